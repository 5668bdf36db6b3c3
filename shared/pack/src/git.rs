//! How `git` is run: as the user, with nothing of the caller's environment that could redirect it, and with nothing
//! that could run a program of the repository's or write into it.

use bothy_contract::{Code, Error};
use std::{
    ffi::OsStr,
    io::{ErrorKind, Read},
    path::Path,
    process::{Child, ChildStdout, Command, Output, Stdio},
};

/// Most of git's error text that is kept, in bytes.
pub(crate) const STDERR_MAX: u64 = 4096;

/// A `git` command in `dir`. The user's own clean filters still run where git needs them: they are the user's.
pub(crate) fn command<I, S>(dir: &Path, args: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut cmd = Command::new("git");
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"GIT_") {
            cmd.env_remove(name);
        }
    }
    cmd.current_dir(dir)
        .env("LC_ALL", "C")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_LITERAL_PATHSPECS", "1")
        // A lazy fetch of a partial clone would write into the repository; replaced objects would not match the pack.
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .arg("--no-optional-locks")
        .arg("--no-pager")
        .args(["-c", "core.hooksPath=/dev/null"])
        .args(["-c", "core.fsmonitor=false"])
        // `git diff` writes the index anew where a file was only touched, whatever was said of locks.
        .args(["-c", "diff.autoRefreshIndex=false"])
        .args(["-c", "gc.auto=0"])
        .args(["-c", "maintenance.auto=false"])
        .args(["-c", "submodule.recurse=false"])
        .args(["-c", "core.quotePath=true"])
        .args(args)
        .stdin(Stdio::null());
    cmd
}

/// What to say when `git` itself could not be started.
fn not_started(err: &std::io::Error) -> Error {
    if err.kind() == ErrorKind::NotFound {
        Error::new(Code::FailedPrecondition, "`git` is not on the PATH")
            .hint("install git, e.g. `apt install git`")
    } else {
        Error::new(Code::Internal, format!("cannot start `git`: {err}"))
    }
}

/// The last words of a failed git, made one line.
pub(crate) fn last_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
    let line = line.replace(|c: char| c.is_control(), "?");
    let line = line.strip_prefix("fatal: ").unwrap_or(&line).to_owned();
    if line.is_empty() { "it gave no reason".to_owned() } else { line }
}

/// Runs to the end and takes all output: for answers of a few lines only.
pub(crate) fn output<I, S>(dir: &Path, args: I) -> Result<Output, Error>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    command(dir, args).output().map_err(|e| not_started(&e))
}

/// The one answer of a git command that should succeed, without its newline.
pub(crate) fn answer(dir: &Path, args: &[&str]) -> Result<Vec<u8>, Error> {
    let out = output(dir, args)?;
    if !out.status.success() {
        return Err(failed(args, &out.stderr));
    }
    Ok(chomp(out.stdout))
}

/// The same for an answer that may be missing: a failure is `None`.
pub(crate) fn maybe(dir: &Path, args: &[&str]) -> Result<Option<Vec<u8>>, Error> {
    let out = output(dir, args)?;
    Ok(out.status.success().then(|| chomp(out.stdout)))
}

/// Without the one newline that git puts at the end; a path may itself end in newlines.
fn chomp(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    bytes
}

fn failed(args: &[&str], stderr: &[u8]) -> Error {
    let name = args.first().copied().unwrap_or_default();
    Error::new(Code::FailedPrecondition, format!("`git {name}` failed: {}", last_words(stderr)))
}

/// A git whose output is read as it comes.
pub(crate) struct Running {
    name: String,
    child: Child,
    stderr: fs_err::File,
}

/// Starts git with its output on a pipe. Its error text goes to a private file, so that no second pipe can fill up.
pub(crate) fn start(dir: &Path, args: &[&str]) -> Result<(Running, ChildStdout), Error> {
    let scratch = || -> std::io::Result<(fs_err::File, Stdio)> {
        let file = fs_err::File::from_parts(tempfile::tempfile()?, "git's error text");
        let other = file.file().try_clone()?;
        Ok((file, Stdio::from(other)))
    };
    let (stderr, writer) = scratch().map_err(no_space)?;
    let mut command = command(dir, args);
    // A pattern with magic is one of the user's, who means it.
    if args.iter().any(|arg| arg.starts_with(":(")) {
        command.env("GIT_LITERAL_PATHSPECS", "0");
    }
    let mut child = command.stdout(Stdio::piped()).stderr(writer).spawn().map_err(|e| not_started(&e))?;
    let Some(stdout) = child.stdout.take() else {
        return Err(Error::new(Code::Internal, "a started `git` has no output"));
    };
    Ok((Running { name: args.first().copied().unwrap_or_default().to_owned(), child, stderr }, stdout))
}

impl Running {
    /// Waits for the end, which must be a good one. Call it once the output was read to its end.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        use std::io::{Seek, SeekFrom};
        let status = self.child.wait().map_err(|e| Error::internal("cannot wait for `git`", &e))?;
        if status.success() {
            return Ok(());
        }
        let mut text = Vec::new();
        let read = self
            .stderr
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.stderr.take(STDERR_MAX).read_to_end(&mut text));
        if let Err(e) = read {
            return Err(Error::internal(format!("`git {}` failed, and so did reading why", self.name), &e));
        }
        Err(failed(&[&self.name], &text))
    }

    /// Ends it early, when its reader has failed; what the reader said is the error that counts.
    pub(crate) fn abandon(mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The error where no temporary file can be made or used.
pub(crate) fn no_space(e: std::io::Error) -> Error {
    Error::new(Code::ResourceExhausted, format!("cannot use a temporary file: {e}"))
        .hint("free some space, or set TMPDIR to a directory with more of it")
}

/// Runs git with its output in a private temporary file (in TMPDIR, without a name), positioned at its start; gives
/// its size in bytes too.
pub(crate) fn to_file(dir: &Path, args: &[&str]) -> Result<(fs_err::File, u64), Error> {
    use std::io::{Seek, SeekFrom};
    let file = tempfile::tempfile().map_err(no_space)?;
    let writer = file.try_clone().map_err(no_space)?;
    let out =
        command(dir, args).stdout(writer).stderr(Stdio::piped()).spawn().map_err(|e| not_started(&e))?;
    let out = out.wait_with_output().map_err(|e| Error::internal("cannot wait for `git`", &e))?;
    if !out.status.success() {
        let err = failed(args, &out.stderr);
        let full = err.message.contains("No space left");
        return Err(if full { err.hint("set TMPDIR to a directory with more space") } else { err });
    }
    let mut file = fs_err::File::from_parts(file, "a temporary file");
    file.seek(SeekFrom::Start(0)).map_err(no_space)?;
    let size = file.metadata().map_err(no_space)?.len();
    Ok((file, size))
}
