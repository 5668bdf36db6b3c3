//! The one way into the store: a directory that holds an image's files becomes the image.
//!
//! The directory is beside the images, under a name with a dot in front, and whoever made it removes it afterwards: an
//! image that was there before is in it then.

use super::{Artifact, ROLES, Store, unusable};
use crate::{
    digest::{self, Beat},
    fault,
};
use bothy_contract::{
    Code, Error, ImageName,
    image::{ImageManifest, Stamp},
};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::{io, os::unix::fs::PermissionsExt as _, path::Path};

/// What an image may take the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// Whatever has its name.
    Any,
    /// Nothing: the name must be free.
    Nothing,
    /// The very image that was created then.
    Created(jiff::Timestamp),
}

impl Store {
    /// Makes `dir` the image that `manifest` describes. The files are those of [`ROLES`], and any artifact that the manifest
    /// names already: one with a path of its own stays where it is. Digests, sizes and stamps are computed here, whatever
    /// the manifest says of them, and files are shared with other images that have the same. What comes back is what was
    /// written.
    ///
    /// # Errors
    /// A file is missing, `over` does not hold, or the file system says no. Then there is no new image.
    pub(crate) fn publish(
        &self,
        dir: &Path,
        manifest: ImageManifest,
        over: Over,
        beat: Beat<'_>,
    ) -> Result<ImageManifest, Error> {
        self.publish_if(dir, manifest, over, beat, &|_, _| true)
    }

    /// Like [`Store::publish`], if `right` says of each role's digest that it is the right one.
    pub(crate) fn publish_if(
        &self,
        dir: &Path,
        mut manifest: ImageManifest,
        over: Over,
        beat: Beat<'_>,
        right: &dyn Fn(&str, &str) -> bool,
    ) -> Result<ImageManifest, Error> {
        let name = manifest.name.clone();
        let failed = |e: io::Error| fault::io(format!("cannot put image {name} into place"), &e);
        for (role, file) in ROLES {
            manifest.artifacts.entry(role.to_owned()).or_insert_with(|| Artifact {
                file: file.to_owned(),
                sha256: String::new(),
                size: 0,
                path: None,
                stamp: None,
            });
        }
        for (role, artifact) in &mut manifest.artifacts {
            let path = artifact.path.clone().unwrap_or_else(|| dir.join(&artifact.file));
            if artifact.path.is_none() {
                fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
                fs_err::File::open(&path).and_then(|f| f.sync_all()).map_err(failed)?;
            }
            artifact.sha256 = digest::of_file(&path, beat)?;
            if !right(role, &artifact.sha256) {
                let other = format!("its {role} is another one than it was: {}", path.display());
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("image {name} was not changed: {other}"),
                )
                .hint("register it again as it is now, `bothy image register --force`"));
            }
        }
        let lock = self.change();
        for artifact in manifest.artifacts.values_mut() {
            let path = artifact.path.clone().unwrap_or_else(|| dir.join(&artifact.file));
            if artifact.path.is_none() {
                self.blobs.share(&path, &artifact.sha256)?;
            }
            let meta = fs_err::symlink_metadata(&path).map_err(failed)?;
            artifact.size = meta.len();
            artifact.stamp = Some(super::check::stamp(&meta));
        }
        manifest.seed_fingerprint = Some(super::seed::fingerprint(&manifest));
        let written = || {
            write_manifest(dir, &manifest)?;
            fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
            fs_err::File::open(dir)?.sync_all()
        };
        written().map_err(failed)?;
        self.may_go_over(&name, over)?;
        put_into_place(dir, &self.dir_of(&name)).map_err(failed)?;
        fs_err::File::open(self.dir()).and_then(|d| d.sync_all()).map_err(failed)?;
        drop(lock);
        Ok(manifest)
    }

    /// Refuses a name that an image has.
    pub(crate) fn must_be_free(&self, name: &ImageName) -> Result<(), Error> {
        self.may_go_over(name, Over::Nothing)
    }

    /// Whether `over` holds for what has `name` now.
    fn may_go_over(&self, name: &ImageName, over: Over) -> Result<(), Error> {
        let there = self.dir_of(name).exists();
        match over {
            Over::Any => Ok(()),
            Over::Nothing if there => {
                Err(Error::new(Code::AlreadyExists, format!("there is an image {name} already"))
                    .hint(format!("choose another name, or remove it with `bothy image rm {name}`")))
            }
            Over::Nothing => Ok(()),
            Over::Created(when) => match self.show(name) {
                Ok(manifest) if manifest.created == when => Ok(()),
                Ok(_) => Err(unusable(name, "it was replaced meanwhile")),
                Err(e) => Err(e),
            },
        }
    }

    /// Writes stamps into the manifest of an image whose files were found to be right, if it is still the same one.
    pub(super) fn restamp(&self, checked: &ImageManifest, stamps: &[(String, Stamp)]) -> Result<(), Error> {
        let _lock = self.change();
        let mut manifest = self.show(&checked.name)?;
        if manifest.created != checked.created {
            return Ok(());
        }
        for (role, stamp) in stamps {
            let was = checked.artifacts.get(role).map(|a| &a.sha256);
            if let Some(artifact) = manifest.artifacts.get_mut(role).filter(|a| Some(&a.sha256) == was) {
                artifact.stamp = Some(*stamp);
            }
        }
        write_manifest(&self.dir_of(&checked.name), &manifest)
            .map_err(|e| fault::io(format!("cannot note that image {} is whole", checked.name), &e))
    }
}

