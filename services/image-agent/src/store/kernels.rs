//! The kernels' catalogue: one directory each, `<store>/kernels/<name>`, with a manifest and two files that are blobs as the
//! images' are.

use super::{Artifact, Garbage, ROLES, Store, check::stamp, publish::put_into_place};
use crate::{
    bootset::{self, BootFiles},
    digest, fault,
};
use bothy_contract::{
    Code, Error, ImageName, KernelName, OpId,
    catalogue::{KernelInfo, KernelManifest, Pruned},
};
use std::{
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// The format of kernels' manifests.
const VERSION: u32 = 1;

/// A boot set that was put into an image's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The kernel's release.
    pub(crate) release: String,
    /// The kernel of the catalogue that it is of, where it is of one.
    pub(crate) kernel: Option<KernelName>,
}

impl Store {
    fn kernel_dir(&self, name: &KernelName) -> PathBuf {
        self.kernels.join(name.as_str())
    }

    /// One kernel.
    pub(crate) fn kernel(&self, name: &KernelName) -> Result<KernelManifest, Error> {
        let path = self.kernel_dir(name).join("manifest.json");
        let data = fs_err::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::not_found(format!("there is no kernel {name}"))
                .hint("`bothy kernel list` shows what is there, `bothy kernel import` brings one"),
            _ => fault::io(format!("cannot read the manifest of kernel {name}"), &e),
        })?;
        let manifest: KernelManifest = serde_json::from_slice(&data)
            .map_err(|e| unusable(name, format!("{} is not a manifest: {e}", path.display())))?;
        if manifest.version != VERSION || manifest.name != *name {
            return Err(unusable(name, "its manifest is another one's"));
        }
        Ok(manifest)
    }

    /// All kernels by name, with the images that boot them.
    pub(crate) fn kernels(&self) -> Result<Vec<KernelInfo>, Error> {
        let failed = |e: io::Error| fault::io("cannot list the kernels", &e);
        let images = self.list()?;
        let mut found = Vec::new();
        let entries = match fs_err::read_dir(&self.kernels) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let Some(name) = entry.file_name().to_str().and_then(|n| n.parse::<KernelName>().ok()) else {
                continue;
            };
            match self.kernel(&name) {
                Ok(manifest) => {
                    let users = images.iter().filter(|i| i.kernel.as_ref() == Some(&name));
                    let used_by: Vec<ImageName> = users.map(|i| i.name.clone()).collect();
                    found.push(KernelInfo { manifest, used_by });
                }
                Err(e) => tracing::warn!(kernel = %name, error = %e, "a kernel is left out"),
            }
        }
        found.sort_by(|a, b| a.manifest.name.cmp(&b.manifest.name));
        Ok(found)
    }

    /// Makes `dir`, which holds a boot set, the kernel `name`.
    pub(crate) fn publish_kernel(
        &self,
        dir: &Path,
        name: KernelName,
        boot: BootFiles,
        origin: String,
    ) -> Result<KernelManifest, Error> {
        let failed = |e: io::Error| fault::io(format!("cannot put kernel {name} into the catalogue"), &e);
        let artifact = |file: &str| -> Result<Artifact, Error> {
            let path = dir.join(file);
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
            fs_err::File::open(&path).and_then(|f| f.sync_all()).map_err(failed)?;
            let sha256 = digest::of_file(&path, &digest::on)?;
            Ok(Artifact { file: file.to_owned(), sha256, size: 0, path: None, stamp: None })
        };
        let mut files = [artifact(bootset::KERNEL)?, artifact(bootset::MODULES)?];
        let _lock = self.change();
        for file in &mut files {
            let path = dir.join(&file.file);
            self.blobs.share(&path, &file.sha256)?;
            let meta = fs_err::symlink_metadata(&path).map_err(failed)?;
            (file.size, file.stamp) = (meta.len(), Some(stamp(&meta)));
        }
        let [kernel, modules] = files;
        let manifest = KernelManifest {
            version: VERSION,
            name: name.clone(),
            release: boot.release,
            architecture: std::env::consts::ARCH.to_owned(),
            created: jiff::Timestamp::now(),
            origin,
            kernel,
            modules,
            module_names: boot.modules,
        };
        let place = self.kernel_dir(&name);
        if place.exists() {
            return Err(Error::new(Code::AlreadyExists, format!("there is a kernel {name} already")).hint(
                format!("choose another name with `--name`, or remove it with `bothy kernel rm {name}`"),
            ));
        }
        let put = || {
            fs_err::create_dir_all(&self.kernels)?;
            let path = dir.join("manifest.json");
            fs_err::write(&path, serde_json::to_vec_pretty(&manifest)?)?;
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
            fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
            fs_err::File::open(&path)?.sync_all()?;
            fs_err::File::open(dir)?.sync_all()?;
            put_into_place(dir, &place)?;
            fs_err::File::open(&self.kernels)?.sync_all()
        };
        put().map_err(failed)?;
        Ok(manifest)
    }

    /// Removes a kernel that no image boots.
    pub(crate) fn remove_kernel(&self, name: &KernelName) -> Result<Pruned, Error> {
        let failed = |e: io::Error| fault::io(format!("cannot remove kernel {name}"), &e);
        let gone = self.dir().join(format!(".gone-{}", OpId::new()));
        {
            let _lock = self.change();
            let used: Vec<_> = self.list()?.into_iter().filter(|i| i.kernel.as_ref() == Some(name)).collect();
            let names: Vec<_> = used.iter().map(|i| i.name.as_str()).collect();
            if !names.is_empty() {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("kernel {name} is used by image {}", names.join(", ")),
                )
                .hint(format!(
                    "remove what you do not need any more, `bothy image rm {}`",
                    names.join(" ")
                )));
            }
            fs_err::rename(self.kernel_dir(name), &gone).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => Error::not_found(format!("there is no kernel {name}"))
                    .hint("`bothy kernel list` shows what is there"),
                _ => failed(e),
            })?;
        }
        fs_err::remove_dir_all(&gone).map_err(failed)?;
        let garbage = self.collect()?;
        let freed = garbage.iter().map(|g: &Garbage| g.allocated).sum();
        Ok(Pruned { images: Vec::new(), files: garbage.into_iter().map(|g| g.path).collect(), freed })
    }

    /// Puts links to the files of a boot set into `out`, an image's directory to be: that of `kernel`, else of the newest one
    /// of the catalogue, else of the default image.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub(crate) fn take_boot_set(&self, kernel: Option<&KernelName>, out: &Path) -> Result<Taken, Error> {
        let newest = || -> Result<Option<KernelName>, Error> {
            let all = self.kernels()?.into_iter().map(|k| k.manifest);
            Ok(all.max_by_key(|m| bootset::numbers(&m.release)).map(|m| m.name))
        };
        let name = kernel.cloned().map_or_else(newest, |k| Ok(Some(k)))?;
        let (from, files, taken) = match name {
            Some(name) => {
                let manifest = self.kernel(&name)?;
                let files = [manifest.kernel, manifest.modules];
                (self.kernel_dir(&name), files, Taken { release: manifest.release, kernel: Some(name) })
            }
            None => {
                let image = self.open(&ImageName::default_image()).map_err(|e| {
                    Error::new(Code::FailedPrecondition, format!("there is no kernel to boot it with: {}", e.message))
                        .hint("`bothy kernel import` brings one, `bothy image build` makes the default image with one")
                })?;
                let files = [image.artifact("kernel")?.0.clone(), image.artifact("modules")?.0.clone()];
                (image.dir, files, Taken { release: image.manifest.kernel_release, kernel: None })
            }
        };
        let names = ROLES.iter().filter(|(role, _)| ["kernel", "modules"].contains(role));
        for (file, (_, as_name)) in files.into_iter().zip(names) {
            let path = from.join(&file.file);
            if digest::of_file(&path, &digest::on)? != file.sha256 {
                return Err(Error::new(Code::FailedPrecondition, format!("{} was altered", path.display()))
                    .hint("remove its kernel or image and bring it in again"));
            }
            fs_err::hard_link(&path, out.join(as_name))
                .map_err(|e| fault::io("cannot take the kernel into the image", &e))?;
        }
        Ok(taken)
    }
}

