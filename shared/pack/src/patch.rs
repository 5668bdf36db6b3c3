//! The checks on a patch that comes back from a guest, which is hostile.
//!
//! A strict reader of exactly what our export makes (`git diff-tree -p --binary --full-index`, git-diff-tree(1)): every
//! line must belong to a section of that format, as `git apply` would read it, or the patch is refused. So each name that
//! `git apply` would act on was checked here. Memory is bounded: content is never held.

use crate::{
    lines::Lines,
    names::{self, display, unquote},
};
use bothy_contract::Error;
use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::RandomState},
    hash::BuildHasher,
    io::{BufRead, Read},
};

/// The largest patch that is accepted, in bytes.
pub const MAX_PATCH: u64 = 4 << 30;
/// The most files a patch may touch.
pub const MAX_FILES: u64 = 1_000_000;
/// The most that all binary files of a patch may claim to inflate to, in bytes.
pub const MAX_INFLATED: u64 = 16 << 30;
/// The most symbolic links, and the most directories, that are remembered.
const MAX_REMEMBERED: usize = 1_000_000;
/// The longest path, in bytes (PATH_MAX, limits.h).
const MAX_NAME: usize = 4095;

/// What a patch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PatchSummary {
    /// Files it touches.
    pub files: u64,
    /// Of those: made.
    pub created: u64,
    /// Of those: deleted.
    pub deleted: u64,
    /// Of those: renamed or copied.
    pub renamed: u64,
    /// Of those: with binary content.
    pub binary: u64,
    /// Of those: symbolic links.
    pub symlinks: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// What all its binary content claims to inflate to, in bytes.
    pub inflated: u64,
    /// Names that are one name where case makes no difference, as far as the patch itself shows.
    pub collisions: u64,
}

/// Reads a whole patch and judges it. An empty one is fine.
///
/// # Errors
/// Refuses anything that is not a patch of our export's form, names outside the repository or inside a `.git`, modes
/// other than file, executable and symbolic link, files below a symbolic link that the patch makes, and sizes beyond
/// [`MAX_PATCH`], [`MAX_FILES`] and [`MAX_INFLATED`].
pub fn inspect_patch(reader: impl Read) -> Result<PatchSummary, Error> {
    inspect_files(reader, |_| Ok(()))
}

/// One file of a patch whose names were checked.
pub(crate) struct Touched<'a> {
    /// Its name before; the same as `to` where it was not renamed.
    pub(crate) from: &'a [u8],
    /// Its name after.
    pub(crate) to: &'a [u8],
    /// It is there only before.
    pub(crate) deleted: bool,
}

/// The same, and gives each file to `each`, whose errors end it.
pub(crate) fn inspect_files(
    reader: impl Read,
    each: impl FnMut(&Touched<'_>) -> Result<(), Error>,
) -> Result<PatchSummary, Error> {
    let mut inspection = Inspection {
        lines: Lines::new(reader, MAX_PATCH),
        sum: PatchSummary::default(),
        links: BTreeSet::new(),
        parents: HashSet::new(),
        folded: HashMap::new(),
        hasher: RandomState::new(),
        each,
    };
    match inspection.run() {
        Ok(()) => Ok(PatchSummary { bytes: inspection.lines.bytes, ..inspection.sum }),
        Err(e) => Err(e
            .context(format!("the patch is refused at line {}", inspection.lines.number))
            .hint("the guest made it: look at it before any of it is used")),
    }
}

/// How many files a patch of our own git touches.
pub(crate) fn count_files(mut reader: impl BufRead) -> Result<u64, Error> {
    let (mut files, mut fresh) = (0, true);
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = (&mut reader)
            .take(8 << 10)
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::internal("cannot read a patch", &e))?;
        if n == 0 {
            return Ok(files);
        }
        // Lines of content begin with another byte, and base 85 has no blanks: the start of a line is enough.
        files += u64::from(fresh && line.starts_with(b"diff --git "));
        fresh = line.ends_with(b"\n");
    }
}

