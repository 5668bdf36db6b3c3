//! Work-seeds as large as the disks that are made from them: a guest that finds its file system as large as its disk has
//! nothing to grow, which takes an emulated one half a second, and the host 20 ms once for each size.
//!
//! They are kept in `<store>/grown` by the digest of their seed and their size, few of them, and never over a restart of the
//! agent: each can be made again from its seed. Roots that share their extents with the image's are kept the same way, in
//! `<store>/roots`. Only what is the image's is grown here, never what a guest wrote.

use crate::{
    build::{self, Stage, pack},
    disks::Seed,
    fault,
};
use bothy_contract::{Error, OpId};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use tokio_util::sync::CancellationToken;

/// How many are kept.
const MAX: usize = 8;
/// The largest, in MiB: what describes an empty file system of this size is 4 MiB to copy for each disk. Larger ones are grown by
/// their guests.
const LARGEST_MIB: u64 = 16 << 10;
const MIB: u64 = 1 << 20;

/// The grown file systems in one directory.
#[derive(Debug, Clone)]
pub(crate) struct Grown {
    dir: PathBuf,
    /// Held while one is made.
    making: Arc<Mutex<()>>,
}

impl Grown {
    /// Those in `dir`, which need not be there yet.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, making: Arc::default() }
    }

    /// Removes all.
    pub(crate) fn sweep(&self) -> Result<(), Error> {
        build::remove(&self.dir)
    }

    /// `seed`, which has the digest `sha256`, as large as a disk of `mib` MiB; `seed` itself where that is not to be had, and the
    /// guest grows it. Runs where blocking is allowed, with a runtime beside.
    pub(crate) fn of(&self, seed: Seed, sha256: &str, mib: u64) -> Seed {
        match self.get(&seed, sha256, mib) {
            Ok(Some(file)) => Seed { file, ..seed },
            Ok(None) => seed,
            Err(error) => {
                tracing::warn!(%error, "the guest has to grow its work disk itself");
                seed
            }
        }
    }

    /// `None` where it is not worth it.
    fn get(&self, seed: &Seed, sha256: &str, mib: u64) -> Result<Option<fs_err::File>, Error> {
        if mib > LARGEST_MIB || seed.size()? >= mib * MIB {
            return Ok(None);
        }
        self.keep(sha256, mib, |half| grow(seed, half, mib)).map(Some)
    }

    /// The one of what has the digest `sha256` for disks of `mib` MiB, made by `make` under the name that it gets, where it is
    /// not there.
    pub(crate) fn keep(
        &self,
        sha256: &str,
        mib: u64,
        make: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<fs_err::File, Error> {
        let path = self.dir.join(format!("{sha256}-{mib}.ext4"));
        let failed = |e: io::Error| fault::io("cannot keep a grown file system", &e);
        // Opened before another one may take its place.
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if !path.is_file() {
            fs_err::create_dir_all(&self.dir).map_err(failed)?;
            self.make_room().map_err(failed)?;
            let half = self.dir.join(format!(".{}", OpId::new()));
            let made = make(&half).and_then(|()| fs_err::rename(&half, &path).map_err(failed));
            if made.is_err() {
                let _ = fs_err::remove_file(&half);
            }
            made?;
        }
        fs_err::File::open(&path).map_err(failed)
    }

    /// Removes the oldest, so that one more can be kept. Who clones one has it open.
    fn make_room(&self) -> io::Result<()> {
        let mut kept = Vec::new();
        for entry in fs_err::read_dir(&self.dir)? {
            let entry = entry?;
            kept.push((entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
        kept.sort();
        let too_many = (kept.len() + 1).saturating_sub(MAX);
        kept.iter().take(too_many).try_for_each(|(_, path)| fs_err::remove_file(path))
    }
}

/// Makes `to` a copy of `seed`, grown to `mib`.
fn grow(seed: &Seed, to: &Path, mib: u64) -> Result<(), Error> {
    let failed = |e: io::Error| fault::io("cannot grow a seed", &e);
    let file = fs_err::File::options().read(true).write(true).create_new(true).open(to).map_err(failed)?;
    crate::clone::clone(seed.file.file(), file.file(), mib * MIB).map_err(failed)?;
    let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
    tokio::runtime::Handle::current().block_on(pack::grow(&with, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    async fn seed_in(dir: &Path) -> PathBuf {
        let (home, path) = (dir.join("home"), dir.join("seed.ext4"));
        fs_err::create_dir(&home).unwrap();
        fs_err::write(home.join("kept"), "what a home begins with").unwrap();
        let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
        pack::work_seed(&with, &path, &home).await.unwrap();
        path
    }

    fn seed(path: &Path) -> Seed {
        Seed::open(path).unwrap()
    }

    /// The blocks of the file system in `seed`.
    fn blocks(seed: &Seed) -> u64 {
        let mut count = [0; 4];
        seed.file.file().read_exact_at(&mut count, 0x404).unwrap();
        u32::from_le_bytes(count).into()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_seed_is_as_large_as_its_disk_and_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let path = seed_in(dir.path()).await;
        let grown = Grown::new(dir.path().join("grown"));
        let small = seed(&path).size().unwrap();
        let (of, large) = tokio::task::spawn_blocking({
            let path = path.clone();
            move || (grown.of(seed(&path), "a", 512), grown.of(seed(&path), "a", LARGEST_MIB + 1))
        })
        .await
        .unwrap();
        assert_eq!((of.size().unwrap(), blocks(&of)), (512 * MIB, 512 * MIB / 4096));
        assert!(of.file.metadata().unwrap().blocks() * 512 < 4 * MIB);
        assert_eq!(large.size().unwrap(), small, "too large to be copied each time");
        assert_eq!(blocks(&seed(&path)), small / 4096, "the seed is as it was");
        // A home in it is what it was.
        let file = of.file.path();
        let told =
            std::process::Command::new("debugfs").args(["-R", "cat /kept"]).arg(file).output().unwrap();
        assert_eq!(told.stdout, b"what a home begins with");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn few_are_kept_and_none_over_a_restart_and_a_failure_is_no_reason_to_fail() {
        let dir = tempfile::tempdir().unwrap();
        let path = seed_in(dir.path()).await;
        let grown = Grown::new(dir.path().join("grown"));
        let kept = grown.clone();
        tokio::task::spawn_blocking(move || {
            let first = kept.of(seed(&path), "a", 99);
            for mib in 0..2 * MAX as u64 {
                let of = kept.of(seed(&path), "a", 100 + mib);
                assert_eq!(of.size().unwrap(), (100 + mib) * MIB);
            }
            assert_eq!(fs_err::read_dir(&kept.dir).unwrap().count(), MAX);
            assert!(!first.file.path().exists(), "its place was taken");
            let clone = fs_err::File::create(path.with_extension("clone")).unwrap();
            crate::clone::clone(first.file.file(), clone.file(), 99 * MIB).unwrap();
            let broken = path.with_extension("broken");
            fs_err::write(&broken, vec![7; 1 << 20]).unwrap();
            assert_eq!(kept.of(seed(&broken), "b", 100).size().unwrap(), 1 << 20);
            assert!(fs_err::read_dir(&kept.dir).unwrap().count() < MAX, "and leaves nothing");
        })
        .await
        .unwrap();
        grown.sweep().unwrap();
        grown.sweep().unwrap();
        assert!(!grown.dir.exists());
    }
}
