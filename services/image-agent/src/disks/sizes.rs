//! How large VMs' disks are, and their growth. A disk only ever grows: the end of one that shrank would be lost to the guest.
//!
//! Growing is a larger length of the file and nothing else: its new part is a hole. It may be done under a running VMM, which
//! is then told of the new size, and whose guest grows its file system; done before a start, the guest does so as it boots.

use super::{Disks, MAX_MIB, MIB, SYSTEM, WORK, root};
use crate::{ext4, fault};
use bothy_contract::{Code, Error, VmId, image::DiskUsage};
use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::PoisonError,
};

/// The most VMs that one question may be about.
const MOST: usize = 200;

impl Disks {
    /// Makes a VM's disks as large as that; one that has its size already is left alone. Both are looked at before either
    /// changes.
    ///
    /// # Errors
    /// The VM has no such disks, one would shrink, or be larger than a disk can be.
    pub(crate) fn grow(&self, vm: VmId, work_mib: u64, system_mib: u64) -> Result<(), Error> {
        let home = self.dir.join(vm.to_string());
        // Between the look and the change nobody else may grow the same disk further.
        let _one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let root = root::there(&home);
        let root_name = root.map_or(SYSTEM, |root| root.file());
        let disks = [
            ("work disk", WORK, None, work_mib),
            (root.map_or("system overlay", |root| root.what()), root_name, root, system_mib),
        ];
        let mut small = Vec::new();
        for (what, name, backend, mib) in disks {
            let file = open(&home.join(name)).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => Error::not_found(format!("VM {vm} has no {what}")),
                _ => fault::io(format!("cannot open the {what} of VM {vm}"), &e),
            })?;
            let cannot_look = |e: io::Error| fault::io(format!("cannot look at the {what} of VM {vm}"), &e);
            let meta = file.metadata().map_err(cannot_look)?;
            if !meta.is_file() {
                return Err(Error::new(Code::Internal, format!("the {what} of VM {vm} is not a file")));
            }
            let has = backend.map_or(Ok(meta.len()), |backend| backend.size(&home)).map_err(cannot_look)?;
            let wants = mib.saturating_mul(MIB);
            if mib > MAX_MIB {
                return Err(Error::invalid(format!(
                    "the {what} of VM {vm} cannot have {mib} MiB: the most is {MAX_MIB}"
                )));
            }
            if wants < has {
                return Err(Error::invalid(format!(
                    "the {what} of VM {vm} has {} MiB and cannot shrink to {mib}",
                    has / MIB
                ))
                .hint("disks only grow; a smaller one takes a new VM"));
            }
            let own = backend.and_then(|backend| backend.own_file_system(&home));
            let stays = own.filter(|path| wants > has && path.exists());
            if let Some(path) = stays
                && !ext4::grows_mounted(&path).map_err(cannot_look)?
            {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("the {what} of VM {vm} cannot grow: its file system has the feature sparse_super2, and no kernel grows such a one while it is mounted"),
                )
                .hint("bring the image in again, made without that feature, and create a VM of it; or say `--system-disk` at the create"));
            }
            if wants > has {
                small.push((what, file, backend, wants));
            }
        }
        for (what, file, backend, wants) in small {
            let grown = backend.map_or_else(|| file.set_len(wants), |of| of.grow(vm, &home, wants));
            grown.map_err(|e| fault::io(format!("cannot grow the {what} of VM {vm}"), &e))?;
        }
        Ok(())
    }

    /// How large the disks of those VMs are that have any. Of a VM that has only one yet, the other's numbers are 0.
    ///
    /// # Errors
    /// Too many are asked for, or a disk cannot be looked at.
    pub(crate) fn usage(&self, vms: &[VmId]) -> Result<BTreeMap<VmId, DiskUsage>, Error> {
        if vms.len() > MOST {
            return Err(Error::invalid(format!("{} VMs are too many for one question", vms.len()))
                .hint(format!("ask for at most {MOST}")));
        }
        let mut usage = BTreeMap::new();
        for vm in vms {
            let home = self.dir.join(vm.to_string());
            let cannot_look = |e: io::Error| fault::io(format!("cannot look at a disk of VM {vm}"), &e);
            let look = |name| size(&home.join(name)).map_err(cannot_look);
            let root = root::there(&home);
            let (work, system) = (look(WORK)?, root.map_or(Ok(None), |root| look(root.file()))?);
            if work.is_none() && system.is_none() {
                continue;
            }
            let (work_size, work_allocated) = work.unwrap_or_default();
            let (_, system_allocated) = system.unwrap_or_default();
            let system_size = match (root, system) {
                (Some(root), Some(_)) => root.size(&home).map_err(cannot_look)?,
                _ => 0,
            };
            let own_root = root.is_some_and(|root| !root.has_base());
            let disks = DiskUsage { work_size, work_allocated, system_size, system_allocated, own_root };
            usage.insert(*vm, disks);
        }
        Ok(usage)
    }
}

/// Its directory is root's, so what is there is what we put there; a link or a device is refused all the same.
pub(super) fn open(path: &Path) -> io::Result<fs_err::File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let mut options = fs_err::OpenOptions::new();
    options.options_mut().custom_flags(flags);
    options.write(true).open(path)
}

