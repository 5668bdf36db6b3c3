//! The user's ssh agent, lent to a machine for as long as a command runs there: an `ssh -A` beside it holds the forwarding, and the
//! command is told where the socket is. The keys stay here; who is root in the guest can have them used meanwhile.

use crate::ssh;
use bothy_contract::{Code, Error, vm::VmRecord};
use std::{ffi::OsStr, os::unix::fs::FileTypeExt, path::Path, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

/// What names the socket of an agent (ssh-agent(1)).
pub(crate) const VARIABLE: &str = "SSH_AUTH_SOCK";
/// How long a guest may take to log the user in.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest path of a socket (unix(7)), and its newline.
const PATH_MAX: u64 = 109;

/// Refuses where the user has no agent, before anything is made.
pub(crate) fn check() -> Result<(), Error> {
    let socket = std::env::var_os(VARIABLE).filter(|v| !v.is_empty());
    let is_socket = |path: &OsStr| fs_err::metadata(Path::new(path)).is_ok_and(|m| m.file_type().is_socket());
    let hint = "start one: `eval $(ssh-agent)` and `ssh-add`, or leave out `--ssh-agent`";
    match socket {
        Some(path) if is_socket(&path) => Ok(()),
        Some(path) => Err(Error::new(
            Code::FailedPrecondition,
            format!("{VARIABLE} names {}, and there is no agent", Path::new(&path).display()),
        )
        .hint(hint)),
        None => {
            Err(Error::new(Code::FailedPrecondition, format!("no ssh agent: {VARIABLE} is not set"))
                .hint(hint))
        }
    }
}

/// The forwarding; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Lent {
    /// Where the guest's end of it is.
    pub(crate) socket: String,
    _ssh: Child,
}

/// Lends the agent to `vm`, as `user` there.
pub(crate) async fn lend(gateway: &Path, vm: &VmRecord, user: &str) -> Result<Lent, Error> {
    // `cat` lasts as long as its input, which is this process' to close.
    let line = format!("printf '%s\\n' \"${VARIABLE}\"; exec cat >/dev/null");
    let args = ["-A", "-T", &line].map(str::to_owned);
    let ssh = ssh::command(gateway, vm.id, vm.name.as_str(), user, &args)?;
    let mut ssh = Command::from(ssh)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| {
            Error::new(Code::FailedPrecondition, format!("cannot run `ssh`: {e}"))
                .hint("install it: `apt-get install openssh-client`")
        })?;
    let mut socket = String::new();
    if let Some(out) = ssh.stdout.take() {
        let read = timeout(PATIENCE, BufReader::new(out.take(PATH_MAX)).read_line(&mut socket)).await;
        // What became of it shows in what was read.
        drop(read);
    }
    let socket = socket.trim_end_matches('\n').to_owned();
    if socket.starts_with('/') && !socket.chars().any(char::is_control) {
        return Ok(Lent { socket, _ssh: ssh });
    }
    let why = if socket.is_empty() { last_words(&mut ssh).await } else { "it names no socket".to_owned() };
    Err(Error::new(Code::FailedPrecondition, format!("{} does not take the ssh agent: {why}", vm.name)).hint(
        "its image needs an sshd that allows agent forwarding (`AllowAgentForwarding`, sshd_config(5))",
    ))
}

async fn last_words(ssh: &mut Child) -> String {
    // Its output has ended, so it has, or soon will.
    drop(ssh.stdin.take());
    let mut text = String::new();
    if let Some(err) = ssh.stderr.take() {
        let read = timeout(Duration::from_secs(5), err.take(4096).read_to_string(&mut text)).await;
        drop(read);
    }
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    line.map_or_else(|| "it forwards none".to_owned(), crate::printer::visible)
}
