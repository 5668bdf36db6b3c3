//! Packing: a few runs of git, each into a private temporary file or a pipe, and one tar stream out.

use crate::{Meta, Mode, Repository, entries::Entries, entry, git, modules, names, packing::PART, patch};
use bothy_contract::{Code, Error};
use std::{
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::ffi::OsStrExt,
};

/// How many names of a kind are kept for the user.
pub(crate) const SHOWN: usize = 5;

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
    // Which commit a submodule is at, but not what is in it.
    "--ignore-submodules=dirty",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "-U3",
    "--inter-hunk-context=0",
    "-O/dev/null",
];

/// What goes into a pack.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackOptions {
    /// How much.
    pub mode: Mode,
    /// Untracked files too.
    pub include_untracked: bool,
    /// Ignored files that match one of these patterns: paths from the top, where `**` is any directories.
    pub include: Vec<String>,
    /// A branch that there will be in the guest only.
    pub branch: Option<String>,
    /// Where that begins instead of HEAD; changes of the working tree then stay out.
    pub from: Option<String>,
    /// Whether [`PackSummary::files`] is wanted.
    pub list: bool,
    /// How large one of the packs of the history may be, in bytes: 512 MiB where nothing is said, and 1 MiB at least
    /// (git-pack-objects(1), `--max-pack-size`).
    pub part: Option<u64>,
}

/// A file that is more than a part of the history.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Packed {
    /// Its name, made fit for people.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// `changed`, `deleted`, `untracked`, `ignored`, `submodule` (its history's bytes), or `file` where no history goes.
    pub kind: &'static str,
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
    /// Bytes of the history.
    pub history_bytes: u64,
    /// Its commits, as far as they lead to HEAD.
    pub commits: u64,
    /// The files, where they were asked for.
    pub files: Vec<Packed>,
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

/// What is to go, and what was found out about it.
pub(crate) struct Plan {
    pub(crate) meta: Meta,
    /// The commit that is checked out; that of `meta` may be another.
    checked_out: String,
    /// Whether what is not committed goes, too.
    pub(crate) as_it_is: bool,
    summary: PackSummary,
}

impl Repository {
    /// Writes the repository as one stream: the format is in `docs/workspaces.md`. Memory does not grow with it.
    ///
    /// # Errors
    /// When git or `out` fails, or the repository moves on while it is packed. What was written then is no pack.
    pub fn pack(&self, options: &PackOptions, out: impl Write) -> Result<PackSummary, Error> {
        let plan = self.plan(options)?;
        let json = serde_json::to_vec_pretty(&plan.meta)
            .map_err(|e| Error::internal("cannot write the meta data", &e))?;
        let elsewhere = (!plan.as_it_is).then(|| plan.meta.head.clone());
        let mut tar = Entries::new(out);
        tar.put(entry::META, json.len() as u64, json.as_slice())?;
        let mut summary = if options.mode == Mode::Copy {
            let mut summary = plan.summary;
            self.all_files(options, &mut tar, &mut summary)?;
            self.untracked(options, entry::FILES, &mut tar, &mut summary)?;
            summary
        } else {
            self.content(plan, options, "", &mut tar)?
        };
        if options.mode == Mode::Full {
            let modules = modules::Packing::new(options, &mut tar, &mut summary);
            modules.pack_all(self, elsewhere.as_deref())?;
        }
        tar.put(entry::END, 0, std::io::empty())?;
        summary.bytes = tar.finish()?;
        Ok(summary)
    }

    /// Finds out what is to go, before anything is written.
    pub(crate) fn plan(&self, options: &PackOptions) -> Result<Plan, Error> {
        let (mut meta, warnings) = self.meta()?;
        let checked_out = meta.head.clone();
        meta.mode = options.mode;
        if let Some(branch) = &options.branch {
            meta.branch = Some(self.new_branch(branch)?);
        }
        if let Some(from) = &options.from {
            meta.head = self.commit(from)?;
        }
        meta.check()?;
        let head = meta.head.clone();
        let mut summary =
            PackSummary { warnings, head, branch: meta.branch.clone(), ..PackSummary::default() };
        self.look_at_index(options.mode, &mut summary)?;
        let as_it_is = meta.head == checked_out;
        if !as_it_is {
            if options.include_untracked || !options.include.is_empty() || options.mode == Mode::Copy {
                return Err(Error::invalid("only commits can come from another revision")
                    .hint("leave out `--from`, or files that are not tracked and `--mode copy`"));
            }
            let changed = self.changed()?;
            if !changed.is_empty() {
                summary
                    .warnings
                    .push(format!("changes stay here, since it begins elsewhere: {}", changed.join(", ")));
            }
        }
        Ok(Plan { meta, checked_out, as_it_is, summary })
    }

