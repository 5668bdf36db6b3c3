//! The leak check itself: one planted leak of each kind must be found. A check that finds nothing proves nothing.

use bothy_e2e::{
    host::Host,
    leak::{Kind, Thing},
};
use bothy_testkit::{ChildGuard, require_root};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn run(host: &Host, program: &str, args: &[&str]) {
    let mut command = Command::new(program);
    command.args(args);
    let mut child = host.spawn(&mut command);
    assert!(child.inner().wait().is_ok_and(|s| s.success()), "{program} {args:?}");
}

/// A child that was only just forked is not yet what it will be, so it may take a moment to be found.
#[track_caller]
fn found(host: &Host, kind: Kind, what: &str) {
    let is_it = |t: &Thing| t.kind == kind && t.what.contains(what);
    let seen = (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        host.leaks().iter().any(is_it)
    });
    assert!(seen, "{kind:?} {what} not in {:#?}", host.leaks());
}

/// This process' own group in version 2's hierarchy, where groups can be made in it.
fn own_cgroup() -> Option<PathBuf> {
    let mounts = fs_err::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|l| l.contains(" - cgroup2 "))?.split(' ').nth(4)?;
    let own = fs_err::read_to_string("/proc/self/cgroup").ok()?;
    let group = Path::new(mount).join(own.lines().find_map(|l| l.strip_prefix("0::/"))?);
    let probe = group.join(format!("planted-{}", std::process::id()));
    fs_err::create_dir(&probe).ok()?;
    fs_err::remove_dir(&probe).ok()?;
    Some(group)
}

#[test]
fn planted_leaks_of_each_kind_are_found() {
    require_root!();
    let host = Host::start_bare(&[], |_| {});
    host.assert_no_leaks();
    let state = host.config.state_dir.clone();

    let process = host.spawn(Command::new("sleep").arg("300"));
    found(&host, Kind::Process, "sleep 300");
    drop(process);
    let outside = ChildGuard::new(Command::new("sleep").arg("301").current_dir(&state).spawn().unwrap());
    found(&host, Kind::Process, "sleep 301");
    drop(outside);

    run(&host, "ip", &["tuntap", "add", "planted0", "mode", "tap"]);
    found(&host, Kind::Tap, "planted0");
    run(&host, "ip", &["tuntap", "del", "planted0", "mode", "tap"]);

    run(&host, "ip", &["link", "add", "planted1", "type", "bridge"]);
    found(&host, Kind::Link, "planted1");
    run(&host, "ip", &["link", "del", "planted1"]);

    run(&host, "nft", &["add", "table", "inet", "planted"]);
    found(&host, Kind::Nftables, "planted");
    run(&host, "nft", &["delete", "table", "inet", "planted"]);

    let mount = state.join("mnt");
    fs_err::create_dir(&mount).unwrap();
    nix::mount::mount(Some("none"), &mount, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .unwrap();
    found(&host, Kind::Mount, "mnt");
    nix::mount::umount(&mount).unwrap();
    fs_err::remove_dir(&mount).unwrap();

    let file = state.join("vm-agent/planted.img");
    fs_err::write(&file, vec![0; 1 << 20]).unwrap();
    found(&host, Kind::File, "planted.img");
    let device = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
    let device = String::from_utf8(device.stdout).unwrap();
    found(&host, Kind::LoopDevice, "planted.img");
    assert!(Command::new("losetup").args(["--detach", device.trim()]).status().unwrap().success());
    fs_err::remove_file(&file).unwrap();

    let socket = host.config.run_dir.join("planted.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    found(&host, Kind::Socket, "planted.sock");
    drop(listener);
    fs_err::remove_file(&socket).unwrap();

    // Without an image the create fails, and its VM is one that this host has had.
    host.bothy(["vm", "create", "--name", "planted"]);
    let ops = host.bothy(["op", "list", "--json"]).json();
    let vm: bothy_contract::VmId = serde_json::from_value(ops[0]["vm"].clone()).unwrap();
    if let Some(group) = own_cgroup() {
        let group = group.join(format!("bothy-vm-{vm}"));
        fs_err::create_dir(&group).unwrap();
        found(&host, Kind::Cgroup, &vm.to_string());
        fs_err::remove_dir(&group).unwrap();
    }

    for (database, insert) in [("vm-agent/vm.db", "vm"), ("net-agent/net.db", "lease")] {
        let db = rusqlite::Connection::open(state.join(database)).unwrap();
        db.pragma_update(None, "foreign_keys", false).unwrap();
        let columns: Vec<String> = db
            .prepare(&format!("SELECT name FROM pragma_table_info('{insert}')"))
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let values = vec!["77"; columns.len()].join(",");
        db.execute(&format!("INSERT INTO {insert} VALUES ({values})"), []).unwrap();
        found(&host, Kind::Row, insert);
        db.execute(&format!("DELETE FROM {insert} WHERE {} = 77", columns[0]), []).unwrap();
    }

    host.assert_no_leaks();
    host.finish();
}
