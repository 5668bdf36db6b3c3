//! The images of this host: one directory each, `<store>/images/<name>`, whose `manifest.json` is the truth.
//!
//! No table repeats what is there, and every request looks anew: an image that is copied or linked in is there, one
//! that is removed is gone. Everything here is public and read-only, since the VMMs' users read it. A directory
//! becomes an image by one rename; names with a dot in front are builds under way.

mod blobs;
mod check;
mod kernels;
mod publish;
mod remove;
mod seed;

pub(crate) use blobs::Garbage;
pub(crate) use publish::Over;

use crate::fault;
use bothy_contract::{
    Code, Error, ImageName,
    image::{Artifact, ImageManifest},
};
use sha2::{Digest as _, Sha256};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The roles that every image has a file for.
pub(crate) const ROLES: [(&str, &str); 5] = [
    ("rootfs", "rootfs.ext4"),
    ("kernel", "vmlinux"),
    ("modules", "modules.cpio"),
    ("system-seed", "system-seed.ext4"),
    ("work-seed", "work-seed.ext4"),
];

/// The images below one directory.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    images: PathBuf,
    kernels: PathBuf,
    blobs: blobs::Blobs,
    /// Held while it is changed which files are there: publishing and collecting never meet. Never across slow work.
    changing: Arc<Mutex<()>>,
    slow: check::Slow,
}

/// An image whose files are all there.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// Its directory.
    pub(crate) dir: PathBuf,
    /// What it says of itself.
    pub(crate) manifest: ImageManifest,
}

impl Image {
    /// The file of `role`.
    pub(crate) fn artifact(&self, role: &str) -> Result<(&Artifact, PathBuf), Error> {
        let artifact =
            self.manifest.artifacts.get(role).ok_or_else(|| {
                unusable(&self.manifest.name, format!("its manifest has no artifact {role}"))
            })?;
        if let Some(path) = &artifact.path {
            return Ok((artifact, path.clone()));
        }
        let plain = Path::new(&artifact.file).file_name().is_some_and(|f| *f == *artifact.file);
        if !plain {
            let is = format!("{:?} is not the name of a file", artifact.file);
            return Err(unusable(&self.manifest.name, is));
        }
        Ok((artifact, self.dir.join(&artifact.file)))
    }

    /// One digest of all its files but the work-seed, which may be made anew at any time.
    pub(crate) fn digest(&self) -> String {
        let mut sha = Sha256::new();
        for (role, artifact) in self.manifest.artifacts.iter().filter(|(role, _)| *role != "work-seed") {
            sha.update(format!("{role} {}\n", artifact.sha256));
        }
        hex::encode(sha.finalize())
    }
}

fn unusable(name: &ImageName, why: impl std::fmt::Display) -> Error {
    Error::new(Code::FailedPrecondition, format!("image {name} cannot be used: {why}"))
        .hint(format!("build it again with `bothy image build {name} --force`"))
}

/// Like [`unusable`], where its manifest tells how it came in and so can again.
fn broken(manifest: &ImageManifest, why: impl std::fmt::Display) -> Error {
    let (name, error) = (&manifest.name, unusable(&manifest.name, why));
    if manifest.origin.is_empty() || manifest.origin.starts_with("recipe ") {
        error
    } else if manifest.is_managed() {
        error.hint(format!(
            "remove it with `bothy image rm {name}` and bring it in again, from {}",
            manifest.origin
        ))
    } else {
        error.hint(format!(
            "if the change is wanted, register it again: `bothy image register {name} --force ...`"
        ))
    }
}

impl Store {
    /// The images below `store`.
    pub(crate) fn new(store: &Path) -> Self {
        Self {
            images: store.join("images"),
            kernels: store.join("kernels"),
            blobs: blobs::Blobs::new(store.join("blobs")),
            changing: Arc::default(),
            slow: Arc::default(),
        }
    }

    /// Held by whoever changes which files are there.
    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blobs that no image and no VM needs.
    pub(crate) fn garbage(&self) -> Result<Vec<Garbage>, Error> {
        let _lock = self.change();
        self.blobs.garbage()
    }

    /// Removes the blobs that no image and no VM needs.
    pub(crate) fn collect(&self) -> Result<Vec<Garbage>, Error> {
        let _lock = self.change();
        self.blobs.collect()
    }

    /// The directory of all images.
    pub(crate) fn dir(&self) -> &Path {
        &self.images
    }

    /// The directory of an image, whether it is there or not.
    pub(crate) fn dir_of(&self, name: &ImageName) -> PathBuf {
        self.images.join(name.as_str())
    }