fn unusable(name: &KernelName, why: impl std::fmt::Display) -> Error {
    Error::new(Code::FailedPrecondition, format!("kernel {name} cannot be used: {why}"))
        .hint(format!("remove it with `bothy kernel rm {name}` and import it again"))
}

#[cfg(test)]
mod tests {
    use super::{super::tests::plant, *};
    use bothy_contract::image::ImageManifest;
    use std::os::unix::fs::MetadataExt as _;

    fn boot(release: &str) -> BootFiles {
        BootFiles { release: release.to_owned(), modules: vec!["overlay".to_owned()] }
    }

    fn put(store: &Store, release: &str) -> Result<KernelManifest, Error> {
        let dir = store.dir().join(".kernel");
        fs_err::create_dir_all(&dir).unwrap();
        fs_err::write(dir.join(bootset::KERNEL), format!("kernel {release}")).unwrap();
        fs_err::write(dir.join(bootset::MODULES), "modules").unwrap();
        let made = store.publish_kernel(&dir, release.parse().unwrap(), boot(release), "a test".into());
        let _ = fs_err::remove_dir_all(&dir);
        made
    }

    #[test]
    fn kernels_are_kept_shared_and_removed_once_no_image_boots_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        fs_err::create_dir_all(store.dir()).unwrap();
        let out = dir.path().join("out");
        fs_err::create_dir(&out).unwrap();
        let none = store.take_boot_set(None, &out).unwrap_err();
        assert!(none.message.starts_with("there is no kernel to boot it with"), "{none}");
        assert_eq!(store.kernels().unwrap(), []);
        let (old, new) = (put(&store, "6.1.0-9").unwrap(), put(&store, "6.1.0-10").unwrap());
        assert_eq!(put(&store, "6.1.0-9").unwrap_err().code, Code::AlreadyExists);
        let taken = store.take_boot_set(None, &out).unwrap();
        assert_eq!(taken, Taken { release: new.release.clone(), kernel: Some(new.name.clone()) });
        let inode = |p: PathBuf| fs_err::metadata(p).unwrap().ino();
        assert_eq!(inode(out.join("vmlinux")), inode(store.kernel_dir(&new.name).join("vmlinux")));
        // The modules of both are one file.
        assert_eq!(inode(out.join("modules.cpio")), inode(store.kernel_dir(&old.name).join("modules.cpio")));

        let image = plant(&store, "a", 10);
        let booting = ImageManifest { kernel: Some(old.name.clone()), ..image.clone() };
        super::super::publish::write_manifest(&store.dir_of(&image.name), &booting).unwrap();
        assert_eq!(store.kernels().unwrap()[1].used_by, std::slice::from_ref(&image.name));
        let err = store.remove_kernel(&old.name).unwrap_err();
        assert_eq!(err.message, "kernel 6.1.0-9 is used by image a");
        store.remove(&image.name).unwrap();
        assert_eq!(
            store.remove_kernel(&old.name).unwrap().files.len(),
            1,
            "the modules are another one's, too"
        );
        assert_eq!(store.remove_kernel(&old.name).unwrap_err().code, Code::NotFound);
        fs_err::write(store.kernel_dir(&new.name).join("vmlinux"), "kernel 6.1.0-11").unwrap();
        fs_err::remove_file(out.join("vmlinux")).unwrap();
        assert!(store.take_boot_set(Some(&new.name), &out).unwrap_err().message.contains("was altered"));
    }
}
