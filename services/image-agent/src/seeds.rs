//! Work-seeds that heal themselves.
//!
//! A seed that is missing, damaged, or made from something else than it would be now is no reason to refuse a create: the
//! VM's disk is made from the image itself, which takes longer and says so. Meanwhile the seed is made anew beside and
//! renamed into place, once for all creates that find it so. A create has the old file open, or the new one, both whole.

mod grown;

pub(crate) use grown::Grown;

use crate::{
    agent::Agent,
    build::{self, Stage, pack},
    disks::Seed,
    fault::{self, blocking},
    register::new_home,
    store::Image,
};
use bothy_contract::{
    Error, OpId,
    image::{PrepareWorkDisk, WorkDisk},
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Makes a VM's work disk ready. Runs where blocking is allowed, with a runtime beside.
pub(crate) fn work(agent: &Agent, ask: &PrepareWorkDisk) -> Result<WorkDisk, Error> {
    agent.disks.work_with(ask.vm, ask.uid, ask.work_mib, |dir| {
        let image = agent.store.open(&ask.image)?;
        let (artifact, path) = image.artifact("work-seed")?;
        let Err(why) = agent.store.check_seed(&image) else {
            return Ok(agent.grown.of(Seed::open(&path)?, &artifact.sha256, ask.work_mib));
        };
        tracing::warn!(image = %ask.image, why, "the work-seed is made anew");
        heal(agent, &image);
        let scratch = dir.join(format!(".seed-{}", OpId::new()));
        let made = make(&image, &scratch);
        let how = format!("made anew from the image, since {why}");
        match made.and_then(|path| Seed::open(&path)) {
            Ok(seed) => Ok(Seed { how: Some(how), scratch: Some(scratch), ..seed }),
            Err(e) => {
                let _ = build::remove(&scratch);
                Err(e.context(format!("{why}, and another one cannot be made")))
            }
        }
    })
}

/// A fresh seed of `image` in `dir`, which is made for it.
fn make(image: &Image, dir: &Path) -> Result<PathBuf, Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(|e| fault::io(format!("cannot make {}", dir.display()), &e))?;
    let (_, rootfs) = image.artifact("rootfs")?;
    let manifest = &image.manifest;
    let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
    let (home, seed) = (dir.join("home"), dir.join("work-seed.ext4"));
    Handle::current().block_on(async {
        new_home(&with, &rootfs, &manifest.home, &manifest.private, &home).await?;
        pack::work_seed(&with, &seed, &home).await
    })?;
    Ok(seed)
}

/// Makes the seed of `image` anew in the background, unless somebody does.
fn heal(agent: &Agent, image: &Image) {
    let name = image.manifest.name.clone();
    if !agent.healing.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
        return;
    }
    let (agent, image) = (agent.clone(), image.clone());
    // Nobody waits for it: what it comes to is in the log, and the next create sees the rest.
    tokio::spawn(async move {
        let of = agent.clone();
        let done = blocking(move || {
            // Somebody may have been done with it since this create looked.
            let image = of.store.open(&image.manifest.name)?;
            if of.store.check_seed(&image).is_ok() {
                return Ok(());
            }
            let dir = of.store.dir().join(format!(".seed-{}", OpId::new()));
            let put = make(&image, &dir).and_then(|seed| of.store.put_seed(&image.manifest, &seed));
            let swept = build::remove(&dir);
            put.and(swept)
        })
        .await;
        match done {
            Ok(()) => tracing::info!(image = %name, "the work-seed is whole again"),
            Err(e) => tracing::warn!(image = %name, error = %e, "the work-seed could not be made anew"),
        }
        agent.healing.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
    });
}
