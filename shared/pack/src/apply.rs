//! Applying a guest's patch to the user's repository, as the user: looked at first, then by `git apply`, whole or not at
//! all, without hooks and without any program that attributes could name.

use crate::{
    Repository, git,
    names::display,
    patch::{PatchSummary, Touched, inspect_files},
};
use bothy_contract::{Code, Error};
use std::{
    collections::HashSet,
    ffi::OsStr,
    io::{Seek, SeekFrom},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The largest patch that `git apply` reads, in bytes (`MAX_APPLY_SIZE`, apply.c).
const MAX_APPLY: u64 = 1023 << 20;
/// The most binary content that is applied, in bytes: `git apply` holds all of it in memory.
const MAX_APPLY_INFLATED: u64 = 2 << 30;
/// How many names of a kind are told.
const SHOWN: usize = 5;

/// What became of a patch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// What the patch did.
    pub patch: PatchSummary,
    /// Files left with conflict markers, where a merge was asked for.
    pub conflicts: Vec<String>,
    /// What the user should look at. One line each.
    pub warnings: Vec<String>,
}

impl Repository {
    /// Applies a patch to the working tree; where `merge` is set, by a 3-way merge that also stages the result.
    ///
    /// # Errors
    /// Refuses what [`crate::inspect_patch`] refuses, names that lead through a symbolic link or into another repository of
    /// the user's tree that is no submodule, names that are one on its file system, sizes that it could not hold, and, without `merge`,
    /// a tree with changes of its own, or such a submodule. A merge does not reach into submodules. Then, and where the patch does not fit, nothing was written.
    pub fn apply(&self, patch: &mut fs_err::File, merge: bool) -> Result<Applied, Error> {
        let again = |e: std::io::Error| Error::internal("cannot read the patch again", &e);
        patch.seek(SeekFrom::Start(0)).map_err(again)?;
        let (mut way, mut attributes) = (Way::new(self), false);
        let sum = inspect_files(&mut *patch, |file| {
            attributes |= [file.from, file.to].iter().any(|name| is_named(name, b".gitattributes"));
            way.check(file)
        })?;
        self.check_room(&sum)?;
        if sum.collisions > 0 && self.folds_case() {
            return Err(Error::invalid(format!(
                "the patch has {} names that differ only by case, which are one file in {}",
                sum.collisions,
                self.root().display()
            ))
            .hint("apply it on a file system that tells them apart"));
        }
        self.check_clean(merge)?;
        for module in &way.entered {
            if merge {
                let shown = module.root().display();
                return Err(Error::invalid(format!(
                    "the patch has files of the submodule {shown}, and a merge does not reach into submodules"
                ))
                .hint("nothing was written; apply it without `--3way`, or export each by itself: `--guest-path` and `--repository` take the places of a submodule"));
            }
            module.check_clean(false)?;
        }
        let mut applied = Applied { patch: sum, ..Applied::default() };
        if sum.files == 0 {
            return Ok(applied);
        }
        if attributes {
            applied.warnings.push(
                "the patch changes `.gitattributes`: look at it before git runs filters or merges by it"
                    .into(),
            );
        }
        patch.seek(SeekFrom::Start(0)).map_err(again)?;
        let mut command = self.safe(&["apply", "--whitespace=nowarn"])?;
        if merge {
            command.arg("--3way");
        }
        let input = patch.file().try_clone().map_err(again)?;
        let out = command
            .arg("-")
            .stdin(Stdio::from(input))
            .output()
            .map_err(|e| Error::internal("cannot start `git apply`", &e))?;
        if out.status.success() {
            return Ok(applied);
        }
        if merge {
            applied.conflicts = self.conflicts()?;
            if !applied.conflicts.is_empty() {
                return Ok(applied);
            }
        }
        let why = Error::new(
            Code::FailedPrecondition,
            format!("the patch does not fit, and nothing was applied: {}", git::last_words(&out.stderr)),
        );
        Err(if merge {
            why.hint("commit or stash the files that it touches, or start from the commit that was imported")
        } else {
            why.hint("try `--3way`, which merges it, or apply it on the commit that was imported")
        })
    }

