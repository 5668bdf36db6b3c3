//! A VM belongs to no agent: signals, an upgrade, a lost or wrong record of the agent leave it running, and found again.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helper: a failed step is a failed test")]

use bothy_contract::Service;
use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{path::Path, time::Duration};

/// Waits until the agent answers again, and another process than `old`.
fn await_agent(host: &Host, old: i32) -> i32 {
    for _ in 0..600 {
        let new = host.pids_of(Service::Vm.binary()).into_iter().find(|pid| *pid != old);
        if let Some(new) = new.filter(|_| host.bothy(["vm", "list"]).status == 0) {
            return new;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the agent does not come back\n{}", host.logs());
}

#[test]
fn signals_to_the_agent_and_an_upgrade_do_not_reach_a_vm() {
    require_root!();
    // Programs of its own, so that they can be replaced.
    let host = Host::start_quick(|_| {});
    let vm = host.create_quick("calm", &[]);
    let boot = host.boot_id("calm");
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGKILL] {
        let agent = *host.pids_of(Service::Vm.binary()).first().expect("the agent runs");
        // To the agent and to all that is in its process group, as a terminal does it.
        kill(Pid::from_raw(-agent), signal).or_else(|_| kill(Pid::from_raw(agent), signal)).unwrap();
        await_agent(&host, agent);
        assert_eq!(host.boot_id("calm"), boot, "after {signal}");
        let now = host.show("calm");
        assert_eq!((&now["vmm_pid"], &now["state"]), (&vm["vmm_pid"], &"running".into()), "after {signal}");
    }
    host.bothy(["vm", "delete", "calm", "--force"]).ok();
    host.finish();
}

/// Puts another file of the same content in the place of `program`, as a package manager does.
fn replace(program: &Path) {
    let beside = program.with_extension("new");
    fs_err::copy(program, &beside).unwrap();
    fs_err::rename(&beside, program).unwrap();
}

#[test]
fn a_vm_outlives_an_upgrade_of_all_programs() {
    require_root!();
    let host = Host::start_installed();
    let vm = host.create("calm");
    let boot = host.boot_id("calm");
    let (holder, _) = host.vmm_of("calm").expect("a VMM");
    for service in Service::ALL {
        replace(&host.program(service.binary()));
    }
    replace(&host.program("bothy-vmm"));
    let agent = host.kill_service(Service::Vm);
    let agent = await_agent(&host, agent);
    let runs = fs_err::read_link(format!("/proc/{agent}/exe")).unwrap();
    assert_eq!(runs, host.program(Service::Vm.binary()), "the new program");
    let holds = fs_err::read_link(format!("/proc/{holder}/exe")).unwrap();
    assert!(
        holds.to_string_lossy().ends_with("(deleted)"),
        "the holder is still the old one: {}",
        holds.display()
    );
    assert_eq!(host.boot_id("calm"), boot);
    assert_eq!(host.show("calm")["vmm_pid"], vm["vmm_pid"]);
    // And the new agent can do everything with a VM of the old one's.
    host.bothy(["vm", "stop", "calm"]).ok();
    host.bothy(["vm", "start", "calm"]).ok();
    assert_ne!(host.boot_id("calm"), boot);
    host.bothy(["vm", "delete", "calm", "--force"]).ok();
    host.finish();
}

#[test]
fn a_lost_damaged_or_stale_handle_is_found_again() {
    require_root!();
    let mut host = Host::start_quick(|_| {});
    let vm = host.create_quick("found", &[]);
    let boot = host.boot_id("found");
    let good: String = edit(&host, "SELECT vmm FROM vm", None);
    let stale = {
        let mut handle: serde_json::Value = serde_json::from_str(&good).unwrap();
        let mut number = 0;
        forge(&mut handle, &mut number);
        assert!(number >= 2, "the record has process ids: {good}");
        handle.to_string()
    };
    for (what, handle) in [
        ("lost", None),
        ("damaged", Some("{\"holder\":")),
        ("of another shape", Some("[]")),
        ("stale", Some(&*stale)),
    ] {
        host.down(&["--keep-vms"]);
        edit(&host, "UPDATE vm SET vmm = ?1 RETURNING 'done'", Some(handle));
        host.up();
        let now = host.await_vm("found", what, |vm| vm["state"] == "running");
        assert_eq!(now["vmm_pid"], vm["vmm_pid"], "{what}");
        assert_eq!(host.boot_id("found"), boot, "{what}");
    }
    // And one whose VMM is gone is not believed, whatever the record says.
    host.down(&["--keep-vms"]);
    let vmm = i32::try_from(vm["vmm_pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    while kill(Pid::from_raw(vmm), None).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    host.up();
    let now = host.await_vm("found", "its end is known", |vm| vm["state"] != "running");
    assert!(now["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{now:#}");
    host.bothy(["vm", "delete", "found"]).ok();
    host.finish();
}

/// Runs one statement on the agent's file while the agent is not there; the first column of its first row.
fn edit(host: &Host, sql: &str, value: Option<Option<&str>>) -> String {
    let path = host.config.service_dir(Service::Vm).join("vm.db");
    let db = rusqlite::Connection::open(path).unwrap();
    match value {
        Some(value) => db.query_row(sql, [value], |row| row.get(0)).unwrap(),
        None => db.query_row(sql, [], |row| row.get(0)).unwrap(),
    }
}

/// Makes every process in a handle another one, which lives: this test's own.
fn forge(value: &mut serde_json::Value, number: &mut usize) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                if name == "pid" {
                    *value = std::process::id().into();
                    *number += 1;
                } else {
                    forge(value, number);
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| forge(item, number)),
        _ => {}
    }
}
