//! What two real guests can reach, in both families, with packets of their own making; and an outside that is a namespace of
//! its own behind the host.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a helper that fails is a failed test"
)]

use bothy_e2e::host::{Host, QUICK};
use bothy_e2e::images;
use bothy_testkit::{ChildGuard, Netns, require_root, temp_dir};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the outside and the host's own service listen.
const PORT: u16 = 8099;
/// The outside's addresses, the last of them the metadata service's.
const WORLD: [&str; 2] = ["198.51.100.2", "2001:db8:99::2"];
const METADATA: &str = "169.254.169.254";
/// The host's addresses towards it.
const UPLINK: [&str; 2] = ["198.51.100.1", "2001:db8:99::1"];

fn bash(netns: &Netns, line: &str) {
    let mut command = Command::new("bash");
    let status = netns.spawn(command.args(["-ec", line]).stdin(Stdio::null())).unwrap().wait().unwrap();
    assert!(status.success(), "{line}");
}

/// Joins a namespace for the host with one for the outside.
fn join(host: &Netns, world: &Netns) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), world.fd().as_raw_fd());
    let [host4, host6] = UPLINK;
    let [world4, world6] = WORLD;
    bash(host, &format!("ip link add up0 type veth peer name out0; ip link set out0 netns {path}"));
    bash(
        world,
        &format!(
            "ip address add {world4}/24 dev out0; ip address add {world6}/64 dev out0 nodad; ip link set out0 up
             ip address add {METADATA}/32 dev out0"
        ),
    );
    bash(
        host,
        &format!(
            "ip address add {host4}/24 dev up0; ip address add {host6}/64 dev up0 nodad; ip link set up0 up
             ip route add default via {world4}; ip -6 route add default via {world6}"
        ),
    );
}

fn outside(netns: &Netns, log: &Path) -> ChildGuard {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network_world.py");
    let mut command = Command::new("python3");
    command.args([script, &PORT.to_string()]).arg(log).stdin(Stdio::null());
    ChildGuard::new(netns.spawn(&mut command).unwrap())
}

/// A guest and its place on the network.
struct Guest {
    name: &'static str,
    mac: String,
    addresses: [String; 2],
    gateways: [String; 2],
}

impl Guest {
    fn create(host: &Host, name: &'static str, more: &[&str]) -> Self {
        let vm = host.create_quick(name, &[&["--memory", "256M"], more].concat());
        let of = |field: &str| vm["lease"][field].as_str().unwrap_or_else(|| panic!("{vm:#}")).to_owned();
        let script = include_str!("network_probe.py");
        host.sh(name, &format!("cat > /root/probe.py <<'END'\n{script}\nEND")).ok();
        Self {
            name,
            mac: of("mac"),
            addresses: [of("address"), of("address6")],
            gateways: [of("gateway"), of("gateway6")],
        }
    }

    /// Runs the probe: whether it says yes.
    fn tries(&self, host: &Host, line: &str) -> bool {
        let ran = host.sh(self.name, &format!("python3 /root/probe.py {line}")).ok();
        assert!(ran.stdout.starts_with("yes") || ran.stdout.starts_with("no: "), "{line}: {ran:?}");
        ran.stdout.starts_with("yes")
    }

    /// Whether it reaches `port` of `address`.
    fn reaches(&self, host: &Host, address: &str, port: u16) -> bool {
        self.tries(host, &format!("tcp {address} {port}"))
    }
}

