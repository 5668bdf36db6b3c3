//! `cargo xtask bench <what>`: what bothy costs, as ratios of alternating pairs in one run, medians printed.
//!
//! - `create [pairs]`: `bothy vm create` to ready against the same QEMU command line, kernel and disks started by hand to the
//!   same readiness; and how long it takes from the accepted request to the VMM's start.
//! - `idle`: the resident memory of the five services and the bus, with nothing to do.
#![expect(clippy::print_stdout, reason = "a program for people")]
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a failed step is a failed bench"
)]

use bothy_e2e::{by_hand::Recipe, host::Host};
use bothy_guest_proto::v1;
use std::{path::Path, process::Command, time::Instant};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["create"] => create(5),
        ["create", pairs] => create(pairs.parse().expect("a number of pairs")),
        ["idle"] => idle(),
        _ => panic!("usage: bench create [pairs] | bench idle"),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

/// When the VMM's process was started, in milliseconds from the operation's acceptance: the stage's begin, and what its
/// note says of the time since then.
fn vmm_started(op: &serde_json::Value) -> f64 {
    let stages = op["stages"].as_array().expect("stages");
    let stage = stages.iter().find(|s| s["name"] == "launch_vmm").expect("the stage");
    let note = stage["note"].as_str().expect("its note");
    let after = note.split("started after ").nth(1).and_then(|rest| rest.split(' ').next());
    stage["started_us"].as_f64().expect("a start") / 1e3
        + after.and_then(|ms| ms.parse().ok()).unwrap_or(f64::NAN)
}

fn create(pairs: usize) {
    let host = Host::start();
    // One VM shows the command line; stopped, its TAP and the paths of its disks serve the runs by hand.
    let vm = host.create("pattern");
    let dir = host.config.holder_dir(vm["id"].as_str().expect("an id").parse().expect("an id"));
    let recipe = Recipe::of(&vm, &dir).expect("the pattern's command line");
    let keys = host_keys(&host.scratch());
    host.bothy(["vm", "stop", "pattern"]).ok();
    let image = bothy_e2e::images::default_image();
    let disks = recipe.paths("file=");

    let (mut ratios, mut with, mut by_hand, mut before_vmm) = (vec![], vec![], vec![], vec![]);
    println!(
        "{:>4} {:>14} {:>14} {:>8} {:>16}",
        "pair", "bothy, s", "by hand, s", "ratio", "to VMM start, ms"
    );
    for pair in 1..=pairs {
        let name = format!("pair-{pair}");
        let start = Instant::now();
        host.bothy(["vm", "create", "--name", &name]).ok();
        let wall = start.elapsed().as_secs_f64();
        let ops = host.bothy(["op", "list", "--json"]).json();
        let op = ops
            .as_array()
            .expect("operations")
            .iter()
            .find(|op| op["subject"] == name.as_str())
            .expect("its op");
        let launched = vmm_started(op);
        host.bothy(["vm", "delete", &name, "--force"]).ok();

        pristine(&image, &disks);
        let hand = host.block_on(recipe.boot(keys.clone())).expect("a boot by hand").ready.as_secs_f64();
        let ratio = wall / hand;
        println!("{pair:>4} {wall:>14.2} {hand:>14.2} {ratio:>8.3} {launched:>16.1}");
        ratios.push(ratio);
        with.push(wall);
        by_hand.push(hand);
        before_vmm.push(launched);
    }
    println!(
        "medians of {pairs} pairs: bothy {:.2} s, by hand {:.2} s, ratio {:.3} (bar: 1.15)",
        median(&with),
        median(&by_hand),
        median(&ratios)
    );
    println!("accepted request to VMM start: median {:.1} ms (bar: 60 ms)", median(&before_vmm));
    let _ = fs_err::remove_dir_all(&dir);
    host.bothy(["vm", "delete", "pattern"]).ok();
    host.finish();
}

/// Puts the image's seeds back in place of the pattern's disks, sized as they were.
fn pristine(image: &Path, disks: &[std::path::PathBuf]) {
    for (disk, seed) in disks.iter().filter_map(|d| Some((d, seed_of(d)?))) {
        let size = fs_err::metadata(disk).expect("a disk").len();
        let copied = Command::new("cp").arg("--sparse=always").arg(image.join(seed)).arg(disk).status();
        assert!(copied.expect("cp").success(), "cannot copy {seed}");
        fs_err::OpenOptions::new().write(true).open(disk).and_then(|f| f.set_len(size)).expect("its size");
    }
}

fn seed_of(disk: &Path) -> Option<&'static str> {
    match disk.file_name()?.to_str()? {
        "system.ext4" => Some("system-seed.ext4"),
        "work.ext4" => Some("work-seed.ext4"),
        _ => None,
    }
}

/// An ssh host key as bothy makes one, so that sshd starts alike.
fn host_keys(scratch: &Path) -> Vec<v1::File> {
    let key = scratch.join("host_key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.expect("ssh-keygen").success(), "no host key");
    let file = |path: &str, from: &Path, mode| v1::File {
        path: path.into(),
        content: fs_err::read(from).expect("the key"),
        mode,
    };
    vec![
        file("/etc/ssh/ssh_host_ed25519_key", &key, 0o600),
        file("/etc/ssh/ssh_host_ed25519_key.pub", &key.with_extension("pub"), 0o644),
    ]
}

fn idle() {
    let host = Host::start();
    std::thread::sleep(std::time::Duration::from_secs(3));
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
