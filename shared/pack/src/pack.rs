//! Packing: a few runs of git, each into a private temporary file or a pipe, and one tar stream out.

use crate::{Repository, entries::Entries, entry, git, names, patch};
use bothy_contract::{Code, Error};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};

/// How many names of a kind are kept for the user.
const SHOWN: usize = 5;

/// The longest file name that git's lists may hold, in bytes; PATH_MAX is 4096 (limits.h).
const NAME_MAX: u64 = 64 << 10;

/// Settings of the user's that would change the form of a patch are overridden one by one.
const DIFF: &[&str] = &[
    "diff",
    "--binary",
    "--full-index",
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--no-renames",
    "--no-relative",
    "--ignore-submodules=all",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "-U3",
    "--inter-hunk-context=0",
    "-O/dev/null",
];

/// What goes into a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackOptions {
    /// Untracked files too; ignored ones never go.
    pub include_untracked: bool,
}

/// What went into a pack, and what did not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackSummary {
    /// The commit that was checked out.
    pub head: String,
    /// Its branch, unless the head is detached.
    pub branch: Option<String>,
    /// Bytes of the whole stream.
    pub bytes: u64,
    /// Bytes of the history's bundle.
    pub history_bytes: u64,
    /// Tracked files that differ from HEAD.
    pub changed: u64,
    /// Untracked files that went in.
    pub untracked_in: u64,
    /// Untracked files that stayed out.
    pub untracked_out: u64,
    /// The first few of those, for people.
    pub untracked_names: Vec<String>,
    /// What the user should know: submodules, conflicts, things that cannot be packed. One line each.
    pub warnings: Vec<String>,
}

impl Repository {
    /// Writes the repository as one stream: the format is in `docs/workspaces.md`. Memory does not grow with it.
    ///
    /// # Errors
    /// When git or `out` fails, or the repository moves on while it is packed. What was written then is no pack.
    pub fn pack(&self, options: PackOptions, out: impl Write) -> Result<PackSummary, Error> {
        let (meta, warnings) = self.meta()?;
        let head = meta.head.clone();
        let mut summary =
            PackSummary { warnings, head, branch: meta.branch.clone(), ..PackSummary::default() };
        self.look_at_index(&mut summary)?;

        // All that can fail without having written anything comes first.
        let (bundle, size) = self.bundle(&summary.head)?;
        let staged = self.diff(&["--cached", &summary.head])?;
        let mut tracked = self.diff(&[&summary.head])?;
        summary.history_bytes = size;
        summary.changed = patch::count_files(BufReader::new(&mut tracked.0))?;
        let again = |e: std::io::Error| Error::internal("cannot read a temporary file again", &e);
        tracked.0.seek(SeekFrom::Start(0)).map_err(again)?;

        let mut tar = Entries::new(out);
        let json = serde_json::to_vec_pretty(&meta)
            .map_err(|e| Error::internal("cannot write the meta data", &e))?;
        tar.put(entry::META, json.len() as u64, json.as_slice())?;
        if let Some(shallow) = self.shallow()? {
            tar.put(entry::SHALLOW, shallow.len() as u64, shallow.as_slice())?;
        }
        tar.put(entry::HISTORY, size, bundle)?;
        tar.put(entry::STAGED, staged.1, staged.0)?;
        tar.put(entry::TRACKED, tracked.1, tracked.0)?;
        self.untracked(options, &mut tar, &mut summary)?;
        tar.put(entry::END, 0, std::io::empty())?;
        summary.bytes = tar.finish()?;
        Ok(summary)
    }

