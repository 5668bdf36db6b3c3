//! The systemd units in `deploy/systemd`: systemd itself finds nothing wrong with them, and they fit the services, the
//! users, the directories and the configuration that come with them. Nothing is booted here; `deploy.rs` does that.
#![expect(clippy::unwrap_used, reason = "a test's own helpers: what fails in them is a failed test")]

use bothy_config::Config;
use bothy_contract::Service;
use bothy_testkit::{TempDir, binary, temp_dir};
use std::{
    collections::BTreeSet,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

/// The configuration that the units name.
const CONFIG: &str = "/etc/bothy/bothy.toml";
/// Where the units expect the programs.
const BIN: &str = "/usr/bin/";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd")
}

fn unit_names() -> Vec<String> {
    let names = fs_err::read_dir(deploy()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|n| n.ends_with(".service") || n.ends_with(".target")).collect();
    names.sort();
    names
}

fn unit(name: &str) -> String {
    fs_err::read_to_string(deploy().join(name)).unwrap()
}

/// All values of `key` in a unit, in order.
fn values(unit: &str, key: &str) -> Vec<String> {
    let of = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    unit.lines().filter_map(of).collect()
}

/// The words of all values of `key`.
fn words(unit: &str, key: &str) -> BTreeSet<String> {
    values(unit, key).iter().flat_map(|v| v.split_whitespace()).map(str::to_owned).collect()
}

fn config() -> Config {
    Config::load(&deploy().join("bothy.toml")).unwrap()
}

/// Whether `program` is there. If not, says so, or panics where no test may be skipped.
fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
        return true;
    }
    let message = format!(
        "SKIPPED units: needs `{program}`; install it with `apt-get install systemd`, or run `cargo xtask setup`"
    );
    assert!(std::env::var_os("BOTHY_TEST_NO_SKIP").is_none_or(|v| v != "1"), "{message}");
    // Not `eprintln!`: the test runner swallows what a passing test prints through the macros.
    let _ = writeln!(std::io::stderr(), "{message}");
    false
}

/// A copy of the units whose programs are the ones of this build.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn new() -> Self {
        let dir = temp_dir();
        let (bin, units) = (dir.path().join("bin"), dir.path().join("units"));
        fs_err::create_dir(&bin).unwrap();
        fs_err::create_dir(&units).unwrap();
        for name in Service::ALL.map(Service::binary).into_iter().chain(["bothy", "bothy-vmm"]) {
            symlink(binary(name), bin.join(name)).unwrap();
        }
        // systemd only looks whether it is there and can be run; the real one may be anywhere.
        let server = bin.join("nats-server");
        fs_err::write(&server, "#!/bin/sh\n").unwrap();
        fs_err::set_permissions(&server, std::fs::Permissions::from_mode(0o755)).unwrap();
        let here = format!("{}/", bin.display());
        for name in unit_names() {
            fs_err::write(units.join(&name), unit(&name).replace(BIN, &here)).unwrap();
        }
        Self { dir }
    }

    fn units(&self) -> PathBuf {
        self.dir.path().join("units")
    }

    /// What systemd has to say against the units: its exit status and its words.
    fn complaints(&self) -> (bool, String) {
        let files = unit_names().into_iter().map(|name| self.units().join(name));
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .args(files)
            // The closing colon adds the host's own units, such as those of the targets.
            .env("SYSTEMD_UNIT_PATH", format!("{}:", self.units().display()))
            .env("SYSTEMD_LOG_LEVEL", "warning")
            .env("LC_ALL", "C.UTF-8")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        // What it says of the host's own units is none of our concern.
        let said = String::from_utf8_lossy(&said);
        let ours: Vec<_> = said.lines().filter(|line| line.contains("bothy")).collect();
        (output.status.success(), ours.join("\n"))
    }

    fn replace(&self, name: &str, from: &str, to: &str) {
        let path = self.units().join(name);
        let text = fs_err::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        fs_err::write(&path, text.replacen(from, to, 1)).unwrap();
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if !have("systemd-analyze") {
        return;
    }
    let (good, said) = Copy::new().complaints();
    assert!(good && said.is_empty(), "{said}");
}