#[test]
fn guests_are_apart_and_the_outside_is_asked_for() {
    require_root!();
    let (netns, world, dir) = (Netns::new(), Netns::new(), temp_dir());
    join(&netns, &world);
    let log = dir.path().join("datagrams");
    let _outside = outside(&world, &log);
    let mut host = Host::start_inside(netns, &[], |config| {
        images::variant_into(config, QUICK, |manifest| manifest["wait"] = serde_json::json!([]));
        config.template.max = 1;
    });
    host.warm(&[QUICK, "--memory", "256M"]);
    // A service of the host, at all its addresses.
    let mut service = Command::new("python3");
    service.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network_world.py"));
    service.arg(PORT.to_string()).arg(dir.path().join("own")).stdin(Stdio::null());
    let service = host.spawn(&mut service);
    // One that was resumed from a template, one that has booted: what holds for the one holds for the other.
    let (one, two) = (Guest::create(&host, "one", &[]), Guest::create(&host, "two", &["--cold"]));
    assert_eq!(host.resumed(), 1);

    // In the guest: one address in each family and the link-local one of its MAC, at once and not in a while.
    let shown =
        host.sh("two", "ip -o address show scope global; ip -6 -o address show tentative").ok().stdout;
    assert_eq!(shown.lines().count(), 2, "{shown}");
    assert!(two.addresses.iter().all(|own| shown.contains(&format!(" {own}/"))), "{shown}");

    // A listener that is there: without one, a closed way and a closed port look alike.
    let server = include_str!("network_world.py");
    let start = "setsid python3 /root/world.py 8080 /root/log </dev/null >/root/out 2>&1 &";
    host.sh("two", &format!("cat > /root/world.py <<'END'\n{server}\nEND\n{start}")).ok();
    let local = "for i in $(seq 50); do python3 /root/probe.py tcp ::1 8080 | grep -q yes && exit 0; sleep 0.2; done; cat /root/out; exit 1";
    host.sh("two", local).ok();

    for (family, own) in one.addresses.iter().enumerate() {
        let probe = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network_probe.py");
        let answer = host.run_bash(&format!("python3 {probe} ping {own}")).ok().stdout;
        assert_eq!(answer.trim(), "yes", "the host's way to {own}");
        assert!(one.tries(&host, &format!("ping {own}")), "the probe itself works");
        let other = &two.addresses[family];
        assert!(!one.tries(&host, &format!("ping {other}")), "guest to guest");
        assert!(
            host.run_bash(&format!("exec 3<>/dev/tcp/{other}/8080")).status == 0,
            "the host's way to {other}"
        );
        assert!(!one.reaches(&host, other, 8080), "guest to guest");
        // The host's services, at every address of the host's, and nothing outside.
        assert!(host.run_bash(&format!("exec 3<>/dev/tcp/{}/{PORT}", UPLINK[family])).status == 0);
        assert!(!one.reaches(&host, &one.gateways[family], PORT), "guest to the host");
        assert!(!one.reaches(&host, UPLINK[family], PORT), "guest to the host");
        assert!(host.run_bash(&format!("exec 3<>/dev/tcp/{}/{PORT}", WORLD[family])).status == 0);
        assert!(!one.reaches(&host, WORLD[family], PORT), "guest to the outside, without egress");
    }

    host.bothy(["vm", "set", "one", "--nat", "on"]).ok();
    for family in [0, 1] {
        assert!(one.reaches(&host, WORLD[family], PORT), "guest to {} with egress", WORLD[family]);
        assert!(!one.reaches(&host, UPLINK[family], PORT), "egress opens nothing of the host");
        assert!(!one.reaches(&host, &two.addresses[family], 8080), "egress opens no other guest");
        assert!(!two.reaches(&host, WORLD[family], PORT), "the other guest's egress");
    }
    assert!(host.run_bash(&format!("exec 3<>/dev/tcp/{METADATA}/{PORT}")).status == 0);
    assert!(!one.reaches(&host, METADATA, PORT), "the metadata service");

    spoofs(&host, &one, &two, &log);

    host.bothy(["vm", "set", "one", "--nat", "off"]).ok();
    for world in WORLD {
        assert!(!one.reaches(&host, world, PORT), "guest to {world} without egress again");
    }

    // Who shares a group with it, and by its name, as long as both are in it.
    let all = |what: &str, yes: bool| {
        let places = two.addresses.iter().map(String::as_str).chain(["two.vm"]);
        for place in places {
            assert_eq!(one.reaches(&host, place, 8080), yes, "{what}: {place}");
        }
    };
    host.bothy(["vm", "set", "one", "--group", "lab"]).ok();
    host.bothy(["vm", "set", "two", "--group", "other"]).ok();
    all("two that share no group", false);
    host.bothy(["vm", "set", "two", "--group", "lab"]).ok();
    all("two of a group", true);
    assert_eq!(host.show("two")["groups"], serde_json::json!(["lab", "other"]));
    assert!(
        !one.reaches(&host, UPLINK[0], PORT) && !one.reaches(&host, WORLD[0], PORT),
        "a group opens no more"
    );
    host.bothy(["vm", "set", "two", "--no-group", "lab"]).ok();
    all("one that has left", false);
    let refused = host.bothy(["vm", "set", "two", "--no-group", "lab"]);
    assert!(refused.status != 0 && refused.stderr.contains("not in a group lab"), "{refused:?}");

    drop(service);
    host.bothy(["vm", "delete", "one", "two", "--force"]).ok();
    // The test's own, and so not bothy's to take away.
    host.run_bash("ip link delete up0").ok();
    host.finish();
}

/// Datagrams of `one`, which has egress: its own arrive outside, those with another's address or MAC do not.
fn spoofs(host: &Host, one: &Guest, two: &Guest, log: &Path) {
    let bridge =
        host.run_bash("ip -o link show type bridge | sed 's/.*ether \\([^ ]*\\) .*/\\1/'").ok().stdout;
    let bridge = bridge.trim();
    let link = host.sh(one.name, "ls /sys/class/net | grep -v '^lo$' | head -1").ok().stdout;
    for family in [0, 1] {
        let send = |mac: &str, source: &str, word: &str| {
            let (link, to) = (link.trim(), WORLD[family]);
            assert!(one.tries(host, &format!("udp {link} {bridge} {mac} {source} {to} {PORT} {word}")));
        };
        let own = &one.addresses[family];
        send(&one.mac, &two.addresses[family], &format!("address-{family}"));
        send(&two.mac, own, &format!("mac-{family}"));
        send(&two.mac, &two.addresses[family], &format!("both-{family}"));
        // Last: once these are there, the others have had their time.
        send(&one.mac, own, &format!("own-{family}"));
    }
    for _ in 0..100 {
        let seen = fs_err::read_to_string(log).unwrap_or_default();
        if seen.contains("own-0") && seen.contains("own-1") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let seen = fs_err::read_to_string(log).unwrap();
    let mut words: Vec<&str> = seen.lines().collect();
    words.dedup();
    assert_eq!(words, ["own-0", "own-1"], "who came out");
}
