//! Which history goes.

use crate::{Mode, Repository, git, packing::Packing, standing::quoted};
use bothy_contract::Error;
use std::{collections::HashSet, ffi::OsStr, path::Path, process::Command};

/// How many commits are recent history.
pub const RECENT: usize = 50;

/// A history on its way.
pub(crate) struct History<'a> {
    pub(crate) packs: Packing<'a>,
    /// Commits whose parents stay out.
    pub(crate) boundary: Vec<String>,
    /// Commands for `git update-ref --stdin`, where other refs go, too.
    pub(crate) refs: Vec<u8>,
    pub(crate) commits: u64,
    /// Holds the packs until they are read.
    _dir: tempfile::TempDir,
}

impl Repository {
    /// Begins to pack the history of `head`, and in [`Mode::Full`] that of all branches, tags and remote branches.
    pub(crate) fn history(&self, head: &str, mode: Mode, part: u64) -> Result<History<'_>, Error> {
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
        let packs = self.start_packing(dir.path(), &revisions, Some(part))?;
        let commits = match mode {
            Mode::Full => self.count(head, None)?,
            _ if boundary.is_empty() => self.count(head, None)?,
            _ => self.count(head, Some(RECENT))?,
        };
        Ok(History { packs, boundary, refs, commits, _dir: dir })
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
