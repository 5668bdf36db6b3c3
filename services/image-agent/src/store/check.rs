//! Whether an image's files are what its manifest says.
//!
//! At each use a look at each file's size and stamp: cheap, and a write or a replacement shows. Where the stamp is
//! another one, or none was kept, the digest decides, and the new stamp is kept. `verify` computes all digests.

use super::{Artifact, Image, Store, broken};
use crate::digest::{self, Beat};
use bothy_contract::{
    Error, ImageName,
    catalogue::{Checked, FileState, Verified},
    image::{ImageManifest, Stamp},
};
use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// Held while digests are computed for a use: a second user of the same image waits for the first one's answer.
pub(super) type Slow = Arc<Mutex<()>>;

/// What `meta` shows of a file's content having changed.
pub(crate) fn stamp(meta: &Metadata) -> Stamp {
    Stamp { inode: meta.ino(), mtime: meta.mtime(), mtime_nsec: meta.mtime_nsec() }
}

/// How a file stands at a look.
enum Look {
    /// As it was when its digest was computed.
    Same,
    /// It may be another one.
    Another(Stamp),
}

fn look(manifest: &ImageManifest, artifact: &Artifact, path: &Path) -> Result<Look, Error> {
    let meta = fs_err::symlink_metadata(path)
        .map_err(|e| broken(manifest, format!("{} is missing ({})", path.display(), e.kind())))?;
    if !meta.is_file() || meta.len() != artifact.size {
        let is = format!("{} is torn: {} bytes of {}", path.display(), meta.len(), artifact.size);
        return Err(broken(manifest, is));
    }
    let stamp = stamp(&meta);
    Ok(if artifact.stamp == Some(stamp) { Look::Same } else { Look::Another(stamp) })
}

impl Store {
    /// Checks the files of `image` that `wanted` says, at the least cost.
    pub(super) fn check(&self, image: &Image, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        let name = &image.manifest.name;
        let changed = |image: &Image| -> Result<Vec<(String, Stamp)>, Error> {
            let mut changed = Vec::new();
            for role in image.manifest.artifacts.keys().filter(|role| wanted(role)) {
                let (artifact, path) = image.artifact(role)?;
                if let Look::Another(stamp) = look(&image.manifest, artifact, &path)? {
                    changed.push((role.clone(), stamp));
                }
            }
            Ok(changed)
        };
        if changed(image)?.is_empty() {
            return Ok(());
        }
        let _one = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever had the lock before may have kept the stamps.
        let image = &Image { dir: image.dir.clone(), manifest: self.show(name)? };
        let stamps = changed(image)?;
        for (role, _) in &stamps {
            let (artifact, path) = image.artifact(role)?;
            let is = digest::of_file(&path, &digest::on)?;
            if is != artifact.sha256 {
                return Err(broken(
                    &image.manifest,
                    format!(
                        "{} was altered: its digest is {is}, its manifest says {}",
                        path.display(),
                        artifact.sha256
                    ),
                ));
            }
        }
        if !stamps.is_empty()
            && let Err(e) = self.restamp(&image.manifest, &stamps)
        {
            tracing::warn!(image = %name, error = %e, "its digests will be computed again");
        }
        Ok(())
    }

    /// Computes all digests of an image anew and keeps the stamps of what is right.
    pub(crate) fn verify(&self, name: &ImageName, beat: Beat<'_>) -> Result<Verified, Error> {
        loop {
            let image = Image { dir: self.dir_of(name), manifest: self.show(name)? };
            let verified = self.verify_once(&image, beat)?;
            // A file that was replaced meanwhile, with the manifest, is not damaged. (Stamps are changed as well.)
            if verified.is_whole() || self.digests_now(name)? == digests(&image.manifest) {
                return Ok(verified);
            }
        }
    }

    /// The digests that the manifest says when nobody is changing it.
    fn digests_now(&self, name: &ImageName) -> Result<Vec<String>, Error> {
        let _lock = self.change();
        Ok(digests(&self.show(name)?))
    }

