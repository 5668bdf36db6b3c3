//! What bothy holds when it has nothing to do.

use bothy_e2e::host::Host;
use std::time::Duration;

pub(crate) fn run() {
    let host = Host::start();
    std::thread::sleep(Duration::from_secs(3));
    let mut total = 0.0;
    for program in [
        "nats-server",
        "bothy-gateway",
        "bothy-vm-agent",
        "bothy-net-agent",
        "bothy-image-agent",
        "bothy-workspace-agent",
    ] {
        for pid in host.pids_of(program) {
            let status = fs_err::read_to_string(format!("/proc/{pid}/status")).expect("its status");
            let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("its size");
            let kib: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
            println!("{program:<24} {:>8.1} MiB", kib / 1024.0);
            total += kib / 1024.0;
        }
    }
    println!("{:<24} {total:>8.1} MiB resident (bar: 120 MiB)", "all five and the bus");
    host.finish();
}
