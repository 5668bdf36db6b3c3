//! The one place that runs other programs: the package and file-system tools of an image build.
//!
//! A tool gets an argument vector and never a shell's line of ours, an environment with nothing of the agent's in it, no input,
//! a process group of its own and a deadline. When it is cancelled, too slow or forgotten, the whole group is
//! killed, and what it said on stderr is in the error. It does not outlive the agent either.

use bothy_contract::{Code, Error};
use rustix::process::{Pid, Signal, kill_process_group};
use std::{collections::VecDeque, ffi::OsString, io, path::Path, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
};
use tokio_util::sync::CancellationToken;

/// Where tools are looked up, whatever the agent's own environment says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How many of the last lines of stderr an error shows.
const KEPT_LINES: usize = 12;
/// More output than this is not kept.
const MAX_OUTPUT: u64 = 4 << 20;
/// What a group gets to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// A tool about to be run.
#[derive(Debug)]
pub(crate) struct Tool {
    name: &'static str,
    package: &'static str,
    prefix: Vec<OsString>,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    deadline: Duration,
}

impl Tool {
    /// The program `name`, from Debian's `package`, to be ended after `deadline`.
    pub(crate) fn new(name: &'static str, package: &'static str, deadline: Duration) -> Self {
        Self { name, package, prefix: Vec::new(), args: Vec::new(), envs: Vec::new(), deadline }
    }

    /// More arguments.
    pub(crate) fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// One more argument.
    pub(crate) fn arg(self, arg: impl Into<OsString>) -> Self {
        self.args([arg.into()])
    }

    /// A variable of its environment.
    pub(crate) fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.envs.push((name.into(), value.into()));
        self
    }

    /// Runs it with the network of the namespace at `netns`, nsenter(1).
    pub(crate) fn in_netns(mut self, netns: Option<&Path>) -> Self {
        if let Some(netns) = netns {
            let mut option = OsString::from("--net=");
            option.push(netns);
            self.prefix.extend(["nsenter".into(), option, "--".into()]);
        }
        self
    }

    /// Runs it as the first process of a PID namespace and with mounts of its own, unshare(1): when that process dies,
    /// whatever it started dies too, even what left its process group, and every mount is gone.
    pub(crate) fn contained(mut self) -> Self {
        let unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"];
        self.prefix.extend(unshare.map(Into::into));
        self
    }

    /// Runs it to its end and gives its stdout; `line` hears each line of its stderr.
    ///
    /// # Errors
    /// It is not installed, it failed, it took too long, or `cancel` was triggered.
    pub(crate) async fn run(
        self,
        cancel: &CancellationToken,
        mut line: impl FnMut(&str),
    ) -> Result<String, Error> {
        let name = self.name;
        if cancel.is_cancelled() {
            return Err(cancelled(name));
        }
        if !PATH.split(':').any(|dir| Path::new(dir).join(name).is_file()) {
            return Err(self.missing());
        }
        // The agent's own death must not leave a tool behind that goes on writing: setpriv(1) asks the kernel for it.
        let leash = ["setpriv", "--pdeathsig", "KILL", "--"].map(OsString::from);
        let tool = self.prefix.iter().cloned().chain([name.into()]).chain(self.args.iter().cloned());
        let mut argv = leash.into_iter().chain(tool);
        let mut command = Command::new(argv.next().unwrap_or_default());
        command.args(argv).env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").env("HOME", "/root");
        command.envs(self.envs.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|e| Error::internal(format!("cannot start `{name}`"), &e))?;
        let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
        let mut stdout = child.stdout.take().map(|s| s.take(MAX_OUTPUT));
        let mut stderr = child.stderr.take().map(|s| BufReader::new(s.take(16 * MAX_OUTPUT)));
        let mut kept = VecDeque::new();
        let mut output = Vec::new();
        let work = async {
            let read_out = async {
                if let Some(out) = &mut stdout {
                    out.read_to_end(&mut output).await?;
                }
                Ok::<_, io::Error>(())
            };
            let read_err = async {
                let mut raw = Vec::new();
                while let Some(err) = &mut stderr {
                    raw.clear();
                    if err.read_until(b'\n', &mut raw).await? == 0 {
                        break;
                    }
                    let text = String::from_utf8_lossy(&raw);
                    let text = text.trim_end();
                    line(text);
                    if kept.len() == KEPT_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(text.to_owned());
                }
                Ok(())
            };
            tokio::try_join!(read_out, read_err)?;
            child.wait().await
        };
        let ended = tokio::select! {
            ended = work => Ok(ended),
            () = cancel.cancelled() => Err(cancelled(name)),
            () = tokio::time::sleep(self.deadline) => Err(Error::new(
                Code::DeadlineExceeded,
                format!("`{name}` was ended after {} s", self.deadline.as_secs()),
            )),
        };
        match ended {
            Ok(Ok(status)) => {
                group.0 = None;
                if status.success() {
                    return Ok(String::from_utf8_lossy(&output).into_owned());
                }
                let said = Vec::from(kept).join("; ");
                let message = format!("`{name}` failed ({status}): {said}");
                let full = said.contains("No space left") || said.contains("not enough free space");
                Err(if full {
                    Error::new(Code::ResourceExhausted, message)
                        .hint("free some space where the state directory is (`df -h`), then try again")
                } else {
                    Error::new(Code::Internal, message)
                })
            }
            Ok(Err(e)) => Err(Error::internal(format!("cannot follow `{name}`"), &e)),
            Err(stopped) => {
                group.signal(Signal::TERM);
                if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
                    group.signal(Signal::KILL);
                    let _ = child.wait().await;
                }
                Err(stopped)
            }
        }
    }

    fn missing(&self) -> Error {
        Error::new(Code::FailedPrecondition, format!("`{}` is not installed", self.name))
            .hint(format!("install it with `apt-get install {}`, or run `cargo xtask setup`", self.package))
    }
}

