//! Submodules: repositories of their own at the places where the index of another names a commit (gitsubmodules(7)). Those that are
//! checked out here go along with a [`Mode::Full`](crate::Mode::Full), and those within them, too.

use crate::{
    Meta, PackOptions, PackSummary, Packed, Repository, entries::Entries, entry, git, names, pack::Names,
};
use bothy_contract::Error;
use std::{ffi::OsStr, io::Write, os::unix::ffi::OsStrExt};

/// How deep submodules may be within one another, and how many there may be in all.
const DEEPEST: usize = 16;
const MOST: usize = 1000;

/// A place where a repository names a commit of another.
pub(crate) struct Gitlink {
    /// Relative to the repository, as git lists it.
    pub(crate) path: Vec<u8>,
    /// The commit.
    pub(crate) commit: String,
}

impl Repository {
    /// The places of submodules in the index, or in `commit`.
    pub(crate) fn gitlinks(&self, commit: Option<&str>) -> Result<Vec<Gitlink>, Error> {
        // `160000 <commit> 0\t<path>` of git-ls-files(1), or `160000 commit <commit>\t<path>` of git-ls-tree(1).
        let args = match commit {
            None => vec!["ls-files", "--stage", "-z", "--full-name"],
            Some(commit) => vec!["ls-tree", "-r", "-z", "--full-tree", commit],
        };
        let mut links = Vec::new();
        self.list(&args, |line| {
            let Some(facts) = line.strip_prefix(b"160000 ") else { return Ok(()) };
            let mut parts = facts.splitn(2, |b| *b == b'\t');
            let (facts, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let facts = String::from_utf8_lossy(facts).into_owned();
            let object = facts.split(' ').find(|word| word.len() >= 40).unwrap_or_default().to_owned();
            links.push(Gitlink { path: path.to_vec(), commit: object });
            Ok(())
        })?;
        // One that is unmerged is listed more than once.
        links.dedup_by(|a, b| a.path == b.path);
        Ok(links)
    }

    /// The repository of a submodule, where it is checked out here.
    pub(crate) fn submodule(&self, link: &Gitlink) -> Option<Repository> {
        let path = self.root().join(OsStr::from_bytes(&link.path));
        let is_dir = fs_err::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
        if !is_dir || fs_err::symlink_metadata(path.join(".git")).is_err() {
            return None;
        }
        // A `.git` that is none would find the repository above.
        Repository::open(&path).ok().filter(|found| found.root() == path)
    }

    /// The submodules that are checked out, also those within others.
    pub(crate) fn submodules(&self) -> Result<Vec<Repository>, Error> {
        let mut found = Vec::new();
        let mut next = vec![(self.clone(), 0)];
        while let Some((repository, depth)) = next.pop() {
            for link in repository.gitlinks(None)? {
                if found.len() < MOST
                    && depth < DEEPEST
                    && let Some(inner) = repository.submodule(&link)
                {
                    found.push(inner.clone());
                    next.push((inner, depth + 1));
                }
            }
        }
        Ok(found)
    }
}

/// Submodules on their way into a pack, behind the repository that they are of.
pub(crate) struct Packing<'a, W: Write> {
    options: &'a PackOptions,
    tar: &'a mut Entries<W>,
    summary: &'a mut PackSummary,
    /// Those that stay empty.
    empty: Names,
    packed: usize,
}

impl<'a, W: Write> Packing<'a, W> {
    pub(crate) fn new(
        options: &'a PackOptions,
        tar: &'a mut Entries<W>,
        summary: &'a mut PackSummary,
    ) -> Self {
        Self { options, tar, summary, empty: Names::default(), packed: 0 }
    }

    /// Packs the submodules of `repository`, and theirs: as they are, or as its commit `from` names them.
    pub(crate) fn pack_all(mut self, repository: &Repository, from: Option<&str>) -> Result<(), Error> {
        self.within(repository, from, b"", 0)?;
        if self.empty.count > 0 {
            let why = "they are not checked out here: `git submodule update --init --recursive`";
            self.summary.warnings.push(format!("submodules are left empty: {}; {why}", self.empty));
        }
        Ok(())
    }

