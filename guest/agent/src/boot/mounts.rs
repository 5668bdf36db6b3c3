//! The mounts of the boot. The rootfs is shared by all guests and read-only; writes go to the guest's own system
//! disk, joined by overlayfs. A machine without a system disk has a rootfs of its own and mounts it writable.
//!
//! `/dev`, `/proc` and `/sys` move into the new root at once, so that the agent, which lives there, finds them before
//! and after the switch at the same place.

use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::disk;
use super::switch::NEW_ROOT;
use super::{BootError, Tried};
use crate::workdisk;

const BASE: &str = "/base";
/// Where the overlay's upper layer is mounted: out of every process' sight once the root is switched.
pub(crate) const SYSTEM: &str = "/system";

/// How long a disk may take to appear after its driver is loaded.
const PATIENCE: Duration = Duration::from_secs(5);

/// `/dev`, `/proc`, `/sys` of the initramfs.
pub(super) fn kernel_file_systems() -> Result<(), BootError> {
    let common = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    for (kind, target, flags) in [
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID),
        ("proc", "/proc", common | MsFlags::MS_NODEV),
        ("sysfs", "/sys", common | MsFlags::MS_NODEV),
    ] {
        make_directory(Path::new(target))?;
        match mount(Some(kind), target, Some(kind), flags, None::<&str>) {
            // A kernel with CONFIG_DEVTMPFS_MOUNT may have been first.
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => return Err(errno).tried(|| format!("mount {target}")),
        }
    }
    Ok(())
}

/// Mounts the new root, and moves the kernel's file systems into it.
pub(super) fn new_root() -> Result<(), BootError> {
    let root = disk::wait_for("rootfs", PATIENCE).tried(|| "find the root disk".into())?;
    let system = disk::by_serial("system").tried(|| "find the system disk".into())?;
    let new_root = Path::new(NEW_ROOT);
    if let Some(system) = system {
        ext4(&root, Path::new(BASE), MsFlags::MS_RDONLY)?;
        ext4(&system, Path::new(SYSTEM), MsFlags::empty())?;
        grow(&system, Path::new(SYSTEM)).tried(|| "grow the system disk's file system".into())?;
        make_directory(&Path::new(SYSTEM).join("upper"))?;
        make_directory(&Path::new(SYSTEM).join("work"))?;
        make_directory(new_root)?;
        let options = overlay_options(BASE, SYSTEM);
        mount(Some("overlay"), new_root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .tried(|| "mount the overlay root".into())?;
    } else {
        ext4(&root, new_root, MsFlags::empty())?;
        grow(&root, new_root).tried(|| "grow the root file system".into())?;
    }
    for name in ["dev", "proc", "sys"] {
        let (from, to) = (Path::new("/").join(name), new_root.join(name));
        make_directory(&to)?;
        mount(Some(&from), &to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .tried(|| format!("move {} into the new root", from.display()))?;
    }
    Ok(())
}

/// Mounts `/dev/pts` below `root` if it is not: without it no command gets a terminal, and systemd, which would mount
/// it, takes a moment to come to it.
///
/// # Errors
/// When it cannot be mounted.
pub(crate) fn mount_pts(root: &Path) -> Result<(), BootError> {
    let pts = root.join("dev/pts");
    make_directory(&pts)?;
    if pts.join("ptmx").exists() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("devpts"), &pts, Some("devpts"), flags, Some("gid=5,mode=620,ptmxmode=000"))
        .tried(|| "mount /dev/pts".into())
}

/// What systemd would mount for itself, for images without it.
pub(super) fn for_stay() -> Result<(), BootError> {
    for (target, options) in [("/run", "mode=755"), ("/dev/shm", "mode=1777")] {
        make_directory(Path::new(target))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(options))
            .tried(|| format!("mount {target}"))?;
    }
    Ok(())
}

fn grow(disk: &Path, mounted: &Path) -> std::io::Result<()> {
    workdisk::grow(disk, &fs_err::File::open(mounted)?).map(drop)
}

fn overlay_options(base: &str, system: &str) -> String {
    format!("lowerdir={base},upperdir={system}/upper,workdir={system}/work")
}

fn ext4(disk: &Path, target: &Path, flags: MsFlags) -> Result<(), BootError> {
    make_directory(target)?;
    mount(Some(disk), target, Some("ext4"), flags, None::<&str>)
        .tried(|| format!("mount {} (ext4) on {}", disk.display(), target.display()))
}

fn make_directory(path: &Path) -> Result<(), BootError> {
    if path.is_dir() {
        return Ok(());
    }
    fs_err::create_dir_all(path).tried(|| "make a mount point".into())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_upper_and_work_directories_are_on_one_disk() {
        let options = super::overlay_options("/base", "/system");
        assert_eq!(options, "lowerdir=/base,upperdir=/system/upper,workdir=/system/work");
    }
}
