//! `bothy vm list` and the agent's start with many stopped VMs.

use crate::median;
use bothy_contract::{Service, VmId};
use bothy_e2e::host::Host;
use rusqlite::{Connection, params};
use std::time::{Duration, Instant};

const RUNS: usize = 20;

pub(crate) fn run(vms: usize) {
    let mut host = Host::start();
    host.bothy(["vm", "create", "--name", "many-1", "--memory", "256M"]).ok();
    host.bothy(["vm", "stop", "many-1"]).ok();
    host.bothy(["host", "down", "--keep-vms"]).ok();
    copy_rows(&host, vms);
    host.up();

    let list: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            let ran = host.bothy(["vm", "list"]).ok();
            let took = start.elapsed().as_secs_f64() * 1e3;
            assert_eq!(ran.stdout.lines().count(), vms + 1, "all are listed");
            took
        })
        .collect();
    println!("`bothy vm list` of {vms} stopped VMs: median {:.1} ms (bar: 30 ms)", median(&list));

    // From the new process to its first answer; what came before is the supervisor's pause.
    let starts: Vec<f64> = (0..5).map(|_| restart(&host)).collect();
    println!("start of the vm-agent with {vms} stopped VMs: median {:.1} ms (bar: 300 ms)", median(&starts));
    remove_copies(&mut host);
    host.bothy(["vm", "delete", "many-1"]).ok();
    host.finish();
}

fn database(host: &Host) -> Connection {
    Connection::open(host.config.service_dir(Service::Vm).join("vm.db")).expect("the agent's database")
}

/// The row of the one real VM again and again, with ids and names of their own: neither a list nor a start looks further.
fn copy_rows(host: &Host, vms: usize) {
    let db = database(host);
    let (id, data): (String, String) =
        db.query_row("SELECT id, data FROM vm", [], |r| Ok((r.get(0)?, r.get(1)?))).expect("the row");
    for n in 2..=vms {
        let (new, name) = (VmId::new().to_string(), format!("many-{n}"));
        let mut copy: serde_json::Value = serde_json::from_str(&data.replace(&id, &new)).expect("JSON");
        copy["name"] = name.clone().into();
        copy["id"] = serde_json::to_value(new.parse::<VmId>().expect("an id")).expect("JSON");
        db.execute(
            "INSERT INTO vm(id, name, data) VALUES (?1, ?2, ?3)",
            params![new, name, copy.to_string()],
        )
        .expect("a row");
    }
}

fn remove_copies(host: &mut Host) {
    host.bothy(["host", "down", "--keep-vms"]).ok();
    database(host).execute("DELETE FROM vm WHERE name <> 'many-1'", []).expect("to delete the copies");
    host.up();
}

/// Kills the agent and waits for the next one: how long that took from its process to its first answer, in milliseconds.
fn restart(host: &Host) -> f64 {
    let old = host.kill_service(Service::Vm);
    let deadline = Instant::now() + Duration::from_secs(30);
    let start = loop {
        assert!(Instant::now() < deadline, "the agent does not come back");
        if host.pids_of(Service::Vm.binary()).first().is_some_and(|pid| *pid != old) {
            break Instant::now();
        }
    };
    // A request waits for a service that is about to be there, so it ends when the agent answers.
    host.bothy(["vm", "list"]).ok();
    start.elapsed().as_secs_f64() * 1e3
}
