//! Rest: a machine is paused or suspended, by hand or since nobody uses it, and its next use lets it go on as it was.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's helper: a failed step is a failed test"
)]

use bothy_contract::Service;
use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use std::time::Duration;

const SHAPE: [&str; 4] = ["--cpus", "1", "--memory", "256M"];

/// What a guest has in memory only: a process that counts, and its count by now.
fn count(host: &Host, name: &str) -> u64 {
    host.sh(name, "cat /run/count").ok().stdout.trim().parse().unwrap()
}

fn start_counting(host: &Host, name: &str) {
    let line = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /run/new; mv /run/new /run/count; sleep 0.1; done' \
                >/dev/null 2>&1 </dev/null & sleep 1";
    host.sh(name, line).ok();
}

#[track_caller]
fn state(host: &Host, name: &str, is: &str) {
    let vm = host.show(name);
    assert_eq!(vm["state"], is, "{vm:#}");
}

/// Whether the guest's clock is right, but for what the question takes.
#[track_caller]
fn clock_is_right(host: &Host, name: &str) {
    let now = || jiff::Timestamp::now().as_second();
    let before = now();
    let guest: i64 = host.sh(name, "date +%s").ok().stdout.trim().parse().unwrap();
    assert!((before - 1..=now() + 1).contains(&guest), "{before} {guest} {}", now());
}

#[test]
fn a_machine_goes_on_after_a_pause_and_after_a_suspend() {
    require_root!();
    let host = Host::start_quick(|_| {});
    let vm = host.create_quick("a", &SHAPE);
    let pid = vm["vmm_pid"].clone();
    start_counting(&host, "a");
    let boot = host.boot_id("a");

    // Paused: the same process, nothing moves, and an exec wakes it.
    host.bothy(["vm", "pause", "a"]).ok();
    state(&host, "a", "paused");
    let again = host.bothy(["vm", "pause", "a"]);
    assert!(again.status != 0 && again.stderr.contains("paused already"), "{again:?}");
    let refused = host.bothy(["vm", "set", "a", "--disk", "20G"]);
    assert!(refused.status != 0 && refused.stderr.contains("vm resume a"), "{refused:?}");
    std::thread::sleep(Duration::from_secs(3));
    let then = count(&host, "a");
    state(&host, "a", "running");
    assert_eq!(host.show("a")["vmm_pid"], pid);
    assert!(then < 60, "it did not stand still: {then}");
    clock_is_right(&host, "a");
    assert_eq!(host.boot_id("a"), boot);

    // By hand, and the agent dies while it is paused.
    host.bothy(["vm", "pause", "a"]).ok();
    host.kill_service(Service::Vm);
    host.await_vm("a", "the agent is back", |vm| vm["state"] == "paused");
    host.bothy(["vm", "resume", "a"]).ok();
    state(&host, "a", "running");

    // Suspended: no process, and the memory is back with the next use.
    let then = count(&host, "a");
    host.bothy(["vm", "suspend", "a"]).ok();
    state(&host, "a", "suspended");
    assert_eq!(host.vmm_of("a"), None);
    for args in [&["vm", "stop", "a"][..], &["vm", "restart", "a"], &["vm", "pause", "a"]] {
        let refused = host.bothy(args);
        assert!(refused.status != 0 && refused.stderr.contains("suspended"), "{args:?} {refused:?}");
    }
    host.kill_service(Service::Vm);
    host.await_vm("a", "the agent is back", |vm| vm["state"] == "suspended");
    assert!(count(&host, "a") >= then, "it went on where it was");
    state(&host, "a", "running");
    assert_ne!(host.show("a")["vmm_pid"], pid);
    clock_is_right(&host, "a");
    assert_eq!(host.boot_id("a"), boot, "it has not booted");
    host.sh("a", "echo kept > /root/kept; sync; ip -o addr").ok();

    // A paused one is stopped as a running one is; a suspended one is killed, and forgets.
    host.bothy(["vm", "pause", "a"]).ok();
    host.bothy(["vm", "stop", "a"]).ok();
    let stopped = host.show("a");
    assert_eq!(stopped["last_exit"]["status"], 0, "it was powered off: {stopped:#}");
    host.bothy(["vm", "start", "a"]).ok();
    host.bothy(["vm", "suspend", "a"]).ok();
    // Memory that is not what was saved is not gone on with.
    let agent = host.config.service_dir(Service::Vm).display().to_string();
    let spoil = "import os,sys,time\nf=sys.argv[1]\nfor _ in range(600):\n  if os.listxattr(f): break\n  time.sleep(.1)\n\
                 f=open(f,'r+b'); f.seek(20<<20); b=f.read(1); f.seek(20<<20); f.write(bytes([b[0]^1]))";
    host.run_bash(&format!("python3 -c \"{spoil}\" $(find {agent} -name suspended)")).ok();
    let refused = host.sh("a", "true");
    assert!(refused.status != 0 && refused.stderr.contains("not what was saved"), "{refused:?}");
    assert!(refused.stderr.contains("vm kill"), "says what to do: {refused:?}");
    state(&host, "a", "suspended");
    host.bothy(["vm", "kill", "a"]).ok();
    state(&host, "a", "stopped");
    host.bothy(["vm", "start", "a"]).ok();
    assert_eq!(host.sh("a", "cat /root/kept; ls /run/count 2>/dev/null").stdout, "kept\n");
    host.bothy(["vm", "suspend", "a"]).ok();
    host.bothy(["vm", "delete", "a"]).ok();
    host.finish();
}

#[test]
fn nobody_uses_it_so_it_rests_and_a_connection_to_its_port_loses_nothing() {
    require_root!();
    let host = Host::start(); // ssh is up when a machine is ready
    let create = |name: &str, idle: &str, port: &str| {
        let args = ["vm", "create", "--name", name, "--idle", idle, "--after", "10s", "--publish", port];
        host.bothy(args.iter().chain(&SHAPE)).ok();
    };
    for bad in [&["--idle", "pause"][..], &["--after", "10m"], &["--idle", "pause", "--after", "1s"]] {
        let refused = host.bothy(["vm", "create", "--name", "bad"].iter().chain(bad));
        assert_ne!(refused.status, 0, "{bad:?}");
    }
    create("p", "pause", "2201:22");
    create("s", "suspend", "2202:22");
    host.await_vm("p", "it is paused", |vm| vm["state"] == "paused");
    host.await_vm("s", "it is suspended", |vm| vm["state"] == "suspended");
    for port in [2201, 2202] {
        let greeting = host.run_bash(&format!("exec 3<>/dev/tcp/127.0.0.1/{port}; timeout 60 head -n1 <&3"));
        assert!(greeting.stdout.starts_with("SSH-2.0-"), "{port}: {greeting:?}\n{}", host.logs());
    }
    host.bothy(["vm", "set", "p", "s", "--idle", "never"]).ok();
    for name in ["p", "s"] {
        state(&host, name, "running");
        assert_eq!(host.show(name)["idle"]["action"], "never");
    }
    host.bothy(["vm", "delete", "--force", "p", "s"]).ok();
    host.finish();
}