/// Puts a manifest into an image's directory, in one step.
pub(super) fn write_manifest(dir: &Path, manifest: &ImageManifest) -> io::Result<()> {
    let mut temp = tempfile::Builder::new().prefix(".manifest-").tempfile_in(dir)?;
    io::Write::write_all(&mut temp, &serde_json::to_vec_pretty(manifest)?)?;
    temp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    temp.as_file().sync_all()?;
    temp.persist(dir.join("manifest.json")).map_err(|e| e.error)?;
    Ok(())
}

/// Renames `new` to `place`. What is there is exchanged for it in the same instant; VMs that run from it keep their
/// files.
pub(crate) fn put_into_place(new: &Path, place: &Path) -> io::Result<()> {
    let flags = if place.exists() { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    renameat_with(CWD, new, CWD, place, flags).map_err(|e| {
        io::Error::new(
            io::Error::from(e).kind(),
            format!("cannot rename {} to {}: {e}", new.display(), place.display()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::image::InitStyle;
    use std::os::unix::fs::MetadataExt as _;

    /// A directory with an image's files, whose content says `text`.
    pub(crate) fn filled(store: &Store, text: &str) -> std::path::PathBuf {
        let dir = store.dir().join(".new");
        fs_err::create_dir_all(&dir).unwrap();
        for (role, file) in ROLES {
            let content = if role == "kernel" { "the same" } else { text };
            fs_err::write(dir.join(file), format!("{role} {content}")).unwrap();
        }
        dir
    }

    #[test]
    fn an_image_is_published_whole_and_shares_what_others_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let publish = |name: &str, text: &str, over| {
            let from = filled(&store, text);
            let made = store.publish(
                &from,
                ImageManifest::new(name.parse().unwrap(), InitStyle::Agent),
                over,
                &digest::on,
            );
            let _ = fs_err::remove_dir_all(&from);
            made
        };
        let a = publish("a", "one", Over::Nothing).unwrap();
        let b = publish("b", "two", Over::Any).unwrap();
        assert_eq!(store.open(&a.name).unwrap().manifest, a);
        let inode = |image: &ImageManifest, role| {
            let image = store.open(&image.name).unwrap();
            fs_err::metadata(image.artifact(role).unwrap().1).unwrap().ino()
        };
        assert_eq!(inode(&a, "kernel"), inode(&b, "kernel"));
        assert_ne!(inode(&a, "rootfs"), inode(&b, "rootfs"));
        assert_eq!(publish("a", "three", Over::Nothing).unwrap_err().code, Code::AlreadyExists);
        let early = Over::Created(jiff::Timestamp::UNIX_EPOCH);
        assert!(publish("a", "three", early).unwrap_err().message.contains("replaced meanwhile"));
        assert_eq!(store.open(&a.name).unwrap().manifest, a, "what was refused changed nothing");
        let again = publish("a", "four", Over::Created(a.created)).unwrap();
        assert_eq!(store.open(&a.name).unwrap().manifest, again);
        assert_eq!(store.collect().unwrap().len(), 2 * (ROLES.len() - 1), "what `three` and `one` had");
    }

    #[test]
    fn a_file_that_is_missing_makes_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let from = filled(&store, "one");
        fs_err::remove_file(from.join("vmlinux")).unwrap();
        let manifest = ImageManifest::new("a".parse().unwrap(), InitStyle::Agent);
        let err = store.publish(&from, manifest, Over::Any, &digest::on).unwrap_err();
        assert!(err.message.contains("vmlinux"), "{err}");
        assert_eq!(store.list().unwrap(), []);
    }

    #[test]
    fn an_image_is_put_into_place_or_exchanged_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (new, place) = (dir.path().join("new"), dir.path().join("place"));
        let put = |text: &str| {
            fs_err::create_dir_all(&new).unwrap();
            fs_err::write(new.join("f"), text).unwrap();
            put_into_place(&new, &place).unwrap();
        };
        put("one");
        assert!(!new.exists());
        put("two");
        assert_eq!(fs_err::read(place.join("f")).unwrap(), b"two");
        assert_eq!(fs_err::read(new.join("f")).unwrap(), b"one");
    }
}