    /// All images by name. One whose manifest cannot be read is left out, and the log says why.
    pub(crate) fn list(&self) -> Result<Vec<ImageManifest>, Error> {
        let failed = |e: &io::Error| fault::io("cannot list the images", e);
        let mut found = Vec::new();
        for entry in fs_err::read_dir(&self.images).map_err(|e| failed(&e))? {
            let entry = entry.map_err(|e| failed(&e))?;
            let Some(name) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            match self.show(&name) {
                Ok(manifest) => found.push(manifest),
                Err(e) => tracing::warn!(image = %name, error = %e, "an image is left out"),
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The manifest of one image.
    pub(crate) fn show(&self, name: &ImageName) -> Result<ImageManifest, Error> {
        let path = self.dir_of(name).join("manifest.json");
        let data = fs_err::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound if !self.dir_of(name).exists() => {
                Error::not_found(format!("there is no image {name}")).hint(format!(
                    "build it with `bothy image build {name}`; `bothy image list` shows what is there"
                ))
            }
            io::ErrorKind::NotFound => unusable(name, format!("{} is missing", path.display())),
            _ => fault::io(format!("cannot read the manifest of image {name}"), &e),
        })?;
        let manifest: ImageManifest = serde_json::from_slice(&data)
            .map_err(|e| unusable(name, format!("{} is not a manifest: {e}", path.display())))?;
        if manifest.version != ImageManifest::VERSION || manifest.name != *name {
            let is = (&manifest.name, manifest.version);
            return Err(unusable(name, format!("its manifest is that of image {}, version {}", is.0, is.1)));
        }
        Ok(manifest)
    }

    /// One image whose files are all there and are what its manifest says, as far as a look at them shows. The work-seed is
    /// not looked at: see [`Store::check_seed`].
    pub(crate) fn open(&self, name: &ImageName) -> Result<Image, Error> {
        let image = Image { dir: self.dir_of(name), manifest: self.show(name)? };
        for (role, _) in ROLES {
            image.artifact(role)?;
        }
        self.check(&image, |role| role != "work-seed")?;
        Ok(image)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use bothy_contract::image::{InitStyle, WaitService};

    /// An image with small files in place of real ones.
    pub(crate) fn plant(store: &Store, name: &str, size: u64) -> ImageManifest {
        let name: ImageName = name.parse().unwrap();
        let dir = store.dir_of(&name);
        fs_err::create_dir_all(&dir).unwrap();
        let mut artifacts = std::collections::BTreeMap::new();
        for (role, file) in ROLES {
            // Another file than before, which another image may have.
            let _ = fs_err::remove_file(dir.join(file));
            fs_err::File::create(dir.join(file)).unwrap().set_len(size).unwrap();
            let sha256 = crate::digest::of_file(&dir.join(file), &crate::digest::on).unwrap();
            let artifact = Artifact { file: file.to_owned(), sha256, size, path: None, stamp: None };
            artifacts.insert(role.to_owned(), artifact);
        }
        let manifest = ImageManifest {
            architecture: "x86_64".into(),
            created: jiff::Timestamp::UNIX_EPOCH,
            recipe_sha256: "r".into(),
            wait: vec![WaitService { name: "ssh".into(), port: Some(22), unit: None, timeout_s: 60 }],
            kernel_release: "6.1".into(),
            artifacts,
            ..ImageManifest::new(name, InitStyle::Systemd)
        };
        fs_err::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        manifest
    }

    /// Makes the manifest say what the files of a planted image have become.
    pub(crate) fn replant(store: &Store, name: &ImageName) {
        let mut manifest = store.show(name).unwrap();
        for artifact in manifest.artifacts.values_mut() {
            let path = store.dir_of(name).join(&artifact.file);
            artifact.sha256 = crate::digest::of_file(&path, &crate::digest::on).unwrap();
            artifact.size = fs_err::metadata(&path).unwrap().len();
            artifact.stamp = None;
        }
        let path = store.dir_of(name).join("manifest.json");
        fs_err::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    }

    #[test]
    fn images_are_what_the_directory_holds() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let (b, a) = (plant(&store, "b", 10), plant(&store, "a", 10));
        fs_err::create_dir(store.dir().join(".build-x")).unwrap();
        fs_err::create_dir(store.dir().join("half")).unwrap();
        assert_eq!(store.list().unwrap(), [a.clone(), b]);
        assert_eq!(store.open(&a.name).unwrap().manifest, a);
        fs_err::remove_dir_all(store.dir_of(&a.name)).unwrap();
        assert_eq!(store.show(&a.name).unwrap_err().code, Code::NotFound);
        assert_eq!(store.list().unwrap().len(), 1);
        let half = store.show(&"half".parse().unwrap()).unwrap_err();
        assert_eq!(half.code, Code::FailedPrecondition);
    }

    #[test]
    fn a_torn_or_missing_file_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let name = plant(&store, "a", 10).name;
        let refused = |why: &str| {
            let err = store.open(&name).unwrap_err();
            assert_eq!(err.code, Code::FailedPrecondition);
            assert!(err.message.contains(why), "{err}");
            assert!(err.hint.unwrap().contains("bothy image build a --force"));
        };
        let seed = store.dir_of(&name).join("system-seed.ext4");
        fs_err::write(&seed, "torn").unwrap();
        refused("system-seed.ext4 is torn: 4 bytes of 10");
        fs_err::remove_file(&seed).unwrap();
        refused("system-seed.ext4 is missing");
        // A link is not followed: it is judged by its own length, whatever lies behind it.
        let behind = dir.path().join("behind");
        fs_err::write(&behind, [0; 10]).unwrap();
        std::os::unix::fs::symlink(&behind, &seed).unwrap();
        refused("system-seed.ext4 is torn");
        fs_err::remove_file(&seed).unwrap();
        let mut evil = plant(&store, "a", 10);
        evil.artifacts.get_mut("kernel").unwrap().file = "../../x".into();
        let path = store.dir_of(&name).join("manifest.json");
        fs_err::write(&path, serde_json::to_vec(&evil).unwrap()).unwrap();
        refused("not the name of a file");
        evil.name = "other".parse().unwrap();
        fs_err::write(&path, serde_json::to_vec(&evil).unwrap()).unwrap();
        refused("that of image other");
        fs_err::write(&path, "{").unwrap();
        refused("is not a manifest");
    }
}
