//! Many creates at once against as many boots by hand at once.

use crate::by_hand::{host_keys, pristine};
use bothy_e2e::{by_hand::Recipe, host::Host};
use std::time::Instant;

/// Small, so that what is measured is the machine's two cores and not its memory.
const MEMORY: &str = "256M";

pub(crate) fn run(vms: usize) {
    let host = Host::start();
    let names: Vec<String> = (1..=vms).map(|n| format!("crowd-{n}")).collect();
    let keys = host_keys(&host.scratch());
    let image = bothy_e2e::images::default_image();
    // The first create of a host makes its initramfs; it is nobody's overhead here.
    host.bothy(["vm", "create", "--name", "first", "--memory", MEMORY]).ok();
    host.bothy(["vm", "delete", "first", "--force"]).ok();

    let start = Instant::now();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| host.bothy(["vm", "create", "--name", name, "--memory", MEMORY]).ok());
        }
    });
    let with = start.elapsed().as_secs_f64();

    let recipes: Vec<(Recipe, std::path::PathBuf)> = names
        .iter()
        .map(|name| {
            let vm = host.show(name);
            let dir = host.config.holder_dir(vm["id"].as_str().expect("an id").parse().expect("an id"));
            (Recipe::of(&vm, &dir).expect("its command line"), dir)
        })
        .collect();
    host.bothy(["vm", "stop"].into_iter().chain(names.iter().map(String::as_str))).ok();
    for (recipe, _) in &recipes {
        pristine(&image, &recipe.paths("file="));
    }
    let start = Instant::now();
    let boots = recipes.iter().map(|(recipe, _)| recipe.boot(keys.clone()));
    for booted in host.block_on(futures::future::join_all(boots)) {
        booted.expect("a boot by hand");
    }
    let hand = start.elapsed().as_secs_f64();
    println!(
        "{vms} at once: bothy {with:.2} s, by hand {hand:.2} s, ratio {:.3} (bar: 1.10); no create failed",
        with / hand
    );
    for (_, dir) in recipes {
        let _ = fs_err::remove_dir_all(dir);
    }
    host.bothy(["vm", "delete", "--force"].into_iter().chain(names.iter().map(String::as_str))).ok();
    host.finish();
}
