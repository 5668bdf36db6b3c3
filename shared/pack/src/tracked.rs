//! The tracked files as they are now, as a tree, and what of it another repository has not yet. Nothing is written to the
//! user's repository: index and objects that this takes are made elsewhere.

use crate::{Mode, Repository, bundle::object, entries::Entries, entry, git, packing::Part};
use bothy_contract::{Code, Error};
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    io::Write,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

/// A tree of the tracked files, and the objects that were made for it.
#[derive(Debug)]
pub struct Tracked {
    tree: String,
    scratch: tempfile::TempDir,
}

impl Tracked {
    /// Its name: another where one of the files is another.
    pub fn tree(&self) -> &str {
        &self.tree
    }
}

/// What to watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// Those of tracked files, and all above them up to the repository's own.
    pub directories: BTreeSet<PathBuf>,
    /// The directory with the files `index` and `HEAD`.
    pub git: PathBuf,
}

/// A pack of [`Mode::Sync`], ready to be sent.
#[derive(Debug)]
pub struct SyncPack {
    meta: Vec<u8>,
    part: Part,
}

impl SyncPack {
    /// Writes it; gives the stream's size in bytes.
    ///
    /// # Errors
    /// What `out` says. What was written then is no pack.
    pub fn write(&self, out: impl Write) -> Result<u64, Error> {
        let mut tar = Entries::new(out);
        tar.put(entry::META, self.meta.len() as u64, self.meta.as_slice())?;
        let Part { name, pack, .. } = &self.part;
        tar.put(&format!("{}/{name}.pack", entry::HISTORY), pack.1, &pack.0)?;
        tar.put(entry::END, 0, std::io::empty())?;
        tar.finish()
    }
}

impl Repository {
    /// The tracked files as they are now.
    ///
    /// # Errors
    /// Retryable, where git cannot read them: one that is replaced or removed meanwhile is enough for that.
    pub fn tracked(&self) -> Result<Tracked, Error> {
        let scratch = tempfile::tempdir().map_err(git::no_space)?;
        let index =
            git::answer(self.root(), &["rev-parse", "--path-format=absolute", "--git-path", "index"])?;
        let index: PathBuf = OsString::from_vec(index).into();
        let copy = scratch.path().join("index");
        if index.exists() {
            fs_err::copy(&index, &copy).map_err(git::no_space)?;
        }
        let run = |args: &[&str]| {
            let args = ["-c", "core.splitIndex=false"].iter().chain(args);
            let out = self
                .beside(scratch.path(), args)?
                .env("GIT_INDEX_FILE", &copy)
                .output()
                .map_err(|e| Error::internal("cannot start `git`", &e))?;
            if out.status.success() {
                return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
            }
            let why = format!("cannot see the state of the files: {}", git::last_words(&out.stderr));
            let error = Error::new(Code::FailedPrecondition, why);
            Err(Error { retryable: true, ..error }
                .hint("run it again; if that stays, `git add -u --dry-run` says it too"))
        };
        run(&["add", "-u", "."])?;
        let tree = run(&["write-tree"])?;
        Ok(Tracked { tree, scratch })
    }

    /// How many files are tracked.
    ///
    /// # Errors
    /// What git says.
    pub fn tracked_count(&self) -> Result<u64, Error> {
        let mut count = 0;
        self.list(&["ls-files", "--cached", "-z"], |_| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// Where one would see that a tracked file changes, or which files are tracked: the directories of tracked files, and that of the
    /// index and of HEAD.
    ///
    /// # Errors
    /// What git says.
    pub fn places(&self) -> Result<Places, Error> {
        let mut directories = BTreeSet::from([self.root().to_owned()]);
        self.list(&["ls-files", "--cached", "-z", "--full-name"], |name| {
            let mut above = Path::new(OsStr::from_bytes(name)).parent();
            while let Some(dir) = above {
                if !directories.insert(self.root().join(dir)) {
                    break;
                }
                above = dir.parent();
            }
            Ok(())
        })?;
        let git = git::answer(self.root(), &["rev-parse", "--absolute-git-dir"])?;
        Ok(Places { directories, git: OsString::from_vec(git).into() })
    }

    /// What a machine needs to have the files as they are `now`, where `base` is the commit that was imported and `known` the tree of
    /// tracked files that it has, as the guest tells both; nothing where they are the same.
    ///
    /// Only objects of that tree go, less those of `base`: a guest that names another commit learns nothing of the history, which it
    /// may not have been given.
    ///
    /// # Errors
    /// A commit that this repository does not have, and what git says.
    pub fn sync(&self, now: &Tracked, base: &str, known: Option<&str>) -> Result<Option<SyncPack>, Error> {
        let base = object(base.as_bytes())
            .ok_or_else(|| Error::invalid(format!("the guest names no commit but {base:?}")))?;
        if git::maybe(self.root(), &["cat-file", "-e", &format!("{base}^{{commit}}")])?.is_none() {
            let short = base.get(..12).unwrap_or(&base);
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{} does not have the commit {short} that was imported", self.root().display()),
            )
            .hint("name the repository that it came from"));
        }
        if known == Some(now.tree()) {
            return Ok(None);
        }
        let (mut meta, _) = self.meta()?;
        meta.mode = Mode::Sync;
        meta.head.clone_from(&base);
        meta.tree = Some(now.tree.clone());
        meta.check()?;
        let meta = serde_json::to_vec_pretty(&meta)
            .map_err(|e| Error::internal("cannot write the meta data", &e))?;
        let wanted = format!("{}\n^{base}^{{tree}}\n", now.tree);
        let mut packing = self.start_packing(now.scratch.path(), &wanted, None)?;
        let part = packing.next()?.ok_or_else(|| Error::new(Code::Internal, "git made no pack"))?;
        Ok(Some(SyncPack { meta, part }))
    }
}
