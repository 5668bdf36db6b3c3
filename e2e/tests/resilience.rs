//! VMs outlive agents, operations outlive everything, and nothing leaks on the way.

use bothy_contract::Service;
use bothy_e2e::host::{Host, QUICK};
use bothy_testkit::require_root;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// A QEMU whose guests do not begin to run.
const HANGS: &str = r#"#!/bin/sh
case "$1" in --version) ;; *) set -- "$@" -S ;; esac
exec qemu-system-x86_64 "$@"
"#;

#[test]
fn a_guest_that_hangs_on_its_way_up_is_booted_once_more() {
    require_root!();
    let dir = tempfile::tempdir().unwrap();
    fs_err::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let qemu = dir.path().join("qemu");
    fs_err::write(&qemu, HANGS).unwrap();
    fs_err::set_permissions(&qemu, Permissions::from_mode(0o755)).unwrap();
    let host = Host::start_quick(|config| {
        config.vm.qemu = qemu;
        config.vm.boot_timeout_s = 60;
    });
    let created = host.bothy(["vm", "create", "--image", QUICK, "--name", "stuck", "--cold"]);
    let told = created.ok().stderr;
    assert!(told.contains("; it had not come up and was reset; its VMM has used"), "{told}");
    let boots = host.bothy(["vm", "exec", "stuck", "--", "true"]).status;
    assert_eq!(boots, 0);

    // A guest that powers itself off is gone as ever: its reset is not left allowed.
    host.bothy(["vm", "exec", "stuck", "--", "sh", "-c", "echo b > /proc/sysrq-trigger"]);
    eventually(&host, "a guest's own reset ends it", || {
        (host.show("stuck")["state"] != "running").then_some(())
    });
    host.bothy(["vm", "delete", "stuck", "--force"]).ok();
}

/// Tries `f` until it gives something, for up to a minute and a half.
#[track_caller]
fn eventually<T>(host: &Host, what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        if let Some(value) = f() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}\n{}", host.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_vm_outlives_its_agents_and_its_end_is_known() {
    require_root!();
    let host = Host::start();
    let vm = host.create("sturdy");
    let boot = |host: &Host| {
        let ran = host.sh("sturdy", "cat /proc/sys/kernel/random/boot_id");
        (ran.status == 0).then(|| ran.stdout.trim().to_owned())
    };
    let first = boot(&host).unwrap();

    for service in Service::ALL {
        host.kill_service(service);
        let now = eventually(&host, "exec works again", || boot(&host));
        assert_eq!(now, first, "after {service:?} was killed");
    }
    let shown = host.show("sturdy");
    assert_eq!(shown["state"], "running");
    assert_eq!(shown["vmm_pid"], vm["vmm_pid"]);

    // The VMM ends while the agent is away: the exit is known all the same. The supervisor is stopped meanwhile, so
    // that nothing brings the agent back too early.
    let vmm = i32::try_from(vm["vmm_pid"].as_i64().unwrap()).unwrap();
    host.kill_service(Service::Vm);
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    let ended = eventually(&host, "the end is known", || {
        let ran = host.bothy(["vm", "show", "sturdy", "--json"]);
        (ran.status == 0).then_some(())?;
        let vm = host.show("sturdy");
        (vm["state"] != "running").then_some(vm)
    });
    assert_eq!(ended["last_exit"]["signal"], 9, "{ended:#}");
    assert!(ended["reason"].as_str().is_some_and(|r| !r.is_empty()), "{ended:#}");

    // And it starts again on the same disks.
    host.bothy(["vm", "start", "sturdy"]).ok();
    assert_ne!(boot(&host).unwrap(), first);
    host.bothy(["vm", "delete", "sturdy", "--force"]).ok();
    host.finish();
}

