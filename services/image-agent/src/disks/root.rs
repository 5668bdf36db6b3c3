//! What VMs' roots are kept on: one trait, [`Backend`], and whoever makes a root disk, hands it out, grows it or removes it goes
//! through it. A VM keeps the one that it began with: the name of its file tells which, whatever new VMs get by now.

mod overlay;
mod own;
mod snapshot;

use super::{Disks, MAX_MIB, MIB};
use crate::{
    clone::{self, clone},
    fault,
    seeds::Grown,
    store::{Image, Store},
};
use bothy_config::RootDiskChoice;
use bothy_contract::{
    Code, Error, ImageName, VmId,
    image::{RootDisk, Rootfs},
};
use std::{
    fmt, io,
    os::unix::fs::fchown,
    path::{Path, PathBuf},
};

/// Where a VM's disks are, and whose.
#[derive(Debug)]
pub(super) struct Place {
    /// The VM.
    pub(super) vm: VmId,
    /// Its directory.
    pub(super) home: PathBuf,
    /// Its VMM's user.
    pub(super) uid: u32,
    /// Roots of images, grown for any VM.
    pub(super) roots: Grown,
}

/// One way to keep roots.
pub(super) trait Backend: fmt::Debug + Sync {
    /// Which one.
    fn kind(&self) -> RootDisk;
    /// What its disks are called.
    fn what(&self) -> &'static str;
    /// The file that takes what the guest writes.
    fn file(&self) -> &'static str;
    /// The artifact of an image that no disk may be smaller than.
    fn least(&self) -> &'static str;
    /// Makes the disk of a VM that has none. The file comes into being last, whole; what else was made is removed on failure.
    ///
    /// # Errors
    /// What was done on what, and why that failed.
    fn make(&self, place: &Place, image: &Image, mib: u64) -> Result<(), Error>;
    /// Makes the disk that is there ready for a VMM. Again is the same.
    ///
    /// # Errors
    /// As above.
    fn attach(&self, place: &Place) -> Result<Rootfs, Error>;
    /// Lets go of all that the kernel has of the disk, so that its files can be removed. Nothing to let go of is fine.
    ///
    /// # Errors
    /// As above.
    fn detach(&self, _vm: VmId, _home: &Path) -> Result<(), Error> {
        Ok(())
    }
    /// How many bytes the guest sees.
    ///
    /// # Errors
    /// It cannot be looked at.
    fn size(&self, home: &Path) -> io::Result<u64> {
        Ok(fs_err::symlink_metadata(home.join(self.file()))?.len())
    }
    /// Makes it as large as that, which is more than it has.
    ///
    /// # Errors
    /// As above.
    fn grow(&self, _vm: VmId, home: &Path, bytes: u64) -> io::Result<()> {
        super::sizes::open(&home.join(self.file()))?.set_len(bytes)
    }
    /// What the guest's file system is on, where it is one of the image's.
    fn own_file_system(&self, _home: &Path) -> Option<PathBuf> {
        None
    }
    /// Whether its `base` is a file that VMs share.
    fn has_base(&self) -> bool {
        self.kind() == RootDisk::Overlay
    }
    /// Whether the VMM opens the file itself.
    fn gives_file(&self) -> bool {
        true
    }
    /// Lets go of what the kernel has of disks below `disks` that are not there any more.
    ///
    /// # Errors
    /// As above.
    fn sweep(&self, _disks: &Path) -> Result<(), Error> {
        Ok(())
    }
}

const ALL: [&dyn Backend; 4] = [&overlay::Overlay, &own::Own::Reflink, &own::Own::Copy, &snapshot::Snapshot];

/// The backend of that kind.
fn backend(kind: RootDisk) -> Result<&'static dyn Backend, Error> {
    ALL.into_iter()
        .find(|backend| backend.kind() == kind)
        .ok_or_else(|| lacks(kind, "this image-agent does not know how"))
}

/// The backend of the root disk in `home`, if there is one.
pub(super) fn there(home: &Path) -> Option<&'static dyn Backend> {
    ALL.into_iter().find(|backend| fs_err::symlink_metadata(home.join(backend.file())).is_ok())
}

/// Lets go of what the kernel has of the root disk of `vm` in `home`, whether there are files of it or not.
pub(super) fn detach(vm: VmId, home: &Path) -> Result<(), Error> {
    ALL.into_iter().try_for_each(|backend| backend.detach(vm, home))
}

/// Lets go of what the kernel has of disks below `disks` that are not there any more.
pub(super) fn sweep(disks: &Path) -> Result<(), Error> {
    ALL.into_iter().try_for_each(|backend| backend.sweep(disks))
}

/// What new VMs get on a host that is set so, and has its images in `store` and its disks in `disks`.
pub(crate) fn choose(choice: RootDiskChoice, store: &Path, disks: &Path) -> RootDisk {
    // Not a copy of all of it for each VM, and never what takes a privilege that this process may not have.
    choice.named().unwrap_or_else(|| match shares(store, disks) {
        Ok(()) => RootDisk::Reflink,
        Err(why) => {
            tracing::info!(%why, "roots are overlays: files cannot share extents here");
            RootDisk::Overlay
        }
    })
}

