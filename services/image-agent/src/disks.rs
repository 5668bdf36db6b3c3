//! The disks of VMs: `<service>/disks/<vm id>/` with `work.ext4` and what the root is kept on ([`root`]), mostly `system.ext4`
//! and the base that it is laid over.
//!
//! A disk is made in full under another name, given to the VM's user and renamed: it is there whole or not at all.
//! From then on only that user's VMM opens it; nothing here ever reads or mounts what a guest wrote. The base is a
//! hard link to the image's rootfs: an overlay is only valid over the base it was begun with, and the link
//! keeps that one, and its page cache, when the image is built anew.

mod homes;
mod root;
mod sizes;
mod templates;

pub(crate) use root::choose;

use crate::{build, fault, seeds::Grown};
use bothy_contract::{
    Code, Error, VmId,
    image::{RootDisk, WorkDisk},
};
use homes::Homes;
use root::{check_size, make_clone};
use std::{
    io,
    ops::Range,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

const SYSTEM: &str = "system.ext4";
const WORK: &str = "work.ext4";
const BASE: &str = "rootfs.ext4";
const ROOT: &str = "root.ext4";
const COW: &str = "root.cow";
const NODE: &str = "root";
const MIB: u64 = 1 << 20;
/// The largest disk, in MiB: as far as the seeds' file systems grow while mounted.
pub(crate) const MAX_MIB: u64 = 4 << 20;

/// The disks below one directory.
#[derive(Debug, Clone)]
pub(crate) struct Disks {
    dir: PathBuf,
    /// Those of templates.
    templates: PathBuf,
    /// What the roots of new VMs are kept on.
    root: RootDisk,
    /// The users that VMMs run as.
    uids: Range<u32>,
    /// Held while disks grow.
    growing: Arc<Mutex<()>>,
    homes: Homes,
    /// Roots of images, grown for VMs that have one of their own.
    roots: Grown,
}

/// What a work disk is made from.
#[derive(Debug)]
pub(crate) struct Seed {
    /// The file: open, so that it can be cloned whatever becomes of its name.
    pub(crate) file: fs_err::File,
    /// How it was come by, where it is not the image's own.
    pub(crate) how: Option<String>,
    /// The directory that it was made in for this disk alone; removed with the last of it.
    pub(crate) scratch: Option<PathBuf>,
}

impl Seed {
    /// One that is there for all.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = fs_err::File::open(path).map_err(|e| fault::io("cannot open a seed", &e))?;
        Ok(Self { file, how: None, scratch: None })
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> Result<u64, Error> {
        Ok(self.file.metadata().map_err(|e| fault::io("cannot look at a seed", &e))?.len())
    }
}

impl Disks {
    /// Disks below `dir`, and those of templates below `templates`, roots kept on `root`, for the VMMs' users `uids`. `grown` has
    /// what can be made again.
    pub(crate) fn new(
        dir: PathBuf,
        templates: PathBuf,
        root: RootDisk,
        uids: Range<u32>,
        grown: PathBuf,
    ) -> Self {
        Self {
            dir,
            templates,
            root,
            uids,
            growing: Arc::default(),
            homes: Homes::default(),
            roots: Grown::new(grown),
        }
    }

    /// Makes a VM's work disk ready, from what `seed` gives where it is not there yet. `seed` may make a directory with a dot
    /// in front in the VM's, which is given to it.
    pub(crate) fn work_with(
        &self,
        vm: VmId,
        uid: u32,
        mib: u64,
        seed: impl FnOnce(&Path) -> Result<Seed, Error>,
    ) -> Result<WorkDisk, Error> {
        self.check_uid(uid)?;
        let home = self.dir.join(vm.to_string());
        let path = home.join(WORK);
        let failed = |e: io::Error| fault::io(format!("cannot make the work disk of VM {vm}"), &e);
        match fs_err::symlink_metadata(&path) {
            Ok(meta) => {
                self.keep(&path, meta.len(), uid, mib)?;
                return Ok(WorkDisk { path, how: "kept".to_owned() });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        let _here = self.homes.enter(&home).map_err(failed)?;
        let made = seed(&home).and_then(|seed| {
            let how = seed
                .size()
                .and_then(|size| check_size("work disk", mib, size))
                .and_then(|()| make_clone(&seed.file, &path, uid, mib));
            if let Some(scratch) = &seed.scratch {
                build::remove(scratch)?;
            }
            how.map(|how| seed.how.unwrap_or_else(|| how.word().to_owned()))
        });
        Ok(WorkDisk { path, how: made? })
    }

    /// Removes all disks of a VM, if it has any.
    pub(crate) fn release(&self, vm: VmId) -> Result<(), Error> {
        let home = self.dir.join(vm.to_string());
        root::detach(vm, &home)?;
        match fs_err::remove_dir_all(home) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(fault::io(format!("cannot remove the disks of VM {vm}"), &e)),
        }
    }

    /// Removes what is kept of images so that disks of theirs are made faster. To be called while none is made.
    pub(crate) fn forget_images(&self) -> Result<(), Error> {
        self.roots.sweep()
    }

    /// The VMs that have disks, oldest first.
    pub(crate) fn list(&self) -> Result<Vec<VmId>, Error> {
        let failed = |e: &io::Error| fault::io("cannot list the disks", e);
        let mut vms = Vec::new();
        for entry in fs_err::read_dir(&self.dir).map_err(|e| failed(&e))? {
            let name = entry.map_err(|e| failed(&e))?.file_name();
            vms.extend(name.to_str().and_then(|n| n.parse::<VmId>().ok()));
        }
        vms.sort();
        Ok(vms)
    }

    /// Removes what a crash left half made. To be called before any request is served.
    pub(crate) fn sweep(&self) -> Result<(), Error> {
        for vm in self.list()? {
            let home = self.dir.join(vm.to_string());
            let failed = |e: io::Error| fault::io(format!("cannot sweep the disks of VM {vm}"), &e);
            for entry in fs_err::read_dir(&home).map_err(failed)? {
                let path = entry.map_err(failed)?.path();
                if path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".")) {
                    if path.is_dir() {
                        // A seed that was being made: its tools may still be at it.
                        build::remove(&path)?;
                    } else {
                        fs_err::remove_file(&path).map_err(failed)?;
                    }
                }
            }
            // One with something in it stays.
            let _ = fs_err::remove_dir(&home);
        }
        self.forget_images()?;
        root::sweep(&self.dir)
    }

    fn check_uid(&self, uid: u32) -> Result<(), Error> {
        if self.uids.contains(&uid) {
            return Ok(());
        }
        let (first, end) = (self.uids.start, self.uids.end);
        Err(Error::invalid(format!("user {uid} is not one of a VMM: they are {first} to {}", end - 1))
            .hint("`vm.uid_base` must be the same for all services"))
    }

    /// Takes up the disk with the file `path`, on which a guest sees `has` bytes, and gives it to `uid`, which may be another one
    /// than before.
    fn keep(&self, path: &Path, has: u64, uid: u32, mib: u64) -> Result<(), Error> {
        large_enough(path, has, mib)?;
        let failed = |e: io::Error| fault::io("cannot take up a disk", &e);
        let meta = fs_err::symlink_metadata(path).map_err(failed)?;
        if meta.uid() != uid {
            std::os::unix::fs::lchown(path, Some(uid), None).map_err(failed)?;
        }
        Ok(())
    }
}

