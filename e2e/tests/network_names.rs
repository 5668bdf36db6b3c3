//! A real guest that may reach a name and nothing else: what it resolves it reaches, and nothing that it did not; who is
//! denied, and the command that allows it, are told by name. VMs are found by name from the host's own resolver.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a failed test")]

use bothy_e2e::host::{Host, QUICK};
use bothy_e2e::images;
use bothy_testkit::{ChildGuard, Netns, require_root, temp_dir};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the outside listens.
const PORT: u16 = 8099;
/// The outside's addresses: of its name server and the allowed name, of another name, and of none.
const WORLD: [&str; 3] = ["198.51.100.2", "198.51.100.3", "198.51.100.4"];

fn bash(netns: &Netns, line: &str) {
    let mut command = Command::new("bash");
    let status = netns.spawn(command.args(["-ec", line]).stdin(Stdio::null())).unwrap().wait().unwrap();
    assert!(status.success(), "{line}");
}

/// Joins a namespace for the host with one for the outside.
fn join(host: &Netns, world: &Netns) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), world.fd().as_raw_fd());
    bash(host, &format!("ip link add up0 type veth peer name out0; ip link set out0 netns {path}"));
    for address in WORLD {
        bash(world, &format!("ip address add {address}/24 dev out0"));
    }
    bash(world, "ip link set out0 up");
    bash(host, "ip address add 198.51.100.1/24 dev up0; ip link set up0 up");
}

fn python(netns: &Netns, script: &str, args: &[&str]) -> ChildGuard {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
    let mut command = Command::new("python3");
    command.arg(script).args(args).stdin(Stdio::null());
    ChildGuard::new(netns.spawn(&mut command).unwrap())
}

#[test]
fn a_guest_reaches_the_names_that_it_may() {
    require_root!();
    let (netns, world, dir) = (Netns::new(), Netns::new(), temp_dir());
    join(&netns, &world);
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (asked, resolv) = (path("asked"), path("resolv.conf"));
    let _outside = python(&world, "network_world.py", &[&PORT.to_string(), &path("datagrams")]);
    let names = [format!("allowed.test={}", WORLD[0]), format!("other.test={}", WORLD[1])];
    let _names = python(&world, "network_names.py", &[WORLD[0], &asked, &names[0], &names[1]]);
    fs_err::write(&resolv, format!("nameserver {}\n", WORLD[0])).unwrap();
    let host = Host::start_inside(netns, &[], |config| {
        images::variant_into(config, QUICK, |manifest| manifest["wait"] = serde_json::json!([]));
        config.net.resolv_conf = (&resolv).into();
    });
    let vm = host.create_quick("one", &["--memory", "256M", "--allow", "allowed.test"]);
    let script = include_str!("network_probe.py");
    host.sh("one", &format!("cat > /root/probe.py <<'END'\n{script}\nEND")).ok();
    let reaches = |what: &str| {
        let ran = host.sh("one", &format!("python3 /root/probe.py tcp {what} {PORT}")).ok();
        assert!(ran.stdout.starts_with("yes") || ran.stdout.starts_with("no: "), "{what}: {ran:?}");
        ran.stdout.starts_with("yes")
    };

    for address in WORLD {
        assert!(host.run_bash(&format!("exec 3<>/dev/tcp/{address}/{PORT}")).status == 0, "the host's way");
        assert!(!reaches(address), "{address} was never resolved");
    }
    assert!(reaches("allowed.test") && reaches(WORLD[0]), "resolved");
    assert!(!reaches(WORLD[1]) && !reaches("other.test"), "neither the name nor its address");
    assert!(!fs_err::read_to_string(&asked).unwrap().contains("other.test"), "nobody heard of it");

    // Denied by name, with the command that allows it, which does.
    let report = host.bothy(["vm", "egress", "one", "--json"]).json();
    let denied = report["denied"].as_array().unwrap_or_else(|| panic!("{report:#}"));
    assert!(denied.iter().any(|d| d["name"] == "other.test"), "{report:#}");
    let command = report["command"].as_str().unwrap_or_else(|| panic!("{report:#}"));
    assert!(command.starts_with("bothy vm egress one allow ") && command.contains("other.test"), "{command}");
    host.bothy(command.split(' ').skip(1)).ok();
    assert!(reaches("other.test") && reaches(WORLD[1]) && reaches("allowed.test"));
    assert!(!reaches(WORLD[2]), "still never resolved");

    // The VM's own name, from within and from the host by its own resolver.
    let own = vm["lease"]["address"].as_str().unwrap();
    let gateway = vm["lease"]["gateway"].as_str().unwrap();
    assert!(host.sh("one", "getent ahostsv4 one.vm").ok().stdout.starts_with(own));
    fs_err::write(dir.path().join("hosts-own"), format!("nameserver {gateway}\n")).unwrap();
    let line = format!("mount --bind {} /etc/resolv.conf && getent ahostsv4 one.vm", path("hosts-own"));
    let found = host.run_bash(&format!("unshare --mount bash -ec '{line}'"));
    assert!(found.stdout.starts_with(own), "{found:?}");

    host.bothy(["vm", "delete", "one", "--force"]).ok();
    // The test's own, and so not bothy's to take away.
    host.run_bash("ip link delete up0").ok();
    host.finish();
}
