//! Much through `vm exec`, and a gateway that goes away beneath it.

use bothy_contract::Service;
use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const SIZE: u64 = 100 << 20;

#[test]
fn a_hundred_mebibytes_arrive_whole_and_in_order() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("bulk", &[]);
    let made =
        host.sh("bulk", &format!("head -c {SIZE} /dev/urandom > /root/blob && sha256sum < /root/blob"));
    let expected = made.ok().stdout;
    let received = host.scratch().join("blob");
    let mut command = host.command("bothy");
    command.args(["vm", "exec", "bulk", "--", "cat", "/root/blob"]);
    let mut exec = host.spawn(command.stdout(fs_err::File::create(&received).unwrap().into_parts().0));
    assert!(exec.inner().wait().unwrap().success());
    assert_eq!(fs_err::metadata(&received).unwrap().len(), SIZE);
    let mut sum = Command::new("sha256sum");
    let sum = sum.stdin(fs_err::File::open(&received).unwrap().into_parts().0).output().unwrap();
    assert_eq!(String::from_utf8(sum.stdout).unwrap(), expected);
    host.bothy(["vm", "delete", "bulk", "--force"]).ok();
    host.finish();
}

#[test]
fn an_exec_beneath_which_the_gateway_restarts_ends_cleanly() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("steady", &[]);
    let mut command = host.command("bothy");
    let line = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo $i; done; exit 7";
    command.args(["vm", "exec", "steady", "--", "bash", "-c", line]);
    let mut exec = host.spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut lines = BufReader::new(exec.inner().stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "1");
    host.kill_service(Service::Gateway);
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
    let until = Instant::now() + Duration::from_secs(90);
    let status = loop {
        if let Some(status) = exec.inner().try_wait().unwrap() {
            break status.code();
        }
        assert!(Instant::now() < until, "the exec hangs\n{}", host.logs());
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut said = String::new();
    exec.inner().stderr.take().unwrap().read_to_string(&mut said).unwrap();
    // What has come is in order and without a hole, and either all of it has come or the command says that it has not.
    let numbers: Vec<u64> = reader.join().unwrap().iter().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.iter().zip(2..).all(|(have, want)| *have == want), "{} lines", numbers.len());
    match status {
        Some(7) => assert_eq!(numbers.len(), 99_999),
        other => {
            assert_eq!(other, Some(125), "{said}");
            assert!(!said.is_empty(), "says why");
        }
    }
    // And nothing of it is left in the guest.
    let until = Instant::now() + Duration::from_secs(60);
    while host.sh("steady", "! pgrep -x bash").status != 0 {
        assert!(Instant::now() < until, "the command goes on without its client");
        std::thread::sleep(Duration::from_millis(200));
    }
    host.bothy(["vm", "delete", "steady", "--force"]).ok();
    host.finish();
}
