//! A stop against a power-off typed inside the same guest, and the delete of a stopped VM.

use crate::median;
use bothy_e2e::host::Host;
use std::{
    io::Write,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

pub(crate) fn run(pairs: usize) {
    let host = Host::start();
    host.bothy(["vm", "create", "--name", "a"]).ok();
    let (mut ratios, mut deletes) = (vec![], vec![]);
    println!("{:>4} {:>14} {:>14} {:>8}", "pair", "vm stop, s", "typed, s", "ratio");
    for pair in 1..=pairs {
        settle();
        let start = Instant::now();
        host.bothy(["vm", "stop", "a"]).ok();
        let stop = start.elapsed().as_secs_f64();
        host.bothy(["vm", "start", "a"]).ok();
        settle();
        let typed = typed(&host);
        host.bothy(["vm", "start", "a"]).ok();
        let ratio = stop / typed;
        println!("{pair:>4} {stop:>14.2} {typed:>14.2} {ratio:>8.3}");
        ratios.push(ratio);
    }
    println!("median of {pairs} pairs: ratio {:.3} (bar: 1.2)", median(&ratios));
    host.bothy(["vm", "delete", "a", "--force"]).ok();
    for pair in 1..=pairs {
        let name = format!("gone-{pair}");
        host.bothy(["vm", "create", "--name", &name, "--memory", "256M"]).ok();
        host.bothy(["vm", "stop", &name]).ok();
        let start = Instant::now();
        host.bothy(["vm", "delete", &name]).ok();
        deletes.push(start.elapsed().as_secs_f64() * 1e3);
    }
    println!("delete of a stopped VM: median {:.1} ms (bar: 60 ms)", median(&deletes));
    host.finish();
}

/// A guest that has just become ready is still busy with what nothing waits for.
fn settle() {
    std::thread::sleep(Duration::from_secs(5));
}

/// How long the VMM lives, in seconds, after `systemctl poweroff` is typed into a shell that waits for it in the guest.
fn typed(host: &Host) -> f64 {
    let process = PathBuf::from(format!("/proc/{}", host.show("a")["vmm_pid"]));
    let mut command = host.command("bothy");
    command.args(["vm", "exec", "-i", "a", "--", "sh"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut shell = host.spawn(&mut command);
    let mut stdin = shell.inner().stdin.take().expect("its stdin");
    settle();
    let start = Instant::now();
    stdin.write_all(b"systemctl poweroff\n").expect("a line");
    stdin.flush().expect("a line");
    while process.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "the guest does not power off");
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = start.elapsed().as_secs_f64();
    while host.show("a")["state"] != "stopped" {
        assert!(start.elapsed() < Duration::from_secs(120), "the VM is not stopped");
        std::thread::sleep(Duration::from_millis(20));
    }
    took
}
