//! Drives a guest by hand, without the host's services: listens on two unix sockets for the VMM's two virtio-serial
//! ports, boots the guest to its init, waits for a port, runs a command, and powers the machine off.
//!
//! `drive <control.sock> <bulk.sock> <systemd|agent> <port to wait for, or 0> <command...>`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a tool for developers"
)]

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bothy_channel::host::Connector;
use bothy_guest_proto::v1::{
    ExecInput, ExecStart, HealthRequest, Nic, PersonaliseRequest, ShutdownRequest, TimelineRequest,
    WaitServiceRequest, exec_input::Input, exec_output::Output,
};
use bothy_guest_proto::{BULK_PORT, CONTROL_PORT, client};
use tokio::net::UnixListener;
use tokio_stream::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let began = Instant::now();
    let say = |what: &str| println!("{:8.3} {what}", began.elapsed().as_secs_f64());
    let (control, bulk) = (UnixListener::bind(&args[0]).unwrap(), UnixListener::bind(&args[1]).unwrap());
    let control = Connector::new(control.accept().await.unwrap().0);
    let bulk = Connector::new(bulk.accept().await.unwrap().0);
    say("the VMM has connected");
    let mut short = client(control.open(CONTROL_PORT).await.unwrap()).await.unwrap();
    let health = short.health(HealthRequest {}).await.unwrap().into_inner();
    say(&format!("health: {health:?}"));
    let request = PersonaliseRequest {
        hostname: "dev".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        nic: Some(Nic {
            mac: "02:00:0a:4d:00:07".into(),
            address: "10.0.2.15".into(),
            prefix: 24,
            gateway: "10.0.2.2".into(),
            dns: vec!["10.0.2.3".into()],
            ..Default::default()
        }),
        unix_time_us: u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros())
            .unwrap(),
        entropy: (0..64).collect(),
        files: Vec::new(),
        home: "/root".into(),
        init_systemd: args[2] == "systemd",
        ..Default::default()
    };
    short.personalise(request.clone()).await.unwrap();
    say("personalised");
    short.personalise(request).await.unwrap();
    say("and again");
    let port = args[3].parse().unwrap();
    if port != 0 {
        let reply = short
            .wait_service(WaitServiceRequest { port, timeout_ms: 60_000, ..Default::default() })
            .await
            .unwrap()
            .into_inner();
        say(&format!("port {port}: {reply:?}"));
    }
    let mut long = client(bulk.open(BULK_PORT).await.unwrap()).await.unwrap();
    for tty in [false, true] {
        let start = ExecStart { argv: args[4..].to_vec(), tty, ..Default::default() };
        let input = tokio_stream::once(ExecInput { input: Some(Input::Start(start)) });
        let mut output = long.exec(input.chain(tokio_stream::pending())).await.unwrap().into_inner();
        while let Some(message) = output.message().await.unwrap() {
            match message.output.unwrap() {
                Output::Stdout(data) | Output::Stderr(data) => print!("{}", String::from_utf8_lossy(&data)),
                other => say(&format!("{other:?}")),
            }
        }
    }
    for step in short.timeline(TimelineRequest {}).await.unwrap().into_inner().steps {
        say(&format!("{:12} at {:>9} us, took {:>8} us", step.name, step.started_us, step.took_us));
    }
    short.shutdown(ShutdownRequest { reboot: false }).await.unwrap();
    say("shutting down");
    // The agent answers until the machine is off.
    while short.health(HealthRequest {}).await.is_ok() {
        say("still there");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    say("gone");
}
