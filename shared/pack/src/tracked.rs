//! The tracked files as they are now, as a tree, and what of it another repository has not yet. Nothing is written to the
//! user's repository: index and objects that this takes are made elsewhere.

use crate::{
    Mode, Repository, bundle::object, entries::Entries, entry, git, history::PACK_OBJECTS, standing::quoted,
};
use bothy_contract::{Code, Error};
use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    io::Write,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A tree of the tracked files, and the objects that were made for it.
pub(crate) struct Tracked {
    /// Its name.
    pub(crate) tree: String,
    objects: PathBuf,
    scratch: tempfile::TempDir,
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
    pack: (fs_err::File, u64),
    _scratch: tempfile::TempDir,
}

impl SyncPack {
    /// Writes it; gives the stream's size in bytes.
    ///
    /// # Errors
    /// What `out` says. What was written then is no pack.
    pub fn write(&self, out: impl Write) -> Result<u64, Error> {
        let mut tar = Entries::new(out);
        tar.put(entry::META, self.meta.len() as u64, self.meta.as_slice())?;
        tar.put(entry::HISTORY, self.pack.1, &self.pack.0)?;
        tar.put(entry::END, 0, std::io::empty())?;
        tar.finish()
    }
}

impl Repository {
    /// The tree of the tracked files as they are now.
    pub(crate) fn tracked(&self) -> Result<Tracked, Error> {
        let scratch = tempfile::tempdir().map_err(no_room)?;
        let index =
            git::answer(self.root(), &["rev-parse", "--path-format=absolute", "--git-path", "index"])?;
        let index: PathBuf = OsString::from_vec(index).into();
        let copy = scratch.path().join("index");
        if index.exists() {
            fs_err::copy(&index, &copy).map_err(no_room)?;
        }
        let objects = scratch.path().join("objects");
        // git makes packs in here before it moves them.
        fs_err::create_dir_all(objects.join("pack")).map_err(no_room)?;
        let run = |args: &[&str]| {
            let mut command = self.beside(&objects, ["-c", "core.splitIndex=false"].iter().chain(args))?;
            let out = command
                .env("GIT_INDEX_FILE", &copy)
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
        let tree = run(&["write-tree"])?;
        Ok(Tracked { tree, objects, scratch })
    }

    /// The name of the tree of the tracked files as they are now: another where one of them changed.
    ///
    /// # Errors
    /// What git says.
    pub fn tracked_tree(&self) -> Result<String, Error> {
        Ok(self.tracked()?.tree)
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

    /// A git that makes its objects in `objects`, and knows those of the repository.
    fn beside(
        &self,
        objects: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Command, Error> {
        let mut command = git::command(self.root(), args);
        command
            .env("GIT_OBJECT_DIRECTORY", objects)
            .env("GIT_ALTERNATE_OBJECT_DIRECTORIES", quoted(&self.objects()?));
        Ok(command)
    }

    /// What a machine needs to have the tracked files as they are here, where `base` is the commit that was imported and `tracked` the tree of
    /// tracked files that it has, as the guest tells both; nothing where nothing has changed.
    ///
    /// Only objects of the present tree go, less those of `base`: a guest that names another commit learns nothing of the history, which it
    /// may not have been given.
    ///
    /// # Errors
    /// A commit that this repository does not have, and what git says.
    pub fn sync(&self, base: &str, tracked: Option<&str>) -> Result<Option<SyncPack>, Error> {
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
        let now = self.tracked()?;
        if tracked == Some(now.tree.as_str()) {
            return Ok(None);
        }
        let (mut meta, _) = self.meta()?;
        meta.mode = Mode::Sync;
        meta.head.clone_from(&base);
        meta.tree = Some(now.tree.clone());
        meta.check()?;
        let meta = serde_json::to_vec_pretty(&meta)
            .map_err(|e| Error::internal("cannot write the meta data", &e))?;
        let pack = self.missing(&now, &base)?;
        Ok(Some(SyncPack { meta, pack, _scratch: now.scratch }))
    }

    /// A pack of the objects of `now` that the commit `base` has not.
    fn missing(&self, now: &Tracked, base: &str) -> Result<(fs_err::File, u64), Error> {
        let place = now.scratch.path().join("missing");
        let mut child = self
            .beside(&now.objects, PACK_OBJECTS)?
            .arg(&place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::internal("cannot start `git pack-objects`", &e))?;
        let wanted = format!("{}\n^{base}^{{tree}}\n", now.tree);
        // A failure shows in its status.
        let told = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(wanted.as_bytes()));
        let out = child.wait_with_output().map_err(|e| Error::internal("cannot wait for `git`", &e))?;
        if !out.status.success() {
            return Err(self.cannot_pack(&git::last_words(&out.stderr)));
        }
        told.map_err(|e| Error::internal("cannot tell `git pack-objects` what to pack", &e))?;
        let name = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        let file = now.scratch.path().join(format!("missing-{name}.pack"));
        let file = fs_err::File::open(file).map_err(no_room)?;
        let size = file.metadata().map_err(no_room)?.len();
        Ok((file, size))
    }
}

fn no_room(e: std::io::Error) -> Error {
    Error::new(Code::ResourceExhausted, format!("cannot make temporary files: {e}"))
        .hint("free some space, or set TMPDIR to a directory with more of it")
}
