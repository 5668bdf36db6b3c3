//! The scripts that run in the guest, and what their exit statuses mean.
//!
//! They are fixed text; what differs from run to run goes in as arguments (`"$1"`), never into the text.

use bothy_contract::{Code, Error};
use std::time::Duration;

/// One script.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    /// Its name, for messages and spans.
    pub name: &'static str,
    /// Its text, for `sh -c`.
    pub text: &'static str,
    /// The longest it may take.
    pub limit: Duration,
}

macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident = $file:literal, $secs:literal s;)*) => {$(
        $(#[$doc])*
        pub const $name: Script = Script {
            name: $file,
            text: concat!(include_str!("scripts/common.sh"), include_str!(concat!("scripts/", $file, ".sh"))),
            limit: Duration::from_secs($secs),
        };
    )*};
}

scripts! {
    /// Makes the private directory of an import.
    PREPARE = "prepare", 600 s;
    /// Builds the repository and renames it into place.
    IMPORT = "import", 1800 s;
    /// Brings changes of the user's side into the working tree.
    SYNC = "sync", 1800 s;
    /// Takes away what an import left.
    CLEAN = "clean", 120 s;
    /// Writes the patch to a private file.
    EXPORT = "export", 1800 s;
    /// Gives the patch.
    READ = "read", 1800 s;
    /// Takes away what an export left.
    CLEAN_EXPORT = "clean-export", 60 s;
    /// Sets the git identity.
    IDENTITY = "identity", 20 s;
}

/// How a script ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Finished {
    /// Exit status, or 128 and the signal.
    pub status: i32,
    /// What it printed; at most [`OUTPUT_MAX`] bytes.
    pub stdout: Vec<u8>,
    /// What it complained of; at most [`OUTPUT_MAX`] bytes.
    pub stderr: Vec<u8>,
}

/// The most that is kept of a script's output, in bytes.
pub const OUTPUT_MAX: usize = 8 << 10;

impl Finished {
    /// What it printed, where it ended well; `path` is what it worked on.
    ///
    /// # Errors
    /// What its exit status means.
    pub fn check(self, script: &Script, path: &str) -> Result<String, Error> {
        let precondition = |message: String| Error::new(Code::FailedPrecondition, message);
        Err(match self.status {
            0 => {
                return String::from_utf8(self.stdout)
                    .map_err(|e| Error::internal(format!("`{}` in the guest gave no text", script.name), &e));
            }
            40 => precondition("the guest has no git".into()).hint("install git in the guest, or use an image that has it"),
            41 => Error::new(Code::AlreadyExists, format!("{path} in the guest is there already and is no directory"))
                .hint("choose another place with `--guest-path`"),
            42 => Error::new(Code::AlreadyExists, format!("{path} in the guest is not empty"))
                .hint("choose another place with `--guest-path`, or remove it in the guest (export first what you need)"),
            45 => would_lose(path, &self.stdout),
            46 => precondition(format!("{path} cannot be made read-only: {}", last_words(&self.stderr)))
                .hint("leave out `--readonly`, or use an image with mount(8)"),
            47 => precondition(format!("{path} is read-only in the guest"))
                .hint("put the repository there anew, without `--readonly`: `bothy workspace prepare --force`"),
            48 => Error { retryable: true, ..precondition(format!("files in {path} changed while it was synced: {}", last_words(&self.stderr))) }
                .hint("run it again; nothing was changed"),
            43 => precondition(format!("something above {path} in the guest is no directory"))
                .hint("choose another place with `--guest-path`"),
            44 => Error::invalid("the pack is not whole").hint("use a `bothy` and services of one version"),
            50 => Error::not_found(format!("{path} in the guest is no repository with a `.git` directory"))
                .hint("name the place of the import with `--guest-path`"),
            51 => precondition(format!("the repository {path} in the guest does not know its import any more"))
                .hint("`refs/bothy/base` and `refs/bothy/import` are gone there: export by hand with `git format-patch`"),
            52 => Error::not_found(format!("the repository {path} in the guest has no such revision"))
                .hint("`git log` in the guest shows what `--base` may name"),
            status => {
                let words = last_words(&self.stderr);
                let full = words.contains("No space left on device");
                let code = if full { Code::ResourceExhausted } else { Code::Internal };
                let error = Error::new(code, format!("`{}` of {path} in the guest ended with {status}: {words}", script.name));
                if full { error.hint("free space in the guest, or make the VM with larger disks") } else { error }
            }
        })
    }
}

/// What a second import would take away: `<commits> <files> <ignored> <names, a line each>`.
fn would_lose(path: &str, told: &[u8]) -> Error {
    let text = String::from_utf8_lossy(told);
    let mut words = text.splitn(4, ' ');
    let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let (commits, files, ignored) = (number(), number(), number());
    let names: Vec<_> = words.next().unwrap_or_default().lines().collect();
    let mut lost = Vec::new();
    for (n, what) in [(commits, "commit"), (files, "changed file"), (ignored, "ignored file")] {
        if n > 0 {
            lost.push(format!("{n} {what}{}", if n == 1 { "" } else { "s" }));
        }
        if what == "changed file" && n > 0 {
            let more = n.saturating_sub(names.len() as u64);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            lost.push(format!("({}{more})", last_words(names.join(", ").as_bytes())));
        }
    }
    Error::new(
        Code::FailedPrecondition,
        format!("{path} in the guest would lose {}", lost.join(", ").replace(", (", " (")),
    )
    .hint("bring it back first with `bothy workspace export`, or give it up with `--force`")
}

/// What a guest printed, as one harmless line.
fn last_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let from = lines.len().saturating_sub(4);
    let line = lines.get(from..).unwrap_or_default().join("; ");
    let line: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).take(1000).collect();
    if line.is_empty() { "it gave no reason".into() } else { line }
}
