//! The real `bothy-vmm` with a real QEMU, paused before its first instruction: all that a holder does but the guest's part.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod host;

use bothy_contract::Code;
use bothy_vm_agent::vmm::{
    LaunchSpec, Verb,
    holder::Holder,
    launching,
    liveness::{self, Liveness},
    wire::{self, HolderHandle, State},
};
use host::{Host, LONG, UID, gone, pid, program};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use std::{os::unix::fs::MetadataExt, path::PathBuf, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

fn status_field(pid: u32, name: &str) -> String {
    let text = fs_err::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len() + 1..].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether that VMM lives, as the agent sees it.
async fn alive(holder: &Holder, handle: &HolderHandle) -> bool {
    matches!(liveness::look(holder, Some(handle)).await, Liveness::Alive(_))
}

#[tokio::test]
async fn a_holder_keeps_a_vmm_as_the_vms_user_and_records_its_end() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = host.spec();
    let (holder, handle) = host.launch(&spec).await;
    let status = holder.status().await.unwrap();
    assert_eq!(
        (status.vm, status.handle, status.state, status.exit),
        (spec.vm, handle, State::Running, None)
    );
    assert!(!status.control_up && !status.bulk_up);
    assert!(alive(&holder, &handle).await);
    assert_eq!(holder.exit().unwrap(), None);

    // As the VM's user, with nothing beside.
    for process in [handle.holder.pid, handle.vmm.pid] {
        assert_eq!(status_field(process, "Uid:"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(status_field(process, "Gid:"), format!("{UID} {UID} {UID} {UID}"));
        assert_eq!(status_field(process, "Groups:"), "");
        assert_eq!(status_field(process, "NoNewPrivs:"), "1");
        assert!(
            ["CapPrm:", "CapAmb:"].iter().all(|set| status_field(process, set).trim_matches('0').is_empty())
        );
    }
    // A guest can make its holder take so much memory and no more; the VMM itself is not bounded.
    let memory = |process: u32| {
        let limits = fs_err::read_to_string(format!("/proc/{process}/limits")).unwrap();
        let line = limits.lines().find(|l| l.starts_with("Max data size")).unwrap().to_owned();
        line.split_whitespace().nth(3).unwrap().to_owned()
    };
    assert_eq!(memory(handle.holder.pid), (512 << 20).to_string());
    assert_eq!(memory(handle.vmm.pid), memory(std::process::id()));
    // Its socket is for the agent's group, and the directory for nobody else.
    let meta = fs_err::metadata(&spec.dir).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o2770, UID, 0));
    let meta = fs_err::metadata(spec.dir.join(wire::HOLDER_SOCKET)).unwrap();
    assert_eq!((meta.mode() & 0o777, meta.gid()), (0o660, 0));
    // In a session of its own, and not our child.
    assert_eq!(nix::unistd::getsid(Some(pid(handle.holder.pid))).unwrap(), pid(handle.holder.pid));
    assert_ne!(status_field(handle.holder.pid, "PPid:"), std::process::id().to_string());

    let monitor = holder.qmp(&json!({ "execute": "query-status" })).await.unwrap();
    assert_eq!(monitor["status"], "prelaunch");
    let err = holder.qmp(&json!({ "execute": "no-such-command" })).await.unwrap_err();
    assert!(err.message.contains("no-such-command"), "{err}");

    // A second launch in the same place touches nothing.
    let err = Holder::launch(program(), &spec).await.unwrap_err();
    assert_eq!(err.code, Code::AlreadyExists);
    assert!(alive(&holder, &handle).await);

    // The VMM ends as QEMU wants it to; the socket goes with the holder, the record stays.
    holder.perform(&Verb::Qmp(json!({ "execute": "quit" }))).await.unwrap();
    gone(handle).await;
    let exit = holder.exit().unwrap().unwrap();
    assert_eq!((exit.status, exit.signal), (Some(0), None));
    assert!(!alive(&holder, &handle).await);
    assert_eq!(holder.status().await.unwrap_err().code, Code::Unavailable);

    // And again in the same directory: a VM that is started a second time.
    let (holder, handle) = host.launch(&spec).await;
    assert_eq!(holder.exit().unwrap(), None);
    holder.kill(9).await.unwrap();
    gone(handle).await;
    assert_eq!(holder.exit().unwrap().unwrap().signal, Some(9));
}