    /// `git` with every filter and merge driver of the configuration made harmless: a patch may change which files they
    /// are for.
    fn safe(&self, args: &[&str]) -> Result<Command, Error> {
        let mut overrides = vec![
            ("apply.whitespace".to_owned(), "nowarn"),
            ("apply.ignoreWhitespace".to_owned(), "no"),
            ("core.protectHFS".to_owned(), "true"),
            ("core.protectNTFS".to_owned(), "true"),
        ];
        let keys = r"^(filter\..*\.(clean|smudge|process|required)|merge\..*\.driver)$";
        // No such key is a status of 1.
        let found = git::maybe(self.root(), &["config", "--null", "--name-only", "--get-regexp", keys])?;
        for key in found.unwrap_or_default().split(|b| *b == 0).filter(|key| !key.is_empty()) {
            let key = String::from_utf8(key.to_vec()).map_err(|_| {
                Error::new(
                    Code::FailedPrecondition,
                    format!("the name of the git setting {} is not text", display(key)),
                )
            })?;
            // An empty command is none; a driver that fails leaves a conflict.
            let value = if key.ends_with(".driver") {
                "false"
            } else if key.ends_with(".required") {
                "no"
            } else {
                ""
            };
            overrides.push((key, value));
        }
        let mut command = git::command(self.root(), args);
        command.env("GIT_CONFIG_COUNT", overrides.len().to_string());
        for (n, (key, value)) in overrides.iter().enumerate() {
            command.env(format!("GIT_CONFIG_KEY_{n}"), key).env(format!("GIT_CONFIG_VALUE_{n}"), value);
        }
        Ok(command)
    }

    fn check_room(&self, sum: &PatchSummary) -> Result<(), Error> {
        let refuse = |what: String| {
            Err(Error::new(Code::ResourceExhausted, what)
                .hint("commit the work in the guest, and bring it back with `--format bundle`"))
        };
        let mib = |bytes: u64| bytes >> 20;
        if sum.bytes > MAX_APPLY {
            return refuse(format!(
                "the patch has {} MiB, and `git apply` reads at most {} MiB",
                mib(sum.bytes),
                mib(MAX_APPLY)
            ));
        }
        if sum.inflated > MAX_APPLY_INFLATED {
            return refuse(format!(
                "the patch claims {} MiB of binary content; at most {} MiB are applied",
                mib(sum.inflated),
                mib(MAX_APPLY_INFLATED)
            ));
        }
        let free = rustix::fs::statvfs(self.root())
            .map_err(|e| Error::internal("cannot see how much space is free", &e))?;
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        let needed = sum.bytes.saturating_add(sum.inflated);
        if needed > free {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "the patch may need {} MiB, and {} has {} MiB free",
                    mib(needed),
                    self.root().display(),
                    mib(free)
                ),
            )
            .hint("make room, and try again"));
        }
        Ok(())
    }

    /// Whether the file system of the working tree takes names that differ by case for one.
    fn folds_case(&self) -> bool {
        let id =
            |name: &str| fs_err::symlink_metadata(self.root().join(name)).ok().map(|m| (m.dev(), m.ino()));
        id(".git").is_some() && id(".git") == id(".gIT")
    }

    /// Refuses a tree with changes of its own; with `merge` only an unfinished merge, since git looks at the files that the
    /// patch touches.
    fn check_clean(&self, merge: bool) -> Result<(), Error> {
        let unmerged = self.conflicts()?;
        if !unmerged.is_empty() {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{} has unmerged files: {}", self.root().display(), unmerged.join(", ")),
            )
            .hint("finish that merge, or `git merge --abort`"));
        }
        if merge {
            return Ok(());
        }
        let dirty = self.changed()?;
        if dirty.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            Code::FailedPrecondition,
            format!("{} has changes of its own: {}", self.root().display(), dirty.join(", ")),
        )
        .hint("commit or stash them, merge with `--3way`, or save the patch with `-o` and look at it first"))
    }

    /// The first few tracked files that differ from HEAD, staged or not.
    pub(crate) fn changed(&self) -> Result<Vec<String>, Error> {
        let args = [
            "diff",
            "--no-ext-diff",
            "--no-renames",
            "--ignore-submodules=all",
            "--name-only",
            "-z",
            "HEAD",
            "--",
        ];
        Ok(some_names(&git::answer(self.root(), &args)?))
    }

    fn conflicts(&self) -> Result<Vec<String>, Error> {
        let args = ["diff", "--no-ext-diff", "--name-only", "--diff-filter=U", "-z", "--"];
        let mut names = some_names(&git::answer(self.root(), &args)?);
        names.dedup();
        Ok(names)
    }
}