    /// Packs the submodules of `repository`, which is at `above` (empty, or with a slash at the end), as they are or as its commit
    /// `from` names them.
    fn within(
        &mut self,
        repository: &Repository,
        from: Option<&str>,
        above: &[u8],
        depth: usize,
    ) -> Result<(), Error> {
        for link in repository.gitlinks(from)? {
            let path = [above, &link.path].concat();
            let module = repository.submodule(&link).filter(|module| {
                // The list of them in the guest has lines.
                !path.contains(&b'\n')
                    && depth < DEEPEST
                    && self.packed < MOST
                    && (from.is_none() || module.has(&link.commit))
            });
            let Some(module) = module else {
                self.empty.add(&path);
                continue;
            };
            let commit = from.map(|_| link.commit.as_str());
            self.one(&module, commit, &path)?;
            self.within(&module, commit, &[&path, b"/".as_slice()].concat(), depth + 1)?;
        }
        Ok(())
    }

    fn one(&mut self, module: &Repository, from: Option<&str>, path: &[u8]) -> Result<(), Error> {
        let shown = names::display(path);
        self.packed += 1;
        let options = PackOptions {
            branch: None,
            from: from.map(str::to_owned),
            include: self.options.include.iter().filter_map(|glob| below(glob, path)).collect(),
            ..self.options.clone()
        };
        let mut plan = module.plan(&options).map_err(|e| e.context(format!("the submodule {shown}")))?;
        if from.is_some() {
            // Also where that commit is checked out here.
            plan.as_it_is = false;
            plan.meta.branch = None;
        }
        let prefix = format!("{}/{}/", entry::MODULES, self.packed);
        let facts = facts(&plan.meta, path);
        self.tar.put(&format!("{prefix}{}", entry::MODULE), facts.len() as u64, facts.as_slice())?;
        let packed = module
            .content(plan, &options, &prefix, self.tar)
            .map_err(|e| e.context(format!("the submodule {shown}")))?;
        let summary = &mut *self.summary;
        summary.history_bytes += packed.history_bytes;
        summary.changed += packed.changed;
        summary.untracked_in += packed.untracked_in;
        summary.untracked_out += packed.untracked_out;
        let below = |name: &String| format!("{shown}/{name}");
        let room = crate::pack::SHOWN.saturating_sub(summary.untracked_names.len());
        summary.untracked_names.extend(packed.untracked_names.iter().take(room).map(below));
        summary.warnings.extend(packed.warnings.iter().map(|warning| format!("{shown}: {warning}")));
        if options.list {
            let kind = "submodule";
            summary.files.push(Packed { name: shown.clone(), bytes: packed.history_bytes, kind });
            summary.files.extend(packed.files.into_iter().map(|f| Packed { name: below(&f.name), ..f }));
        }
        Ok(())
    }
}

impl Repository {
    /// Whether the commit is here.
    fn has(&self, commit: &str) -> bool {
        let name = format!("{commit}^{{commit}}");
        matches!(git::maybe(self.root(), &["cat-file", "-e", &name]), Ok(Some(_)))
    }
}

/// The entry [`entry::MODULE`].
fn facts(meta: &Meta, path: &[u8]) -> Vec<u8> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let (branch, name, email) = (text(&meta.branch), text(&meta.git_name), text(&meta.git_email));
    let rest = [&meta.head, meta.object_format.as_str(), &branch, &name, &email].map(|s| format!("{s}\n"));
    [path, b"\n", rest.concat().as_bytes()].concat()
}

/// What a pattern for paths from the top of the repository says of paths from the top of the submodule `path`.
fn below(glob: &str, path: &[u8]) -> Option<String> {
    if glob.starts_with("**/") {
        return Some(glob.to_owned());
    }
    let path = std::str::from_utf8(path).ok()?;
    glob.strip_prefix(path)?.strip_prefix('/').map(str::to_owned)
}