#[tokio::test]
async fn no_vmm_outlives_its_holder_and_a_holder_outlives_whoever_launched_it() {
    bothy_testkit::require_root!();
    let host = Host::new();
    // An agent in a process group of its own, that is killed with all of the group.
    let spec = host.spec();
    let file = host.dir.path().join("spec.json");
    fs_err::write(&file, serde_json::to_vec(&spec).unwrap()).unwrap();
    launching::prepare(&spec.dir).unwrap();
    let mut agent = tokio::process::Command::new("sh")
        .args(["-c", "\"$0\" launch --parent=$$ < \"$1\"; exec sleep 1000"])
        .arg(program())
        .arg(&file)
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut stdout = agent.stdout.take().unwrap();
    while said.last() != Some(&b'\n') {
        said.push(timeout(LONG, stdout.read_u8()).await.unwrap().unwrap());
    }
    let wire::Launched::Running(wire::Running { handle, .. }) = serde_json::from_slice(&said).unwrap() else {
        panic!("{said:?}")
    };
    host.note(handle);
    kill(Pid::from_raw(-i32::try_from(agent.id().unwrap()).unwrap()), Signal::SIGKILL).unwrap();
    agent.wait().await.unwrap();
    let holder = Holder::new(&spec.dir, UID);
    assert!(alive(&holder, &handle).await);

    kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
    gone(handle).await;
    assert!(!alive(&holder, &handle).await);
    assert_eq!(holder.exit().unwrap(), None, "nobody was there to see it end");
    // Its sockets are still there; they do not stop the next one.
    assert!(spec.dir.join(wire::HOLDER_SOCKET).exists());
    let (_, handle) = host.launch(&spec).await;

    // Told to end, a holder takes its VMM along and says how.
    kill(pid(handle.holder.pid), Signal::SIGTERM).unwrap();
    gone(handle).await;
    assert!(holder.exit().unwrap().is_some());
}

#[tokio::test]
async fn a_vmm_that_does_not_start_is_an_error_with_its_own_words() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = LaunchSpec { argv: vec!["/nonexistent/vmm".into()], ..host.spec() };
    let err = Holder::launch(program(), &spec).await.unwrap_err();
    assert!(err.message.contains("cannot run /nonexistent/vmm: No such file"), "{err}");

    let mut spec = host.spec();
    spec.argv.extend(["-device".into(), "no-such-device".into()]);
    let err = Holder::launch(program(), &spec).await.unwrap_err();
    assert!(err.message.contains("'no-such-device' is not a valid device"), "{err}");
    assert!(!spec.dir.join(wire::HOLDER_SOCKET).exists());

    // A mistaken directory loses nothing.
    let spec = host.spec();
    fs_err::create_dir(&spec.dir).unwrap();
    fs_err::write(spec.dir.join("thesis.txt"), "years of work").unwrap();
    let err = Holder::launch(program(), &spec).await.unwrap_err();
    assert!(err.message.contains("thesis.txt"), "{err}");
    assert!(spec.dir.join("thesis.txt").exists());

    let err = Holder::launch(program(), &LaunchSpec { uid: 0, ..host.spec() }).await.unwrap_err();
    assert_eq!(err.code, Code::InvalidArgument);
    let err = Holder::launch(&PathBuf::from("/nonexistent/bothy-vmm"), &host.spec()).await.unwrap_err();
    assert!(err.hint.is_some());
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_and_callers_that_leave_cost_nothing() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = host.spec();
    let (holder, handle) = host.launch(&spec).await;
    let socket = spec.dir.join(wire::HOLDER_SOCKET);
    for (request, answer) in [
        ("", "ERR not one of"),
        ("HELP", "ERR not one of"),
        ("CONNECT", "ERR `` is not a port"),
        ("CONNECT -1", "ERR `-1` is not a port"),
        ("KILL 9999", "ERR `9999` is not a signal"),
        ("KILL 0; rm", "ERR `0; rm` is not a signal"),
        ("QMP {", "ERR not a JSON command"),
        ("QMP []", "ERR a command is a JSON object"),
        ("API {", "ERR not a request"),
        (r#"API {"method":"GET","path":"/"}"#, "ERR this VMM has a QMP monitor and no API"),
    ] {
        let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).await.unwrap();
        let mut said = String::new();
        timeout(LONG, stream.read_to_string(&mut said)).await.unwrap().unwrap();
        assert!(said.starts_with(answer), "{request}: {said}");
    }
    // Many that wait for a guest that never comes, and go: more than may be open at once.
    for _ in 0..600 {
        let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        stream.write_all(b"CONNECT 1\n").await.unwrap();
    }
    // As soon as the holder has seen them go, one more waits like the first.
    timeout(LONG, async {
        while let Ok(early) = timeout(Duration::from_millis(50), holder.connect(1)).await {
            let err = early.expect_err("there is no guest");
            assert!(err.message.contains("are open already"), "{err}");
        }
    })
    .await
    .unwrap();
    assert!(alive(&holder, &handle).await);

    // Someone else's socket in its place is not talked to.
    let other = Holder::new(&spec.dir, UID + 1);
    let err = other.status().await.unwrap_err();
    assert!(err.message.contains("listens there instead of"), "{err}");
    holder.kill(15).await.unwrap();
    gone(handle).await;
}

