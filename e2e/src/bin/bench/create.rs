//! One create against one boot by hand.

use crate::{
    by_hand::{host_keys, pristine},
    median,
};
use bothy_e2e::{by_hand::Recipe, host::Host};
use std::time::Instant;

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

pub(crate) fn run(pairs: usize) {
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
        "medians of {pairs} pairs: bothy {:.2} s, by hand {:.2} s, ratio {:.3} (bar: 1.08)",
        median(&with),
        median(&by_hand),
        median(&ratios)
    );
    println!("accepted request to VMM start: median {:.1} ms (bar: 60 ms)", median(&before_vmm));
    let _ = fs_err::remove_dir_all(&dir);
    host.bothy(["vm", "delete", "pattern"]).ok();
    host.finish();
}