/// NUL-terminated names for people, at most a few.
fn some_names(list: &[u8]) -> Vec<String> {
    let all = list.split(|b| *b == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = all.clone().take(SHOWN).map(display).collect();
    let more = all.count().saturating_sub(SHOWN);
    if more > 0 {
        names.push(format!("and {more} more"));
    }
    names
}

fn is_named(path: &[u8], name: &[u8]) -> bool {
    path.rsplit(|b| *b == b'/').next() == Some(name)
}

/// The directories on the way to a patch's files in the user's tree.
struct Way {
    root: PathBuf,
    /// The last one that was good: files of one directory follow one another.
    good: Vec<u8>,
    /// Symbolic links that the patch itself takes away, which git does before it makes anything.
    gone: HashSet<Vec<u8>>,
    repository: Repository,
    /// Submodules, once that was asked for.
    submodules: Option<Vec<Repository>>,
    /// Those that the patch has files of, or of repositories within.
    entered: Vec<Repository>,
}

impl Way {
    fn new(repository: &Repository) -> Self {
        Self {
            root: repository.root().to_owned(),
            good: Vec::new(),
            gone: HashSet::new(),
            repository: repository.clone(),
            submodules: None,
            entered: Vec::new(),
        }
    }

    /// Whether `path` is one of the user's submodules.
    fn enters(&mut self, path: &Path) -> Result<bool, Error> {
        if self.entered.iter().any(|module| module.root() == path) {
            return Ok(true);
        }
        let known = match &self.submodules {
            Some(known) => known,
            None => self.submodules.insert(self.repository.submodules()?),
        };
        let module = known.iter().find(|module| module.root() == path);
        self.entered.extend(module.cloned());
        Ok(module.is_some())
    }

    fn check(&mut self, file: &Touched<'_>) -> Result<(), Error> {
        self.parents(file.from)?;
        // In the order of git's diffs a name comes before those below it.
        if file.deleted
            && fs_err::symlink_metadata(self.root.join(OsStr::from_bytes(file.from)))
                .is_ok_and(|m| m.is_symlink())
        {
            self.gone.insert(file.from.to_vec());
        }
        if !file.deleted && file.to != file.from {
            self.parents(file.to)?;
        }
        Ok(())
    }

    fn parents(&mut self, name: &[u8]) -> Result<(), Error> {
        let Some(end) = name.iter().rposition(|b| *b == b'/') else { return Ok(()) };
        let parent = name.get(..end).unwrap_or_default();
        if parent == self.good {
            return Ok(());
        }
        let slashes = parent.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at);
        for end in slashes.chain([parent.len()]) {
            let shown = parent.get(..end).unwrap_or_default();
            let path = self.root.join(OsStr::from_bytes(shown));
            let refuse = |why: &str| {
                Err(Error::invalid(format!("the patch is refused: {} {why}", display(name)))
                    .hint("nothing was written; look at the patch, saved with `-o`"))
            };
            match fs_err::symlink_metadata(&path) {
                Ok(m) if m.is_symlink() && self.gone.contains(shown) => break,
                Ok(m) if m.is_symlink() => {
                    return refuse(&format!("leads through the symbolic link {}", display(shown)));
                }
                Ok(m) if m.is_dir() => {
                    if fs_err::symlink_metadata(path.join(".git")).is_ok() && !self.enters(&path)? {
                        return refuse(&format!("is inside another repository, {}", display(shown)));
                    }
                }
                // A file there is git's to judge: the patch may replace it. Below what is not there is nothing.
                _ => break,
            }
        }
        self.good = parent.to_vec();
        Ok(())
    }
}