#[tokio::test]
async fn a_launch_whose_agent_is_gone_refuses() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = host.spec();
    launching::prepare(&spec.dir).unwrap();
    // The agent holds the lock as one that undoes does, so that the launch waits; meanwhile its parent, the first shell's
    // process group leader, ends.
    let holder = Holder::new(&spec.dir, UID);
    let quiet = holder.quiet().await.unwrap().unwrap();
    let (file, said) = (host.dir.path().join("spec.json"), host.dir.path().join("said"));
    fs_err::write(&file, serde_json::to_vec(&spec).unwrap()).unwrap();
    let parent = tokio::process::Command::new("sh")
        .args(["-c", "\"$0\" launch --parent=$$ < \"$1\" > \"$2\" & exit 0"])
        .args([program(), &file, &said])
        .status();
    assert!(timeout(LONG, parent).await.unwrap().unwrap().success());
    drop(quiet);
    let word = timeout(LONG, async {
        loop {
            if let Ok(word) = serde_json::from_slice(&fs_err::read(&said).unwrap_or_default()) {
                return word;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    let wire::Launched::Failed(err) = word else { panic!("it was launched: {word:?}") };
    assert!(
        err.code == Code::FailedPrecondition && err.message.contains("which asked for it, is gone"),
        "{err}"
    );
    assert!(!spec.dir.exists());
    // Undone before it began: there is no lock file, and it makes none.
    holder.quiet().await.unwrap().unwrap().remove().unwrap();
    let mut late = tokio::process::Command::new(program())
        .args(["launch", &format!("--parent={}", std::process::id())])
        .stdin(fs_err::File::open(&file).unwrap().into_parts().0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(!timeout(LONG, late.wait()).await.unwrap().unwrap().success());
    assert!(!spec.dir.exists() && !launching::lock_path(&spec.dir).exists());
}

/// What the agent's undo does, on a launch that is cut off from its agent at its most awkward moment: after it has begun,
/// before its VMM answers.
#[tokio::test]
async fn an_undo_waits_for_the_launch_under_way_and_leaves_nothing() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let mut spec = host.spec();
    // A VMM that hesitates until it is told to go on: it has begun, and shows that by a file.
    let (begun, go) = (spec.dir.join("vmm.log.begun"), spec.dir.join("vmm.log.go"));
    let wait = r#": > "$0"; until [ -e "$1" ]; do sleep 0.02; done; shift; exec "$@""#;
    let mut argv = vec!["sh".into(), "-c".into(), wait.into()];
    argv.extend([begun.display().to_string(), go.display().to_string()]);
    argv.append(&mut spec.argv);
    spec.argv = argv;
    launching::prepare(&spec.dir).unwrap();
    let file = host.dir.path().join("spec.json");
    fs_err::write(&file, serde_json::to_vec(&spec).unwrap()).unwrap();
    // The agent and its `launch` die together; the holder, in a session of its own, goes on.
    let mut agent = tokio::process::Command::new("sh")
        .args(["-c", "\"$0\" launch --parent=$$ < \"$1\"; exit 0"])
        .arg(program())
        .arg(&file)
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    timeout(LONG, async {
        while !begun.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    kill(Pid::from_raw(-i32::try_from(agent.id().unwrap()).unwrap()), Signal::SIGKILL).unwrap();
    agent.wait().await.unwrap();

    let holder = Holder::new(&spec.dir, UID);
    let undo = async {
        let quiet = holder.quiet().await.unwrap().expect("the launch's lock file");
        let handle = holder.status().await.expect("the holder is found").handle;
        host.note(handle);
        assert!(handle.vmm.is_alive());
        holder.kill(9).await.unwrap();
        gone(handle).await;
        fs_err::remove_dir_all(&spec.dir).unwrap();
        quiet.remove().unwrap();
        handle
    };
    let on = async {
        // The undo is not through, however long the VMM takes.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(spec.dir.exists() && launching::lock_path(&spec.dir).exists());
        fs_err::write(&go, "").unwrap();
    };
    let (handle, ()) = timeout(LONG, async { tokio::join!(undo, on) }).await.unwrap();
    assert!(!handle.holder.is_alive() && !handle.vmm.is_alive());
    assert!(!spec.dir.exists() && !launching::lock_path(&spec.dir).exists());
}
