//! The first entry of a pack: what it is.

use bothy_contract::Error;
use serde::{Deserialize, Serialize};
use std::io::Read;

/// The version of the format that this build writes and reads.
pub const FORMAT: u32 = 4;

/// The largest `meta.json`, in bytes.
pub const META_MAX: u64 = 64 << 10;

/// How objects are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectFormat {
    /// 40 hex digits.
    Sha1,
    /// 64 hex digits.
    Sha256,
}

impl ObjectFormat {
    /// The word for `git init --object-format=`.
    pub fn as_str(self) -> &'static str {
        match self {
            ObjectFormat::Sha1 => "sha1",
            ObjectFormat::Sha256 => "sha256",
        }
    }

    fn digits(self) -> usize {
        match self {
            ObjectFormat::Sha1 => 40,
            ObjectFormat::Sha256 => 64,
        }
    }
}

/// How much of a repository goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Recent history of the branch, and the tracked files as they are.
    #[default]
    Shallow,
    /// All history, with all branches and tags, and the tracked files as they are.
    Full,
    /// The files without git.
    Copy,
    /// What has changed in the tracked files since an import, for the repository that it made.
    Sync,
}

impl Mode {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shallow => "shallow",
            Self::Full => "full",
            Self::Copy => "copy",
            Self::Sync => "sync",
        }
    }
}

/// What a pack holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// [`FORMAT`].
    pub format: u32,
    /// How much it is.
    #[serde(default)]
    pub mode: Mode,
    /// The name of the repository's directory, for people.
    pub name: String,
    /// The commit that is checked out; with [`Mode::Sync`] the one that was imported.
    pub head: String,
    /// The tree of the tracked files, with [`Mode::Sync`] only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
    /// Its branch without `refs/heads/`; none where the head is detached.
    #[serde(default)]
    pub branch: Option<String>,
    /// How objects are named.
    pub object_format: ObjectFormat,
    /// `user.name` where this checkout has one of its own.
    #[serde(default)]
    pub git_name: Option<String>,
    /// `user.email` where this checkout has one of its own.
    #[serde(default)]
    pub git_email: Option<String>,
}

impl Meta {
    /// Checks every field, since it may come from anybody.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        if self.format != FORMAT {
            return Err(Error::invalid(format!(
                "the pack has format {}, and this agent reads format {FORMAT}",
                self.format
            ))
            .hint("use a `bothy` and services of one version"));
        }
        let hex = |s: &str| s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if self.head.len() != self.object_format.digits() || !hex(&self.head) {
            return Err(Error::invalid(format!(
                "{:?} is not a commit of a {} repository",
                self.head,
                self.object_format.as_str()
            )));
        }
        let tree_fits = match &self.tree {
            Some(tree) => self.mode == Mode::Sync && tree.len() == self.object_format.digits() && hex(tree),
            None => self.mode != Mode::Sync,
        };
        if !tree_fits {
            return Err(Error::invalid(format!(
                "a pack of mode {} does not name {:?}",
                self.mode.as_str(),
                self.tree
            )));
        }
        for (what, text, max) in [
            ("name", Some(&self.name), 255),
            ("branch", self.branch.as_ref(), 1000),
            ("user.name", self.git_name.as_ref(), 1000),
            ("user.email", self.git_email.as_ref(), 1000),
        ] {
            if let Some(text) = text
                && (text.is_empty() || text.len() > max || text.chars().any(char::is_control))
            {
                return Err(Error::invalid(format!(
                    "the {what} {text:?} of the pack is empty, longer than {max} bytes or has control characters"
                )));
            }
        }
        if self.branch.as_ref().is_some_and(|b| b.starts_with('-')) {
            return Err(Error::invalid("the branch name of the pack begins with `-`"));
        }
        Ok(())
    }

    /// Reads it from the beginning of a pack: `Ok(None)` means that `start` is good so far and more is needed.
    ///
    /// # Errors
    /// When `start` is no pack, whatever follows.
    pub fn from_start(start: &[u8]) -> Result<Option<Self>, Error> {
        const BLOCK: usize = 512;
        let Some(block) = start.get(..BLOCK) else { return Ok(None) };
        let not_a_pack = || {
            Error::invalid(format!("the stream is no pack: it does not begin with `{}`", crate::entry::META))
        };
        let header = tar::Header::from_byte_slice(block);
        let sum = block.iter().enumerate().fold(0_u32, |sum, (i, b)| {
            // The checksum is over the header with its own field as spaces (POSIX.1-1988 ustar).
            sum + u32::from(if (148..156).contains(&i) { b' ' } else { *b })
        });
        let named = header.path_bytes().as_ref() == crate::entry::META.as_bytes();
        if header.cksum().ok() != Some(sum) || !named || !header.entry_type().is_file() {
            return Err(not_a_pack());
        }
        let size = header.size().map_err(|_| not_a_pack())?;
        if size > META_MAX {
            return Err(Error::invalid(format!(
                "the pack's `{}` is larger than {META_MAX} bytes",
                crate::entry::META
            )));
        }
        let end = BLOCK + usize::try_from(size).unwrap_or(usize::MAX - BLOCK);
        let Some(json) = start.get(BLOCK..end) else { return Ok(None) };
        let meta: Self = serde_json::from_slice(json)
            .map_err(|e| Error::invalid(format!("the pack's `{}` is not valid: {e}", crate::entry::META)))?;
        meta.check()?;
        Ok(Some(meta))
    }

    /// Reads it from the beginning of a reader, and no further than it must.
    ///
    /// # Errors
    /// When the reader fails, ends early, or gives something else than a pack.
    pub fn read(mut reader: impl Read) -> Result<Self, Error> {
        let mut start = Vec::new();
        loop {
            if let Some(meta) = Self::from_start(&start)? {
                return Ok(meta);
            }
            let before = start.len();
            (&mut reader)
                .take(512)
                .read_to_end(&mut start)
                .map_err(|e| Error::internal("cannot read the pack", &e))?;
            if start.len() == before {
                return Err(Error::invalid("the pack ends within its first entry"));
            }
        }
    }
}
