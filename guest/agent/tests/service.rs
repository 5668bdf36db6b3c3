//! The real gRPC service over an in-memory stream, running real processes on this machine.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests stop the test, with the line")]

use std::time::{Duration, Instant};

use bothy_guest::agent::{Accepted, server};
use bothy_guest::{Guest, Init};
use bothy_guest_proto::v1::{
    self, ExecExited, ExecFailed, ExecInput, ExecOutput, ExecStart, TarChunk, WindowSize, exec_input::Input,
    exec_output::Output,
};
use bothy_guest_proto::{GuestClient, client};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

async fn agent() -> GuestClient {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let streams = tokio_stream::once(Ok(Accepted::new(theirs))).chain(tokio_stream::pending());
    tokio::spawn(server(Guest::new(Init::foreign(), Vec::new()), streams));
    client(ours).await.unwrap()
}

/// One Exec, as a host sees it.
struct Session {
    input: Option<mpsc::Sender<ExecInput>>,
    output: Streaming<ExecOutput>,
}

#[derive(Debug, Default)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exited: Option<ExecExited>,
    failed: Option<ExecFailed>,
}

impl Session {
    async fn begin(agent: &mut GuestClient, start: ExecStart) -> Self {
        let (input, queue) = mpsc::channel(4);
        input.send(ExecInput { input: Some(Input::Start(start)) }).await.unwrap();
        let output = agent.exec(ReceiverStream::new(queue)).await.unwrap().into_inner();
        Self { input: Some(input), output }
    }

    async fn send(&self, input: Input) {
        self.input.as_ref().unwrap().send(ExecInput { input: Some(input) }).await.unwrap();
    }

