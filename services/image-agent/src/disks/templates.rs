//! The disks of templates: `<service>/templates/<id>/` with the system overlay as it was when the template's memory was saved,
//! and the base that it lies over.
//!
//! Memory and overlay are two halves of one moment: a guest that is resumed has the one's inodes in mind. So a frozen overlay is
//! the template's own file, moved here once its VMM has ended; it is root's, nothing ever opens it to write, and each VM gets a
//! clone. A directory is a template once it has that name: it is filled under another one.

use super::{
    BASE, Disks, ROOT, SYSTEM, WORK, check_size, make_clone,
    root::{self, Place},
};
use crate::fault;
use bothy_contract::{
    Code, Error, VmId,
    image::{FrozenDisks, Rootfs, WorkDisk},
};
use std::{
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
};

/// The size of a placeholder, in bytes.
const PLACEHOLDER: u64 = 1 << 20;

impl Disks {
    /// Makes the disks of `vm`, whose VMM has ended, those of a template with its id.
    ///
    /// # Errors
    /// The VM has no system overlay, or it cannot be moved.
    pub(crate) fn freeze(&self, vm: VmId) -> Result<FrozenDisks, Error> {
        let to = self.template(vm);
        if !to.exists() {
            let home = self.dir.join(vm.to_string());
            let failed = |e: io::Error| fault::io(format!("cannot freeze the disks of VM {vm}"), &e);
            if let Some(backend) = root::there(&home).filter(|backend| !backend.kind().can_be_frozen()) {
                let kind = backend.kind().word();
                let no = format!("VM {vm} cannot be a template: its root disk is {kind}");
                return Err(Error::new(Code::FailedPrecondition, no));
            }
            let half = self.half(vm);
            fs_err::create_dir_all(&half).map_err(failed)?;
            fs_err::set_permissions(&half, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
            // A crash may have come between the two moves, or after them.
            for name in [BASE, SYSTEM, ROOT] {
                match fs_err::rename(home.join(name), half.join(name)) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    moved => moved.map_err(failed)?,
                }
            }
            let Some(backend) = root::there(&half) else {
                // Only what is empty: a base without its overlay is swept.
                let _ = fs_err::remove_dir(&half);
                return Err(Error::not_found(format!("VM {vm} has no root disk to freeze")));
            };
            let system = half.join(backend.file());
            if backend.has_base() && !half.join(BASE).exists() {
                let no_base =
                    format!("VM {vm} has no base of its own: the images are on another file system");
                return Err(Error::new(Code::FailedPrecondition, no_base));
            }
            std::os::unix::fs::lchown(&system, Some(0), Some(0)).map_err(failed)?;
            fs_err::File::open(&system).and_then(|file| file.sync_all()).map_err(failed)?;
            fs_err::rename(&half, &to).map_err(failed)?;
        }
        self.release(vm)?;
        let file = root::there(&to).map_or(SYSTEM, |backend| backend.file());
        let meta = fs_err::symlink_metadata(to.join(file))
            .map_err(|e| fault::io(format!("cannot look at the disks of template {vm}"), &e))?;
        Ok(FrozenDisks { allocated: meta.blocks() * 512 })
    }