/// Whether the disk with the file `path`, on which a guest sees `has` bytes, has as many as its VM.
fn large_enough(path: &Path, has: u64, mib: u64) -> Result<(), Error> {
    // A larger one was grown by a change of the VM that was cut short before it was written down.
    if has >= mib.saturating_mul(MIB) {
        return Ok(());
    }
    let is = has / MIB;
    Err(Error::new(Code::FailedPrecondition, format!("{} is there with {is} MiB, not {mib}", path.display()))
        .hint("`bothy vm set` grows the disks of a VM"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, tests::plant};
    use bothy_contract::ImageName;

    pub(super) const UID: u32 = 780_001;

    pub(super) struct Host {
        _dir: Option<tempfile::TempDir>,
        pub(super) root: PathBuf,
        pub(super) store: Store,
        pub(super) disks: Disks,
        pub(super) image: ImageName,
    }

    impl Disks {
        /// A work disk from the image's own seed.
        pub(super) fn work(
            &self,
            store: &Store,
            vm: VmId,
            image: &ImageName,
            uid: u32,
            mib: u64,
        ) -> Result<WorkDisk, Error> {
            self.work_with(vm, uid, mib, |_| {
                let image = store.open(image)?;
                Seed::open(&image.artifact("work-seed")?.1)
            })
        }
    }

    impl Host {
        /// The same disks on a host that is set to keep roots on `kind`.
        pub(super) fn with(&self, kind: RootDisk) -> Disks {
            Disks { root: kind, ..self.disks.clone() }
        }
    }

    /// A host with all it has below `root`, which keeps roots on `kind`.
    pub(super) fn host_with(root: PathBuf, kind: RootDisk) -> Host {
        let store = Store::new(&root.join("store"));
        let image = plant(&store, "a", MIB).name;
        let roots = root.join("store/roots");
        let disks = Disks::new(root.join("disks"), root.join("templates"), kind, 780_000..780_010, roots);
        fs_err::create_dir(root.join("disks")).unwrap();
        fs_err::create_dir(root.join("templates")).unwrap();
        Host { _dir: None, root, store, disks, image }
    }

    pub(super) fn host() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let host = host_with(dir.path().to_owned(), RootDisk::Overlay);
        Host { _dir: Some(dir), ..host }
    }

    #[test]
    fn disks_are_the_vms_own_and_asked_for_again_are_the_same() {
        bothy_testkit::require_root!();
        let h = host();
        let vm = VmId::new();
        let rootfs = h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
        let work = h.disks.work(&h.store, vm, &h.image, UID, 32).unwrap();
        for (path, mib) in [(rootfs.system.as_ref().unwrap(), 16), (&work.path, 32)] {
            let meta = fs_err::metadata(path).unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o777, meta.len()), (UID, 0o600, mib * MIB));
        }
        assert_eq!(fs_err::metadata(h.disks.dir.join(vm.to_string())).unwrap().mode() & 0o777, 0o711);
        fs_err::write(&work.path, "the user's work").unwrap();
        fs_err::File::options().write(true).open(&work.path).unwrap().set_len(32 * MIB).unwrap();
        let again = h.disks.work(&h.store, vm, &h.image, UID + 1, 32).unwrap();
        assert_eq!((again.path.clone(), again.how.as_str()), (work.path, "kept"));
        assert!(fs_err::read(&again.path).unwrap().starts_with(b"the user's work"));
        assert_eq!(fs_err::metadata(&again.path).unwrap().uid(), UID + 1);
        assert_eq!(h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap(), rootfs);
        assert_eq!(h.disks.list().unwrap(), [vm]);
        h.disks.release(vm).unwrap();
        h.disks.release(vm).unwrap();
        assert_eq!(h.disks.list().unwrap(), []);
    }

    /// A create has both made side by side: what fails is told, and does not make the other fail.
    #[test]
    fn a_disk_that_cannot_be_made_is_not_in_the_way_of_the_other() {
        bothy_testkit::require_root!();
        let h = host();
        let copies = h.with(RootDisk::Copy);
        let vm = VmId::new();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        let work = h.disks.work_with(vm, UID, 16, |_| {
            // The image of this host is no file system, so there is nothing to grow.
            let refused = copies.rootfs(&h.store, vm, &h.image, UID, 16).unwrap_err();
            assert!(refused.message.contains("resize2fs"), "{refused}");
            Seed::open(&h.store.dir_of(&h.image).join("work-seed.ext4"))
        });
        assert!(work.unwrap().path.is_file());
        h.disks.release(vm).unwrap();
        // And the other way round.
        let root = h.disks.work_with(vm, UID, 16, |_| {
            let made = h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
            assert!(made.base.is_file());
            Err(Error::invalid("no seed"))
        });
        assert_eq!(root.unwrap_err().message, "no seed");
        assert!(h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap().base.is_file());
    }

    #[test]
    fn an_overlay_keeps_its_base_when_the_image_is_built_anew() {
        bothy_testkit::require_root!();
        let h = host();
        let vm = VmId::new();
        let before = h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
        let inode = fs_err::metadata(&before.base).unwrap().ino();
        fs_err::remove_dir_all(h.store.dir_of(&h.image)).unwrap();
        plant(&h.store, "a", 2 * MIB);
        let after = h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
        assert_eq!(fs_err::metadata(&after.base).unwrap().ino(), inode);
    }

    #[test]
    fn what_cannot_be_made_is_refused_and_leaves_nothing() {
        bothy_testkit::require_root!();
        let h = host();
        let vm = VmId::new();
        let gone: ImageName = "gone".parse().unwrap();
        for (image, uid, mib, code) in [
            (&h.image, 0, 16, Code::InvalidArgument),
            (&h.image, 780_010, 16, Code::InvalidArgument),
            (&h.image, UID, 0, Code::InvalidArgument),
            (&h.image, UID, MAX_MIB + 1, Code::InvalidArgument),
            (&h.image, UID, u64::MAX, Code::InvalidArgument),
            (&gone, UID, 16, Code::NotFound),
        ] {
            assert_eq!(h.disks.rootfs(&h.store, vm, image, uid, mib).unwrap_err().code, code);
            assert_eq!(h.disks.work(&h.store, vm, image, uid, mib).unwrap_err().code, code);
        }
        assert_eq!(h.disks.list().unwrap(), []);
        h.disks.work(&h.store, vm, &h.image, UID, 16).unwrap();
        let other = h.disks.work(&h.store, vm, &h.image, UID, 17).unwrap_err();
        assert_eq!(other.code, Code::FailedPrecondition);
    }

    #[test]
    fn a_crash_leaves_nothing_after_the_next_start() {
        let h = host();
        let (vm, other) = (VmId::new(), VmId::new());
        let home = h.disks.dir.join(vm.to_string());
        fs_err::create_dir(&home).unwrap();
        fs_err::write(home.join(".disk-abc"), "half").unwrap();
        fs_err::create_dir(h.disks.dir.join(other.to_string())).unwrap();
        fs_err::write(h.disks.dir.join(other.to_string()).join(WORK), "whole").unwrap();
        h.disks.sweep().unwrap();
        assert_eq!(h.disks.list().unwrap(), [other]);
    }

    /// A real full disk: a tmpfs that only this thread sees.
    #[test]
    fn a_full_disk_is_said_and_leaves_nothing() {
        bothy_testkit::require_root!();
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            let none = None::<&str>;
            nix::mount::mount(none, "/", none, private, none).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("full");
            fs_err::create_dir(&root).unwrap();
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("full"), &root, Some("tmpfs"), flags, Some("size=3m")).unwrap();
            let h = host_with(root.clone(), RootDisk::Overlay);
            let seed = h.store.dir_of(&h.image).join("work-seed.ext4");
            fs_err::write(&seed, vec![7; MIB as usize]).unwrap();
            crate::store::tests::replant(&h.store, &h.image);
            h.store.open(&h.image).unwrap();
            fs_err::write(root.join("ballast"), vec![7; (MIB + MIB / 2) as usize]).unwrap();
            let err = h.disks.work(&h.store, VmId::new(), &h.image, UID, 16).unwrap_err();
            assert_eq!(err.code, Code::ResourceExhausted, "{err}");
            assert!(err.hint.is_some());
            assert_eq!(h.disks.list().unwrap(), []);
            let root = h.root.clone();
            nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH).unwrap();
        });
        thread.join().unwrap();
    }
}
