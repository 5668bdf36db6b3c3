//! The disk that holds the user's home, and the online growth that gives a small file system the size of its disk:
//! the host runs no fsck and no resize2fs on what a guest wrote, and never mounts it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use fs_err::File;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::fstatfs;

use crate::boot::{by_serial, sectors};
use crate::sys;

/// How long a disk that was made larger may take to say so.
const PATIENCE: Duration = Duration::from_secs(5);

/// Mounts the disk with serial `work` on `home`, once it has at least `least` bytes. `false` if the machine has no such disk.
///
/// # Errors
/// When the disk stays smaller, or cannot be mounted.
pub(crate) fn mount_on(home: &Path, least: u64) -> io::Result<bool> {
    let Some(disk) = by_serial("work")? else { return Ok(false) };
    wait_for(&disk, least)?;
    if !is_mounted(&fs_err::read_to_string("/proc/self/mounts")?, &disk, home) {
        fs_err::create_dir_all(home)?;
        // Mounting writes that it is mounted, and waits until the host has that on its own disk, with all of the disk that
        // the host has just made: longer than everything else. Until `barriers` a loss of power of the host is told to
        // nobody; what there was to lose is a home that nobody has used.
        mount(Some(&disk), home, Some("ext4"), MsFlags::empty(), Some("barrier=0")).map_err(|errno| {
            io::Error::other(format!("mount {} on {}: {}", disk.display(), home.display(), errno.desc()))
        })?;
    }
    Ok(true)
}

/// From here on what is written to `home` and synced is on the host's disk, too.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn barriers(home: &Path) -> io::Result<()> {
    if by_serial("work")?.is_none() {
        return Ok(());
    }
    let (flags, on) = (MsFlags::MS_REMOUNT, Some("barrier=1"));
    mount(None::<&str>, home, None::<&str>, flags, on).map_err(|errno| {
        io::Error::other(format!("mount {} with barriers: {}", home.display(), errno.desc()))
    })
}

/// Grows the file system of the work disk, mounted on `home`, to the size that the disk has.
///
/// # Errors
/// When it cannot be grown.
pub(crate) fn fill(home: &Path) -> io::Result<()> {
    grow_work(home, 0).map(drop)
}

/// Grows the file system of the work disk, mounted on `home`, once the disk has at least `least` bytes. Returns its size in
/// bytes; 0 if the machine has no such disk.
///
/// # Errors
/// When the disk stays smaller, or cannot be grown.
pub(crate) fn grow_work(home: &Path, least: u64) -> io::Result<u64> {
    let Some(disk) = by_serial("work")? else { return Ok(0) };
    grown(&disk, &File::open(home)?, least)
}

/// The same for the disk that holds what the guest writes to its root: the overlay's upper layer, or the root itself.
/// `directory` is one on it, which need not have a path any more.
///
/// # Errors
/// When the disk stays smaller, or cannot be grown.
pub(crate) fn grow_system(directory: &File, least: u64) -> io::Result<u64> {
    let disk = match by_serial("system")? {
        Some(disk) => disk,
        None => match by_serial("rootfs")? {
            Some(disk) => disk,
            None => return Ok(0),
        },
    };
    grown(&disk, directory, least)
}

fn grown(disk: &Path, directory: &File, least: u64) -> io::Result<u64> {
    wait_for(disk, least)?;
    grow(disk, directory)
}

/// Waits until the guest knows that `disk` has at least `least` bytes. The kernel hears of a new size by an interrupt, and looks
/// at it when it comes to it.
fn wait_for(disk: &Path, least: u64) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while sectors(disk)?.saturating_mul(512) < least {
        if Instant::now() > until {
            return Err(io::Error::other(format!(
                "{} has {} bytes, not {least}: the VMM did not tell the guest of its new size",
                disk.display(),
                sectors(disk)?.saturating_mul(512)
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Grows the file system on `disk`, which `directory` is on, to the disk's size; at that size already, nothing happens.
/// Returns that size in bytes.
///
/// # Errors
/// When sizes cannot be read or the kernel refuses.
pub(crate) fn grow(disk: &Path, directory: &File) -> io::Result<u64> {
    let (block, blocks) = room(disk, directory)?;
    // The kernel takes its time to find that there is nothing to do.
    if ext4_blocks(disk)? == Some(blocks) {
        return Ok(blocks.saturating_mul(block));
    }
    sys::ext4_resize(directory.file(), blocks).map_err(|error| {
        io::Error::new(error.kind(), format!("grow {} to {blocks} blocks: {error}", disk.display()))
    })?;
    Ok(blocks.saturating_mul(block))
}

/// Whether the work disk, mounted on `home`, has room that its file system does not use yet.
pub(crate) fn is_to_grow(home: &Path) -> io::Result<bool> {
    let Some(disk) = by_serial("work")? else { return Ok(false) };
    let (_, blocks) = room(&disk, &File::open(home)?)?;
    Ok(ext4_blocks(&disk)? != Some(blocks))
}

/// The size of a block of the file system that `directory` is on, and how many of them its `disk` holds.
fn room(disk: &Path, directory: &File) -> io::Result<(u64, u64)> {
    let block = u64::try_from(fstatfs(directory.file())?.block_size()).unwrap_or_default();
    let blocks = blocks_of(sectors(disk)?, block)
        .ok_or_else(|| io::Error::other(format!("{}: a block size of {block}", disk.display())))?;
    Ok((block, blocks))
}

/// How many blocks the ext4 on `disk` has, by its superblock: statfs(2) says less, for it leaves the file system's own out. `None`
/// where there is no ext4. (The kernel's documentation of ext4, "Super Block".)
fn ext4_blocks(disk: &Path) -> io::Result<Option<u64>> {
    let mut superblock = [0; 0x400];
    File::open(disk)?.file().read_exact_at(&mut superblock, 0x400)?;
    Ok(blocks_in(&superblock))
}

fn blocks_in(superblock: &[u8; 0x400]) -> Option<u64> {
    const IS_64BIT: u32 = 0x80;
    let word = |at: usize| {
        let bytes = superblock.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    if word(0x38)? & 0xffff != 0xef53 {
        return None;
    }
    let high = if word(0x60)? & IS_64BIT == 0 { 0 } else { word(0x150)? };
    Some(u64::from(high) << 32 | u64::from(word(0x4)?))
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
    fn the_size_of_a_file_system_is_in_its_superblock() {
        let mut superblock = [0; 0x400];
        assert_eq!(blocks_in(&superblock), None, "no ext4");
        superblock[0x38..0x3a].copy_from_slice(&0xef53_u16.to_le_bytes());
        superblock[0x4..0x8].copy_from_slice(&2_621_440_u32.to_le_bytes());
        superblock[0x150] = 1;
        assert_eq!(blocks_in(&superblock), Some(2_621_440), "the upper half is only there with `64bit`");
        superblock[0x60] = 0x80;
        assert_eq!(blocks_in(&superblock), Some(2_621_440 + (1 << 32)));
    }

    #[test]
    fn a_mounted_work_disk_is_not_mounted_twice() {
        let mounts = "overlay / overlay rw 0 0\n/dev/vdc /root ext4 rw 0 0\n";
        assert!(is_mounted(mounts, Path::new("/dev/vdc"), Path::new("/root")));
        assert!(!is_mounted(mounts, Path::new("/dev/vdc"), Path::new("/home")));
        assert!(!is_mounted(mounts, Path::new("/dev/vda"), Path::new("/root")));
    }
}