/// The length of a disk and what the host has allocated for it, in bytes; `None` where there is none.
fn size(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs_err::symlink_metadata(path) {
        // The unit is 512 whatever the file system's is (stat(3type)).
        Ok(meta) => Ok(Some((meta.len(), meta.blocks().saturating_mul(512)))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Host, UID, host};
    use super::*;
    use std::os::unix::fs::FileExt as _;

    fn with_disks() -> (Host, VmId) {
        let (h, vm) = (host(), VmId::new());
        h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
        h.disks.work(&h.store, vm, &h.image, UID, 32).unwrap();
        (h, vm)
    }

    fn sizes(h: &Host, vm: VmId) -> (u64, u64) {
        let usage = h.disks.usage(&[vm]).unwrap()[&vm];
        (usage.work_size / MIB, usage.system_size / MIB)
    }

    #[test]
    fn disks_grow_under_whoever_has_them_open_and_keep_what_is_in_them() {
        bothy_testkit::require_root!();
        let (h, vm) = with_disks();
        let path = h.disks.dir.join(vm.to_string()).join(WORK);
        let vmm = fs_err::File::options().read(true).write(true).open(&path).unwrap();
        vmm.file().write_all_at(b"the user's work", 32 * MIB - 100).unwrap();
        for _ in 0..2 {
            h.disks.grow(vm, 64, 16).unwrap();
            assert_eq!(sizes(&h, vm), (64, 16));
        }
        h.disks.grow(vm, 64, 128).unwrap();
        assert_eq!(sizes(&h, vm), (64, 128));
        let meta = vmm.metadata().unwrap();
        assert_eq!((meta.len(), meta.uid(), meta.mode() & 0o777), (64 * MIB, UID, 0o600));
        assert!(meta.blocks() * 512 < 16 * MIB, "the new part is a hole");
        let mut read = [0; 15];
        vmm.file().read_exact_at(&mut read, 32 * MIB - 100).unwrap();
        assert_eq!(&read, b"the user's work");
        // The next start asks for the new size.
        assert_eq!(h.disks.work(&h.store, vm, &h.image, UID, 64).unwrap().how, "kept");
    }

    #[test]
    fn no_disk_shrinks_and_a_refusal_changes_neither() {
        bothy_testkit::require_root!();
        let (h, vm) = with_disks();
        for (work, system, why) in [
            (31, 16, "cannot shrink to 31"),
            (64, 15, "cannot shrink to 15"),
            (64, 0, "cannot shrink to 0"),
            (64, MAX_MIB + 1, "the most is"),
            (u64::MAX, 16, "the most is"),
        ] {
            let e = h.disks.grow(vm, work, system).unwrap_err();
            assert_eq!(e.code, Code::InvalidArgument, "{e}");
            assert!(e.message.contains(why), "{e}");
            assert_eq!(sizes(&h, vm), (32, 16));
        }
        let other = VmId::new();
        assert_eq!(h.disks.grow(other, 64, 64).unwrap_err().code, Code::NotFound);
        assert_eq!(h.disks.list().unwrap(), [vm], "nothing was made");
    }

    #[test]
    fn growths_at_once_end_with_the_largest() {
        bothy_testkit::require_root!();
        let (h, vm) = with_disks();
        std::thread::scope(|scope| {
            for n in 0..64 {
                let disks = h.disks.clone();
                // Some are too late, and say so.
                scope.spawn(move || disks.grow(vm, 33 + (n * 37) % 64, 16));
            }
        });
        assert_eq!(sizes(&h, vm), (96, 16));
    }

    #[test]
    fn a_link_in_a_disks_place_is_not_followed() {
        bothy_testkit::require_root!();
        let (h, vm) = with_disks();
        let (path, other) = (h.disks.dir.join(vm.to_string()).join(WORK), h.root.join("other"));
        fs_err::rename(&path, &other).unwrap();
        fs_err::os::unix::fs::symlink(&other, &path).unwrap();
        h.disks.grow(vm, 64, 16).unwrap_err();
        assert_eq!(fs_err::metadata(&other).unwrap().len(), 32 * MIB);
    }

    #[test]
    fn usage_is_of_those_that_have_disks() {
        bothy_testkit::require_root!();
        let (h, vm) = with_disks();
        let half = VmId::new();
        h.disks.work(&h.store, half, &h.image, UID, 8).unwrap();
        let work = h.disks.dir.join(vm.to_string()).join(WORK);
        let file = fs_err::File::options().write(true).open(work).unwrap();
        file.file().write_all_at(&vec![7; 4 * MIB as usize], MIB).unwrap();
        file.sync_all().unwrap();
        let usage = h.disks.usage(&[vm, VmId::new(), half]).unwrap();
        assert_eq!(usage.len(), 2);
        assert_eq!((usage[&vm].work_size, usage[&vm].system_size), (32 * MIB, 16 * MIB));
        assert!((4 * MIB..8 * MIB).contains(&usage[&vm].work_allocated), "{usage:?}");
        assert_eq!((usage[&half].work_size, usage[&half].system_size), (8 * MIB, 0));
        let e = h.disks.usage(&vec![vm; MOST + 1]).unwrap_err();
        assert_eq!(e.code, Code::InvalidArgument);
    }
}