#[test]
fn a_holder_that_dies_takes_its_vmm_with_it() {
    require_root!();
    let host = Host::start();
    let vm = host.create("held");
    let vmm = Pid::from_raw(i32::try_from(vm["vmm_pid"].as_i64().unwrap()).unwrap());
    let holder = *host.pids_of("bothy-vmm").first().expect("a holder");
    kill(Pid::from_raw(holder), Signal::SIGKILL).unwrap();
    eventually(&host, "the VMM goes with its holder", || kill(vmm, None).is_err().then_some(()));
    let vm = eventually(&host, "the agent noticed", || {
        let vm = host.show("held");
        (vm["state"] != "running").then_some(vm)
    });
    assert!(vm["reason"].as_str().is_some_and(|r| r.contains("holder")), "says why: {vm:#}");
    host.bothy(["vm", "delete", "held", "--force"]).ok();
    host.finish();
}

#[test]
fn the_agent_dies_in_the_middle_of_a_create_and_nothing_leaks() {
    require_root!();
    let host = Host::start();
    for (round, pause) in [20u64, 150, 600, 3000].into_iter().enumerate() {
        let name = format!("torn-{round}");
        let mut command = host.command("bothy");
        command.args(["vm", "create", "--name", &name]);
        let mut create = host.spawn(&mut command);
        std::thread::sleep(Duration::from_millis(pause));
        host.kill_service(Service::Vm);
        let _ = create.inner().wait();
        // Finished or undone, never half: the operation reaches a final state, and the VM's state agrees with it.
        let state = eventually(&host, "the operation ends", || {
            let ran = host.bothy(["op", "list", "--json"]);
            let ops: serde_json::Value = serde_json::from_str(&ran.stdout).ok()?;
            let op = ops.as_array()?.iter().find(|op| op["subject"] == name.as_str())?;
            let state = op["state"].as_str()?.to_owned();
            ["succeeded", "failed", "cancelled"].contains(&state.as_str()).then_some(state)
        });
        let vms = host.bothy(["vm", "list", "--json"]).json();
        let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name.as_str()).cloned();
        match (state.as_str(), vm) {
            ("succeeded", Some(vm)) => {
                assert_eq!(vm["state"], "running");
                host.sh(&name, "true").ok();
                host.bothy(["vm", "delete", &name, "--force"]).ok();
            }
            ("failed" | "cancelled", None) => {}
            (state, vm) => panic!("the operation {state}, the VM {vm:#?}"),
        }
        host.assert_no_leaks();
    }
    host.finish();
}

#[test]
fn a_cancelled_create_is_undone_and_a_late_watcher_sees_all_of_it() {
    require_root!();
    let host = Host::start();
    let mut command = host.command("bothy");
    command.args(["vm", "create", "--name", "never"]);
    let mut create = host.spawn(&mut command);
    let op = eventually(&host, "the guest boots", || {
        let ops = host.bothy(["op", "list", "--json"]).json();
        let op = ops.as_array()?.iter().find(|op| op["subject"] == "never")?.clone();
        let booting = op["stages"].as_array()?.iter().any(|s| s["name"] == "wait_guest");
        booting.then(|| op["id"].as_str().unwrap().to_owned())
    });
    host.bothy(["op", "cancel", &op]).ok();
    assert_ne!(create.inner().wait().unwrap().code(), Some(0));
    let shown = eventually(&host, "it is undone", || {
        let op = host.bothy(["op", "show", &op, "--json"]).json();
        (op["state"] == "cancelled").then_some(op)
    });
    let stages = shown["stages"].as_array().unwrap();
    assert!(stages.iter().all(|s| s["state"] != "running"), "{stages:#?}");
    host.assert_no_leaks();
    // The name is free at once, and the events are still there for one who comes late.
    let seen = host.bothy(["op", "show", &op, "--watch"]);
    let text = format!("{}{}", seen.stdout, seen.stderr);
    assert!(text.contains("resolve_image") && text.contains("launch_vmm"), "{text}");
    host.create("never");
    host.bothy(["vm", "delete", "never", "--force"]).ok();
    host.finish();
}
