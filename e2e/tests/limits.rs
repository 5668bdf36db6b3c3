//! What is bounded: memory that the host does not have, VMs that nobody uses, logs that a guest fills.

use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use std::{
    process::Stdio,
    time::{Duration, Instant},
};

#[test]
fn a_vm_that_the_hosts_memory_does_not_hold_is_refused_before_anything_is_made() {
    require_root!();
    // The host keeps more than it has, so nothing fits.
    let host = Host::start_quick(|config| config.vm.memory_reserve_mib = 1 << 30);
    let refused = host.bothy(["vm", "create", "--image", "quick", "--name", "much"]);
    assert_ne!(refused.status, 0, "{refused:?}");
    assert!(refused.stderr.contains("memory") && refused.stderr.contains("--force"), "{}", refused.stderr);
    assert_eq!(host.bothy(["vm", "list", "--json"]).json().as_array().unwrap().len(), 0);
    assert_eq!(host.bothy(["op", "list", "--json"]).json().as_array().unwrap().len(), 0, "nothing was begun");
    host.assert_no_leaks();

    host.create_quick("much", &["--force"]);
    host.sh("much", "true").ok();
    // A start is a new question.
    host.bothy(["vm", "stop", "much"]).ok();
    assert_ne!(host.bothy(["vm", "start", "much"]).status, 0);
    assert_eq!(host.show("much")["state"], "stopped");
    host.bothy(["vm", "start", "much", "--force"]).ok();
    host.bothy(["vm", "delete", "much", "--force"]).ok();
    host.finish();
}

#[test]
fn a_vm_that_nobody_uses_is_stopped_and_one_in_use_is_not() {
    require_root!();
    let host = Host::start_quick(|config| config.vm.auto_stop_stale_after_s = 6);
    host.create_quick("idle", &[]);
    let mut command = host.command("bothy");
    command.args(["vm", "exec", "idle", "--", "sleep", "1000"]).stdout(Stdio::null()).stderr(Stdio::null());
    let session = host.spawn(&mut command);
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        let vm = host.show("idle");
        assert_eq!(vm["state"], "running", "somebody is in it: {vm:#}");
        std::thread::sleep(Duration::from_millis(500));
    }
    drop(session);
    let vm = host.await_vm("idle", "nobody uses it", |vm| vm["state"] == "stopped");
    assert!(vm["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "says why: {vm:#}");
    host.bothy(["vm", "delete", "idle"]).ok();
    host.finish();
}

#[test]
fn logs_are_bounded_and_keep_their_end() {
    require_root!();
    let host = Host::start_quick(|_| {});
    let vm = host.create_quick("chatty", &[]);
    // About 4 MiB, twice what is kept.
    host.sh(
        "chatty",
        "seq -f 'line %.0f of what the guest says' 1 130000 > /dev/console; echo the end > /dev/console",
    )
    .ok();
    let mut last = String::new();
    for _ in 0..100 {
        last = host.bothy(["vm", "logs", "chatty"]).ok().stdout;
        if last.contains("the end") {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(last.contains("the end"), "{} bytes, without the end", last.len());
    assert!(
        last.contains("line 129999 of") && !last.contains("line 1 of"),
        "the end is kept, the beginning is not"
    );
    let id = vm["id"].as_str().unwrap().replace('-', "");
    let dir = host.config.run_dir.join("vm").join(id);
    let kept: u64 = fs_err::read_dir(dir)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("console.log"))
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    assert!(kept <= 2 << 20 && kept > 1 << 20, "{kept} bytes");
    // In order, without a hole: what is kept are the last lines of all.
    let numbers: Vec<u64> = last
        .lines()
        .filter_map(|line| line.trim().strip_prefix("line ")?.split(' ').next()?.parse().ok())
        .collect();
    assert!(numbers.len() > 1000 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    host.bothy(["vm", "delete", "chatty", "--force"]).ok();
    host.finish();
}
