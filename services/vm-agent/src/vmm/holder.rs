//! The agent's end of a holder: start one, find it again, talk to it.
//!
//! Nothing here trusts the holder's directory: it belongs to the VM's user, and so to whoever breaks out of the VMM.

use super::{
    Verb,
    firecracker::api::Request,
    launching::{self, Quiet},
    liveness::{self, Liveness},
    passing,
    wire::{
        self, HolderHandle, LaunchSpec, Launched, MAX_LINE, Process, Running, SaveReply, SaveRequest, Status,
    },
};
use bothy_contract::{Code, Error, vm::ExitRecord};
use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// How long a holder may take to answer anything but `CONNECT`; it answers in microseconds, its VMM in milliseconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a launch may take, beside loading a saved guest; the holder itself gives up on the VMM before that.
const LAUNCH: Duration = Duration::from_secs(20);

/// The holder of one VM, by its directory.
#[derive(Debug, Clone)]
pub struct Holder {
    dir: PathBuf,
    uid: u32,
}

fn launch_limit(spec: &LaunchSpec) -> Duration {
    let state = spec.restore.as_ref().and_then(|restore| fs_err::metadata(&restore.state).ok());
    LAUNCH + state.map(|meta| wire::load_limit(meta.len())).unwrap_or_default()
}

/// The `bothy-vmm` beside the running program.
///
/// # Errors
/// The running program's path is not known.
pub fn program() -> Result<PathBuf, Error> {
    let me = std::env::current_exe().map_err(|e| Error::internal("cannot find the running program", &e))?;
    Ok(me.with_file_name("bothy-vmm"))
}

impl Holder {
    /// The holder whose directory is `dir` and who runs as `uid`, whether it lives or not.
    pub fn new(dir: impl Into<PathBuf>, uid: u32) -> Self {
        Self { dir: dir.into(), uid }
    }

    /// Starts a holder and its VMM: `program` is `bothy-vmm`. Once this returns, the VMM answers, and lives on whatever
    /// happens to the caller. Where it fails, nothing runs. It is not cancelled by dropping: the holder may then live, and
    /// shows by its socket once [`Holder::quiet`] returns.
    ///
    /// # Errors
    /// What `bothy-vmm` or the VMM said.
    pub async fn launch(program: &Path, spec: &LaunchSpec) -> Result<(Self, Running), Error> {
        spec.check()?;
        launching::prepare(&spec.dir)?;
        let failed = |what: &str, err: &dyn std::fmt::Display| {
            Error::new(Code::Internal, format!("cannot {what} {}: {err}", program.display()))
        };
        let mut child = tokio::process::Command::new(program)
            .arg("launch")
            .arg(format!("--parent={}", std::process::id()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| failed("run", &e).hint("install `bothy-vmm` beside `bothy-vm-agent`"))?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("talk to", &"no pipes"));
        };
        let text = serde_json::to_vec(spec).map_err(|e| failed("specify a VM to", &e))?;
        let talk = async {
            stdin.write_all(&text).await?;
            drop(stdin);
            let mut answer = Vec::new();
            stdout.take(MAX_LINE as u64).read_to_end(&mut answer).await?;
            child.wait().await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = tokio::time::timeout(launch_limit(spec), talk)
            .await
            .map_err(|_| failed("wait for", &"it did not answer in time"))?
            .map_err(|e| failed("talk to", &e))?;
        match serde_json::from_slice(&answer) {
            Ok(Launched::Running(running)) => Ok((Self::new(&spec.dir, spec.uid), running)),
            Ok(Launched::Failed(err)) => Err(err),
            Err(err) => Err(failed("understand", &err)),
        }
    }

    /// Waits until no launch of this holder is under way, and lets none begin while the result lives: what is found then is
    /// all there is. `None` where none can begin anyhow.
    ///
    /// # Errors
    /// As for [`launching::wait`].
    pub async fn quiet(&self) -> Result<Option<Quiet>, Error> {
        let dir = self.dir.clone();
        tokio::task::spawn_blocking(move || launching::wait(&dir))
            .await
            .map_err(|e| Error::internal("cannot wait for a launch", &e))?
    }

