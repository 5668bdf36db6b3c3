//! Disks by their virtio-blk serial number: letters depend on the order of probing, serials are the host's word. A VMM that
//! cannot give serials (Firecracker) says the disks' order instead, on the kernel's command line.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::machine;

/// Disks that were found.
static KNOWN: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// The device node of the disk whose serial is `serial`, or `None` if the machine has none.
///
/// # Errors
/// When sysfs cannot be read.
pub(crate) fn by_serial(serial: &str) -> io::Result<Option<PathBuf>> {
    // Disks do not come and go, and looking through all of them takes a resumed guest longer than all it does with one.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(disk) = known.get(serial) {
        return Ok(Some(disk.clone()));
    }
    let block = Path::new("/sys/block");
    let name = match machine::disks() {
        Some(order) => find_by_order(block, &order, serial)?,
        None => find(block, serial)?,
    };
    let disk = name.map(|name| Path::new("/dev").join(name));
    if let Some(disk) = &disk {
        known.insert(serial.to_owned(), disk.clone());
    }
    Ok(disk)
}

/// The same, for a disk that must be there: waits up to `patience` for it to appear.
///
/// # Errors
/// When it does not appear, naming the serial.
pub(crate) fn wait_for(serial: &str, patience: Duration) -> io::Result<PathBuf> {
    let until = Instant::now() + patience;
    loop {
        if let Some(disk) = by_serial(serial)? {
            return Ok(disk);
        }
        if Instant::now() > until {
            let text = format!("no virtio disk with serial `{serial}`: is it on the VMM's command line?");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The size of a disk in sectors of 512 bytes, whatever its own sector size (sysfs-block(5)).
///
/// # Errors
/// When sysfs does not say.
pub(crate) fn sectors(disk: &Path) -> io::Result<u64> {
    let name = disk.file_name().unwrap_or_default();
    let text = fs_err::read_to_string(Path::new("/sys/block").join(name).join("size"))?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{}: not a size: `{}`", disk.display(), text.trim())))
}

/// The disk in `wanted`'s place of `order`, once there are as many as that has; the kernel names them as it finds them.
fn find_by_order(block: &Path, order: &[String], wanted: &str) -> io::Result<Option<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(block)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("vd") {
            names.push(name);
        }
    }
    if names.len() < order.len() {
        return Ok(None);
    }
    // `vdz` comes before `vdaa`.
    names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    let place = order.iter().position(|name| name == wanted);
    Ok(place.and_then(|place| names.get(place)).map(PathBuf::from))
}

fn find(block: &Path, serial: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs_err::read_dir(block)? {
        let name = entry?.file_name();
        // Other kinds of block device have no such file.
        let Ok(text) = fs_err::read_to_string(block.join(&name).join("serial")) else { continue };
        if text.trim() == serial {
            return Ok(Some(name.into()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_and_by_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("work")), ("vdb", Some("rootfs\n")), ("loop0", None)] {
            fs_err::create_dir(dir.path().join(name)).unwrap();
            if let Some(serial) = serial {
                fs_err::write(dir.path().join(name).join("serial"), serial).unwrap();
            }
        }
        assert_eq!(find(dir.path(), "rootfs").unwrap(), Some("vdb".into()));
        assert_eq!(find(dir.path(), "work").unwrap(), Some("vda".into()));
        assert_eq!(find(dir.path(), "root").unwrap(), None);
    }

    #[test]
    fn a_disk_is_found_by_its_place_once_all_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let order = ["rootfs", "system", "work"].map(str::to_owned);
        let at = |name: &str| find_by_order(dir.path(), &order, name).unwrap();
        for name in ["vdb", "loop0", "vda"] {
            fs_err::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(at("rootfs"), None);
        fs_err::create_dir(dir.path().join("vdc")).unwrap();
        assert_eq!(at("rootfs"), Some("vda".into()));
        assert_eq!(at("work"), Some("vdc".into()));
        assert_eq!(at("other"), None);
    }
}
