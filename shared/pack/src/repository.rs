//! Finding the repository that a path is in, and refusing what cannot be packed.

use crate::{
    Meta, ObjectFormat, git,
    meta::{FORMAT, Mode},
    names,
};
use bothy_contract::{Code, Error};
use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// A git repository of the user's with a working tree and at least one commit.
#[derive(Debug, Clone)]
pub struct Repository {
    root: PathBuf,
}

impl Repository {
    /// The repository that `path` is in: a path inside it means the whole repository. A linked worktree and a detached
    /// HEAD are fine.
    ///
    /// # Errors
    /// Where there is no repository, or it is bare or has no commit yet: each with what to do. Nothing was changed.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        match fs_err::metadata(path) {
            Ok(m) if m.is_dir() => {}
            Ok(_) => {
                return Err(Error::invalid(format!("{shown} is not a directory"))
                    .hint("name a directory inside a git repository"));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::not_found(format!("there is no directory {shown}"))
                    .hint("name a directory inside a git repository"));
            }
            Err(e) => {
                return Err(Error::new(Code::FailedPrecondition, format!("cannot open the repository: {e}")));
            }
        }
        let out = git::output(path, ["rev-parse", "--is-bare-repository", "--is-inside-work-tree"])?;
        if !out.status.success() {
            let why = git::last_words(&out.stderr);
            return Err(if why.contains("not a git repository") {
                Error::new(Code::FailedPrecondition, format!("{shown} is not inside a git repository"))
                    .hint("run this inside a repository, or make one with `git init` and commit")
            } else if why.contains("dubious ownership") {
                Error::new(
                    Code::FailedPrecondition,
                    format!("git refuses {shown}, which belongs to another user"),
                )
                .hint("if you trust it: `git config --global --add safe.directory <its path>`")
            } else {
                Error::new(Code::FailedPrecondition, format!("git cannot open {shown}: {why}"))
            });
        }
        let mut facts = out.stdout.split(|b| *b == b'\n').map(|line| line == b"true");
        let (bare, inside) = (facts.next().unwrap_or_default(), facts.next().unwrap_or_default());
        if !inside {
            return Err(if bare {
                Error::new(Code::FailedPrecondition, format!("{shown} is a bare repository and has no files"))
                    .hint("clone it, and run this in the clone")
            } else {
                Error::new(
                    Code::FailedPrecondition,
                    format!("{shown} is inside a repository's `.git` directory"),
                )
                .hint("run this in the working tree beside it")
            });
        }
        let root = git::answer(path, &["rev-parse", "--show-toplevel"])?;
        let repo = Self { root: OsString::from_vec(root).into() };
        repo.head()?;
        Ok(repo)
    }

    /// The top of the working tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The commit that is checked out.
    pub(crate) fn head(&self) -> Result<String, Error> {
        let head = git::maybe(&self.root, &["rev-parse", "--quiet", "--verify", "HEAD^{commit}"])?
            .ok_or_else(|| {
                Error::new(Code::FailedPrecondition, format!("{} has no commit yet", self.root.display()))
                    .hint("make a first one: `git commit --allow-empty -m start`")
            })?;
        String::from_utf8(head).map_err(|e| Error::internal("git's name of HEAD is not text", &e))
    }

    /// What the pack of it will say it is, and what the user should be told.
    pub(crate) fn meta(&self) -> Result<(Meta, Vec<String>), Error> {
        let mut warnings = Vec::new();
        let branch = match git::maybe(&self.root, &["symbolic-ref", "--quiet", "HEAD"])? {
            None => None,
            Some(name) => match name.strip_prefix(b"refs/heads/").map(|b| String::from_utf8(b.to_vec())) {
                Some(Ok(branch)) if branch.len() <= 1000 => Some(branch),
                _ => {
                    warnings.push(format!(
                        "the branch name {} is not text, so the guest's head is detached",
                        names::display(&name)
                    ));
                    None
                }
            },
        };
        let object_format = match git::answer(&self.root, &["rev-parse", "--show-object-format"])?.as_slice()
        {
            b"sha1" => ObjectFormat::Sha1,
            b"sha256" => ObjectFormat::Sha256,
            other => {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!("the repository's object format {} is not known", names::display(other)),
                ));
            }
        };
        let name = self
            .root
            .file_name()
            .map_or_else(|| "repository".into(), |n| names::display(n.as_encoded_bytes()));
        let meta = Meta {
            format: FORMAT,
            mode: Mode::default(),
            name: name.chars().take(60).collect(),
            head: self.head()?,
            tree: None,
            branch,
            object_format,
            git_name: self.own_setting("user.name")?,
            git_email: self.own_setting("user.email")?,
        };
        meta.check()?;
        Ok((meta, warnings))
    }

    /// A setting where this checkout has its own (local, per worktree, or included by its path): not the global one,
    /// which goes into the guest with the user's identity.
    fn own_setting(&self, key: &str) -> Result<Option<String>, Error> {
        let here = git::maybe(&self.root, &["config", "--get", key])?;
        let elsewhere = git::maybe(Path::new("/"), &["config", "--get", key])?;
        let usable = |s: &String| !s.is_empty() && s.len() <= 1000 && !s.chars().any(char::is_control);
        Ok(here
            .filter(|h| Some(h) != elsewhere.as_ref())
            .and_then(|h| String::from_utf8(h).ok())
            .filter(usable))
    }

    /// The boundary file of a shallow clone.
    pub(crate) fn shallow(&self) -> Result<Option<Vec<u8>>, Error> {
        if git::answer(&self.root, &["rev-parse", "--is-shallow-repository"])? != b"true" {
            return Ok(None);
        }
        let path =
            git::answer(&self.root, &["rev-parse", "--path-format=absolute", "--git-path", "shallow"])?;
        let path = PathBuf::from(OsString::from_vec(path));
        let size = fs_err::metadata(&path)
            .map_err(|e| Error::internal("cannot read the shallow boundary", &e))?
            .len();
        if size > 4 << 20 {
            return Err(Error::new(
                Code::FailedPrecondition,
                "the shallow boundary of the repository is larger than 4 MiB",
            )
            .hint("`git fetch --unshallow`"));
        }
        fs_err::read(&path).map(Some).map_err(|e| Error::internal("cannot read the shallow boundary", &e))
    }
}
