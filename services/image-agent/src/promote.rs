//! `image promote`: the files of a registered image become the image-agent's own, as an operation.
//!
//! Copied beside, compared with the digests that were written down when it was registered, and put into place by one rename
//! if the image is still the same one. All slow work is done outside every lock; until the rename the image is what it was.

use crate::{
    agent::Agent,
    build::{self, Stage},
    digest::Beat,
    fault::{self, blocking},
    kinds::{self, Step, Work},
    store::Over,
};
use bothy_bus::Context;
use bothy_contract::{Code, Error, catalogue::PromoteImage, image::ImageManifest};
use bothy_ops::{Begun, Graph, New, Op, Ops};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

/// The kind of these operations.
pub(crate) const KIND: &str = "image.promote";
/// Copied at once: as often it can be stopped.
const CHUNK: u64 = 16 << 20;

/// Begins to promote.
pub(crate) async fn begin(
    ops: &Ops,
    agent: &Agent,
    context: Context,
    ask: PromoteImage,
) -> Result<Begun, Error> {
    let (agent, name) = (agent.clone(), ask.image.clone());
    let manifest = blocking(move || agent.store.show(&name)).await?;
    if manifest.is_managed() {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("image {} is one of the image-agent's own already", ask.image),
        ));
    }
    let new = New {
        kind: KIND,
        subject: ask.image.to_string(),
        vm: None,
        owner: ask.owner,
        request: Some(context.request_id),
        input: serde_json::to_value(&manifest)
            .map_err(|e| Error::internal("cannot write down the image", &e))?,
    };
    ops.begin(new, move |tx, op| kinds::reserve(tx, &ask.image, op)).await
}

struct Promote {
    agent: Agent,
    /// The image as it was when this was asked for.
    was: ImageManifest,
    dir: PathBuf,
}

/// The stages of a promotion.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let dir = agent.store.dir().join(format!(".promote-{}", op.id));
    Ok(kinds::sequence(Promote { agent: agent.clone(), was: op.input()?, dir }))
}

impl Work for Promote {
    const STAGES: &'static [&'static str] = &["copy", "finish"];

    fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    async fn run(&self, stage: &'static str, with: Stage) -> Result<Step, Error> {
        let (agent, was, dir) = (self.agent.clone(), self.was.clone(), self.dir.clone());
        let copying = stage == "copy";
        blocking(
            move || {
                if copying { copy_all(&agent, &was, &dir, &with) } else { finish(&agent, was, &dir, &with) }
            },
        )
        .await
    }
}

fn copy_all(agent: &Agent, was: &ImageManifest, dir: &Path, with: &Stage) -> Result<Step, Error> {
    let out = dir.join("image");
    let failed = |e: io::Error| fault::io(format!("cannot copy image {}", was.name), &e);
    fs_err::create_dir(&out).map_err(failed)?;
    let theirs = |path: &Option<PathBuf>| path.is_some();
    let total: u64 = was.artifacts.values().filter(|a| theirs(&a.path)).map(|a| a.size).sum();
    let beat = with.bytes(total);
    for artifact in was.artifacts.values() {
        let to = out.join(&artifact.file);
        match &artifact.path {
            Some(path) => copy(path, &to, &beat)?,
            None => {
                fs_err::hard_link(agent.store.dir_of(&was.name).join(&artifact.file), to).map_err(failed)?
            }
        }
    }
    Ok(Step::note(format!("{} MiB", total >> 20)))
}

fn finish(agent: &Agent, was: ImageManifest, dir: &Path, with: &Stage) -> Result<Step, Error> {
    let (expected, created) = (was.artifacts.clone(), was.created);
    let mut manifest = ImageManifest { created: jiff::Timestamp::now(), ..was };
    manifest.origin = manifest.origin.replacen("registered", "promoted from", 1);
    for artifact in manifest.artifacts.values_mut() {
        artifact.path = None;
    }
    let total = expected.values().map(|a| a.size).sum();
    let right = |role: &str, sha256: &str| expected.get(role).is_some_and(|a| a.sha256 == sha256);
    let made = agent.store.publish_if(
        &dir.join("image"),
        manifest,
        Over::Created(created),
        &with.bytes(total),
        &right,
    )?;
    build::remove(dir)?;
    Step::last(format!("image {}", made.name), &made)
}

/// Copies a file's data and leaves its holes holes; shares extents where the file system can.
fn copy(from: &Path, to: &Path, beat: Beat<'_>) -> Result<(), Error> {
    let failed = |e: io::Error| fault::io(format!("cannot copy {}", from.display()), &e);
    let (from, to) = (open(from).map_err(failed)?, create(to).map_err(failed)?);
    let length = from.metadata().map_err(failed)?.len();
    if ioctl_ficlone(&to, &from).is_ok() {
        return beat(length);
    }
    to.set_len(length).map_err(failed)?;
    let mut at = 0;
    while at < length {
        let start = match seek(&from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break, // only a hole is left
            Err(e) => return Err(failed(e.into())),
        };
        beat(start - at)?;
        let end = seek(&from, SeekFrom::Hole(start)).map_err(|e| failed(e.into()))?.min(length);
        at = start;
        while at < end {
            let (mut read, mut write) = (at, at);
            let want = usize::try_from(CHUNK.min(end - at)).unwrap_or(usize::MAX);
            let n = copy_file_range(&from, Some(&mut read), &to, Some(&mut write), want)
                .map_err(|e| failed(e.into()))?;
            if n == 0 {
                return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, "it got shorter meanwhile")));
            }
            at += n as u64;
            beat(n as u64)?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    Ok(fs_err::File::open(path)?.into_parts().0)
}

fn create(path: &Path) -> io::Result<File> {
    Ok(fs_err::File::create(path)?.into_parts().0)
}