    async fn pid(&mut self) -> i32 {
        match self.output.message().await.unwrap().unwrap().output.unwrap() {
            Output::Started(started) => i32::try_from(started.pid).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Reads until `text` has come.
    async fn expect(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.output.message().await.unwrap().unwrap().output.unwrap() {
                Output::Stdout(data) => seen.push_str(&String::from_utf8_lossy(&data)),
                Output::Started(_) => {}
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    async fn end(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(message) = self.output.message().await.unwrap() {
            assert!(outcome.exited.is_none() && outcome.failed.is_none(), "nothing follows the last message");
            match message.output.unwrap() {
                Output::Started(_) => {}
                Output::Stdout(data) => outcome.stdout.extend(data),
                Output::Stderr(data) => outcome.stderr.extend(data),
                Output::Exited(exited) => outcome.exited = Some(exited),
                Output::Failed(failed) => outcome.failed = Some(failed),
            }
        }
        outcome
    }
}

fn command(argv: &[&str]) -> ExecStart {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    ExecStart { argv, workdir: "/".into(), ..Default::default() }
}

fn sh(script: &str) -> ExecStart {
    command(&["sh", "-c", script])
}

async fn run(start: ExecStart) -> Outcome {
    let mut session = Session::begin(&mut agent().await, start).await;
    session.input = None;
    session.end().await
}

#[tokio::test]
async fn output_is_kept_apart_and_the_exit_status_is_exact() {
    let outcome = run(sh("echo out; echo err >&2; exit 42")).await;
    assert_eq!((outcome.stdout.as_slice(), outcome.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(outcome.exited, Some(ExecExited { status: 42, signal: 0 }));
    let killed = run(sh("kill -9 $$")).await;
    assert_eq!(killed.exited, Some(ExecExited { status: 137, signal: 9 }));
}

#[tokio::test]
async fn much_output_arrives_whole_and_in_order() {
    let outcome = run(sh("seq 1 400000; seq 1 1000 >&2")).await;
    let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
    assert!(outcome.stdout == expected.as_bytes(), "{} bytes of {}", outcome.stdout.len(), expected.len());
    assert_eq!(outcome.stderr.len(), 3893);
}

#[tokio::test]
async fn stdin_flows_until_its_end() {
    let mut agent = agent().await;
    let mut session = Session::begin(&mut agent, command(&["sha256sum"])).await;
    session.pid().await;
    for _ in 0..32 {
        session.send(Input::Stdin(vec![b'x'; 65536])).await;
    }
    session.send(Input::StdinEof(true)).await;
    let outcome = session.end().await;
    // sha256 of 2 MiB of `x`.
    let expected = run(sh("head -c 2097152 /dev/zero | tr '\\0' x | sha256sum")).await;
    assert_eq!(outcome.stdout, expected.stdout);
    assert_eq!(outcome.exited.unwrap().status, 0);
}

#[tokio::test]
async fn a_command_that_does_not_read_its_input_ends_all_the_same() {
    let mut agent = agent().await;
    let mut session = Session::begin(&mut agent, sh("exec <&-; sleep 0.2; echo done")).await;
    session.pid().await;
    let input = session.input.take().unwrap();
    let feeder = tokio::spawn(async move {
        while input.send(ExecInput { input: Some(Input::Stdin(vec![0; 65536])) }).await.is_ok() {}
    });
    assert_eq!(session.end().await.stdout, b"done\n");
    feeder.await.unwrap();
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    for (start, errno) in [
        (command(&["no-such-command-anywhere"]), 2),
        (command(&["/etc/passwd"]), 13),
        (command(&["/"]), 13),
        (command(&["/no/such"]), 2),
        (ExecStart { workdir: "/no/such".into(), ..sh("true") }, 2),
        (ExecStart { user: "no-such-user".into(), ..sh("true") }, 22),
    ] {
        let outcome = run(start.clone()).await;
        let failed = outcome.failed.unwrap_or_else(|| panic!("{start:?} started"));
        assert_eq!(failed.errno, errno, "{}", failed.message);
        assert!(outcome.exited.is_none());
    }
}

#[tokio::test]
async fn a_command_is_its_user_with_its_environment() {
    let start = ExecStart {
        user: "4321".into(),
        env: [("EXTRA".to_owned(), "a b".to_owned())].into(),
        ..sh("id -u; id -G; echo \"$HOME|$USER|$EXTRA|$LANG\"; pwd; env | grep -c CARGO")
    };
    let text = String::from_utf8(run(start).await.stdout).unwrap();
    assert_eq!(text, "4321\n0\n/|4321|a b|C.UTF-8\n/\n0\n");
}

#[tokio::test]
async fn a_terminal_is_a_real_one() {
    let mut agent = agent().await;
    let start = ExecStart {
        tty: true,
        window: Some(WindowSize { rows: 33, cols: 101 }),
        term: "xterm-256color".into(),
        ..sh(
            "tty -s && stty size; echo $TERM; trap 'stty size; exit 7' WINCH; echo up; while :; do sleep 0.05; done",
        )
    };
    let mut session = Session::begin(&mut agent, start).await;
    session.expect("33 101\r\nxterm-256color\r\nup").await;
    session.send(Input::Resize(WindowSize { rows: 50, cols: 80 })).await;
    let outcome = session.end().await;
    assert!(String::from_utf8_lossy(&outcome.stdout).contains("50 80"), "{outcome:?}");
    assert_eq!(outcome.exited.unwrap().status, 7);
}

#[tokio::test]
async fn control_c_and_end_of_file_work_on_a_terminal() {
    let mut agent = agent().await;
    let mut session =
        Session::begin(&mut agent, ExecStart { tty: true, ..sh("echo up; exec sleep 100") }).await;
    session.expect("up").await;
    session.send(Input::Stdin(vec![3])).await;
    assert_eq!(session.end().await.exited.unwrap().signal, 2);

    let session = Session::begin(&mut agent, ExecStart { tty: true, ..command(&["cat"]) }).await;
    session.send(Input::Stdin(b"line\n".to_vec())).await;
    session.send(Input::StdinEof(true)).await;
    let outcome = session.end().await;
    assert_eq!((outcome.stdout.as_slice(), outcome.exited.unwrap().status), (&b"line\r\nline\r\n"[..], 0));
}

#[tokio::test]
async fn signals_reach_the_whole_group() {
    let mut agent = agent().await;
    let script = "trap 'echo got; exit 3' USR1; echo up; while :; do sleep 0.05; done";
    let mut session = Session::begin(&mut agent, sh(script)).await;
    session.expect("up").await;
    session.send(Input::Signal(999)).await;
    session.send(Input::Signal(10)).await;
    let outcome = session.end().await;
    assert_eq!((outcome.stdout.as_slice(), outcome.exited.unwrap().status), (&b"got\n"[..], 3));
}

#[tokio::test]
async fn signals_reach_the_job_in_the_foreground_of_a_terminal_and_not_its_shell() {
    let mut agent = agent().await;
    let script = "set -m; sh -c 'echo first; exec sleep 1000'; echo job $?; \
                  sh -c 'echo pid $$ up; exec sleep 1000'; echo never";
    let start = ExecStart { tty: true, ..command(&["bash", "-c", script]) };
    let mut session = Session::begin(&mut agent, start).await;
    let shell = session.pid().await;
    session.expect("first").await;
    session.send(Input::Signal(15)).await;
    let seen = session.expect(" up").await;
    assert!(seen.contains("job 143") && alive(shell), "{seen:?}");
    let job: i32 = seen.split("pid ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(alive(job) && job != shell);
    // The host leaves while the second job is in the foreground.
    drop(session);
    drop(agent);
    gone(shell).await;
    gone(job).await;
}

/// Waits until there is no such process, not even one that nobody has reaped.
async fn gone(pid: i32) {
    let patience = Instant::now() + Duration::from_secs(30);
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < patience, "process {pid} is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn many_commands_run_at_once() {
    let agent = agent().await;
    let runs = (0..64).map(|n| {
        let mut agent = agent.clone();
        async move {
            let start =
                ExecStart { tty: n % 8 == 0, ..sh(&format!("echo {n}; read line; echo $line; exit {n}")) };
            let session = Session::begin(&mut agent, start).await;
            // None ends before all have begun.
            (n, session)
        }
    });
    for (n, mut session) in futures::future::join_all(runs).await {
        session.expect(&format!("{n}")).await;
        session.send(Input::Stdin(format!("<{n}>\n").into_bytes())).await;
        let outcome = session.end().await;
        assert!(String::from_utf8_lossy(&outcome.stdout).contains(&format!("<{n}>")), "{n}: {outcome:?}");
        assert_eq!(outcome.exited.unwrap().status, n);
    }
}

#[tokio::test]
async fn a_background_child_does_not_hold_the_exec() {
    let outcome = run(sh("sleep 60 & echo $!")).await;
    assert_eq!(outcome.exited.unwrap().status, 0);
    let pid: i32 = String::from_utf8(outcome.stdout).unwrap().trim().parse().unwrap();
    assert!(alive(pid), "and is left alone");
    bothy_guest::sys::kill(pid, 9).unwrap();
    // One that never stops writing does not either.
    let outcome = run(sh("yes & echo $! >&2")).await;
    let pid: i32 = String::from_utf8(outcome.stderr).unwrap().lines().next().unwrap().trim().parse().unwrap();
    let _ = bothy_guest::sys::kill(pid, 9);
    assert_eq!(outcome.exited.unwrap().status, 0);
}

fn alive(pid: i32) -> bool {
    let state = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok();
    state.is_some_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

#[tokio::test]
async fn a_host_that_goes_away_takes_its_command_with_it() {
    for script in ["echo up; sleep 1000", "trap '' HUP; echo up; while :; do sleep 1; done"] {
        let mut agent = agent().await;
        let mut session = Session::begin(&mut agent, sh(script)).await;
        let pid = session.pid().await;
        session.expect("up").await;
        assert!(alive(pid));
        drop(session);
        drop(agent);
        gone(pid).await;
    }
}

#[tokio::test]
async fn who_is_left_of_the_group_goes_with_its_command() {
    let mut agent = agent().await;
    let script = "sh -c 'trap \"\" HUP; echo $$ up; while :; do sleep 1; done' & wait";
    let mut session = Session::begin(&mut agent, sh(script)).await;
    let command = session.pid().await;
    let seen = session.expect("up").await;
    let child: i32 = seen.split(' ').next().unwrap().parse().unwrap();
    assert!(alive(child) && child != command);
    drop(session);
    drop(agent);
    gone(command).await;
    let patience = Instant::now() + Duration::from_secs(30);
    // An orphan: whose zombie it is, is not ours to say.
    while alive(child) {
        assert!(Instant::now() < patience, "the child lives on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn metrics_disks_and_services() {
    let mut agent = agent().await;
    let told = agent.metrics(v1::MetricsRequest {}).await.unwrap().into_inner();
    assert!(told.memory_total > told.memory_available && told.root_size > told.root_used, "{told:?}");
    // This machine has none of our disks.
    let grown = agent.grow_disks(v1::GrowDisksRequest::default()).await.unwrap().into_inner();
    assert_eq!((grown.work_bytes, grown.system_bytes), (0, 0));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let wait = |port, unit: &str, timeout_ms| v1::WaitServiceRequest { port, unit: unit.into(), timeout_ms };
    let up = agent.wait_service(wait(port, "", 30_000)).await.unwrap().into_inner();
    assert!(up.ready && up.why.is_empty(), "{up:?}");
    drop(listener);
    let down = agent.wait_service(wait(port, "", 1)).await.unwrap().into_inner();
    assert!(!down.ready && down.why.contains(&port.to_string()) && down.log.is_empty(), "{down:?}");
    for (bad, code) in [
        (wait(0, "", 1), tonic::Code::InvalidArgument),
        (wait(70_000, "", 1), tonic::Code::InvalidArgument),
        (wait(0, "-x.service", 1), tonic::Code::InvalidArgument),
        (wait(port, "../x.service", 1), tonic::Code::InvalidArgument),
        // PID 1 of this machine is not the guest's systemd.
        (wait(0, "ssh.service", 1), tonic::Code::FailedPrecondition),
    ] {
        assert_eq!(agent.wait_service(bad.clone()).await.unwrap_err().code(), code, "{bad:?}");
    }
}

#[tokio::test]
async fn trees_go_in_and_out() {
    let mut agent = agent().await;
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let script =
        format!("cd {}; mkdir a; seq 1 100000 > a/b; ln -s b a/c; chmod 750 a/b", from.path().display());
    assert_eq!(run(sh(&script)).await.exited.unwrap().status, 0);
    let request = v1::GetTarRequest { path: from.path().to_str().unwrap().into() };
    let mut stream = agent.get_tar(request).await.unwrap().into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        chunks.push(chunk);
    }
    let first = TarChunk { dir: to.path().join("deep").to_str().unwrap().into(), data: Vec::new() };
    let reply =
        agent.put_tar(tokio_stream::iter(std::iter::once(first).chain(chunks))).await.unwrap().into_inner();
    assert_eq!((reply.entries, reply.bytes), (4, 588_895));
    let script = format!(
        "diff -r {} {}/deep && stat -c %a {1}/deep/a/b && readlink {1}/deep/a/c",
        from.path().display(),
        to.path().display()
    );
    assert_eq!(run(sh(&script)).await.stdout, b"750\nb\n");

    let missing = agent.get_tar(v1::GetTarRequest { path: "/no/such".into() }).await.unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);
    let relative =
        agent.put_tar(tokio_stream::once(TarChunk { dir: "tmp".into(), data: vec![] })).await.unwrap_err();
    assert_eq!(relative.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn files_ports_and_forwarding() {
    let mut agent = agent().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys/authorized").to_str().unwrap().to_owned();
    let file = v1::File { path: path.clone(), content: b"key\n".to_vec(), mode: 0o600 };
    agent.write_files(v1::WriteFilesRequest { files: vec![file.clone()], below_home: false }).await.unwrap();
    assert_eq!(run(sh(&format!("stat -c %a {path}; cat {path}"))).await.stdout, b"600\nkey\n");
    let bad = v1::File { path: "relative".into(), ..file.clone() };
    let other = v1::File { path: format!("{path}.2"), ..file };
    agent
        .write_files(v1::WriteFilesRequest { files: vec![other, bad], below_home: false })
        .await
        .unwrap_err();
    assert!(!std::path::Path::new(&format!("{path}.2")).exists(), "bad input changes nothing");

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let listed = agent.ports(v1::PortsRequest {}).await.unwrap().into_inner().ports;
    assert!(listed.iter().any(|found| found.port == port && found.pid == std::process::id()));
    let wait = v1::WaitServiceRequest { port, timeout_ms: 5000, ..Default::default() };
    assert!(agent.wait_service(wait).await.unwrap().into_inner().ready);
    // The connection that the wait made.
    listener.accept().await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let chunks = [(port, b"abc".to_vec()), (0, vec![b'x'; 300_000])];
    let chunks = chunks.map(|(port, data)| v1::ForwardChunk { port, data });
    let mut stream = agent.forward(tokio_stream::iter(chunks)).await.unwrap().into_inner();
    let mut echoed = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        echoed.extend(chunk.data);
    }
    assert!(echoed.len() == 300_003 && echoed.starts_with(b"abcx"));
    let closed =
        agent.forward(tokio_stream::once(v1::ForwardChunk { port, data: vec![] })).await.unwrap_err();
    assert_eq!(closed.code(), tonic::Code::Unavailable);
    let nonsense = v1::WaitServiceRequest { port: 70_000, timeout_ms: 1, ..Default::default() };
    let nonsense = agent.wait_service(nonsense).await.unwrap_err();
    assert_eq!(nonsense.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn nothing_runs_before_the_machine_has_its_identity() {
    let (link, mut pid1) = tokio::net::UnixStream::pair().unwrap();
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let streams = tokio_stream::once(Ok(Accepted::new(theirs))).chain(tokio_stream::pending());
    tokio::spawn(server(Guest::new(Init::waiting(link), Vec::new()), streams));
    let mut agent = client(ours).await.unwrap();
    let health = agent.health(v1::HealthRequest {}).await.unwrap().into_inner();
    assert!(!health.personalised && !health.init_started && health.uptime_us > 0);
    let start = ExecInput { input: Some(Input::Start(sh("true"))) };
    assert_eq!(
        agent.exec(tokio_stream::once(start)).await.unwrap_err().code(),
        tonic::Code::FailedPrecondition
    );
    // A bad identity is refused before PID 1 hears of anything.
    let bad = v1::PersonaliseRequest { hostname: "no dots.allowed".into(), ..Default::default() };
    assert_eq!(agent.personalise(bad).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    // Shutdown reaches PID 1 even now.
    agent.shutdown(v1::ShutdownRequest { reboot: false }).await.unwrap();
    let mut byte = [0];
    tokio::io::AsyncReadExt::read_exact(&mut pid1, &mut byte).await.unwrap();
    assert_eq!(byte, *b"p");
}
