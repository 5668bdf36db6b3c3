//! The host's own lookups, by a real systemd-resolved on a real system bus: the C library of a program of its own asks
//! 127.0.0.53, as on a host that runs resolved, and nobody asks the agent but resolved.

use crate::{
    machine::Machine,
    resolver::{Resolver, ask, data},
    world::World,
};
use bothy_bus::{Client, testing::TestBus};
use bothy_contract::{
    Code, Service, VmId,
    methods::{NetHostShow, NetLeaseAcquire, NetNameSet},
    net::{AcquireLease, Egress, GetNetHost, NameVm, Resolved},
};
use bothy_testkit::{ChildGuard, require_root};
use hickory_proto::rr::RecordType;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::Signal,
    unistd::{Gid, Uid, chown},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The user of the private `/etc/passwd` that resolved becomes.
const RESOLVER_UID: u32 = 64_995;

const BUS: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>RESOLVE1</include>
</busconfig>
"#;

/// Where the programs are: installed, or as set-up unpacked them.
fn root() -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/resolved");
    let parts = ["usr/share/dbus-1/system.d/org.freedesktop.resolve1.conf", "usr/bin/dbus-daemon"];
    let whole = |root: &PathBuf| parts.iter().all(|part| root.join(part).is_file());
    [PathBuf::from("/"), unpacked].into_iter().find(whole)
}

/// A program of `root`, with the libraries there.
fn program(root: &Path, names: &[&str]) -> Command {
    let found = names.iter().map(|name| root.join(name)).find(|path| path.is_file());
    let mut command = Command::new(found.unwrap_or_else(|| PathBuf::from(names[0])));
    if root != Path::new("/") {
        let libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "lib/x86_64-linux-gnu"];
        let all = libraries.iter().flat_map(|dir| [root.join(dir).join("systemd"), root.join(dir)]);
        command.env("LD_LIBRARY_PATH", std::env::join_paths(all).unwrap());
    }
    command
}

/// The calling thread, and what it starts, gets a `/run` and an `/etc` of its own, as far as names have to do with them.
fn private(dir: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        fs_err::write(&path, text).unwrap();
        let target = Path::new("/etc").join(name);
        // It may be a link to what is not there now.
        let target = fs_err::canonicalize(&target).unwrap_or(target);
        mount(Some(&path), &target, none, MsFlags::MS_BIND, none).unwrap();
    };
    let id = RESOLVER_UID;
    file("passwd", &format!("root:x:0:0::/root:/bin/sh\nsystemd-resolve:x:{id}:{id}::/:/bin/false\n"));
    file("group", &format!("root:x:0:\nsystemd-resolve:x:{id}:\n"));
    file("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n");
    file("hosts", "127.0.0.1 localhost\n");
    file("resolv.conf", "nameserver 127.0.0.53\n");
    for dir in ["/run/dbus", "/run/systemd/resolve", "/run/systemd/resolved.conf.d"] {
        fs_err::create_dir_all(dir).unwrap();
    }
    chown("/run/systemd/resolve", Some(Uid::from_raw(id)), Some(Gid::from_raw(id))).unwrap();
    let text = "[Resolve]\nDNS=192.0.2.2\nFallbackDNS=\nLLMNR=no\nMulticastDNS=no\nDNSSEC=no\n";
    fs_err::write("/run/systemd/resolved.conf.d/test.conf", text).unwrap();
}

fn start_bus(root: &Path, dir: &Path) -> ChildGuard {
    let policy = root.join("usr/share/dbus-1/system.d/org.freedesktop.resolve1.conf");
    let file = dir.join("bus.conf");
    fs_err::write(&file, BUS.replace("RESOLVE1", policy.to_str().unwrap())).unwrap();
    let mut command = program(root, &["usr/bin/dbus-daemon"]);
    command.arg("--nofork").arg(format!("--config-file={}", file.display()));
    ChildGuard::new(command.spawn().unwrap())
}

fn start_resolved(root: &Path) -> ChildGuard {
    let mut command = program(root, &["usr/lib/systemd/systemd-resolved", "lib/systemd/systemd-resolved"]);
    command.env("SYSTEMD_LOG_TARGET", "console").env("SYSTEMD_LOG_LEVEL", "info");
    ChildGuard::new(command.spawn().unwrap())
}

/// What resolved has for the bridge, `dns` or `domain`.
fn told(root: &Path, what: &str) -> String {
    let out = program(root, &["usr/bin/resolvectl"]).args([what, "bothy0"]).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    let text = String::from_utf8(out.stdout).unwrap();
    text.split_once(':').map_or(String::new(), |(_, rest)| rest.trim().to_owned())
}