fn cancelled(name: &str) -> Error {
    Error::new(Code::Cancelled, format!("`{name}` was stopped on request"))
}

/// Kills what is left of a process group when it goes out of scope.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            // Gone already is what is wanted.
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, deadline: Duration) -> Tool {
        Tool::new("sh", "dash", deadline).args(["-c", script])
    }

    fn alive(pid: &str) -> bool {
        // A zombie that nobody has waited for yet is not alive.
        fs_err::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|s| !s.contains(") Z "))
    }

    #[tokio::test]
    async fn output_lines_and_failures_come_back() {
        let cancel = CancellationToken::new();
        let mut lines = Vec::new();
        let script = "echo out; echo one >&2; echo two >&2; env | grep -c CARGO; exit 3";
        let minute = Duration::from_secs(60);
        let err = sh(script, minute).run(&cancel, |l| lines.push(l.to_owned())).await.unwrap_err();
        assert_eq!(lines, ["one", "two"]);
        assert!(err.message.contains("exit status: 3") && err.message.contains("one; two"), "{err}");
        let out = sh("echo $#; echo $X; env | grep -c CARGO || true", minute).env("X", "y");
        assert_eq!(out.run(&cancel, |_| ()).await.unwrap(), "0\ny\n0\n");
        let gone = Tool::new("no-such-tool", "some-package", minute).run(&cancel, |_| ()).await.unwrap_err();
        assert_eq!(gone.code, Code::FailedPrecondition);
        assert!(gone.hint.unwrap().contains("apt-get install some-package"));
    }

    #[tokio::test]
    async fn a_cancelled_or_late_tool_takes_its_children_along() {
        for by_cancel in [true, false] {
            let cancel = CancellationToken::new();
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("pid");
            let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
            let deadline = Duration::from_secs(if by_cancel { 600 } else { 1 });
            let trigger = cancel.clone();
            let watched = file.clone();
            let watcher = tokio::spawn(async move {
                while by_cancel && !watched.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if by_cancel {
                    trigger.cancel();
                }
            });
            let err = sh(&script, deadline).run(&cancel, |_| ()).await.unwrap_err();
            watcher.await.unwrap();
            assert_eq!(err.code, if by_cancel { Code::Cancelled } else { Code::DeadlineExceeded });
            let pid = fs_err::read_to_string(&file).unwrap();
            while alive(&pid) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}
