//! A create that is resumed from a template: against the same VMM that restores a template by hand to its agent's first answer,
//! against the same by hand on to the end of a first command, against a create that boots, eight at once, and a suspended
//! machine's first exec.

use crate::{
    by_hand::{become_and_run, host_keys, resume, somebody, template},
    median,
};
use bothy_e2e::{
    by_hand::{Recipe, Saved},
    host::Host,
};
use std::time::Instant;

const SHAPE: [&str; 4] = ["--cpus", "1", "--memory", "512M"];
const CROWD: usize = 8;

fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn create(host: &Host, name: &str, more: &[&str]) {
    let args = ["vm", "create", "--name", name];
    host.bothy(args.iter().chain(&SHAPE).chain(more)).ok();
}

pub(crate) fn run(pairs: usize) {
    let host = Host::start_with(&[], |config| config.template.max = 2);
    host.bothy(["image", "warm"].iter().chain(&SHAPE)).ok();

    // The same template, made by hand of the same image: memory in a shared file, devices apart.
    create(&host, "pattern", &["--cold"]);
    let vm = host.show("pattern");
    let dir = host.config.holder_dir(vm["id"].as_str().expect("an id").parse().expect("an id"));
    let recipe = Recipe::of(&vm, &dir).expect("the pattern's command line");
    host.bothy(["vm", "stop", "pattern"]).ok();
    let scratch = host.scratch();
    let saved = Saved::new(&scratch);
    let image = bothy_e2e::images::default_image();
    let (seed, home) = (image.join("system-seed.ext4"), image.join("work-seed.ext4"));
    let keys = host_keys(&scratch);
    host.block_on(template(&recipe, &saved, &seed, keys.clone())).expect("a template by hand");

    let (mut ratios, mut resumed, mut bare, mut same, mut booted) = (vec![], vec![], vec![], vec![], vec![]);
    println!(
        "{:>4} {:>14} {:>14} {:>8} {:>18} {:>14}",
        "pair", "bothy, ms", "by hand, ms", "ratio", "to a command, ms", "cold, ms"
    );
    for pair in 1..=pairs {
        let name = format!("warm-{pair}");
        let start = Instant::now();
        create(&host, &name, &[]);
        host.sh(&name, "true").ok();
        let with = ms(start);
        host.bothy(["vm", "delete", "--force", &name]).ok();

        let work = scratch.join(format!("work-{pair}"));
        let by_hand = host.block_on(resume(&recipe, &saved, &work)).expect("a restore by hand");
        let by_hand = by_hand.as_secs_f64() * 1e3;

        let who = somebody(&vm, &home, keys.clone());
        let words = become_and_run(&recipe, &saved, (&home, &work), Some(who));
        let words = host.block_on(words).expect("a command by hand").as_secs_f64() * 1e3;

        let name = format!("cold-{pair}");
        let start = Instant::now();
        create(&host, &name, &["--cold"]);
        let cold = ms(start);
        host.bothy(["vm", "delete", "--force", &name]).ok();
        println!("{pair:>4} {with:>14.0} {by_hand:>14.0} {:>8.2} {words:>18.0} {cold:>14.0}", with / by_hand);
        ratios.push(with / by_hand);
        resumed.push(with);
        bare.push(by_hand);
        same.push(words);
        booted.push(cold);
    }
    println!(
        "medians of {pairs} pairs: create to first exec {:.0} ms, by hand {:.0} ms, ratio {:.2} (bar: 2.5)",
        median(&resumed),
        median(&bare),
        median(&ratios)
    );
    println!(
        "the same by hand to the end of a first command {:.0} ms, {:.2} of the first answer: what a guest of this VMM needs \
         for its identity and a command, with nothing of bothy's on the host",
        median(&same),
        median(&same) / median(&bare)
    );
    println!(
        "a create that boots {:.0} ms: {:.1}x (bar: 12x)",
        median(&booted),
        median(&booted) / median(&resumed)
    );

    // Eight at once.
    let start = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..CROWD {
            let host = &host;
            scope.spawn(move || {
                create(host, &format!("crowd-{n}"), &[]);
                host.sh(&format!("crowd-{n}"), "true").ok();
            });
        }
    });
    let with = ms(start);
    // Stopped, they leave their TAPs for as many by hand.
    let names: Vec<String> = (0..CROWD).map(|n| format!("crowd-{n}")).collect();
    host.bothy(["vm", "stop"].into_iter().chain(names.iter().map(String::as_str))).ok();
    let by_hand: Vec<Recipe> = names
        .iter()
        .map(|name| {
            let dir = scratch.join(name);
            fs_err::create_dir(&dir).expect("a directory");
            let tap = host.show(name)["lease"]["tap"].as_str().expect("a TAP").to_owned();
            recipe.with_sockets(&dir).with_tap(&tap).with_disk("system", &dir.join("system.ext4"))
        })
        .collect();
    let works: Vec<_> = names.iter().map(|name| scratch.join(name).join("work.ext4")).collect();
    let start = Instant::now();
    let each = by_hand.iter().zip(&works).map(|(recipe, work)| resume(recipe, &saved, work));
    host.block_on(futures::future::try_join_all(each)).expect("restores by hand");
    let bare = ms(start);
    let start = Instant::now();
    let each = by_hand.iter().zip(&works).map(|(recipe, work)| {
        let who = somebody(&vm, &home, keys.clone());
        become_and_run(recipe, &saved, (&home, work), Some(who))
    });
    host.block_on(futures::future::try_join_all(each)).expect("commands by hand");
    let words = ms(start);
    host.bothy(["vm", "delete"].into_iter().chain(names.iter().map(String::as_str))).ok();
    println!(
        "{CROWD} at once: bothy {with:.0} ms, by hand {bare:.0} ms, ratio {:.2} (bar: 2.0); by hand to the ends of first \
         commands {words:.0} ms, {:.2}",
        with / bare,
        words / bare
    );

    // A suspended one and its first exec.
    create(&host, "sleeper", &[]);
    let (mut wakes, mut bare, mut same) = (vec![], vec![], vec![]);
    for pair in 1..=pairs {
        host.bothy(["vm", "suspend", "sleeper"]).ok();
        let start = Instant::now();
        host.sh("sleeper", "true").ok();
        wakes.push(ms(start));
        let work = scratch.join(format!("sleeper-{pair}"));
        let by_hand = host.block_on(resume(&recipe, &saved, &work)).expect("a restore by hand");
        bare.push(by_hand.as_secs_f64() * 1e3);
        let words = become_and_run(&recipe, &saved, (&home, &work), None);
        same.push(host.block_on(words).expect("a command by hand").as_secs_f64() * 1e3);
    }
    println!(
        "a suspended machine's first exec: {:.0} ms, a restore by hand {:.0} ms, ratio {:.2} (bar: 2.0); by hand to the end of \
         a first command {:.0} ms, {:.2}",
        median(&wakes),
        median(&bare),
        median(&wakes) / median(&bare),
        median(&same),
        median(&same) / median(&bare)
    );
    host.bothy(["vm", "delete", "--force", "sleeper", "pattern"]).ok();
    drop(host);
}
