//! The real gateway and the real command line on a real nats-server. The services behind them are made here, small and
//! on the real bus: these tests are about routing, about who may do what, and about streams that break. What the real
//! services answer is tested end to end elsewhere.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test stops with the line that failed"
)]

mod host;
mod many;

use crate::host::{ALICE, BOB, PATCH, host};
use bothy_contract::{
    Code, Error,
    op::{OpEvent, OpEventKind, OpState},
};
use serde_json::Value;
use std::{os::unix::process::CommandExt, process::Command, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread")]
async fn each_user_sees_and_touches_only_what_is_theirs() {
    bothy_testkit::require_root!();
    let host = host().await;
    let names = |value: Value| {
        let mut names: Vec<_> =
            value.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(host.json(0, &["vm", "list"])), ["cut", "db", "real", "web"]);
    assert_eq!(names(host.json(ALICE, &["vm", "list"])), ["cut", "real", "web"]);
    assert_eq!(names(host.json(BOB, &["vm", "list"])), ["db"]);
    assert_eq!(host.json(ALICE, &["vm", "show", "we"])["name"], "web");
    let dbs = host.vms[1].id.to_string();
    for vm in ["db", &dbs, "d"] {
        assert_eq!(host.code(ALICE, &["vm", "show", vm]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "stop", vm]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "logs", vm]), "not_found");
        for verb in ["start", "restart", "kill", "delete", "stats", "ports", "shell"] {
            assert_eq!(host.code(ALICE, &["vm", verb, vm]), "not_found", "{verb}");
        }
        assert_eq!(host.code(ALICE, &["vm", "set", vm, "--nat", "on"]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "proxy", vm, "22"]), "not_found");
        assert_eq!(host.code(ALICE, &["workspace", "export", vm]), "not_found");
    }
    let op = host.op.to_string();
    assert_eq!(host.json(ALICE, &["op", "show", &op])["id"].as_str().unwrap().replace('-', ""), op);
    assert_eq!(host.code(BOB, &["op", "show", &op]), "not_found");
    assert_eq!(host.code(BOB, &["op", "cancel", &op]), "not_found");
    assert_eq!(host.code(ALICE, &["image", "build"]), "permission_denied");
    assert!(host.changes.lock().unwrap().is_empty(), "no refused change reached a service");
    // The owner is who calls, whatever they say.
    assert_eq!(host.code(BOB, &["vm", "create", "--name", "web"]), "already_exists");
    assert_eq!(*host.changes.lock().unwrap(), [format!("create for {BOB}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_watcher_sees_all_stages_and_the_error_at_the_end() {
    bothy_testkit::require_root!();
    let host = host().await;
    let stage = || "launch_vmm".to_owned();
    let failed = Error::new(Code::StageFailed, "launch_vmm: no memory").hint("ask for less");
    let events = [
        OpEventKind::Accepted { kind: "vm.stop".to_owned(), subject: "web".to_owned() },
        OpEventKind::StageStarted { stage: stage() },
        OpEventKind::StageDone {
            stage: stage(),
            took_us: 12_000,
            note: Some("with \u{1b}[2J in it".to_owned()),
        },
        OpEventKind::Finished { state: OpState::Failed, error: Some(failed), result: None },
    ];
    for (seq, what) in events.into_iter().enumerate() {
        let event = OpEvent { op: host.op, seq: seq as u64, at_us: 1000 * seq as u64, what };
        host.vm_client.publish_op_event(&event).await.unwrap();
    }
    let out = host.run(ALICE, &["vm", "stop", "web"]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(125), "{text}");
    insta::assert_snapshot!(text, @r"
      launch_vmm            12 ms  with \u{1b}[2J in it
    error: launch_vmm: no memory
      hint: ask for less
    ");
    assert_eq!(*host.changes.lock().unwrap(), [format!("stop {}", host.vms[0].id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_that_was_cut_short_is_an_error_and_no_file() {
    bothy_testkit::require_root!();
    let host = host().await;
    let good = host.dir.path().join("good.patch");
    let out = host.run(0, &["workspace", "export", "web", "-o", good.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(fs_err::read(&good).unwrap(), PATCH);
    let bad = host.dir.path().join("bad.patch");
    assert_eq!(host.code(0, &["workspace", "export", "cut", "-o", bad.to_str().unwrap()]), "unavailable");
    assert!(!bad.exists());
    let left: Vec<_> = fs_err::read_dir(host.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".bothy-")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_goes_in() {
    bothy_testkit::require_root!();
    let host = host().await;
    let repo = host.dir.path().join("repo");
    fs_err::create_dir(&repo).unwrap();
    let git = |args: &[&str]| {
        let out = Command::new("git")
            .arg("-C")
            .arg(&repo)
            .args(["-c", "user.name=a", "-c", "user.email=a@b"])
            .args(args)
            .output();
        assert!(out.unwrap().status.success(), "git {args:?}");
    };
    git(&["init", "-q", "-b", "main"]);
    git(&["commit", "-q", "--allow-empty", "-m", "start"]);
    let report = host.json(0, &["workspace", "prepare", "web", repo.to_str().unwrap()]);
    assert!(report["bytes"].as_u64().unwrap() > 1000, "{report}");
    assert_eq!(
        host.code(0, &["workspace", "prepare", "web", host.dir.path().to_str().unwrap()]),
        "failed_precondition"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_raw_bytes_both_ways() {
    bothy_testkit::require_root!();
    let host = host().await;
    let mut stream = tokio::net::UnixStream::connect(&host.socket).await.unwrap();
    let head = "GET /v1/vms/web/channel/2 HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: bothy-channel\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
    let sent: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_be_bytes).collect();
    let (mut read, mut write) = stream.into_split();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    writer.await.unwrap();
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_opens_connections_without_end_harms_only_themselves() {
    bothy_testkit::require_root!();
    let host = host().await;
    // Held by a process of that user, each with half a request on it.
    let flood = "use Socket; $SIG{PIPE} = 'IGNORE'; my @s; \
                 for (1..400) { socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; \
                 connect($s, pack_sockaddr_un($ARGV[0])) or die; syswrite($s, 'GET /v1/ver'); push @s, $s } \
                 $| = 1; print qq(open\\n); <STDIN>";
    let mut flood = Command::new("perl")
        .args(["-e", flood])
        .arg(&host.socket)
        .uid(ALICE)
        .gid(ALICE)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 5];
    std::io::Read::read_exact(flood.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"open\n");
    let refused = host.run(ALICE, &["vm", "list"]);
    assert!(!refused.status.success());
    assert!(host.run(BOB, &["vm", "list"]).status.success());
    assert!(host.run(0, &["vm", "list"]).status.success());
    drop(flood.stdin.take());
    assert!(flood.wait().unwrap().success());
    for _ in 0..500 {
        if host.run(ALICE, &["vm", "list"]).status.success() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the places were not given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_says_nothing_is_left_on_request() {
    bothy_testkit::require_root!();
    let host = host().await;
    let asked = format!("channel of {}", host.vms[2].id);
    for signal in ["-INT", "-TERM", "-HUP"] {
        host.changes.lock().unwrap().clear();
        let child = Command::new(&host.bothy)
            .arg("--socket")
            .arg(&host.socket)
            .args(["vm", "exec", "cut", "--", "true"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        host.until(|| host.changes.lock().unwrap().contains(&asked)).await;
        // It catches signals from a moment after that on; before, a signal ends it as it ends any process.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap().success());
        let out = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap());
        let out = tokio::time::timeout(Duration::from_secs(30), out).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(text.contains("no longer waiting") && out.status.code() == Some(130), "{signal}: {text}");
    }
}
