//! `git pack-objects` at work: many objects come in several packs, each of which goes on its way while git still makes the next.
//! The packs and their indexes are made here, so that a guest, whose processor may be emulated, need not index them again.

use crate::{Repository, git};
use bothy_contract::{Code, Error};
use std::{
    collections::HashSet,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

/// A pack is read once, by a guest whose processor may be emulated: what git has compressed already, and found to differ little, goes
/// as it is, and the rest in the quickest way. To look for more costs longer than to send it.
const PACK_OBJECTS: [&str; 13] = [
    // What it copies it maps: no more of it at a time than it needs, whatever the size.
    "-c",
    "core.packedGitWindowSize=4m",
    "-c",
    "core.packedGitLimit=32m",
    "-c",
    "pack.packSizeLimit=0",
    "-c",
    "pack.compression=1",
    "pack-objects",
    "-q",
    "--revs",
    "--delta-base-offset",
    "--window=0",
];

/// How large a pack may be, in bytes, where nothing else is said. Most repositories are one: every git in the guest looks into all
/// packs, and what is packed here already git copies in a moment.
pub(crate) const PART: u64 = 512 << 20;
/// How often to look for the next pack.
const LOOK: Duration = Duration::from_millis(20);

/// A running `git pack-objects` and the directory that it writes to. Ends with this.
pub(crate) struct Packing<'a> {
    repository: &'a Repository,
    child: Child,
    dir: PathBuf,
    given: HashSet<PathBuf>,
}

/// A complete pack.
#[derive(Debug)]
pub(crate) struct Part {
    /// `pack-` and a hash of what is in it.
    pub(crate) name: String,
    pub(crate) pack: (fs_err::File, u64),
    pub(crate) index: (fs_err::File, u64),
}

impl Repository {
    /// Starts to pack what `revisions` name (git-pack-objects(1), `--revs`) in `dir`, in packs of `size` bytes at most, or in one.
    /// What is in `dir/objects` is known beside the repository's own objects.
    pub(crate) fn start_packing(
        &self,
        dir: &Path,
        revisions: &str,
        size: Option<u64>,
    ) -> Result<Packing<'_>, Error> {
        let mut child = self
            .beside(dir, PACK_OBJECTS)?
            .args(size.map(|size| format!("--max-pack-size={size}")))
            .arg(dir.join("pack"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::internal("cannot start `git pack-objects`", &e))?;
        // It reads all of that before it writes anything but complaints; a failure shows in its status.
        let told = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(revisions.as_bytes()));
        let mut packing = Packing { repository: self, child, dir: dir.to_owned(), given: HashSet::new() };
        match told {
            Err(e) if packing.end()?.is_none() => {
                Err(Error::internal("cannot tell `git pack-objects` what to pack", &e))
            }
            _ => Ok(packing),
        }
    }

    fn cannot_pack(&self, why: &str) -> Error {
        let e = Error::new(Code::FailedPrecondition, format!("`git pack-objects` failed: {why}"));
        let partial = git::maybe(self.root(), &["config", "--get-regexp", r"^remote\..*\.promisor$"]);
        if matches!(partial, Ok(Some(_))) {
            e.context("the repository is a partial clone, and objects are missing")
                .hint("fetch them first: `git fetch --refetch --filter=blob:limit=1t`, or make a full clone")
        } else if why.contains("No space left") {
            e.hint("set TMPDIR to a directory with more space")
        } else {
            e
        }
    }
}

impl Packing<'_> {
    /// The next pack, as soon as it is complete; `None` after the last one. What was given before is removed: no more than two
    /// packs are there at a time where they are read as fast as they are made.
    pub(crate) fn next(&mut self) -> Result<Option<Part>, Error> {
        for path in &self.given {
            for extension in ["pack", "idx"] {
                drop(fs_err::remove_file(path.with_extension(extension)));
            }
        }
        loop {
            // Before the directory is looked at: what is in it then is all.
            let ended = self.end()?;
            if let Some(path) = self.complete()? {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let part = Part { name, pack: opened(&path, "pack")?, index: opened(&path, "idx")? };
                self.given.insert(path);
                return Ok(Some(part));
            }
            if ended.is_some() {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// A pack that was not given yet. Its index gets its name last, once all of it is written.
    fn complete(&self) -> Result<Option<PathBuf>, Error> {
        for entry in fs_err::read_dir(&self.dir).map_err(git::no_space)? {
            let path = entry.map_err(git::no_space)?.path();
            if path.extension().is_some_and(|extension| extension == "idx") && !self.given.contains(&path) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Whether git has come to its end, which must be a good one.
    fn end(&mut self) -> Result<Option<()>, Error> {
        let failed = |e: std::io::Error| Error::internal("cannot wait for `git`", &e);
        let Some(status) = self.child.try_wait().map_err(failed)? else { return Ok(None) };
        if status.success() {
            return Ok(Some(()));
        }
        let mut said = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            stderr.take(git::STDERR_MAX).read_to_end(&mut said).map_err(failed)?;
        }
        Err(self.repository.cannot_pack(&git::last_words(&said)))
    }
}

impl Drop for Packing<'_> {
    fn drop(&mut self) {
        // Both fail where it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A file that git made, and its size in bytes.
fn opened(path: &Path, extension: &str) -> Result<(fs_err::File, u64), Error> {
    let file = fs_err::File::open(path.with_extension(extension)).map_err(git::no_space)?;
    let size = file.metadata().map_err(git::no_space)?.len();
    Ok((file, size))
}
