//! Which history goes, as a ready pack and its index: made here, so that the guest need not index it again.

use crate::{Mode, Repository, git, standing::quoted};
use bothy_contract::{Code, Error};
use std::{
    collections::HashSet,
    ffi::OsStr,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// How many commits are recent history.
pub const RECENT: usize = 50;

/// A pack with its index.
pub(crate) struct History {
    pub(crate) pack: (fs_err::File, u64),
    pub(crate) index: (fs_err::File, u64),
    /// Commits whose parents stay out.
    pub(crate) boundary: Vec<String>,
    /// Commands for `git update-ref --stdin`, where other refs go, too.
    pub(crate) refs: Vec<u8>,
    pub(crate) commits: u64,
    /// Holds the files until they are read.
    _dir: tempfile::TempDir,
}

/// A pack is read once, by a guest whose processor may be emulated: what git has compressed already, and found to differ little, goes
/// as it is, and the rest in the quickest way. To look for more costs longer than to send it.
const PACK_OBJECTS: [&str; 9] = [
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

impl Repository {
    /// Packs the history of `head`, and in [`Mode::Full`] that of all branches, tags and remote branches.
    pub(crate) fn history(&self, head: &str, mode: Mode) -> Result<History, Error> {
        let (boundary, refs) = match mode {
            Mode::Full => (Vec::new(), self.other_refs()?),
            _ => (self.boundary(head)?, Vec::new()),
        };
        let mut revisions = String::new();
        for commit in &boundary {
            revisions.push_str(&format!("--shallow {commit}\n"));
        }
        revisions.push_str(&format!("{head}\n"));
        // `create <ref> <object>`: the object is what follows the last blank.
        for line in refs.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            if let Some(object) = line.rsplit(|b| *b == b' ').next() {
                revisions.push_str(&String::from_utf8_lossy(object));
                revisions.push('\n');
            }
        }
        let dir = tempfile::tempdir().map_err(git::no_space)?;
        let made = self.pack_objects(dir.path(), &revisions)?;
        let (pack, index) = (opened(&made, "pack")?, opened(&made, "idx")?);
        let commits = match mode {
            Mode::Full => self.count(head, None)?,
            _ if boundary.is_empty() => self.count(head, None)?,
            _ => self.count(head, Some(RECENT))?,
        };
        Ok(History { pack, index, boundary, refs, commits, _dir: dir })
    }

    /// Packs what `revisions` name (git-pack-objects(1), `--revs`) into files in `dir`; gives what their names are without `.pack` and
    /// `.idx`. What is in `dir/objects` is known beside the repository's own objects.
    pub(crate) fn pack_objects(&self, dir: &Path, revisions: &str) -> Result<PathBuf, Error> {
        let mut child = self
            .beside(dir, PACK_OBJECTS)?
            .arg(dir.join("pack"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::internal("cannot start `git pack-objects`", &e))?;
        // It reads all of that before it writes anything but complaints; a failure shows in its status.
        let told = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(revisions.as_bytes()));
        let out = child.wait_with_output().map_err(|e| Error::internal("cannot wait for `git`", &e))?;
        if !out.status.success() {
            return Err(self.cannot_pack(&git::last_words(&out.stderr)));
        }
        told.map_err(|e| Error::internal("cannot tell `git pack-objects` what to pack", &e))?;
        Ok(dir.join(format!("pack-{}", String::from_utf8_lossy(&out.stdout).trim())))
    }

    /// A git that makes its objects in `dir/objects`, and knows those of the repository: it makes even packs in the directory of
    /// objects before it moves them.
    pub(crate) fn beside(
        &self,
        dir: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Command, Error> {
        let objects = dir.join("objects");
        fs_err::create_dir_all(objects.join("pack")).map_err(git::no_space)?;
        let mut command = git::command(self.root(), args);
        command
            .env("GIT_OBJECT_DIRECTORY", &objects)
            .env("GIT_ALTERNATE_OBJECT_DIRECTORIES", quoted(&self.objects()?));
        Ok(command)
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

    fn count(&self, head: &str, most: Option<usize>) -> Result<u64, Error> {
        let most = most.map_or_else(|| "--max-count=-1".to_owned(), |n| format!("--max-count={n}"));
        let text = git::answer(self.root(), &["rev-list", "--count", &most, head])?;
        Ok(String::from_utf8_lossy(&text).trim().parse().unwrap_or(0))
    }

    /// The commits among the most recent ones that have a parent which is not: without their parents the history ends
    /// there, as that of a shallow clone does.
    fn boundary(&self, head: &str) -> Result<Vec<String>, Error> {
        let most = format!("--max-count={RECENT}");
        let text = git::answer(self.root(), &["rev-list", "--parents", &most, head])?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let recent: HashSet<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
        let cut = |line: &&str| line.split(' ').skip(1).any(|parent| !recent.contains(parent));
        Ok(text.lines().filter(cut).filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    }

    /// All branches, tags and remote branches. Symbolic ones stay out: they name another.
    fn other_refs(&self) -> Result<Vec<u8>, Error> {
        let format = "--format=%(symref) create %(refname) %(objectname)";
        let listed =
            git::answer(self.root(), &["for-each-ref", format, "refs/heads", "refs/tags", "refs/remotes"])?;
        let mut refs = Vec::new();
        for line in listed.split(|b| *b == b'\n') {
            if let Some(command) = line.strip_prefix(b" ") {
                refs.extend_from_slice(command);
                refs.push(b'\n');
            }
        }
        Ok(refs)
    }
}

/// One of the files that [`Repository::pack_objects`] made, and its size in bytes.
pub(crate) fn opened(made: &Path, extension: &str) -> Result<(fs_err::File, u64), Error> {
    // The name is no number of ours, and has no dot.
    let file = fs_err::File::open(made.with_extension(extension)).map_err(git::no_space)?;
    let size = file.metadata().map_err(git::no_space)?.len();
    Ok((file, size))
}
