//! Each service and the bus die in the middle of a create: the operation ends, done or undone, and nothing is left.

use bothy_contract::Service;
use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::time::{Duration, Instant};

/// How the create of `name` ended.
fn ended(host: &Host, name: &str) -> Option<String> {
    let ran = host.bothy(["op", "list", "--json"]);
    let ops: serde_json::Value = serde_json::from_str(&ran.stdout).ok()?;
    let op = ops.as_array()?.iter().find(|op| op["subject"] == name && op["kind"] == "vm.create")?;
    let state = op["state"].as_str()?.to_owned();
    ["succeeded", "failed", "cancelled"].contains(&state.as_str()).then_some(state)
}

#[test]
fn whoever_dies_during_a_create_it_ends_done_or_undone() {
    require_root!();
    let host = Host::start();
    let mut victims: Vec<&str> = Service::ALL.iter().map(|s| s.binary()).collect();
    victims.push("nats-server");
    // One early, while agents work for the create; one late, while the guest boots.
    for (round, victim) in victims.into_iter().enumerate() {
        let pause = if round % 2 == 0 { 60 } else { 1500 };
        let name = format!("fault-{round}");
        let mut command = host.command("bothy");
        command.args(["vm", "create", "--name", &name]);
        let mut create = host.spawn(&mut command);
        std::thread::sleep(Duration::from_millis(pause));
        let pid = *host.pids_of(victim).first().expect("the victim runs");
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        let _ = create.inner().wait();
        let deadline = Instant::now() + Duration::from_secs(120);
        // The create may have been refused outright: then there is no operation, and no VM either.
        let state = loop {
            let there = host.bothy(["vm", "show", &name]).status == 0;
            match ended(&host, &name) {
                Some(state) => break state,
                None if !there && host.bothy(["host", "status"]).status == 0 => break "refused".to_owned(),
                None => {}
            }
            assert!(Instant::now() < deadline, "{victim}: the create does not end\n{}", host.logs());
            std::thread::sleep(Duration::from_millis(200));
        };
        if state == "succeeded" {
            assert_eq!(host.show(&name)["state"], "running", "{victim}");
            host.sh(&name, "true").ok();
            host.bothy(["vm", "delete", &name, "--force"]).ok();
        }
        host.assert_no_leaks();
    }
    // And all is well afterwards.
    host.create("after");
    host.bothy(["vm", "delete", "after", "--force"]).ok();
    host.finish();
}
