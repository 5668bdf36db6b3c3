//! How the user's repository stands to what was imported from it.

use crate::{Repository, bundle::object, git};
use bothy_contract::Error;

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
            standing.files_differ = Some(self.tracked()?.tree() != tracked);
        }
        Ok(standing)
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
