//! `cargo xtask bench <what>`: what bothy costs, as ratios of alternating pairs in one run, medians printed.
//!
//! - `create [pairs]`: `bothy vm create` to ready against the same QEMU command line, kernel and disks started by hand to the
//!   same readiness; and how long it takes from the accepted request to the VMM's start.
//! - `crowd [vms]`: as many creates at once against as many boots by hand at once.
//! - `many [vms]`: `bothy vm list` and the agent's start with that many stopped VMs.
//! - `end [pairs]`: a stop against a power-off typed inside the same guest, and the delete of a stopped VM.
//! - `template [pairs]`: a create that is resumed, to its first exec, against a restore by hand and against a boot; eight at
//!   once; and a suspended machine's first exec.
//! - `flatten [pairs]`: layers of 500 MiB to an ext4 file system, against `tar -x` of them and `mkfs.ext4 -d`.
//! - `images [creates]`: the disks of a VM at three sizes of its rootfs, and what a second VM reads of a rootfs that is in the
//!   page cache.
//! - `workspace [pairs] [files]`: a repository of 20,000 files and 400 MiB into a guest and out again, against `tar` through the same
//!   channel, git over ssh and `git status` in the guest.
//! - `lease [leases]`: what the lease of a warm slot costs over the bus, for one client at a time and for twenty at once.
//! - `idle`: the resident memory of the five services and the bus, with nothing to do.
#![expect(clippy::print_stdout, reason = "a program for people")]
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a failed step is a failed bench"
)]

mod by_hand;
mod create;
mod crowd;
mod end;
mod flatten;
mod idle;
mod images;
mod lease;
mod many;
mod template;
mod workspace;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |default| args.get(1).map_or(default, |n| n.parse().expect("a number"));
    match args.first().map(String::as_str) {
        Some("create") => create::run(number(5)),
        Some("crowd") => crowd::run(number(16)),
        Some("many") => many::run(number(50)),
        Some("end") => end::run(number(5)),
        Some("flatten") => flatten::run(number(3)),
        Some("lease") => lease::run(number(200)),
        Some("idle") => idle::run(),
        Some("images") => images::run(number(20)),
        Some("template") => template::run(number(5)),
        Some("workspace") => {
            workspace::run(number(1), args.get(2).map_or(20_000, |n| n.parse().expect("a number of files")));
        }
        _ => panic!(
            "usage: bench create [pairs] | crowd [vms] | many [vms] | end [pairs] | flatten [pairs] | lease [leases] | idle | images [creates] | \
             template [pairs] | workspace [pairs] [files]"
        ),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}