    /// Packs history, index and working tree as entries whose names begin with `prefix`.
    pub(crate) fn content<W: Write>(
        &self,
        plan: Plan,
        options: &PackOptions,
        prefix: &str,
        tar: &mut Entries<W>,
    ) -> Result<PackSummary, Error> {
        let Plan { checked_out, as_it_is, mut summary, .. } = plan;
        // Git packs meanwhile.
        let mut history = self.history(&summary.head, options.mode, options.part.unwrap_or(PART))?;
        let (staged, mut tracked) = if as_it_is {
            (self.diff(&["--cached", &summary.head])?, self.diff(&[&summary.head])?)
        } else {
            (self.diff(&[&summary.head, &summary.head])?, self.diff(&[&summary.head, &summary.head])?)
        };
        summary.commits = history.commits;
        summary.changed = patch::count_files(BufReader::new(&mut tracked.0))?;
        if options.list && as_it_is {
            self.list_changed(&mut summary)?;
        }
        let again = |e: std::io::Error| Error::internal("cannot read a temporary file again", &e);
        tracked.0.seek(SeekFrom::Start(0)).map_err(again)?;

        let named = |name: &str| format!("{prefix}{name}");
        let mut shallow = self.shallow()?.unwrap_or_default();
        for commit in &history.boundary {
            shallow.extend_from_slice(commit.as_bytes());
            shallow.push(b'\n');
        }
        if !shallow.is_empty() {
            tar.put(&named(entry::SHALLOW), shallow.len() as u64, shallow.as_slice())?;
        }
        if !history.refs.is_empty() {
            tar.put(&named(entry::REFS), history.refs.len() as u64, history.refs.as_slice())?;
        }
        while let Some(part) = history.packs.next()? {
            summary.history_bytes += part.pack.1;
            let name = format!("{prefix}{}/{}", entry::HISTORY, part.name);
            tar.put(&format!("{name}.pack"), part.pack.1, part.pack.0)?;
            tar.put(&format!("{name}.idx"), part.index.1, part.index.0)?;
        }
        if self.head()? != checked_out {
            let moved = Error::new(
                Code::FailedPrecondition,
                format!("the HEAD of {} moved while it was packed", self.root().display()),
            );
            return Err(Error { retryable: true, ..moved }.hint("run it again"));
        }
        tar.put(&named(entry::STAGED), staged.1, staged.0)?;
        tar.put(&named(entry::TRACKED), tracked.1, tracked.0)?;
        self.untracked(options, &named(entry::UNTRACKED), tar, &mut summary)?;
        Ok(summary)
    }

    /// Checks the name of a branch that is to be there in the guest only.
    fn new_branch(&self, name: &str) -> Result<String, Error> {
        let full = format!("refs/heads/{name}");
        if name.starts_with('-')
            || !git::output(self.root(), ["check-ref-format", full.as_str()])?.status.success()
        {
            return Err(Error::invalid(format!("{name:?} is no name for a branch"))
                .hint("see `git help check-ref-format`"));
        }
        if git::maybe(self.root(), &["show-ref", "--verify", "--quiet", &full])?.is_some() {
            return Err(Error::new(Code::AlreadyExists, format!("there is a branch {name} here already"))
                .hint("choose another name: this branch is to be in the guest only"));
        }
        Ok(name.to_owned())
    }

    /// The commit that a revision of the user's names.
    fn commit(&self, revision: &str) -> Result<String, Error> {
        let name = format!("{revision}^{{commit}}");
        let found =
            git::maybe(self.root(), &["rev-parse", "--quiet", "--verify", "--end-of-options", &name])?;
        found.and_then(|commit| String::from_utf8(commit).ok()).ok_or_else(|| {
            Error::not_found(format!("{} has no commit {revision:?}", self.root().display()))
                .hint("name a branch, a tag or a commit; `git log` shows them")
        })
    }