#[test]
fn systemd_finds_what_is_wrong_with_broken_units() {
    if !have("systemd-analyze") {
        return;
    }
    let breaks = [
        ("bothy-gateway.service", "Restart=on-failure", "Restart=perhaps", "perhaps"),
        ("bothy-vm-agent.service", "KillMode=", "KillMoode=", "KillMoode"),
        ("bothy-bus.service", "/nats-server", "/no-such-server", "no-such-server"),
        (
            "bothy-net-agent.service",
            "RestrictAddressFamilies=AF_UNIX",
            "RestrictAddressFamilies=AF_NIX",
            "AF_NIX",
        ),
    ];
    for (name, from, to, complaint) in breaks {
        let copy = Copy::new();
        copy.replace(name, from, to);
        let (_, said) = copy.complaints();
        assert!(said.contains(complaint) && said.contains(name), "{name} with {to}: {said}");
    }
}

#[test]
fn every_service_has_a_unit_that_starts_its_binary() {
    let mut expected: BTreeSet<String> =
        ["bothy-bus.service", "bothy-vms.service", "bothy.target"].map(str::to_owned).into();
    let wanted = words(&unit("bothy.target"), "Wants");
    for service in Service::ALL {
        let name = format!("{}.service", service.binary());
        let unit = unit(&name);
        assert_eq!(values(&unit, "ExecStart"), [format!("{BIN}{} --config {CONFIG}", service.binary())]);
        // Each of the binaries says READY=1.
        assert_eq!(values(&unit, "Type"), ["notify"], "{name}");
        assert!(words(&unit, "After").contains("bothy-bus.service"), "{name}");
        assert!(wanted.contains(&name), "{name}");
        expected.insert(name);
    }
    assert_eq!(unit_names().into_iter().collect::<BTreeSet<_>>(), expected);
    // Machines outlive the agent: nothing but the agent's own process may be stopped with it.
    assert_eq!(values(&unit("bothy-vm-agent.service"), "KillMode"), ["process"]);
    assert!(words(&unit("bothy-vm-agent.service"), "Requires").contains("bothy-vms.service"));
    let bus = unit("bothy-bus.service");
    assert!(wanted.contains("bothy-bus.service"));
    assert_eq!(values(&bus, "ExecStartPre"), [format!("+{BIN}bothy host bus-setup --config {CONFIG}")]);
    let conf = config().bus_dir().join("nats.conf");
    assert_eq!(values(&bus, "ExecStart"), [format!("{BIN}nats-server -c {}", conf.display())]);
}

#[test]
fn the_bus_set_up_is_what_the_unit_calls() {
    let dir = temp_dir();
    let config = Config::new(dir.path().join("state"), dir.path().join("run"));
    let file = dir.path().join("bothy.toml");
    fs_err::write(&file, config.to_toml().unwrap()).unwrap();
    let bus = unit("bothy-bus.service");
    let line = values(&bus, "ExecStartPre").remove(0).replace(CONFIG, file.to_str().unwrap());
    let mut words = line.trim_start_matches('+').strip_prefix(BIN).unwrap().split(' ');
    let output = Command::new(binary(words.next().unwrap())).args(words).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(config.bus_dir().join("nats.conf").is_file());
}

#[test]
fn the_example_configuration_fits_the_units_and_the_defaults() {
    let config = config();
    // It shows every setting at its default, so a default that changes must change there too.
    assert_eq!(config, Config::new("/var/lib/bothy", "/run/bothy"));
    for name in unit_names() {
        for path in words(&unit(&name), "ReadWritePaths") {
            let path = Path::new(&path);
            assert!(
                path.starts_with(&config.state_dir) || path.starts_with(&config.run_dir),
                "{name}: {path:?}"
            );
        }
    }
    // A path that a unit may write to must exist when it starts, or it does not start.
    let tmpfiles = fs_err::read_to_string(deploy().join("tmpfiles.d/bothy.conf")).unwrap();
    let made: BTreeSet<_> = tmpfiles
        .lines()
        .filter_map(|line| line.strip_prefix("d ")?.split_whitespace().next())
        .map(PathBuf::from)
        .collect();
    for name in unit_names() {
        for path in words(&unit(&name), "ReadWritePaths") {
            assert!(made.contains(Path::new(&path)), "{name}: nobody makes {path}");
        }
    }
    // The services that may not make their own directory below root's.
    for service in [Service::Vm, Service::Net, Service::Image] {
        assert!(made.contains(&config.service_dir(service)), "{service:?}");
    }
}