struct Inspection<R, F> {
    lines: Lines<R>,
    sum: PatchSummary,
    /// Symbolic links that there will be, folded.
    links: BTreeSet<Vec<u8>>,
    /// Hashes of all directories in which there will be files, folded.
    parents: HashSet<u64>,
    /// From the hash of each folded name that there will be to the hash of the name.
    folded: HashMap<u64, u64>,
    hasher: RandomState,
    each: F,
}

/// One file's part of the patch, as far as it was read.
#[derive(Default)]
struct Section {
    /// From `diff --git`, where both names are the same.
    both: Option<Vec<u8>>,
    /// From `rename from` and `copy from`.
    from: Option<Vec<u8>>,
    /// From `rename to` and `copy to`.
    to: Option<Vec<u8>>,
    created: bool,
    deleted: bool,
    link: bool,
}

impl<R: Read, F: FnMut(&Touched<'_>) -> Result<(), Error>> Inspection<R, F> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let line = self.lines.next()?;
            if line.is_empty() {
                break;
            }
            let Some(names) = line.strip_prefix(b"diff --git ").and_then(|l| l.strip_suffix(b"\n")) else {
                return Err(Error::invalid(format!("a line that belongs to no file: {}", excerpt(line))));
            };
            let section = Section { both: same_name(names), ..Section::default() };
            self.sum.files += 1;
            if self.sum.files > MAX_FILES {
                return Err(Error::invalid(format!("it touches more than {MAX_FILES} files")));
            }
            self.section(section)?;
        }
        for link in &self.links {
            if self.parents.contains(&self.hasher.hash_one(link.as_slice())) {
                return Err(Error::invalid(format!(
                    "it puts files below the symbolic link {}",
                    display(link)
                )));
            }
        }
        Ok(())
    }

    fn section(&mut self, mut section: Section) -> Result<(), Error> {
        loop {
            let full = self.lines.next()?;
            let Some(line) = full.strip_suffix(b"\n") else {
                if full.is_empty() {
                    break;
                }
                return Err(Error::invalid(format!("a header that is too long or cut: {}", excerpt(full))));
            };
            if let Some(mode) = line.strip_prefix(b"new file mode ") {
                section.created = true;
                section.link |= is_link(mode)?;
            } else if let Some(mode) = line.strip_prefix(b"deleted file mode ") {
                section.deleted = true;
                is_link(mode)?;
            } else if let Some(mode) = line.strip_prefix(b"new mode ") {
                section.link |= is_link(mode)?;
            } else if let Some(mode) = line.strip_prefix(b"old mode ") {
                is_link(mode)?;
            } else if let Some(name) = strip_any(line, [b"rename from ", b"copy from "]) {
                section.from = Some(name_of(name)?);
            } else if let Some(name) = strip_any(line, [b"rename to ", b"copy to "]) {
                section.to = Some(name_of(name)?);
            } else if let Some(index) = line.strip_prefix(b"index ") {
                if let Some(at) = index.iter().position(|b| *b == b' ') {
                    section.link |= is_link(index.get(at + 1..).unwrap_or_default())?;
                }
            } else if line.starts_with(b"similarity index ") || line.starts_with(b"dissimilarity index ") {
                // Says nothing that `git apply` acts on.
            } else if line == b"GIT binary patch" {
                self.sum.binary += 1;
                let (from, to) = section.names()?;
                self.note(&section, &from, &to)?;
                return self.binary();
            } else if let Some(name) = line.strip_prefix(b"--- ") {
                let (from, to) = section.names()?;
                is_named(name, b"a/", &from)?;
                let name = self.lines.next()?;
                let Some(name) = name.strip_prefix(b"+++ ").and_then(|l| l.strip_suffix(b"\n")) else {
                    return Err(Error::invalid("`---` without `+++`"));
                };
                is_named(name, b"b/", &to)?;
                self.note(&section, &from, &to)?;
                return self.hunks();
            } else {
                self.lines.hold();
                break;
            }
        }
        let (from, to) = section.names()?;
        self.note(&section, &from, &to)
    }

    /// Checks and counts a file whose header is read.
    fn note(&mut self, section: &Section, from: &[u8], to: &[u8]) -> Result<(), Error> {
        check_name(from)?;
        check_name(to)?;
        self.sum.created += u64::from(section.created);
        self.sum.deleted += u64::from(section.deleted);
        self.sum.renamed += u64::from(section.to.is_some());
        (self.each)(&Touched { from, to, deleted: section.deleted })?;
        if section.deleted {
            return Ok(());
        }
        // As a file system that folds case sees it: there a link `D` is in the way of `d/x`, too.
        let folded = names::fold(to);
        let exact = self.hasher.hash_one(to);
        if *self.folded.entry(self.hasher.hash_one(folded.as_slice())).or_insert(exact) != exact {
            self.sum.collisions += 1;
        }
        for (at, _) in folded.iter().enumerate().filter(|(_, b)| **b == b'/') {
            self.parents.insert(self.hasher.hash_one(folded.get(..at).unwrap_or_default()));
        }
        if section.link {
            self.sum.symlinks += 1;
            self.links.insert(folded);
        }
        if self.links.len() > MAX_REMEMBERED || self.parents.len() > MAX_REMEMBERED {
            return Err(Error::invalid(format!(
                "it has more than {MAX_REMEMBERED} symbolic links or directories"
            )));
        }
        Ok(())
    }

    /// `@@ -a,b +c,d @@` and as many lines as that says, again and again.
    fn hunks(&mut self) -> Result<(), Error> {
        let mut first = true;
        loop {
            let line = self.lines.next()?;
            let Some((mut old, mut new)) = hunk_counts(line) else {
                if first {
                    return Err(Error::invalid(format!("not the start of a hunk: {}", excerpt(line))));
                }
                self.lines.hold();
                return Ok(());
            };
            first = false;
            while old > 0 || new > 0 {
                let line = self.lines.next()?;
                let (minus, plus) = match line.first() {
                    Some(b' ' | b'\n') => (1, 1),
                    Some(b'-') => (1, 0),
                    Some(b'+') => (0, 1),
                    Some(b'\\') => (0, 0),
                    _ => return Err(Error::invalid(format!("not a line of a hunk: {}", excerpt(line)))),
                };
                let left = old.checked_sub(minus).zip(new.checked_sub(plus));
                (old, new) = left.ok_or_else(|| Error::invalid("a hunk with more lines than it says"))?;
            }
            if !self.lines.next()?.starts_with(b"\\ ") {
                self.lines.hold();
            }
        }
    }

    /// One or two of `literal <size>` or `delta <size>`, each with lines of base 85 up to an empty line.
    fn binary(&mut self) -> Result<(), Error> {
        for part in 0..2 {
            let line = self.lines.next()?;
            let Some(size) = strip_any(line, [b"literal ", b"delta "]) else {
                if part == 0 {
                    return Err(Error::invalid(format!(
                        "not the start of binary content: {}",
                        excerpt(line)
                    )));
                }
                self.lines.hold();
                return Ok(());
            };
            let size = size
                .strip_suffix(b"\n")
                .and_then(number)
                .ok_or_else(|| Error::invalid("a size that is no number"))?;
            self.sum.inflated = self.sum.inflated.saturating_add(size);
            if self.sum.inflated > MAX_INFLATED {
                return Err(Error::invalid(format!(
                    "its binary files claim to be larger than {} GiB",
                    MAX_INFLATED >> 30
                )));
            }
            loop {
                let line = self.lines.next()?;
                if line == b"\n" {
                    break;
                }
                // A letter for the length and at most 52 bytes in base 85 (git's diff.c).
                if !line.first().is_some_and(u8::is_ascii_alphabetic)
                    || line.len() > 68
                    || !line.ends_with(b"\n")
                {
                    return Err(Error::invalid(format!("not a line of binary content: {}", excerpt(line))));
                }
            }
        }
        Ok(())
    }
}

