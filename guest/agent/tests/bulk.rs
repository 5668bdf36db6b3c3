//! Much output through the real service: whole, in order, and with little memory. The one test of its process, whose memory
//! it looks at.
#![expect(clippy::unwrap_used, reason = "a test stops, with the line")]

use bothy_guest::agent::{Accepted, server};
use bothy_guest::{Guest, Init};
use bothy_guest_proto::client;
use bothy_guest_proto::v1::{ExecInput, ExecStart, exec_input::Input, exec_output::Output};
use tokio_stream::StreamExt;

/// `seq -f` makes lines of 16 bytes: 100 MiB of them.
const LINES: usize = (100 << 20) / 16;

/// The most memory that this process ever had, in KiB (VmHWM, proc_pid_status(5)).
fn peak() -> usize {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_hundred_mebibytes_arrive_whole_in_order_and_pass_through_little_memory() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let streams = tokio_stream::once(Ok(Accepted::new(theirs))).chain(tokio_stream::pending());
    tokio::spawn(server(Guest::new(Init::foreign(), Vec::new()), streams));
    let mut agent = client(ours).await.unwrap();
    let argv = ["seq", "-f", "%015.0f", "1", &LINES.to_string()].map(str::to_owned).to_vec();
    let start = ExecStart { argv, workdir: "/".into(), ..Default::default() };
    let input = tokio_stream::once(ExecInput { input: Some(Input::Start(start)) });
    let mut output = agent.exec(input.chain(tokio_stream::pending())).await.unwrap().into_inner();

    // A host that is slow at first: what it does not take must wait in the guest's pipe, not in anybody's memory.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let before = peak();
    let (mut lines, mut rest, mut status) = (0, Vec::new(), None);
    while let Some(message) = output.message().await.unwrap() {
        match message.output.unwrap() {
            Output::Started(_) => {}
            Output::Stdout(data) => {
                rest.extend_from_slice(&data);
                let whole = rest.len() - rest.len() % 16;
                for line in rest.drain(..whole).collect::<Vec<_>>().chunks(16) {
                    lines += 1;
                    assert_eq!(line, format!("{lines:015}\n").as_bytes());
                }
            }
            Output::Exited(exited) => status = Some(exited.status),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((lines, rest.len(), status), (LINES, 0, Some(0)));
    // Windows of 1 MiB per stream and 4 MiB per connection, on both sides, and what the allocator keeps.
    // The kernel sums up each thread's share now and then only, so that a later reading may be a little less.
    assert!(peak().saturating_sub(before) < 32 << 10, "{before} KiB grew to {} KiB", peak());
}