/// systemd passes over a capability that it does not know without a word, so that is checked here.
#[test]
fn the_units_have_the_capabilities_that_the_privilege_table_names() {
    let docs = fs_err::read_to_string(deploy().join("../../docs/privileges.md")).unwrap();
    for service in Service::ALL {
        let row = docs.lines().find(|line| line.starts_with(&format!("| `{}` |", service.binary()))).unwrap();
        let needs = row.split('|').nth(2).unwrap();
        let named: BTreeSet<String> = needs
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("CAP_"))
            .map(str::to_owned)
            .collect();
        let unit = unit(&format!("{}.service", service.binary()));
        assert_eq!(words(&unit, "AmbientCapabilities"), named, "{service:?}");
        if words(&unit, "User").contains("root") {
            assert!(needs.contains("root"), "{service:?} runs as root: {needs}");
        } else {
            assert!(!values(&unit, "CapabilityBoundingSet").is_empty(), "{service:?}");
            assert_eq!(words(&unit, "CapabilityBoundingSet"), named, "{service:?}");
        }
    }
}

#[test]
fn the_users_and_groups_of_the_units_and_directories_are_made() {
    let text = fs_err::read_to_string(deploy().join("sysusers.d/bothy.conf")).unwrap();
    let of = |kind: &str| -> BTreeSet<String> {
        let lines = text.lines().filter(|line| kind.contains(line.get(..1).unwrap_or("#")));
        lines.filter_map(|line| line.split_whitespace().nth(1)).chain(["root"]).map(str::to_owned).collect()
    };
    // A user's line makes a group of the same name.
    let (users, groups) = (of("u"), of("ug"));
    for name in unit_names().iter().filter(|name| name.ends_with(".service")) {
        let unit = unit(name);
        let user = words(&unit, "User");
        assert_eq!(user.len(), 1, "{name}");
        assert!(user.is_subset(&users), "{name}: {user:?}");
        assert!(words(&unit, "SupplementaryGroups").is_subset(&groups), "{name}");
        // The set-up gives an identity to the user named like the binary: another one could not read it. The place of the
        // VMs' groups runs nothing and is the vm-agent's.
        let own = match name.trim_end_matches(".service") {
            "bothy-vms" => Service::Vm.binary(),
            own => own,
        };
        assert!(user.contains(own) || (user.contains("root") && !users.contains(own)), "{name}: {user:?}");
    }
    let tmpfiles = fs_err::read_to_string(deploy().join("tmpfiles.d/bothy.conf")).unwrap();
    for line in tmpfiles.lines().filter(|line| line.starts_with("d ")) {
        let fields: Vec<_> = line.split_whitespace().collect();
        assert!(users.contains(fields[3]) && groups.contains(fields[4]), "{line}");
    }
}

/// systemd's own tools read the two files and do with them, below a root of their own, what the units need.
#[test]
fn systemd_makes_the_users_and_the_directories() {
    bothy_testkit::require_root!();
    if !have("systemd-sysusers") || !have("systemd-tmpfiles") {
        return;
    }
    let root = temp_dir();
    let run = |program: &str, more: &[&str], file: &str| {
        let output = Command::new(program)
            .arg(format!("--root={}", root.path().display()))
            .args(more)
            .arg(fs_err::canonicalize(deploy().join(file)).unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    };
    fs_err::create_dir(root.path().join("etc")).unwrap();
    run("systemd-sysusers", &[], "sysusers.d/bothy.conf");
    run("systemd-tmpfiles", &["--create"], "tmpfiles.d/bothy.conf");
    let group = fs_err::read_to_string(root.path().join("etc/group")).unwrap();
    let passwd = fs_err::read_to_string(root.path().join("etc/passwd")).unwrap();
    assert!(passwd.lines().any(|line| line.starts_with("bothy-vm-agent:")), "{passwd}");
    let id = |name: &str| -> u32 {
        let line = group.lines().find(|line| line.split(':').next() == Some(name)).unwrap();
        line.split(':').nth(2).unwrap().parse().unwrap()
    };
    use std::os::unix::fs::MetadataExt;
    let run_dir = fs_err::metadata(root.path().join("run/bothy")).unwrap();
    assert_eq!((run_dir.mode() & 0o7777, run_dir.uid(), run_dir.gid()), (0o3775, 0, id("bothy")));
    let vm = fs_err::metadata(root.path().join("var/lib/bothy/vm-agent")).unwrap();
    assert_eq!((vm.mode() & 0o7777, vm.gid()), (0o700, id("bothy-vm-agent")));
}
