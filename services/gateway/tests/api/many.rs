//! Many machines per command, what they use and say, and what becomes of a command that is interrupted.

use crate::host::{ALICE, BOB, end, host};
use bothy_contract::VmId;
use serde_json::Value;
use std::{process::Command, sync::atomic::Ordering, time::Duration};

#[tokio::test(flavor = "multi_thread")]
async fn several_machines_are_resolved_once_and_each_is_told_of() {
    bothy_testkit::require_root!();
    let host = host().await;
    let before = host.lists.load(Ordering::Relaxed);
    let id = host.vms[0].id.to_string();
    let out = host.run(ALICE, &["vm", "kill", "web", "nope", "cu", "db", &id, "web", "--signal", "term"]);
    assert_eq!(host.lists.load(Ordering::Relaxed) - before, 1);
    insta::assert_snapshot!(format!("{:?}\n{}", out.status.code(), String::from_utf8_lossy(&out.stderr)), @r#"
    Some(125)
    error: there is no VM "nope"
      hint: `bothy vm list` shows the VMs
    error: there is no VM "db"
      hint: `bothy vm list` shows the VMs
    "#);
    let text = String::from_utf8(out.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["cut is killed (5 ms)", "web is killed (5 ms)"]);
    let mut changes: Vec<_> = host.changes.lock().unwrap().iter().map(|c| host.name_ids(c)).collect();
    changes.sort();
    assert_eq!(changes, ["kill cut 15", "kill web 15"]);

    // As JSON: a document for each that was done, and one for each that failed.
    let out = host.run(ALICE, &["--json", "vm", "restart", "web", "nope"]);
    let done: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(done["vm"]["name"] == "web" && done["took_us"] == 5000, "{done}");
    let text = String::from_utf8(out.stderr).unwrap();
    let failed: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(failed["vm"] == "nope" && failed["error"]["code"] == "not_found", "{failed}");
    assert!(host.changes.lock().unwrap().last().unwrap().ends_with(" 10000"), "the default grace");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_means_the_callers_own_and_a_delete_of_all_is_confirmed() {
    bothy_testkit::require_root!();
    let host = host().await;
    assert_eq!(host.code(ALICE, &["vm", "delete", "--all"]), "failed_precondition");
    assert!(host.changes.lock().unwrap().is_empty());
    let out = host.run(0, &["vm", "delete", "--all", "--force"]);
    assert!(out.status.success() && out.stdout.is_empty(), "root has none of their own: {out:?}");
    assert!(host.run(BOB, &["vm", "delete", "--all", "--force"]).status.success());
    assert_eq!(*host.changes.lock().unwrap(), [format!("delete {} true", host.vms[1].id)]);
    // None of them is stopped, so none is pruned.
    let out = host.run(ALICE, &["vm", "prune", "--yes"]);
    assert!(out.status.success() && out.stdout.is_empty(), "{out:?}");
    assert_eq!(host.changes.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_cannot_become_is_refused_before_a_service_is_asked() {
    bothy_testkit::require_root!();
    let host = host().await;
    let out = host.run(ALICE, &["vm", "set", "web", "--disk", "1G"]);
    insta::assert_snapshot!(String::from_utf8_lossy(&out.stderr), @r"
    error: the work disk of web has 10240 MiB and cannot be made smaller, to 1024 MiB
      hint: disks only grow; a new VM can have a smaller one
    ");
    let (status, error) = host.raw("PATCH", "/v1/vms/web", r#"{"work_mib":1024}"#).await;
    assert!(status == 400 && error["code"] == "invalid_argument", "{error}");
    let (status, _) = host.raw("PATCH", "/v1/vms/web", "{}").await;
    assert_eq!(status, 400);
    assert!(host.changes.lock().unwrap().is_empty());
    let (status, begun) = host.raw("PATCH", "/v1/vms/we", r#"{"memory_mib":2048}"#).await;
    assert!(status == 202 && begun["op"].is_string(), "{begun}");
    assert_eq!(*host.changes.lock().unwrap(), [format!("set {} Some(2048)", host.vms[0].id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_of_what_is_named_or_of_all_that_run() {
    bothy_testkit::require_root!();
    let host = host().await;
    let (_, all) = host.raw("GET", "/v1/stats", "").await;
    assert_eq!(all["stats"].as_array().unwrap().len(), 4);
    let gone = VmId::new();
    let (_, some) = host.raw("GET", &format!("/v1/stats?vm=db&vm=we&vm=web&vm={gone}"), "").await;
    assert_eq!(some["stats"].as_array().unwrap().len(), 2, "{some}");
    assert_eq!(host.raw("GET", "/v1/stats?vm=nope", "").await.0, 404);
    assert_eq!(host.raw("GET", "/v1/stats?name=web", "").await.0, 400);
    let out = host.run(BOB, &["vm", "stats"]);
    insta::assert_snapshot!(String::from_utf8_lossy(&out.stdout), @r"
    NAME  CPU %    MEMORY  WORK DISK  SYSTEM DISK  NET IN  NET OUT     UPTIME
    db     12.5  64.0 MiB          -            -       -        -  1 min 1 s
    ");
    let row = host.json(BOB, &["vm", "stats", "db"]);
    assert!(row["name"] == "db" && row["cpu_us"] == 1_000_000, "{row}");
    let ports = host.json(BOB, &["vm", "ports", "db"]);
    assert!(ports["host"] == "db.vm" && ports["ports"][0]["port"] == 22, "{ports}");
    // The reader of what never ends may leave.
    let script = format!(
        "{} --socket {} --json vm stats --watch | head -n 1",
        host.bothy.display(),
        host.socket.display()
    );
    let mut shell = Command::new("bash");
    shell.args(["-c", &script]).stdout(std::process::Stdio::piped());
    let (status, text, _) = end(shell.spawn().unwrap()).await;
    assert!(status == Some(0) && text.contains("cpu_percent"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_of_a_log() {
    bothy_testkit::require_root!();
    let host = host().await;
    let tail = |args: &[&str]| {
        let args: Vec<_> = ["vm", "logs", "web"].iter().chain(args).copied().collect();
        String::from_utf8(host.run(ALICE, &args).stdout).unwrap()
    };
    assert_eq!(tail(&[]).lines().count(), 1000);
    assert_eq!(tail(&["--tail", "2"]), "line 998\nline 999\n");
    assert_eq!(tail(&["-n", "2", "--follow"]), "line 998\nline 999\n");
    assert_eq!(tail(&["-n", "0"]), "");
    assert_eq!(tail(&["-n", "5000"]).lines().count(), 1000);
    assert_eq!(host.code(ALICE, &["vm", "logs", "web", "-n", "100001"]), "invalid_argument");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_cancels_what_can_be_cancelled_and_leaves_the_rest() {
    bothy_testkit::require_root!();
    let host = host().await;
    let interrupt = async |args: &[&str], begun: &str| {
        let child = host.spawn(args);
        host.until(|| host.changes.lock().unwrap().iter().any(|c| c.starts_with(begun))).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let (status, _, text) = end(child).await;
        (status, text)
    };
    let (status, text) = interrupt(&["vm", "stop", "web"], "stop").await;
    assert_eq!(status, Some(130), "{text}");
    insta::assert_snapshot!(text.replace(&host.op.to_string(), "[OP]"), @r"
    error: no longer waiting for operation [OP], which cannot be cancelled and goes on
      hint: `bothy op show --watch [OP]` shows how it goes
    ");
    let (status, text) = interrupt(&["vm", "create", "--name", "slow"], "create").await;
    assert_eq!(status, Some(130), "{text}");
    insta::assert_snapshot!(text, @r"
    cancelling; what was done is being undone (Ctrl-C again to leave it to that)
    error: cancelled; what was done is undone
    ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_s_output_arrives_whole_and_its_end_is_never_made_up() {
    bothy_testkit::require_root!();
    let mut host = host().await;
    // 100 MiB of which every byte has its place, through the command line, the gateway and a guest's real agent.
    let out =
        host.run(0, &["vm", "exec", "real", "--", "sh", "-c", "seq 1 15000000 | head -c 104857600; exit 7"]);
    assert_eq!(out.status.code(), Some(7), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.stdout.len(), 100 << 20);
    let mut at = 0;
    for n in 1.. {
        let line = format!("{n}\n");
        let rest = &out.stdout[at..];
        if rest.len() < line.len() {
            assert!(line.as_bytes().starts_with(rest));
            break;
        }
        assert!(rest.starts_with(line.as_bytes()), "line {n}");
        at += line.len();
    }
    // A signal reaches a command that does not read its stdin, however much of that waits.
    let mut child = host.spawn(&[
        "vm",
        "exec",
        "-i",
        "real",
        "--",
        "sh",
        "-c",
        "trap 'exit 9' INT; echo up; while :; do sleep 0.1; done",
    ]);
    let mut stdin = child.stdin.take().unwrap();
    let filler = std::thread::spawn(move || {
        let _ = std::io::Write::write_all(&mut stdin, &[0; 300 << 10]);
        stdin
    });
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let (status, _, text) = end(child).await;
    assert_eq!(status, Some(9), "{text}");
    drop(filler.join());
    // The gateway dies while a command runs: an error, and neither silence nor a success.
    let mut child = host.spawn(&["vm", "exec", "real", "--", "sh", "-c", "echo up; sleep 600"]);
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    host.gateway.inner().kill().unwrap();
    let (status, _, text) = end(child).await;
    assert_eq!(status, Some(125), "{text}");
    assert!(text.contains("the guest of real broke off") && text.contains("may still run"), "{text}");
    // A new one serves the next.
    let config = host.dir.path().join("bothy.toml");
    let gateway =
        Command::new(env!("CARGO_BIN_EXE_bothy-gateway")).env("BOTHY_CONFIG", &config).spawn().unwrap();
    host.gateway = bothy_testkit::ChildGuard::new(gateway);
    host.until(|| host.run(0, &["vm", "list"]).status.success()).await;
    assert_eq!(host.run(0, &["vm", "exec", "real", "--", "sh", "-c", "exit 3"]).status.code(), Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_reaches_is_changed_shown_and_hinted_at() {
    bothy_testkit::require_root!();
    let host = host().await;
    let changes = || -> Vec<_> {
        let mut changes = host.changes.lock().unwrap();
        changes.drain(..).map(|c| host.name_ids(&c)).collect()
    };
    for (args, noted) in [
        (&["egress", "web", "allow", "B.c.", "*.d.e,b.c"][..], "set web None allow *.d.e, b.c"),
        (&["egress", "web", "open"], "set web None open"),
        (&["set", "web", "--egress", "none", "--publish", "8080:80"], "set web None none 127.0.0.1:8080:80"),
    ] {
        let args: Vec<_> = ["vm"].iter().chain(args).copied().collect();
        let out = host.run(ALICE, &args);
        assert!(out.status.success(), "{out:?}");
        assert_eq!(changes(), [noted]);
    }
    assert_eq!(host.code(ALICE, &["vm", "set", "web", "--unpublish", "8080"]), "not_found");
    assert_eq!(host.code(BOB, &["vm", "egress", "web"]), "not_found");
    assert_eq!(host.code(BOB, &["vm", "egress", "web", "open"]), "not_found");
    assert!(changes().is_empty());
    let report = host.json(ALICE, &["vm", "egress", "web"]);
    assert_eq!(report["policy"]["names"][0], "a.b");
    assert_eq!(report["denied"][0]["count"], 2);
    assert_eq!(report["command"], "bothy vm egress web allow new.test old.test");
    changes();
    // Only what was denied while the command ran is told, and nobody asks after a success.
    let out = host.run(ALICE, &["vm", "exec", "real", "--", "false"]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(text, "real was denied new.test; `bothy vm egress real allow new.test` allows it\n");
    assert_eq!(changes(), ["channel of real", "egress of real"]);
    let out = host.run(ALICE, &["vm", "exec", "real", "--", "true"]);
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    assert_eq!(changes(), ["channel of real"]);
}