/// Whether a file in `to` can share the extents of one in `from`: by trying.
fn shares(from: &Path, to: &Path) -> io::Result<()> {
    let of = tempfile::tempfile_in(from)?;
    io::Write::write_all(&mut &of, &[1; 4096])?;
    clone::reflink(&of, &tempfile::tempfile_in(to)?)
}

impl Disks {
    /// Makes a VM's root disk ready: the one that it has, or one as new VMs get it.
    pub(crate) fn rootfs(
        &self,
        store: &Store,
        vm: VmId,
        image: &ImageName,
        uid: u32,
        mib: u64,
    ) -> Result<Rootfs, Error> {
        self.check_uid(uid)?;
        let place = Place { vm, home: self.dir.join(vm.to_string()), uid, roots: self.roots.clone() };
        let kept = there(&place.home);
        let mut here = None;
        let backend = kept.map_or_else(|| backend(self.root), Ok)?;
        if kept.is_some() {
            self.keep_root(backend, &place, mib)?;
        } else {
            let image = store.open(image)?;
            check_size(backend.what(), mib, image.artifact(backend.least())?.0.size)?;
            here = Some(self.homes.enter(&place.home).map_err(|e| failed(backend, vm, &e))?);
            backend.make(&place, &image, mib)?;
        }
        let mut rootfs = backend.attach(&place).inspect_err(|_| {
            // One that is new is not kept: nobody knows of it yet.
            if kept.is_none() && backend.detach(vm, &place.home).is_ok() {
                for name in [backend.file(), super::BASE] {
                    let _ = fs_err::remove_file(place.home.join(name));
                }
            }
        })?;
        drop(here);
        if backend.has_base() && !rootfs.base.is_file() {
            // Linking was not possible when it was made: see `link`.
            rootfs.base = store.open(image)?.artifact("rootfs")?.1;
        }
        Ok(rootfs)
    }

    /// What roots of new VMs are kept on.
    pub(crate) fn root_disk(&self) -> RootDisk {
        self.root
    }

    /// Takes up the root disk that is there, for a user who may be another one than before.
    pub(super) fn keep_root(&self, backend: &dyn Backend, place: &Place, mib: u64) -> Result<(), Error> {
        let has = backend.size(&place.home).map_err(|e| failed(backend, place.vm, &e))?;
        let file = place.home.join(backend.file());
        if backend.gives_file() {
            self.keep(&file, has, place.uid, mib)
        } else {
            super::large_enough(&file, has, mib)
        }
    }
}

/// The error for a root disk that could not be made.
fn failed(backend: &dyn Backend, vm: VmId, err: &io::Error) -> Error {
    fault::io(format!("cannot make the {} of VM {vm}", backend.what()), err)
}

/// Whether a disk may have `mib` MiB, that is to hold `least` bytes.
pub(super) fn check_size(what: &str, mib: u64, least: u64) -> Result<(), Error> {
    let least = least.div_ceil(MIB);
    if (least..=MAX_MIB).contains(&mib) {
        return Ok(());
    }
    Err(Error::invalid(format!("the {what} cannot have {mib} MiB: it must be {least} to {MAX_MIB}")))
}

/// A hard link to `rootfs` at `base`; none where the store is on another file system.
pub(super) fn link(rootfs: &Path, base: &Path) -> io::Result<()> {
    match fs_err::hard_link(rootfs, base) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::CrossesDevices) => Err(e),
        _ => Ok(()),
    }
}

/// Makes the file `to`, whole and of `uid` from its first moment under that name; `fill` gets it empty, under another one.
pub(super) fn make_file<T>(
    to: &Path,
    uid: u32,
    fill: impl FnOnce(&tempfile::NamedTempFile) -> Result<T, Error>,
) -> Result<T, Error> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = |e: io::Error| fault::io(format!("cannot make {}", to.display()), &e);
    let temp = tempfile::Builder::new()
        .prefix(".disk-")
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(to.parent().unwrap_or(to))
        .map_err(failed)?;
    let made = fill(&temp)?;
    fchown(temp.as_file(), Some(uid), None).map_err(failed)?;
    temp.persist_noclobber(to).map_err(|e| failed(e.error))?;
    Ok(made)
}

/// Makes `to` a clone of `from` with `mib` MiB.
pub(super) fn make_clone(from: &fs_err::File, to: &Path, uid: u32, mib: u64) -> Result<clone::How, Error> {
    make_file(to, uid, |temp| {
        clone(from.file(), temp.as_file(), mib * MIB)
            .map_err(|e| fault::io(format!("cannot clone {}", from.path().display()), &e))
    })
}

/// The error where the kernel or the file system has not what a backend needs.
pub(super) fn lacks(kind: RootDisk, why: impl fmt::Display) -> Error {
    Error::new(Code::FailedPrecondition, format!("root disks cannot be {} here: {why}", kind.word())).hint(
        "set `root_disk` of `[image]` in bothy.toml to `overlay`, or to `auto`, and restart the image-agent",
    )
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod tests_dm;