    /// The history of HEAD, which must still be `head` when it is there.
    fn bundle(&self, head: &str) -> Result<(fs_err::File, u64), Error> {
        let bundle = git::to_file(self.root(), &["bundle", "create", "--quiet", "-", "HEAD"]).map_err(|e| {
            let partial = git::maybe(self.root(), &["config", "--get-regexp", r"^remote\..*\.promisor$"]);
            if matches!(partial, Ok(Some(_))) {
                e.context("the repository is a partial clone, and objects are missing")
                    .hint("fetch them first: `git fetch --refetch --filter=blob:limit=1t`, or make a full clone")
            } else {
                e
            }
        })?;
        if self.head()? != head {
            let moved =
                Error::new(Code::FailedPrecondition, "the repository's HEAD moved while it was packed");
            return Err(Error { retryable: true, ..moved }.hint("run it again"));
        }
        Ok(bundle)
    }

    fn diff(&self, what: &[&str]) -> Result<(fs_err::File, u64), Error> {
        let mut args = DIFF.to_vec();
        args.extend_from_slice(what);
        args.push("--");
        git::to_file(self.root(), &args)
    }

    /// Submodules and conflicts, from the index.
    fn look_at_index(&self, summary: &mut PackSummary) -> Result<(), Error> {
        let (mut modules, mut conflicts) = (Names::default(), Names::default());
        let mut last = Vec::new();
        // `<mode> <object> <stage>\t<name>`, git-ls-files(1).
        self.list(&["ls-files", "--stage", "-z"], |line| {
            let mut parts = line.splitn(2, |b| *b == b'\t');
            let (facts, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            if facts.starts_with(b"160000 ") {
                modules.add(name);
            } else if !facts.ends_with(b" 0") && last != name {
                conflicts.add(name);
                last = name.to_vec();
            }
            Ok(())
        })?;
        if modules.count > 0 {
            summary.warnings.push(format!("submodules are left empty: {modules}"));
        }
        if conflicts.count > 0 {
            summary.warnings.push(format!("unmerged files go as they are in the working tree: {conflicts}"));
        }
        Ok(())
    }

    /// Packs or counts the files that git does not know and does not ignore.
    fn untracked<W: Write>(
        &self,
        options: PackOptions,
        tar: &mut Entries<W>,
        summary: &mut PackSummary,
    ) -> Result<(), Error> {
        let (mut out, mut odd) = (Names::default(), Names::default());
        let args = ["ls-files", "--others", "--exclude-standard", "-z", "--full-name", "--"];
        self.list(&args, |name| {
            // A directory in this list is a repository inside the repository.
            if name.ends_with(b"/") {
                odd.add(name);
            } else if !options.include_untracked {
                out.add(name);
            } else if tar.put_file(self.root(), name)? {
                summary.untracked_in += 1;
            } else {
                odd.add(name);
            }
            Ok(())
        })?;
        if odd.count > 0 {
            let what = "untracked repositories and special files stay out";
            summary.warnings.push(format!("{what}: {odd}"));
        }
        summary.untracked_out = out.count;
        summary.untracked_names = out.first;
        Ok(())
    }

    /// Runs git and gives each NUL-terminated piece of its output to `each`.
    fn list(
        &self,
        args: &[&'static str],
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (running, stdout) = git::start(self.root(), args)?;
        let read = || {
            let mut reader = BufReader::new(stdout);
            let mut name = Vec::new();
            loop {
                name.clear();
                let n = (&mut reader)
                    .take(NAME_MAX)
                    .read_until(0, &mut name)
                    .map_err(|e| Error::internal("cannot read a list of git's", &e))?;
                if n == 0 {
                    return Ok(());
                }
                if name.pop() != Some(0) {
                    return Err(Error::new(Code::Internal, "git listed a name without an end"));
                }
                each(&name)?;
            }
        };
        match read() {
            Ok(()) => running.finish(),
            Err(e) => {
                running.abandon();
                Err(e)
            }
        }
    }
}

/// A count of names, and the first few of them.
#[derive(Default)]
struct Names {
    count: u64,
    first: Vec<String>,
}

impl Names {
    fn add(&mut self, name: &[u8]) {
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push(names::display(name));
        }
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.first.join(", "))?;
        match self.count - self.first.len() as u64 {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