impl Section {
    /// The names before and after.
    fn names(&self) -> Result<(Vec<u8>, Vec<u8>), Error> {
        match (&self.from, &self.to, &self.both) {
            (Some(from), Some(to), _) => Ok((from.clone(), to.clone())),
            (None, None, Some(both)) => Ok((both.clone(), both.clone())),
            _ => Err(Error::invalid("a file whose name is not clear")),
        }
    }
}

fn excerpt(line: &[u8]) -> String {
    display(line.get(..80).unwrap_or(line))
}

fn strip_any<'a, const N: usize>(line: &'a [u8], prefixes: [&[u8]; N]) -> Option<&'a [u8]> {
    prefixes.iter().find_map(|p| line.strip_prefix(*p))
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

/// The number of old and new lines that a hunk's first line announces.
fn hunk_counts(line: &[u8]) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix(b"@@ -")?.splitn(3, |b| *b == b' ');
    let count = |range: &[u8]| match range.iter().position(|b| *b == b',') {
        Some(at) => number(range.get(at + 1..)?).filter(|_| range.get(..at).and_then(number).is_some()),
        None => number(range).map(|_| 1),
    };
    let old = count(words.next()?)?;
    let new = count(words.next()?.strip_prefix(b"+")?)?;
    words.next()?.starts_with(b"@@").then_some((old, new))
}