    /// Puts the tracked files that differ from HEAD into the list.
    fn list_changed(&self, summary: &mut PackSummary) -> Result<(), Error> {
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
        self.list(&args, |name| {
            let path = self.root().join(std::ffi::OsStr::from_bytes(name));
            let (bytes, kind) =
                fs_err::symlink_metadata(path).map_or((0, "deleted"), |m| (m.len(), "changed"));
            summary.files.push(Packed { name: names::display(name), bytes, kind });
            Ok(())
        })
    }

    /// Packs the tracked files as they are in the working tree.
    fn all_files<W: Write>(
        &self,
        options: &PackOptions,
        tar: &mut Entries<W>,
        summary: &mut PackSummary,
    ) -> Result<(), Error> {
        let mut last = Vec::new();
        self.list(&["ls-files", "--cached", "-z", "--full-name"], |name| {
            let there = fs_err::symlink_metadata(self.root().join(std::ffi::OsStr::from_bytes(name))).is_ok();
            // An unmerged file is listed more than once.
            if last == name || !there {
                return Ok(());
            }
            last = name.to_vec();
            if let Some(bytes) = tar.put_file(self.root(), entry::FILES, name)? {
                summary.changed += 1;
                if options.list {
                    summary.files.push(Packed { name: names::display(name), bytes, kind: "file" });
                }
            }
            Ok(())
        })
    }

    fn diff(&self, what: &[&str]) -> Result<(fs_err::File, u64), Error> {
        let mut args = DIFF.to_vec();
        args.extend_from_slice(what);
        args.push("--");
        git::to_file(self.root(), &args)
    }

    /// Submodules and conflicts, from the index.
    fn look_at_index(&self, mode: Mode, summary: &mut PackSummary) -> Result<(), Error> {
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
        match mode {
            // There it is told one by one.
            Mode::Full => {}
            _ if modules.count == 0 => {}
            Mode::Shallow => {
                let mend = "`--mode full` takes along those that are here";
                summary.warnings.push(format!("submodules are left empty: {modules}; {mend}"));
            }
            _ => summary.warnings.push(format!("submodules are left empty: {modules}")),
        }
        if conflicts.count > 0 {
            summary.warnings.push(format!("unmerged files go as they are in the working tree: {conflicts}"));
        }
        Ok(())
    }

    /// Packs or counts the files that git does not know and does not ignore, and packs the ignored ones that are wanted.
    fn untracked<W: Write>(
        &self,
        options: &PackOptions,
        dir: &str,
        tar: &mut Entries<W>,
        summary: &mut PackSummary,
    ) -> Result<(), Error> {
        let (mut out, mut odd) = (Names::default(), Names::default());
        let mut put = |name: &[u8], kind: &'static str, summary: &mut PackSummary| {
            // A directory in this list is a repository inside the repository.
            let bytes = if name.ends_with(b"/") { None } else { tar.put_file(self.root(), dir, name)? };
            match bytes {
                None => odd.add(name),
                Some(bytes) => {
                    summary.untracked_in += 1;
                    if options.list {
                        summary.files.push(Packed { name: names::display(name), bytes, kind });
                    }
                }
            }
            Ok::<_, Error>(())
        };
        let args = ["ls-files", "--others", "--exclude-standard", "-z", "--full-name", "--"];
        self.list(&args, |name| {
            if options.include_untracked || name.ends_with(b"/") {
                put(name, "untracked", summary)
            } else {
                out.add(name);
                Ok(())
            }
        })?;
        if !options.include.is_empty() {
            let patterns: Vec<_> = options.include.iter().map(|p| format!(":(top,glob){p}")).collect();
            let mut args =
                vec!["ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--full-name", "--"];
            args.extend(patterns.iter().map(String::as_str));
            let before = summary.untracked_in;
            self.list(&args, |name| put(name, "ignored", summary))?;
            if summary.untracked_in == before && !dir.starts_with(entry::MODULES) {
                let what = "no ignored file matches";
                summary.warnings.push(format!("{what} {}", options.include.join(", ")));
            }
        }
        if odd.count > 0 {
            let what = "untracked repositories and special files stay out";
            summary.warnings.push(format!("{what}: {odd}"));
        }
        summary.untracked_out = out.count;
        summary.untracked_names = out.first;
        Ok(())
    }

    /// Runs git and gives each NUL-terminated piece of its output to `each`.
    pub(crate) fn list(
        &self,
        args: &[&str],
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
pub(crate) struct Names {
    pub(crate) count: u64,
    first: Vec<String>,
}

impl Names {
    pub(crate) fn add(&mut self, name: &[u8]) {
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
