//! The blobs that came from registries, by their SHA-256: each is fetched once, whoever wants it, and one that broke off is
//! gone on with. What is there under its name is what that name says. The ones that nobody wanted for longest go when they are
//! too many.

use crate::fault;
use bothy_contract::Error;
use fs_err as fs;
use std::{
    collections::HashMap,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::SystemTime,
};
use tokio::sync::{Mutex, OwnedMutexGuard};

/// What they may take together, also those that broke off, once a pull has ended.
const KEPT: u64 = 8 << 30;
/// How the name of one ends that is not whole.
const PART: &str = "part";

/// The directory of the blobs, and who fetches which.
#[derive(Debug)]
pub(crate) struct Blobs {
    dir: PathBuf,
    fetching: std::sync::Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl Blobs {
    /// Those in `dir`.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, fetching: Default::default() }
    }

    /// Makes the directory if it is not there, it private, and what an earlier process left small enough.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.dir)
            .and_then(|()| fs::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o700)))
            .and_then(|()| self.trim())
            .map_err(|e| fault::io("cannot make the blobs' directory", &e))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until nobody else fetches this one.
    pub(super) async fn alone(&self, sha256: &str) -> OwnedMutexGuard<()> {
        let one = {
            let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that somebody holds or waits for.
            fetching.retain(|_, one| Arc::strong_count(one) > 1);
            Arc::clone(fetching.entry(sha256.to_owned()).or_default())
        };
        one.lock_owned().await
    }

    /// Where one is while it comes.
    pub(super) fn part(&self, sha256: &str) -> PathBuf {
        self.dir.join(sha256).with_extension(PART)
    }

    /// Gives a blob the name `to` as well, where it is there, and says whether.
    pub(super) fn link(&self, sha256: &str, to: &Path) -> io::Result<bool> {
        let blob = self.dir.join(sha256);
        let linked = match fs::hard_link(&blob, to) {
            // The images may be on a file system of their own.
            Err(e) if e.kind() == io::ErrorKind::CrossesDevices => fs::copy(&blob, to).map(drop),
            linked => linked,
        };
        match linked {
            Ok(()) => {
                // It was wanted now.
                fs::File::open(&blob)?.file().set_modified(SystemTime::now())?;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// One that came whole, and was checked.
    pub(super) fn keep(&self, sha256: &str) -> io::Result<()> {
        fs::rename(self.part(sha256), self.dir.join(sha256))
    }

    /// Removes the ones that nobody wanted for longest, so that the rest takes at most so many bytes.
    pub(super) fn trim(&self) -> io::Result<()> {
        self.trim_to(KEPT)
    }

    fn trim_to(&self, most: u64) -> io::Result<()> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // Another pull may have removed it.
            if let Ok(meta) = fs::symlink_metadata(&path) {
                all.push((meta.modified()?, meta.len(), path));
            }
        }
        all.sort();
        let mut sum: u64 = all.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in all {
            if sum <= most {
                break;
            }
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if self.is_fetched(&name) {
                continue;
            }
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => sum -= size,
            }
        }
        Ok(())
    }

    fn is_fetched(&self, sha256: &str) -> bool {
        let fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        fetching.get(sha256).is_some_and(|one| Arc::strong_count(one) > 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn one_is_kept_linked_and_goes_as_the_one_that_was_wanted_longest_ago() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(dir.path().join("blobs"));
        blobs.prepare().unwrap();
        let to = dir.path().join("to");
        assert!(!blobs.link("a", &to).unwrap());
        for name in ["a", "b", "c"] {
            fs::write(blobs.part(name), vec![1; 100]).unwrap();
            blobs.keep(name).unwrap();
            let hour_ago = SystemTime::now() - Duration::from_secs(3600);
            fs::File::open(blobs.dir().join(name)).unwrap().file().set_modified(hour_ago).unwrap();
        }
        assert!(blobs.link("a", &to).unwrap());
        let fetched = blobs.alone("b").await;
        blobs.trim_to(200).unwrap();
        let left = || ["a", "b", "c"].map(|name| blobs.dir().join(name).exists());
        assert_eq!(left(), [true, true, false], "b is being fetched, a was wanted now");
        drop(fetched);
        blobs.trim_to(100).unwrap();
        assert_eq!(left(), [true, false, false]);
        blobs.trim_to(0).unwrap();
        assert_eq!(fs::read(to).unwrap().len(), 100, "who took it keeps it");
    }

    #[tokio::test]
    async fn one_is_fetched_by_one_at_a_time() {
        let blobs = Arc::new(Blobs::new("/nowhere".into()));
        let first = blobs.alone("a").await;
        let _other = blobs.alone("b").await;
        let (of, waiting) = (Arc::clone(&blobs), Arc::new(()));
        let held = Arc::clone(&waiting);
        let second = tokio::spawn(async move {
            let _guard = of.alone("a").await;
            drop(held);
        });
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&waiting), 2, "it waits");
        drop(first);
        second.await.unwrap();
    }
}
