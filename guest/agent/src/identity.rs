//! What makes a guest one machine and not another: its name, its machine id, its resolver, its clock, its randomness.
//! All of it may be set again at any time; a resumed guest is somebody else than its template.

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::files::{self, Put};
use crate::sys;

const KERNELS_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What is laid over it.
const OUR_BOOT_ID: &str = "/run/bothy/boot_id";
/// Where systemd and others before it keep a seed for the next boot.
const SEEDS: [&str; 2] = ["var/lib/systemd/random-seed", "var/lib/urandom/random-seed"];

/// Refuses names that are not DNS labels (RFC 1123): 1 to 63 lower-case letters, digits and inner dashes.
///
/// # Errors
/// Says what is wrong.
pub(crate) fn check_hostname(name: &str) -> Result<(), String> {
    let ok = (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if ok { Ok(()) } else { Err(format!("host name `{name}` is not a DNS label")) }
}

/// Refuses what is not a machine id: 32 lower-case hex digits (machine-id(5)).
///
/// # Errors
/// Says what is wrong.
pub(crate) fn check_machine_id(id: &str) -> Result<(), String> {
    let ok = id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if ok { Ok(()) } else { Err(format!("machine id `{id}` is not 32 lower-case hex digits")) }
}

/// Sets the host name, now and in the files below `root`.
///
/// # Errors
/// When the kernel refuses or a file cannot be written.
pub(crate) fn set_hostname(root: &Path, name: &str, put: Put) -> io::Result<()> {
    nix::unistd::sethostname(name)?;
    put(&root.join("etc/hostname"), format!("{name}\n").as_bytes(), 0o644)?;
    let hosts = root.join("etc/hosts");
    let now = fs_err::read_to_string(&hosts).unwrap_or_default();
    put(&hosts, hosts_with(&now, name).as_bytes(), 0o644)
}

/// Writes the machine id.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn set_machine_id(root: &Path, id: &str, put: Put) -> io::Result<()> {
    let id = format!("{id}\n");
    put(&root.join("etc/machine-id"), id.as_bytes(), 0o444)?;
    // A link to the other in most images; a file of its own is one more place to look for it.
    let bus = root.join("var/lib/dbus/machine-id");
    let own = fs_err::symlink_metadata(&bus).is_ok_and(|meta| meta.is_file());
    if own { put(&bus, id.as_bytes(), 0o444) } else { Ok(()) }
}

/// Lays a file over the kernel's boot id, with the same id: it can be written to later, when the kernel's is that of too many
/// machines.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn lay_boot_id() -> io::Result<()> {
    let ours = Path::new(OUR_BOOT_ID);
    if ours.exists() {
        return Ok(());
    }
    files::write(ours, format!("{}\n", boot_id()?).as_bytes(), 0o444)?;
    Ok(mount(Some(ours), KERNELS_BOOT_ID, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Gives this machine a boot id of its own, where the kernel has its template's: the same in all of its machines.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn new_boot_id() -> io::Result<()> {
    lay_boot_id()?;
    let id = fs_err::read_to_string("/proc/sys/kernel/random/uuid")?;
    // In place: a new file would not be the one that lies over the kernel's.
    files::overwrite(Path::new(OUR_BOOT_ID), id.as_bytes(), 0o444)
}

/// The id of this boot, as every process sees it.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs_err::read_to_string(KERNELS_BOOT_ID)?.trim().to_owned())
}

/// The seeds that user space keeps for its next boot, where the image has any.
pub(crate) fn seeds(root: &Path) -> Vec<PathBuf> {
    SEEDS.map(|path| root.join(path)).into_iter().filter(|path| path.is_file()).collect()
}

/// Replaces them.
///
/// # Errors
/// When there is no randomness, or a file cannot be written.
pub(crate) fn renew_seeds(seeds: &[PathBuf]) -> io::Result<()> {
    for path in seeds {
        let mut seed = vec![0; 512];
        fs_err::File::open("/dev/urandom")?.read_exact(&mut seed)?;
        files::write(path, &seed, 0o600)?;
    }
    Ok(())
}

/// Writes the resolver's configuration, replacing the link to a stub that some images have.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn set_resolver(root: &Path, servers: &[IpAddr], put: Put) -> io::Result<()> {
    let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    put(&root.join("etc/resolv.conf"), text.as_bytes(), 0o644)
}

/// Sets the wall clock to `unix_us` microseconds since 1970.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn set_clock(unix_us: u64) -> io::Result<()> {
    let seconds = i64::try_from(unix_us / 1_000_000).map_err(io::Error::other)?;
    let nanos = i64::try_from(unix_us % 1_000_000 * 1000).map_err(io::Error::other)?;
    Ok(clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos))?)
}

/// Moves the wall clock by that many microseconds.
///
/// # Errors
/// When the kernel refuses, as it does with a time before 1970.
pub(crate) fn step_clock(by_us: i64) -> io::Result<()> {
    if by_us == 0 { Ok(()) } else { set_clock(clock_us().saturating_add_signed(by_us)) }
}

/// The wall clock, in microseconds since 1970.
pub(crate) fn clock_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Feeds the host's randomness to the kernel.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    bytes.chunks(sys::MAX_ENTROPY).try_for_each(sys::add_entropy)
}

/// `/etc/hosts` with one line for the host name, on Debian's address for it, and everything else as it was.
fn hosts_with(now: &str, name: &str) -> String {
    let mut text = String::new();
    if !now.lines().any(|line| line.split_whitespace().next() == Some("127.0.0.1")) {
        text.push_str("127.0.0.1\tlocalhost\n");
    }
    for line in now.lines().filter(|line| line.split_whitespace().next() != Some("127.0.1.1")) {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&format!("127.0.1.1\t{name}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keeps_what_the_image_has_and_names_the_machine_once() {
        let image = "127.0.0.1 localhost\n::1 ip6-localhost\n127.0.1.1 template\n";
        let first = hosts_with(image, "dev");
        assert_eq!(first, "127.0.0.1 localhost\n::1 ip6-localhost\n127.0.1.1\tdev\n");
        assert_eq!(hosts_with(&first, "dev"), first);
        assert_eq!(hosts_with("", "dev"), "127.0.0.1\tlocalhost\n127.0.1.1\tdev\n");
    }

    #[test]
    fn names_and_ids_are_checked() {
        assert!(check_hostname("dev-1").is_ok());
        for bad in ["", "-a", "a-", "A", "a.b", "a\nb", &"a".repeat(64)] {
            assert!(check_hostname(bad).is_err(), "{bad}");
        }
        assert!(check_machine_id("0123456789abcdef0123456789abcdef").is_ok());
        assert!(check_machine_id("0123456789ABCDEF0123456789abcdef").is_err());
        assert!(check_machine_id("0123").is_err());
    }
}