    /// A file in the place of the work disk of `vm`, which is to become a template: empty, and smaller than any disk, so that a
    /// guest sees when it has another.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn placeholder(&self, vm: VmId, uid: u32) -> Result<WorkDisk, Error> {
        self.check_uid(uid)?;
        let home = self.dir.join(vm.to_string());
        let path = home.join(WORK);
        let failed = |e| fault::io(format!("cannot make a placeholder for the work disk of VM {vm}"), &e);
        let _here = self.homes.enter(&home).map_err(failed)?;
        let empty = || {
            let file = fs_err::File::create(&path)?;
            file.set_len(PLACEHOLDER)?;
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            std::os::unix::fs::fchown(&file, Some(uid), None)
        };
        empty().map_err(|e| {
            let _ = fs_err::remove_file(&path);
            failed(e)
        })?;
        Ok(WorkDisk { path, how: "placeholder".to_owned() })
    }

    /// Makes the base and the system overlay of `vm` ready, as the template has them.
    ///
    /// # Errors
    /// There is no such template, its overlay is larger than `mib`, or the clone cannot be made.
    pub(crate) fn rootfs_of_template(
        &self,
        template: VmId,
        vm: VmId,
        uid: u32,
        mib: u64,
    ) -> Result<Rootfs, Error> {
        self.check_uid(uid)?;
        let (from, home) = (self.template(template), self.dir.join(vm.to_string()));
        let place = Place { vm, home, uid, roots: self.roots.clone() };
        let Some(backend) = root::there(&from) else {
            return Err(Error::not_found(format!("there are no disks of template {template}")));
        };
        let failed = |e: io::Error| fault::io(format!("cannot make the {} of VM {vm}", backend.what()), &e);
        check_size(backend.what(), mib, backend.size(&from).map_err(failed)?)?;
        if let Some(kept) = root::there(&place.home) {
            self.keep_root(kept, &place, mib)?;
            return kept.attach(&place);
        }
        let _here = self.homes.enter(&place.home).map_err(failed)?;
        let base = place.home.join(BASE);
        let make = || {
            if backend.has_base() {
                // First: an overlay without the base it was begun with is worth nothing.
                root::link(&from.join(BASE), &base).map_err(failed)?;
            }
            let frozen = fs_err::File::open(from.join(backend.file())).map_err(failed)?;
            make_clone(&frozen, &place.home.join(backend.file()), uid, mib)
        };
        match make() {
            Ok(_) => backend.attach(&place),
            Err(e) => {
                let _ = fs_err::remove_file(&base);
                Err(e)
            }
        }
    }

    /// Removes the disks of a template, if it has any, those that are half frozen too.
    ///
    /// # Errors
    /// They cannot be removed.
    pub(crate) fn forget_template(&self, template: VmId) -> Result<(), Error> {
        for dir in [self.template(template), self.half(template)] {
            match fs_err::remove_dir_all(dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(fault::io(format!("cannot remove the disks of template {template}"), &e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The templates that have disks, whole or half frozen, oldest first.
    ///
    /// # Errors
    /// They cannot be listed.
    pub(crate) fn frozen(&self) -> Result<Vec<VmId>, Error> {
        let failed = |e: io::Error| fault::io("cannot list the templates' disks", &e);
        let mut templates = Vec::new();
        for entry in fs_err::read_dir(&self.templates).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            templates
                .extend(name.to_str().and_then(|name| name.trim_start_matches('.').parse::<VmId>().ok()));
        }
        templates.sort();
        Ok(templates)
    }

    fn half(&self, id: VmId) -> PathBuf {
        self.templates.join(format!(".{id}"))
    }

    fn template(&self, id: VmId) -> PathBuf {
        self.templates.join(id.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            MIB,
            tests::{UID, host},
        },
        *,
    };

    #[test]
    fn vms_of_a_template_have_its_overlay_and_nothing_of_each_other() {
        bothy_testkit::require_root!();
        let h = host();
        let maker = VmId::new();
        let made = h.disks.rootfs(&h.store, maker, &h.image, UID, 16).unwrap();
        let work = h.disks.placeholder(maker, UID).unwrap();
        assert_eq!(fs_err::metadata(&work.path).unwrap().len(), PLACEHOLDER);
        let base = fs_err::metadata(&made.base).unwrap().ino();
        fs_err::write(made.system.as_ref().unwrap(), vec![7; 5000]).unwrap();
        fs_err::File::options()
            .write(true)
            .open(made.system.as_ref().unwrap())
            .unwrap()
            .set_len(16 * MIB)
            .unwrap();
        let frozen = h.disks.freeze(maker).unwrap();
        assert_eq!(h.disks.freeze(maker).unwrap(), frozen, "again is the same");
        assert!(frozen.allocated >= 5000);
        assert_eq!(h.disks.list().unwrap(), [], "the maker has no disks any more");
        let system = h.disks.template(maker).join(SYSTEM);
        let meta = fs_err::metadata(&system).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o600));

        let before = fs_err::read(&system).unwrap();
        for (n, size) in [(0, 16), (1, 32)] {
            let vm = VmId::new();
            let root = h.disks.rootfs_of_template(maker, vm, UID + n, size).unwrap();
            assert_eq!(h.disks.rootfs_of_template(maker, vm, UID + n, size).unwrap(), root, "kept");
            let meta = fs_err::metadata(root.system.as_ref().unwrap()).unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o777, meta.len()), (UID + n, 0o600, size * MIB));
            assert!(fs_err::read(root.system.as_ref().unwrap()).unwrap().starts_with(&before[..5000]));
            assert_eq!(fs_err::metadata(&root.base).unwrap().ino(), base, "the same page cache");
            fs_err::write(root.system.as_ref().unwrap(), "a guest's writes").unwrap();
        }
        assert_eq!(fs_err::read(&system).unwrap(), before);
        h.disks.forget_template(maker).unwrap();
        h.disks.forget_template(maker).unwrap();
        let gone = h.disks.rootfs_of_template(maker, VmId::new(), UID, 16).unwrap_err();
        assert_eq!(gone.code, Code::NotFound);
        assert_eq!(h.disks.list().unwrap().len(), 2, "what began with it stays");
    }

    #[test]
    fn a_freeze_that_was_cut_off_is_done_again_or_swept() {
        bothy_testkit::require_root!();
        let h = host();
        let (vm, other, known) = (VmId::new(), VmId::new(), VmId::new());
        let small = h.disks.rootfs(&h.store, vm, &h.image, UID, 16).unwrap();
        let half = h.disks.templates.join(format!(".{vm}"));
        fs_err::create_dir(&half).unwrap();
        fs_err::rename(&small.base, half.join(BASE)).unwrap();
        h.disks.freeze(vm).unwrap();
        assert_eq!(h.disks.freeze(other).unwrap_err().code, Code::NotFound);
        let too_small = h.disks.rootfs_of_template(vm, VmId::new(), UID, 8).unwrap_err();
        assert_eq!(too_small.code, Code::InvalidArgument);
        h.disks.rootfs(&h.store, known, &h.image, UID, 16).unwrap();
        h.disks.freeze(known).unwrap();
        fs_err::create_dir(h.disks.half(other)).unwrap();
        let mut all = [vm, known, other];
        all.sort();
        assert_eq!(h.disks.frozen().unwrap(), all);
        for gone in [vm, other, VmId::new()] {
            h.disks.forget_template(gone).unwrap();
        }
        assert_eq!(h.disks.frozen().unwrap(), [known]);
        assert_eq!(h.disks.list().unwrap(), []);
    }
}