/// Whether a mode is that of a symbolic link; refuses all but the three that a patch may have.
fn is_link(mode: &[u8]) -> Result<bool, Error> {
    match mode {
        b"100644" | b"100755" => Ok(false),
        b"120000" => Ok(true),
        _ => Err(Error::invalid(format!("a file mode that is not accepted: {}", excerpt(mode)))),
    }
}

/// A name that fills a header to its end.
fn name_of(text: &[u8]) -> Result<Vec<u8>, Error> {
    if text.starts_with(b"\"") {
        let (name, rest) = unquote(text).ok_or_else(|| Error::invalid("a name that is wrongly quoted"))?;
        return if rest.is_empty() {
            Ok(name)
        } else {
            Err(Error::invalid("something behind a quoted name"))
        };
    }
    Ok(text.to_vec())
}

/// The name in `a/NAME b/NAME`.
fn same_name(text: &[u8]) -> Option<Vec<u8>> {
    let (old, new) = if text.starts_with(b"\"") {
        let (old, rest) = unquote(text)?;
        let (new, rest) = unquote(rest.strip_prefix(b" ")?)?;
        (old, rest.is_empty().then_some(new)?)
    } else {
        let (old, rest) = text.split_at_checked(text.len() / 2)?;
        (old.to_vec(), rest.strip_prefix(b" ")?.to_vec())
    };
    let name = old.strip_prefix(b"a/")?;
    (Some(name) == new.strip_prefix(b"b/")).then(|| name.to_vec())
}

/// Checks the name of a `---` or `+++` line against the one of the header.
fn is_named(text: &[u8], side: &[u8], name: &[u8]) -> Result<(), Error> {
    // git puts a tab behind a name with blanks, for the sake of other tools.
    let text = text.strip_suffix(b"\t").unwrap_or(text);
    let found = name_of(text)?;
    if found == b"/dev/null" || found.strip_prefix(side) == Some(name) {
        return Ok(());
    }
    Err(Error::invalid(format!("two names for one file: {} and {}", excerpt(name), excerpt(&found))))
}

/// Refuses a name that is not plainly inside the repository's working tree, on any file system.
fn check_name(name: &[u8]) -> Result<(), Error> {
    let refuse = |why: &str| Err(Error::invalid(format!("the name {} {why}", excerpt(name))));
    if name.len() > MAX_NAME {
        return refuse("is too long");
    }
    if name.contains(&0) {
        return refuse("has a NUL byte");
    }
    for part in name.split(|b| *b == b'/') {
        if part.is_empty() || part == b"." || part == b".." {
            return refuse("is not inside the repository");
        }
        if part.split(|b| *b == b'\\').any(is_dot_git) {
            return refuse("is inside a `.git` directory");
        }
    }
    Ok(())
}

/// Whether some file system takes `part` for `.git`: by case, by code points that HFS+ ignores, by what NTFS drops at
/// the end, by its short name (git's own list: `is_hfs_dotgit` in utf8.c, `is_ntfs_dotgit` in path.c).
fn is_dot_git(part: &[u8]) -> bool {
    let visible: String = String::from_utf8_lossy(part)
        .chars()
        .filter(|c| {
            !matches!(c, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}')
        })
        .collect::<String>()
        .to_lowercase();
    let stem = visible.split(':').next().unwrap_or_default().trim_end_matches(['.', ' ']);
    stem == ".git" || stem == "git~1"
}
