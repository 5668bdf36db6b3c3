//! Building an image from a recipe, stage by stage.
//!
//! Everything is made in one directory, `<store>/images/.build-<id>`, which becomes the image by one rename at the
//! end; undoing a build, at whatever stage, is removing that directory. Nothing is ever mounted by us and no loop
//! device is used: file systems are filled by `mkfs.ext4 -d`. Only files of Debian's signed packages are in the tree.
//!
//! ```text
//! fetch_packages -> customise -> pack_rootfs -> kernel -> seeds -> finish
//! ```

pub(crate) mod boot;
mod finish;
pub(crate) mod pack;
mod tree;

use crate::{
    fault::{self, blocking},
    recipe::Recipe,
    store::Store,
};
use bothy_contract::{Code, Error, ImageName};
use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Prefix of the directories of builds.
pub(crate) const PREFIX: &str = ".build-";

/// How often a directory is emptied that goes on filling, and the pause between.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(25);

/// Told how far a stage has come: units done, in all where known, and a line for people.
pub(crate) type Progress = Arc<dyn Fn(u64, Option<u64>, &str) + Send + Sync>;

/// What a stage gets besides the build: how to be stopped, and whom to tell.
#[derive(Clone)]
pub(crate) struct Stage {
    /// Stops the stage's tools.
    pub(crate) cancel: CancellationToken,
    /// Hears how it gets on.
    pub(crate) progress: Progress,
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage").field("cancelled", &self.cancel.is_cancelled()).finish_non_exhaustive()
    }
}

impl Stage {
    /// A beat for work on `total` bytes: it tells how far that is, and stops it where the stage is to stop.
    pub(crate) fn bytes(&self, total: u64) -> impl Fn(u64) -> Result<(), Error> + Send + Sync + use<> {
        let (with, done) = (self.clone(), AtomicU64::new(0));
        move |n| {
            if with.cancel.is_cancelled() {
                return Err(Error::new(Code::Cancelled, "it was stopped on request"));
            }
            let before = done.fetch_add(n, Ordering::Relaxed);
            // Not each of them: thousands of reports would only be thrown away.
            if before >> 24 != (before + n) >> 24 {
                (with.progress)(before + n, Some(total), "bytes");
            }
            Ok(())
        }
    }
}

/// The stages in order, by the names that operations show.
pub(crate) const STAGES: [&str; 6] =
    ["fetch_packages", "customise", "pack_rootfs", "kernel", "seeds", "finish"];

/// One build.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    /// The image's name.
    pub(crate) name: ImageName,
    /// What it is made of.
    pub(crate) recipe: Recipe,
    /// Where it goes.
    pub(crate) store: Store,
    /// The network namespace to download in.
    pub(crate) netns: Option<PathBuf>,
    /// The directory it is made in.
    pub(crate) work: PathBuf,
}

impl Build {
    /// A build that is named `id` among those under way. Nothing is made yet.
    pub(crate) fn new(
        name: ImageName,
        recipe: Recipe,
        store: Store,
        netns: Option<PathBuf>,
        id: impl fmt::Display,
    ) -> Self {
        let work = store.dir().join(format!("{PREFIX}{id}"));
        Self { name, recipe, store, netns, work }
    }

    /// Runs the stage of that name, one of [`STAGES`]. A word on how it went comes back.
    pub(crate) async fn run(&self, stage: &str, with: &Stage) -> Result<String, Error> {
        match stage {
            "fetch_packages" => self.fetch_packages(with).await,
            "customise" => self.customise().await,
            "pack_rootfs" => self.pack_rootfs(with).await,
            "kernel" => self.kernel(with).await,
            "seeds" => self.seeds(with).await,
            "finish" => self.finish(with).await,
            other => Err(Error::invalid(format!("a build has no stage {other}"))),
        }
    }

    /// Removes all that the stages made, at whatever point they stopped. Nothing there is not an error.
    pub(crate) async fn undo(&self) -> Result<(), Error> {
        let work = self.work.clone();
        blocking(move || remove(&work)).await
    }

    /// The tree that becomes the rootfs.
    fn tree(&self) -> PathBuf {
        self.work.join("tree")
    }

    /// The directory that becomes the image.
    fn out(&self) -> PathBuf {
        self.work.join("image")
    }
}

/// Removes what no process is working on any more: half-made images, and images half removed. To be called before any
/// operation begins or goes on.
pub(crate) fn sweep(store: &Store) -> Result<(), Error> {
    let failed = |e: io::Error| fault::io("cannot sweep the image store", &e);
    for entry in fs_err::read_dir(store.dir()).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a build's directory with all that is in it. The tools of an agent that was killed are killed with it, and write until they
/// are dead: a directory that fills while it is emptied is emptied again. Blocks.
pub(crate) fn remove(work: &Path) -> Result<(), Error> {
    let mut tries = 0..TRIES;
    loop {
        match fs_err::remove_dir_all(work) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && tries.next().is_some() => {
                std::thread::sleep(PAUSE);
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(fault::io("cannot remove what a build left", &e));
            }
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dying_tool_still_writes_goes_too() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join(".build-1");
        fs_err::create_dir(&work).unwrap();
        let tool = std::thread::spawn({
            let work = work.clone();
            move || {
                // Until its directory is gone.
                (0..20_000).take_while(|n| fs_err::create_dir(work.join(n.to_string())).is_ok()).count()
            }
        });
        while !work.join("1000").exists() {
            std::thread::yield_now();
        }
        remove(&work).unwrap();
        assert!(tool.join().unwrap() > 1000);
        assert!(!work.exists());
        remove(&work).unwrap();
    }
}