    /// The user that holder and VMM run as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The holder's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Opens a raw stream to `port` of the guest. It waits for the guest's session as long as that takes: give it a
    /// deadline.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`), or what it said.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let mut stream = self.dial().await?;
        self.say(&mut stream, &format!("CONNECT {port}")).await?;
        let line = self.line(&mut stream).await?;
        match line.strip_prefix("OK ") {
            Some(_) => Ok(stream),
            None => Err(self.refused("connect to the guest", &line)),
        }
    }

    /// How holder and VMM stand.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`).
    pub async fn status(&self) -> Result<Status, Error> {
        let line = self.ask("STATUS").await?;
        serde_json::from_str(&line).map_err(|_| self.refused("tell its status", &line))
    }

    /// Sends `signal` to the VMM.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`), or the VMM has ended.
    pub async fn kill(&self, signal: i32) -> Result<(), Error> {
        let line = self.ask(&format!("KILL {signal}")).await?;
        if line == "OK" { Ok(()) } else { Err(self.refused("signal the VMM", &line)) }
    }

    /// Sends `signal` to the VMM of `handle`, by its holder, or without it where nobody answers for that VMM; the latter takes
    /// the right to signal other users' processes. One that has ended is no error.
    ///
    /// # Errors
    /// Neither way is open.
    pub async fn kill_vmm(&self, handle: &HolderHandle, signal: i32) -> Result<(), Error> {
        if let Liveness::Alive(_) = liveness::look(self, Some(handle)).await
            && self.kill(signal).await.is_ok()
        {
            return Ok(());
        }
        handle.vmm.signal(signal)
    }

    /// Sends a command to the VMM's monitor and gives what it returned.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`), or what the VMM said against it.
    pub async fn qmp(&self, command: &serde_json::Value) -> Result<serde_json::Value, Error> {
        self.answer(&self.ask(&format!("QMP {command}")).await?)
    }

    /// Sends a request to the VMM's API and gives what it answered: `null` where that is nothing.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`), or what the VMM said against it.
    pub async fn api(&self, request: &Request) -> Result<serde_json::Value, Error> {
        let text = serde_json::to_string(request)
            .map_err(|e| Error::internal("cannot write a request to the VMM", &e))?;
        let patience = PATIENCE.max(request.patience());
        self.answer(&self.ask_within(patience, &format!("API {text}")).await?)
    }

    fn answer(&self, line: &str) -> Result<serde_json::Value, Error> {
        let answer: serde_json::Value =
            serde_json::from_str(line).map_err(|_| self.refused("reach the VMM", line))?;
        if let Some(value) = answer.get("return") {
            return Ok(value.clone());
        }
        let said =
            answer.pointer("/error/desc").and_then(|desc| desc.as_str()).unwrap_or("it gave no reason");
        Err(self.refused("carry out a command", said))
    }

    /// Carries out what a driver wants done, and gives the VMM's answer.
    ///
    /// # Errors
    /// As for [`Holder::qmp`], [`Holder::api`] and [`Holder::kill`].
    pub async fn perform(&self, verb: &Verb) -> Result<serde_json::Value, Error> {
        match verb {
            Verb::Qmp(command) => self.qmp(command).await,
            Verb::Api(request) => self.api(request).await,
            Verb::Signal(signal) => self.kill(*signal).await.map(|()| serde_json::Value::Null),
        }
    }

    /// Waits until the process is gone. It need not be a child (pidfd_open(2)).
    ///
    /// # Errors
    /// The kernel gives no pidfd for another reason than that.
    pub async fn gone(process: Process) -> Result<(), Error> {
        let failed =
            |err: std::io::Error| Error::internal(format!("cannot watch process {}", process.pid), &err);
        let pid = i32::try_from(process.pid).ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { return Ok(()) };
        let fd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(err) => return Err(failed(err.into())),
        };
        // Checked after the pidfd is there: from here on it cannot be another's.
        if !process.is_alive() {
            return Ok(());
        }
        // tokio's only safe way to wait on any pollable descriptor; nothing is ever read from it.
        let fd = tokio::net::unix::pipe::Receiver::from_owned_fd_unchecked(fd).map_err(failed)?;
        fd.readable().await.map(|_| ()).map_err(failed)
    }

    /// How the last VMM ended; `None` while it runs, or where holder and host went down with it.
    ///
    /// # Errors
    /// The record is there and not readable or not one.
    pub fn exit(&self) -> Result<Option<ExitRecord>, Error> {
        let path = self.dir.join(wire::EXIT_RECORD);
        let bytes = match wire::read_untrusted(&path, 64 << 10) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(Error::internal("cannot read how the VMM ended", &err)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::internal(format!("{} is not an exit record", path.display()), &e))
    }

    /// Sends a request to save the guest, with the files that it goes into. A caller that gives up makes the holder do so.
    pub(super) async fn ask_to_save(
        &self,
        request: &SaveRequest,
        files: &[&fs_err::File],
    ) -> Result<SaveReply, Error> {
        let text = serde_json::to_string(request)
            .map_err(|e| Error::internal("cannot write a request to save a guest", &e))?;
        let answer = async {
            let mut stream = self.dial().await?;
            // The first byte carries them (unix(7)).
            let fds: Vec<_> = files.iter().map(|file| file.file().as_fd()).collect();
            passing::send(&stream, b"S", &fds).await.map_err(|e| self.broke(&e))?;
            self.say(&mut stream, &format!("AVE {text}")).await?;
            self.line(&mut stream).await
        };
        // The holder's own limits come first, with better words.
        let line = tokio::time::timeout(request.limit + PATIENCE, answer).await.map_err(|_| {
            Error::new(
                Code::DeadlineExceeded,
                format!("the holder in {} does not answer", self.dir.display()),
            )
        })??;
        let reply = self.answer(&line)?;
        serde_json::from_value(reply).map_err(|e| self.broke(&e))
    }

    async fn ask(&self, request: &str) -> Result<String, Error> {
        self.ask_within(PATIENCE, request).await
    }

    async fn ask_within(&self, patience: Duration, request: &str) -> Result<String, Error> {
        let answer = async {
            let mut stream = self.dial().await?;
            self.say(&mut stream, request).await?;
            self.line(&mut stream).await
        };
        tokio::time::timeout(patience, answer).await.map_err(|_| {
            Error::new(Code::Unavailable, format!("the holder in {} does not answer", self.dir.display()))
        })?
    }

    async fn dial(&self) -> Result<UnixStream, Error> {
        let path = self.dir.join(wire::HOLDER_SOCKET);
        let unavailable = |err: &dyn std::fmt::Display| {
            Error::new(Code::Unavailable, format!("no holder answers on {}: {err}", path.display()))
        };
        let stream = UnixStream::connect(&path).await.map_err(|e| unavailable(&e))?;
        let peer = stream.peer_cred().map_err(|e| unavailable(&e))?;
        if peer.uid() != self.uid {
            return Err(unavailable(&format!("user {} listens there instead of {}", peer.uid(), self.uid)));
        }
        Ok(stream)
    }

    async fn say(&self, stream: &mut UnixStream, request: &str) -> Result<(), Error> {
        stream.write_all(format!("{request}\n").as_bytes()).await.map_err(|e| self.broke(&e))
    }

    /// One line, and not a byte more: what follows belongs to the stream.
    async fn line(&self, stream: &mut UnixStream) -> Result<String, Error> {
        let mut line = Vec::new();
        loop {
            let byte = stream.read_u8().await.map_err(|e| self.broke(&e))?;
            if byte == b'\n' {
                return String::from_utf8(line).map_err(|e| self.broke(&e));
            }
            line.push(byte);
            if line.len() > MAX_LINE {
                return Err(self.broke(&"its answer has no end"));
            }
        }
    }

    fn broke(&self, err: &dyn std::fmt::Display) -> Error {
        Error::new(Code::Unavailable, format!("the holder in {} broke off: {err}", self.dir.display()))
    }

    fn refused(&self, what: &str, line: &str) -> Error {
        let said = line.strip_prefix("ERR ").unwrap_or(line);
        Error::new(
            Code::FailedPrecondition,
            format!("the holder in {} cannot {what}: {said}", self.dir.display()),
        )
    }
}
