//! Templates: VMs that are resumed from one are machines of their own, one that is spoilt costs nobody a create, and a crash
//! while one is made leaves nothing.
#![expect(clippy::unwrap_used, reason = "a test's helper: a failed step is a failed test")]

use bothy_contract::Service;
use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const SHAPE: [&str; 4] = ["--cpus", "1", "--memory", "256M"];

/// A host that makes templates, with one of the default image.
fn warm_host() -> Host {
    let mut host = Host::start_with(&[], |config| config.template.max = 2);
    host.warm(&SHAPE);
    host
}

#[track_caller]
fn warm(host: &Host, more: &[&str]) -> Value {
    let args = ["image", "warm", "--json"];
    host.bothy(args.iter().chain(&SHAPE).chain(more)).json()
}

/// Creates a VM; what its stages told.
#[track_caller]
fn create(host: &Host, name: &str, more: &[&str]) -> String {
    let args = ["vm", "create", "--name", name];
    host.bothy(args.iter().chain(&SHAPE).chain(more)).ok().stderr
}

#[track_caller]
fn templates(host: &Host) -> Vec<Value> {
    host.bothy(["image", "templates", "--json"]).json().as_array().unwrap().clone()
}

/// The files of the one template, and what is in them.
fn files(host: &Host) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for service in [Service::Vm, Service::Image] {
        let dir = host.config.service_dir(service).join("templates");
        for template in fs_err::read_dir(dir).unwrap() {
            for file in fs_err::read_dir(template.unwrap().path()).unwrap() {
                let path = file.unwrap().path();
                let digest = hex::encode(Sha256::digest(fs_err::read(&path).unwrap()));
                files.push((path, digest));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn vms_of_one_template_are_machines_of_their_own() {
    require_root!();
    let host = warm_host();
    let before = files(&host);
    assert_eq!(before.len(), 4, "memory, devices, overlay, base: {before:?}");

    // Two at once, and one that boots: the same machine otherwise.
    std::thread::scope(|scope| {
        for name in ["one", "two"] {
            let host = &host;
            scope.spawn(move || {
                let told = create(host, name, &[]);
                assert!(told.contains("its guest was resumed"), "{told}");
            });
        }
    });
    let told = create(&host, "cold", &["--cold"]);
    assert!(told.contains("it is to boot") && !told.contains("was resumed"), "{told}");
    assert_eq!(templates(&host)[0]["uses"], 2);

    let own = "cat /etc/machine-id /etc/hostname /etc/ssh/ssh_host_ed25519_key.pub /proc/sys/kernel/random/boot_id; \
               hostname; cat /sys/class/net/eth0/address; ip -o addr show eth0 scope global; \
               ip -6 -o addr show eth0 scope link; head -c 24 /dev/urandom | od -An -tx1";
    let lines = |name: &str| -> Vec<String> {
        host.sh(name, own).ok().stdout.lines().map(|line| line.trim().to_owned()).collect()
    };
    let all = [lines("one"), lines("two"), lines("cold")];
    for (n, line) in all[0].iter().enumerate() {
        let different: BTreeSet<_> = all.iter().map(|lines| &lines[n]).collect();
        assert_eq!(different.len(), 3, "line {n} is the same in two guests: {line}\n{all:#?}");
    }
    let same = "uname -a | cut -d' ' -f1,3-; nproc; grep MemTotal /proc/meminfo; dpkg-query -W | md5sum; \
                stat -c %a /root /root/.ssh; df -Pk / /root | tr -s ' ' | cut -d' ' -f1,2,6; cat /etc/resolv.conf; \
                ls -A /root; ss -Hltn | tr -s ' ' | cut -d' ' -f4 | sort";
    assert_eq!(host.sh("one", same).ok().stdout, host.sh("cold", same).ok().stdout);

    for name in ["one", "two", "cold"] {
        let vm = host.show(name);
        assert_eq!(vm["boot_id"], host.boot_id(name).as_str(), "{vm:#}");
        assert_eq!(host.sh(name, "hostname").ok().stdout.trim(), name);
        let address = vm["lease"]["address"].as_str().unwrap();
        assert!(host.sh(name, "ip -4 -o addr").ok().stdout.contains(address));
        let ssh = host.bothy(["vm", "ssh", name, "--", "echo from-$(hostname)"]);
        assert_eq!(ssh.stdout.trim(), format!("from-{name}"), "{ssh:?}");
    }

    // The guest's clock, within what the question itself takes.
    let asked = SystemTime::now();
    let guest: u128 = host.sh("one", "date +%s%N").ok().stdout.trim().parse().unwrap();
    let answered = SystemTime::now();
    let nanos = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let slack = Duration::from_millis(50).as_nanos();
    assert!(
        (nanos(asked) - slack..nanos(answered) + slack).contains(&guest),
        "{asked:?} {guest} {answered:?}"
    );

    // What one writes no other sees, nor the template; and a stop and a start keep it.
    for name in ["one", "two"] {
        host.sh(name, &format!("echo {name} > /root/mine; echo {name} > /etc/mine; sync")).ok();
    }
    for name in ["one", "two"] {
        assert_eq!(host.sh(name, "cat /root/mine /etc/mine").ok().stdout, format!("{name}\n{name}\n"));
    }
    host.bothy(["vm", "stop", "one"]).ok();
    host.bothy(["vm", "start", "one"]).ok();
    assert_eq!(host.sh("one", "cat /root/mine /etc/mine; hostname").ok().stdout, "one\none\none\n");
    create(&host, "three", &[]);
    assert_eq!(host.sh("three", "ls /root/mine /etc/mine 2>/dev/null").stdout, "");
    assert_eq!(files(&host), before, "nobody writes to a template");

    host.bothy(["vm", "delete", "--force", "one", "two", "three", "cold"]).ok();
    host.finish();
}

#[test]
fn a_spoilt_template_costs_nobody_a_create() {
    require_root!();
    let mut host = warm_host();
    let state = files(&host).into_iter().find(|(path, _)| path.ends_with("state")).unwrap().0;
    let devices = fs_err::read(&state).unwrap();
    fs_err::write(&state, &devices[..devices.len() / 2]).unwrap();

    let told = create(&host, "a", &[]);
    assert!(told.contains("it could not be resumed, so it boots"), "{told}");
    assert_eq!(host.sh("a", "hostname").ok().stdout.trim(), "a");
    let aside = templates(&host);
    assert!(aside[0]["set_aside"].is_string(), "{aside:#?}");
    assert_eq!(files(&host), [], "it takes no room");
    assert!(create(&host, "b", &[]).contains("was set aside"));

    // Not made again by itself, but by root.
    let refused = host.bothy(["image", "warm"].iter().chain(&SHAPE));
    assert_ne!(refused.status, 0);
    assert!(refused.stderr.contains("set aside") && refused.stderr.contains("--force"), "{}", refused.stderr);
    host.bothy(["vm", "delete", "--force", "a", "b"]).ok();
    host.assert_no_leaks();
    warm(&host, &["--force"]);
    host.take_for_granted();
    assert!(create(&host, "c", &[]).contains("its guest was resumed"));

    // Nor does a VMM that dies while its guest is resumed.
    let begun = Instant::now();
    let killed = std::thread::scope(|scope| {
        let told = scope.spawn(|| create(&host, "d", &[]));
        let vmm = loop {
            match host.vmm_of("d") {
                Some((_, vmm)) => break vmm,
                None => assert!(begun.elapsed() < Duration::from_secs(60), "it has no VMM\n{}", host.logs()),
            }
        };
        kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
        told.join().unwrap()
    });
    assert!(killed.contains("it could not be resumed, so it boots"), "{killed}");
    assert_eq!(host.sh("d", "hostname").ok().stdout.trim(), "d");
    assert!(templates(&host)[0]["set_aside"].is_string());
    host.bothy(["vm", "delete", "--force", "c", "d"]).ok();
    host.finish();
}

#[test]
fn thirty_in_a_row_see_nothing_of_one_another() {
    require_root!();
    let host = warm_host();
    let before = files(&host);
    for n in 0..30 {
        let name = format!("m{n}");
        assert!(create(&host, &name, &[]).contains("its guest was resumed"), "{n}");
        let found = host.sh(
            &name,
            "ls /root/mine /etc/mine 2>/dev/null; echo mine >/root/mine; echo mine >/etc/mine; sync",
        );
        assert_eq!((found.status, found.stdout.as_str()), (0, ""), "machine {n} finds what another wrote");
        // The one before ends while this one lives.
        if n > 0 {
            host.bothy(["vm", "delete", "--force", &format!("m{}", n - 1)]).ok();
        }
    }
    host.bothy(["vm", "delete", "--force", "m29"]).ok();
    assert_eq!(templates(&host)[0]["uses"], 30);
    assert_eq!(files(&host), before, "nobody writes to a template");
    host.finish();
}

#[test]
fn a_crash_while_one_is_made_leaves_nothing() {
    require_root!();
    let mut host = Host::start_with(&[], |config| config.template.max = 2);
    for (service, stage) in
        [(Service::Vm, "wait_guest"), (Service::Vm, "save"), (Service::Image, "freeze_disks")]
    {
        let begun = Instant::now();
        let mut making = host.command("bothy");
        making.args(["image", "warm"]).args(SHAPE);
        let making = host.spawn(&mut making);
        // As near to that stage as one gets by looking.
        let in_stage = || {
            let ops = host.bothy(["op", "list", "--json"]).json();
            let op = ops.as_array().unwrap().iter().find(|op| op["kind"] == "template.make").cloned();
            let stages = op.map(|op| op["stages"].clone()).unwrap_or_default();
            let stage = stages.as_array().and_then(|all| all.iter().find(|s| s["name"] == stage).cloned());
            stage.is_some()
        };
        while !in_stage() {
            assert!(begun.elapsed() < Duration::from_secs(120), "{stage} is never reached\n{}", host.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
        host.kill_service(service);
        drop(making);
        let over = || {
            let ops = host.bothy(["op", "list", "--json"]);
            ops.status == 0 && ops.json().as_array().unwrap().iter().all(|op| op["finished"].is_string())
        };
        while !over() {
            assert!(begun.elapsed() < Duration::from_secs(180), "it does not end\n{}", host.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
        match templates(&host).as_slice() {
            [] => host.assert_no_leaks(),
            // The kill came too late to matter.
            [_] => {
                host.take_for_granted();
                warm(&host, &["--force"]);
            }
            more => panic!("{more:#?}"),
        }
    }
    warm(&host, &[]);
    host.take_for_granted();
    assert!(create(&host, "a", &[]).contains("its guest was resumed"));
    host.bothy(["vm", "delete", "--force", "a"]).ok();

    // Nor does an image that goes leave its template: the next agent finds it of no use.
    host.bothy(["image", "rm", "debian"]).ok();
    host.kill_service(Service::Vm);
    let begun = Instant::now();
    let left = || host.bothy(["image", "templates", "--json"]);
    while left().status != 0 || !files(&host).is_empty() || !templates(&host).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it stays: {:?}\n{}", left(), host.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    host.finish();
}
