//! Work-seeds as large as the disks that are made from them: a guest that finds its file system as large as its disk has
//! nothing to grow, which takes an emulated one half a second, and the host 20 ms once for each size.
//!
//! They are kept in `<store>/grown` by the digest of their seed and their size, few of them, and never over a restart of the
//! agent: each can be made again from its seed. Only seeds are grown here, never what a guest wrote.

use crate::{
    build::{Stage, pack},
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
const MAX_MIB: u64 = 16 << 10;
const MIB: u64 = 1 << 20;

/// The grown seeds in one directory.
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
        match fs_err::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(fault::io("cannot sweep the grown seeds", &e))
            }
            _ => Ok(()),
        }
    }

    /// `seed`, which has the digest `sha256`, as large as a disk of `mib` MiB; `seed` itself where that is not to be had, and the
    /// guest grows it. Runs where blocking is allowed, with a runtime beside.
    pub(crate) fn of(&self, seed: Seed, sha256: &str, mib: u64) -> Seed {
        if mib > MAX_MIB || seed.size >= mib * MIB {
            return seed;
        }
        match self.get(&seed.path, sha256, mib) {
            Ok(path) => Seed { path, size: mib * MIB, how: seed.how },
            Err(error) => {
                tracing::warn!(%error, "the guest has to grow its work disk itself");
                seed
            }
        }
    }

    fn get(&self, seed: &Path, sha256: &str, mib: u64) -> Result<PathBuf, Error> {
        let path = self.dir.join(format!("{sha256}-{mib}.ext4"));
        let failed = |e: io::Error| fault::io("cannot keep a grown seed", &e);
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if path.is_file() {
            return Ok(path);
        }
        fs_err::create_dir_all(&self.dir).map_err(failed)?;
        self.make_room().map_err(failed)?;
        let half = self.dir.join(format!(".{}", OpId::new()));
        let made = grow(seed, &half, mib).and_then(|()| fs_err::rename(&half, &path).map_err(failed));
        if made.is_err() {
            let _ = fs_err::remove_file(&half);
        }
        made.map(|()| path)
    }

    /// Removes the oldest, so that one more can be kept. Whoever clones one has it open.
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
fn grow(seed: &Path, to: &Path, mib: u64) -> Result<(), Error> {
    let failed = |e: io::Error| fault::io("cannot grow a seed", &e);
    let from = fs_err::File::open(seed).map_err(failed)?;
    let file = fs_err::File::options().read(true).write(true).create_new(true).open(to).map_err(failed)?;
    crate::clone::clone(from.file(), file.file(), mib * MIB).map_err(failed)?;
    let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
    tokio::runtime::Handle::current().block_on(pack::grow(&with, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    async fn seed_in(dir: &Path) -> Seed {
        let (home, path) = (dir.join("home"), dir.join("seed.ext4"));
        fs_err::create_dir(&home).unwrap();
        fs_err::write(home.join("kept"), "what a home begins with").unwrap();
        let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
        pack::work_seed(&with, &path, &home).await.unwrap();
        Seed { size: fs_err::metadata(&path).unwrap().len(), path, how: None }
    }

    fn blocks(path: &Path) -> u64 {
        let bytes = fs_err::read(path).unwrap();
        u64::from(u32::from_le_bytes(bytes[0x404..0x408].try_into().unwrap()))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_seed_is_as_large_as_its_disk_and_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let seed = seed_in(dir.path()).await;
        let (small, path) = (seed.size, seed.path.clone());
        let grown = Grown::new(dir.path().join("grown"));
        let again = || Seed { path: path.clone(), size: small, how: None };
        let (of, large) = tokio::task::spawn_blocking({
            let (grown, seed, larger) = (grown.clone(), again(), again());
            move || (grown.of(seed, "a", 512), grown.of(larger, "a", MAX_MIB + 1))
        })
        .await
        .unwrap();
        assert_eq!((of.size, blocks(&of.path)), (512 * MIB, 512 * MIB / 4096));
        assert!(fs_err::metadata(&of.path).unwrap().blocks() * 512 < 4 * MIB);
        assert_eq!(
            (large.path.clone(), large.size),
            (path.clone(), small),
            "too large to be copied each time"
        );
        assert_eq!(blocks(&path), small / 4096, "the seed is as it was");
        // A home in it is what it was.
        let told =
            std::process::Command::new("debugfs").args(["-R", "cat /kept"]).arg(&of.path).output().unwrap();
        assert_eq!(told.stdout, b"what a home begins with");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn few_are_kept_and_none_over_a_restart_and_a_failure_is_no_reason_to_fail() {
        let dir = tempfile::tempdir().unwrap();
        let seed = seed_in(dir.path()).await;
        let grown = Grown::new(dir.path().join("grown"));
        let (kept, path, size) = (grown.clone(), seed.path.clone(), seed.size);
        tokio::task::spawn_blocking(move || {
            for mib in 0..2 * MAX as u64 {
                let of = kept.of(Seed { path: path.clone(), size, how: None }, "a", 100 + mib);
                assert_eq!(of.size, (100 + mib) * MIB);
            }
            assert_eq!(fs_err::read_dir(&kept.dir).unwrap().count(), MAX);
            let broken = path.with_extension("broken");
            fs_err::write(&broken, vec![7; 1 << 20]).unwrap();
            let of = kept.of(Seed { path: broken.clone(), size: 1 << 20, how: None }, "b", 100);
            assert_eq!((of.path, of.size), (broken, 1 << 20));
            assert!(fs_err::read_dir(&kept.dir).unwrap().count() < MAX, "and leaves nothing");
        })
        .await
        .unwrap();
        grown.sweep().unwrap();
        grown.sweep().unwrap();
        assert!(!grown.dir.exists());
    }
}
