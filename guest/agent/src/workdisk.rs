//! The disk that holds the user's home, and the online growth that gives a small file system the size of its disk:
//! the host runs no fsck and no resize2fs, and never mounts what a guest wrote.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;

use crate::boot::{by_serial, sectors};
use crate::sys;

/// Mounts the disk with serial `work` on `home` and grows it. `false` if the machine has no such disk. Mounted already: only grows.
///
/// # Errors
/// When the disk cannot be mounted or grown.
pub(crate) fn mount_on(home: &Path) -> io::Result<bool> {
    let Some(disk) = by_serial("work")? else { return Ok(false) };
    if !is_mounted(&fs_err::read_to_string("/proc/self/mounts")?, &disk, home) {
        fs_err::create_dir_all(home)?;
        mount(Some(&disk), home, Some("ext4"), MsFlags::empty(), None::<&str>).map_err(|errno| {
            io::Error::other(format!("mount {} on {}: {}", disk.display(), home.display(), errno.desc()))
        })?;
    }
    grow(&disk, home)?;
    Ok(true)
}

/// Grows the file system on `disk`, mounted at `mounted`, to the disk's size; at that size already, nothing happens.
///
/// # Errors
/// When sizes cannot be read or the kernel refuses.
pub(crate) fn grow(disk: &Path, mounted: &Path) -> io::Result<()> {
    let stat = statfs(mounted)?;
    let block = u64::try_from(stat.block_size()).unwrap_or_default();
    let blocks = blocks_of(sectors(disk)?, block)
        .ok_or_else(|| io::Error::other(format!("{}: a block size of {block}", disk.display())))?;
    // The kernel logs and does nothing where the size is the same; statfs says less than the full size (its own
    // structures are left out), so the call is what decides.
    let directory = fs_err::File::open(mounted)?;
    sys::ext4_resize(directory.file(), blocks).map_err(|error| {
        io::Error::new(error.kind(), format!("grow {} to {blocks} blocks: {error}", disk.display()))
    })
}

/// How many file-system blocks of `block` bytes a disk of `sectors` 512-byte sectors holds.
fn blocks_of(sectors: u64, block: u64) -> Option<u64> {
    sectors.checked_mul(512)?.checked_div(block)
}

/// Whether `/proc/self/mounts` lists `disk` at `target`.
fn is_mounted(mounts: &str, disk: &Path, target: &Path) -> bool {
    mounts.lines().any(|line| {
        let mut words = line.split(' ');
        words.next().map(Path::new) == Some(disk) && words.next().map(Path::new) == Some(target)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_of_growth_is_the_file_systems_block() {
        assert_eq!(blocks_of(2_097_152, 4096), Some(262_144));
        assert_eq!(blocks_of(20_480, 1024), Some(10_240));
        assert_eq!(blocks_of(20_480, 0), None);
    }

    #[test]
    fn a_mounted_work_disk_is_not_mounted_twice() {
        let mounts = "overlay / overlay rw 0 0\n/dev/vdc /root ext4 rw 0 0\n";
        assert!(is_mounted(mounts, Path::new("/dev/vdc"), Path::new("/root")));
        assert!(!is_mounted(mounts, Path::new("/dev/vdc"), Path::new("/home")));
        assert!(!is_mounted(mounts, Path::new("/dev/vda"), Path::new("/root")));
    }
}
