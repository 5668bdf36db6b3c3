//! How the user's repository stands to what was imported from it.

use crate::{Repository, bundle::object, git};
use bothy_contract::{Code, Error};

/// How the user's repository stands to an import.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct Standing {
    /// The commit that is checked out.
    pub head: String,
    /// Whether the repository has the imported commit at all; all else is empty where it does not.
    pub known: bool,
    /// Commits that it has since the import.
    pub ahead: u64,
    /// Commits of the import that it has not any longer.
    pub behind: u64,
    /// Whether its tracked files are others than those that were imported; none where that cannot be told.
    pub files_differ: Option<bool>,
    /// The first few tracked files that differ from HEAD.
    pub changed: Vec<String>,
}

impl Repository {
    /// Compares with an import of the commit `base` and the tree `tracked`, as a guest tells them.
    ///
    /// # Errors
    /// Git's, and names of objects that are none.
    pub fn standing(&self, base: &str, tracked: Option<&str>) -> Result<Standing, Error> {
        let base = object(base.as_bytes())
            .ok_or_else(|| Error::invalid(format!("the guest names no commit but {base:?}")))?;
        let mut standing = Standing { head: self.head()?, changed: self.changed()?, ..Standing::default() };
        if git::maybe(self.root(), &["cat-file", "-e", &format!("{base}^{{commit}}")])?.is_none() {
            return Ok(standing);
        }
        standing.known = true;
        let range = format!("{base}...HEAD");
        let counts = git::answer(self.root(), &["rev-list", "--left-right", "--count", &range, "--"])?;
        let counts = String::from_utf8_lossy(&counts).into_owned();
        let mut counts = counts.split_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
        standing.behind = counts.next().unwrap_or(0);
        standing.ahead = counts.next().unwrap_or(0);
        if let Some(tracked) = tracked.and_then(|tree| object(tree.as_bytes())) {
            standing.files_differ = Some(self.tracked_tree()? != tracked);
        }
        Ok(standing)
    }

    /// The tree of the tracked files as they are now. Index and objects that this takes are made elsewhere.
    fn tracked_tree(&self) -> Result<String, Error> {
        let no_room = |e: std::io::Error| {
            Error::new(Code::ResourceExhausted, format!("cannot make temporary files: {e}"))
                .hint("free some space, or set TMPDIR to a directory with more of it")
        };
        let scratch = tempfile::tempdir().map_err(no_room)?;
        let index =
            git::answer(self.root(), &["rev-parse", "--path-format=absolute", "--git-path", "index"])?;
        let index: std::path::PathBuf =
            <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(index).into();
        let copy = scratch.path().join("index");
        if index.exists() {
            fs_err::copy(&index, &copy).map_err(no_room)?;
        }
        let objects = scratch.path().join("objects");
        fs_err::create_dir_all(&objects).map_err(no_room)?;
        let run = |args: &[&str]| {
            let out = git::command(self.root(), ["-c", "core.splitIndex=false"].iter().chain(args))
                .env("GIT_INDEX_FILE", &copy)
                .env("GIT_OBJECT_DIRECTORY", &objects)
                .env("GIT_ALTERNATE_OBJECT_DIRECTORIES", quoted(&self.objects()?))
                .output()
                .map_err(|e| Error::internal("cannot start `git`", &e))?;
            if out.status.success() {
                return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
            }
            Err(Error::new(
                Code::FailedPrecondition,
                format!("cannot see the state of the files: {}", git::last_words(&out.stderr)),
            ))
        };
        run(&["add", "-u", "."])?;
        run(&["write-tree"])
    }
}

/// A path in a list that git separates by colons (git(1), GIT_ALTERNATE_OBJECT_DIRECTORIES).
pub(crate) fn quoted(path: &std::path::Path) -> std::ffi::OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut out = vec![b'"'];
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
    std::ffi::OsString::from_vec(out)
}