/// The first column of `getent`, which asks as every program does.
fn lookup(kind: &str, name: &str) -> Vec<String> {
    let out = Command::new("timeout").args(["20", "getent", kind, name]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let column = usize::from(kind == "hosts");
    let mut all: Vec<String> =
        text.lines().filter_map(|l| l.split_whitespace().nth(column)).map(str::to_owned).collect();
    all.dedup();
    all
}

fn agent(config: &Path) -> ChildGuard {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bothy-net-agent"));
    ChildGuard::new(command.arg("--config").arg(config).spawn().unwrap())
}

/// Until the agent says so.
async fn state(gateway: &Client, wanted: impl Fn(&Resolved) -> bool) {
    let mut last = None;
    for _ in 0..300 {
        match gateway.call::<NetHostShow>(&GetNetHost {}).await {
            Ok(host) => last = host.dns.and_then(|dns| dns.resolved),
            Err(e) if matches!(e.code, Code::Unavailable | Code::DeadlineExceeded) => {}
            Err(e) => panic!("{e}"),
        }
        if last.as_ref().is_some_and(&wanted) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("resolved is {last:?}");
}

/// Until it is so.
async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..150 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never: {what}");
}

#[test]
fn the_host_s_resolver_asks_the_bridge_for_machines_and_nothing_else() {
    require_root!();
    let Some(root) = &root() else {
        let missing = "needs systemd-resolved and dbus-daemon: `cargo xtask setup` unpacks them";
        assert!(std::env::var_os("BOTHY_TEST_NO_SKIP").is_none_or(|v| v != "1"), "{missing}");
        println!("SKIPPED host_names: {missing}");
        return;
    };
    let world = &World::new();
    let outside = &world.neighbour();
    let upstream = &Resolver::default();
    upstream.add("far.test.", 60, "198.51.100.7");
    upstream.start(outside, "192.0.2.2");
    world.ns.run(|| {
        let dir = &bothy_testkit::temp_dir();
        private(dir.path());
        let mut bus = TestBus::start();
        bus.config.net.tap_pool_size = 1;
        let file = &bus.config.state_dir.join("bothy.toml");
        let configure = |resolved: bool| {
            let mut config = bus.config.clone();
            config.net.resolved = resolved;
            fs_err::write(file, config.to_toml().unwrap()).unwrap();
        };
        configure(true);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.unwrap().block_on(async {
            let vm_agent = Client::connect(&bus.config, Service::Vm).await.unwrap();
            let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
            // Nobody there yet: the network is as whole as ever.
            let first = agent(file);
            state(&gateway, |s| *s == Resolved::Absent).await;
            let vm = VmId::new();
            let request = AcquireLease { egress: Some(Egress::Open), ..AcquireLease::new(vm) };
            let lease = vm_agent.call::<NetLeaseAcquire>(&request).await.unwrap();
            vm_agent.call::<NetNameSet>(&NameVm { vm, name: "web".parse().unwrap() }).await.unwrap();
            let guest = Machine::new(&world.ns, &lease);

            let _system = start_bus(root, dir.path());
            eventually("a system bus", || Path::new("/run/dbus/system_bus_socket").exists()).await;
            let resolved = start_resolved(root);
            state(&gateway, |s| *s == Resolved::Told).await;
            let (address, address6) = (lease.address.to_string(), lease.address6.unwrap().to_string());
            assert_eq!(lookup("ahostsv4", "web.vm"), [address.as_str()]);
            assert_eq!(lookup("ahostsv6", "web.vm"), [address6.as_str()]);
            assert_eq!(lookup("hosts", &address), ["web.vm"], "and back");
            assert_eq!(lookup("hosts", &address6), ["web.vm"], "and back");
            assert!(lookup("ahosts", "nobody.vm").is_empty());
            assert_eq!(lookup("ahostsv4", "far.test"), ["198.51.100.7"], "all others go where they went");
            assert!(told(root, "domain").split_whitespace().all(|domain| domain.starts_with('~')));
            // What guests ask goes the same way, and comes to an end.
            let far = ask(&guest.ns, lease.gateway.into(), "far.test.", RecordType::A);
            assert_eq!(data(&far), ["198.51.100.7"]);
            let strayed: Vec<String> =
                upstream.asked().into_iter().filter(|name| !name.starts_with("far.test")).collect();
            assert!(strayed.is_empty(), "{strayed:?} are nobody's business outside");

            // One that comes back, and has forgotten all.
            drop(resolved);
            state(&gateway, |s| *s == Resolved::Absent).await;
            let _ = fs_err::remove_dir_all("/run/systemd/resolve/netif");
            let _resolved = start_resolved(root);
            state(&gateway, |s| *s == Resolved::Told).await;
            assert_eq!(lookup("ahostsv4", "web.vm"), [address.as_str()]);

            // As it was before, once the agent has ended.
            assert!(first.stop(Signal::SIGTERM, PATIENCE).success());
            assert_eq!((told(root, "dns"), told(root, "domain")), (String::new(), String::new()));

            configure(false);
            let second = agent(file);
            state(&gateway, |s| *s == Resolved::Off).await;
            assert!(lookup("ahosts", "web.vm").is_empty() && told(root, "dns").is_empty());
            assert!(second.stop(Signal::SIGTERM, PATIENCE).success());

            // What somebody else has set for the bridge is theirs.
            let mut theirs = program(root, &["usr/bin/resolvectl"]);
            assert!(theirs.args(["dns", "bothy0", "192.0.2.9"]).status().unwrap().success());
            configure(true);
            let third = agent(file);
            state(&gateway, |s| matches!(s, Resolved::Refused(why) if why.contains("192.0.2.9"))).await;
            assert!(third.stop(Signal::SIGTERM, PATIENCE).success());
            assert_eq!(told(root, "dns"), "192.0.2.9");
        });
    });
}
