//! The checks on a bundle of commits that comes back from a guest, which is hostile.
//!
//! It is unpacked into a repository of its own that borrows the user's objects, as strictly as git can, and what its
//! commits change is then judged like a patch. Nothing comes near the user's repository.

use crate::{
    Repository, git,
    names::display,
    patch::{PatchSummary, inspect_patch},
};
use bothy_contract::{Code, Error};
use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::Stdio,
};

/// The one ref of a bundle from a guest.
pub const EXPORT_REF: &str = "refs/bothy/export";
/// The most commits that a bundle may build on. A history with many merges may have a few dozen.
const MAX_PREREQUISITES: usize = 1000;
/// The longest line of the header, in bytes: an object name and a commit's title.
const MAX_LINE: u64 = 8 << 10;

/// What is in a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleSummary {
    /// The last commit.
    pub head: String,
    /// How many commits are new to the user's repository.
    pub commits: u64,
    /// What they change, all together.
    pub patch: PatchSummary,
}

/// The header of a bundle (gitformat-bundle(5)).
struct Header {
    prerequisites: Vec<String>,
    head: String,
    /// Where the pack begins.
    pack: u64,
}

impl Repository {
    /// Looks at a bundle whole, and says what is in it.
    ///
    /// # Errors
    /// Refuses what is no bundle of our export's form, what builds on commits that the repository does not have, broken
    /// objects and odd trees (`git index-pack --strict`), and all that [`inspect_patch`] refuses in what its commits change.
    pub fn check_bundle(&self, bundle: &mut fs_err::File) -> Result<BundleSummary, Error> {
        self.look_at_bundle(bundle).map_err(|e| {
            if e.hint.is_some() {
                return e;
            }
            e.context("the bundle is refused").hint("the guest made it: do not fetch from it")
        })
    }

    fn look_at_bundle(&self, bundle: &mut fs_err::File) -> Result<BundleSummary, Error> {
        let again = |e: std::io::Error| Error::internal("cannot read the bundle again", &e);
        bundle.seek(SeekFrom::Start(0)).map_err(again)?;
        let header = read_header(&mut *bundle)?;
        for commit in &header.prerequisites {
            let known = git::maybe(self.root(), &["cat-file", "-e", &format!("{commit}^{{commit}}")])?;
            if known.is_none() {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("the bundle builds on {commit}, which {} does not have", self.root().display()),
                )
                .hint("run this in the repository that was imported"));
            }
        }
        let scratch = tempfile::tempdir().map_err(|e| {
            Error::new(Code::ResourceExhausted, format!("cannot make a temporary directory: {e}"))
        })?;
        let scratch = scratch.path();
        self.borrow_objects(scratch)?;
        bundle.seek(SeekFrom::Start(header.pack)).map_err(again)?;
        let input = bundle.file().try_clone().map_err(again)?;
        let limit = format!("--max-input-size={}", crate::MAX_PATCH);
        let out =
            git::command(scratch, ["--git-dir=.", "index-pack", "--stdin", "--fix-thin", "--strict", &limit])
                .stdin(Stdio::from(input))
                .output()
                .map_err(|e| Error::internal("cannot start `git index-pack`", &e))?;
        if !out.status.success() {
            return Err(Error::invalid(format!(
                "its objects are not sound: {}",
                git::last_words(&out.stderr)
            )));
        }
        let mut walk = vec!["--git-dir=.", "rev-list", "--objects", "--quiet", &header.head, "--not"];
        walk.extend(header.prerequisites.iter().map(String::as_str));
        let whole = git::output(scratch, &walk)?;
        if !whole.status.success() {
            return Err(Error::invalid(format!("objects are missing: {}", git::last_words(&whole.stderr))));
        }
        let mut count = vec!["--git-dir=.", "rev-list", "--count", &header.head, "--not"];
        count.extend(header.prerequisites.iter().map(String::as_str));
        let commits = String::from_utf8_lossy(&git::answer(scratch, &count)?).trim().parse().unwrap_or(0);
        let from = match header.prerequisites.first() {
            Some(commit) => commit.clone(),
            None => {
                let empty = git::answer(scratch, &["--git-dir=.", "hash-object", "-t", "tree", "/dev/null"])?;
                String::from_utf8_lossy(&empty).into_owned()
            }
        };
        let args = [
            "--git-dir=.",
            "diff-tree",
            "-p",
            "-r",
            "--binary",
            "--full-index",
            "--no-ext-diff",
            "--no-textconv",
            "--no-color",
            "--no-renames",
            "--src-prefix=a/",
            "--dst-prefix=b/",
            "-U3",
            &from,
            &header.head,
        ];
        let (patch, _) = git::to_file(scratch, &args)?;
        Ok(BundleSummary { patch: inspect_patch(patch)?, commits, head: header.head })
    }

    /// Makes `dir` a bare repository that has the user's objects, too.
    fn borrow_objects(&self, dir: &Path) -> Result<(), Error> {
        let format = git::answer(self.root(), &["rev-parse", "--show-object-format"])?;
        let format = format!("--object-format={}", String::from_utf8_lossy(&format));
        git::answer(dir, &["init", "-q", "--bare", "--template=", &format, "."])?;
        let mut objects = self.objects()?.into_os_string().into_vec();
        if objects.contains(&b'\n') || objects.starts_with(b"\"") {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("git cannot borrow objects from {}", display(&objects)),
            ));
        }
        objects.push(b'\n');
        let failed = |e: std::io::Error| Error::internal("cannot write a temporary file", &e);
        fs_err::create_dir_all(dir.join("objects/info")).map_err(failed)?;
        fs_err::write(dir.join("objects/info/alternates"), objects).map_err(failed)?;
        if let Some(shallow) = self.shallow()? {
            fs_err::write(dir.join("shallow"), shallow).map_err(failed)?;
        }
        Ok(())
    }

    /// The directory of the repository's objects.
    pub(crate) fn objects(&self) -> Result<PathBuf, Error> {
        let path =
            git::answer(self.root(), &["rev-parse", "--path-format=absolute", "--git-path", "objects"])?;
        Ok(OsString::from_vec(path).into())
    }
}