    fn verify_once(&self, image: &Image, beat: Beat<'_>) -> Result<Verified, Error> {
        let name = &image.manifest.name;
        let (mut files, mut stamps) = (Vec::new(), Vec::new());
        for role in image.manifest.artifacts.keys() {
            let (artifact, path) = image.artifact(role)?;
            let mut found = None;
            let state = match fs_err::symlink_metadata(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => FileState::Missing,
                Err(e) => return Err(crate::fault::io(format!("cannot look at {}", path.display()), &e)),
                Ok(meta) if !meta.is_file() || meta.len() != artifact.size => FileState::Torn,
                Ok(meta) => {
                    let is = digest::of_file(&path, beat)?;
                    let right = is == artifact.sha256;
                    found = Some(is);
                    if right {
                        stamps.push((role.clone(), stamp(&meta)));
                        FileState::Whole
                    } else {
                        FileState::Altered
                    }
                }
            };
            let expected = artifact.sha256.clone();
            files.push(Checked { role: role.clone(), path, expected, found, state });
        }
        let old = stamps
            .iter()
            .any(|(role, stamp)| image.manifest.artifacts.get(role).is_some_and(|a| a.stamp != Some(*stamp)));
        if old {
            self.restamp(&image.manifest, &stamps)?;
        }
        Ok(Verified { image: name.clone(), files })
    }
}

fn digests(manifest: &ImageManifest) -> Vec<String> {
    manifest.artifacts.values().map(|a| a.sha256.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::plant, *};

    #[test]
    fn what_is_altered_behind_its_back_is_found_and_what_is_only_touched_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let name = plant(&store, "a", 4096).name;
        let rootfs = store.dir_of(&name).join("rootfs.ext4");
        let stamps = || store.show(&name).unwrap().artifacts["rootfs"].stamp;
        assert_eq!(stamps(), None, "as images of before are");
        store.open(&name).unwrap();
        let first = stamps().unwrap();
        // The same content in another file, as a copy is.
        fs_err::copy(&rootfs, dir.path().join("copy")).unwrap();
        fs_err::rename(dir.path().join("copy"), &rootfs).unwrap();
        store.open(&name).unwrap();
        assert_ne!(stamps().unwrap(), first);
        assert!(store.verify(&name, &digest::on).unwrap().files.iter().all(|f| f.state == FileState::Whole));
        // As long as before, and something else in it.
        fs_err::write(&rootfs, [1; 4096]).unwrap();
        let err = store.open(&name).unwrap_err();
        assert!(err.message.contains("rootfs.ext4 was altered"), "{err}");
        assert!(err.hint.unwrap().contains("bothy image build a --force"));
        let verified = store.verify(&name, &digest::on).unwrap();
        let of = |role: &str| verified.files.iter().find(|f| f.role == role).unwrap();
        assert_eq!(of("rootfs").state, FileState::Altered);
        assert_ne!(of("rootfs").found.as_ref(), Some(&of("rootfs").expected));
        assert_eq!(of("kernel").state, FileState::Whole);
        fs_err::write(&rootfs, [0; 5]).unwrap();
        fs_err::remove_file(store.dir_of(&name).join("vmlinux")).unwrap();
        let verified = store.verify(&name, &digest::on).unwrap();
        let state = |role: &str| verified.files.iter().find(|f| f.role == role).unwrap().state;
        assert_eq!((state("rootfs"), state("kernel")), (FileState::Torn, FileState::Missing));
    }

    #[test]
    fn stamps_are_never_written_into_another_image_of_that_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let old = plant(&store, "a", 10);
        let mut new = plant(&store, "a", 20);
        new.created = jiff::Timestamp::now();
        super::super::publish::write_manifest(&store.dir_of(&new.name), &new).unwrap();
        let stamp = Stamp { inode: 1, mtime: 1, mtime_nsec: 1 };
        store.restamp(&old, &[("rootfs".to_owned(), stamp)]).unwrap();
        assert_eq!(store.show(&new.name).unwrap(), new);
    }
}