fn read_header(reader: impl Read) -> Result<Header, Error> {
    let mut reader = BufReader::new(reader);
    let mut header = Header { prerequisites: Vec::new(), head: String::new(), pack: 0 };
    let mut first = true;
    loop {
        let mut line = Vec::new();
        let n = (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::internal("cannot read the bundle", &e))?;
        header.pack += n as u64;
        let odd = || {
            Err(Error::invalid(format!(
                "a header line that is not ours: {}",
                display(line.get(..80).unwrap_or(&line))
            )))
        };
        let Some(text) = line.strip_suffix(b"\n") else { return odd() };
        if std::mem::take(&mut first) {
            if text != b"# v2 git bundle" && text != b"# v3 git bundle" {
                return odd();
            }
        } else if text.is_empty() {
            break;
        } else if text == b"@object-format=sha256" || text == b"@object-format=sha1" {
            // The repository's own format counts: other objects would not be read.
        } else if let Some(rest) = text.strip_prefix(b"-") {
            let Some(commit) = rest.split(|b| *b == b' ').next().and_then(object) else { return odd() };
            header.prerequisites.push(commit);
            if header.prerequisites.len() > MAX_PREREQUISITES {
                return Err(Error::invalid(format!("it builds on more than {MAX_PREREQUISITES} commits")));
            }
        } else {
            let name = text.strip_suffix(EXPORT_REF.as_bytes()).and_then(|rest| rest.strip_suffix(b" "));
            let Some(head) = name.and_then(object).filter(|_| header.head.is_empty()) else { return odd() };
            header.head = head;
        }
    }
    if header.head.is_empty() {
        return Err(Error::invalid(format!("it has no {EXPORT_REF}")));
    }
    Ok(header)
}

/// The full name of an object.
pub(crate) fn object(text: &[u8]) -> Option<String> {
    let hex =
        matches!(text.len(), 40 | 64) && text.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
    hex.then(|| String::from_utf8_lossy(text).into_owned())
}
