//! One VMM that was started by hand, and the ends of its sockets.

use super::PATIENCE;
use bothy_channel::host::Connector;
use bothy_guest_proto::{CONTROL_PORT, GuestClient, client};
use serde_json::{Value, json};
use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    process::{Child, Command},
    time::timeout,
};

/// A VMM and what talks to it. Dropped, it is killed.
#[derive(Debug)]
pub struct Machine {
    vmm: Child,
    control: UnixStream,
    /// The same connection once more: what is written here is behind the channel's back.
    pub raw: UnixStream,
    monitor: Option<Monitor>,
    channel: Option<Connector>,
    /// Other ports, which stay connected.
    _others: Vec<UnixStream>,
}

impl Machine {
    /// Starts `argv`, whose sockets are in `sockets`; the VMM connects to them.
    pub(super) async fn start(argv: &[String], sockets: &Path) -> io::Result<Self> {
        fs_err::create_dir_all(sockets)?;
        let listen = |path: PathBuf| {
            let _ = fs_err::remove_file(&path);
            UnixListener::bind(&path).map(|listener| (path, listener))
        };
        let listeners: Vec<(PathBuf, UnixListener)> = super::paths(argv, "path=")
            .into_iter()
            .filter(|path| path.starts_with(sockets))
            .map(listen)
            .collect::<io::Result<_>>()?;
        let (program, args) = argv.split_first().ok_or_else(|| io::Error::other("an empty command line"))?;
        let mut vmm = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(fs_err::File::create(sockets.join("console"))?.into_file())
            .kill_on_drop(true)
            .spawn()?;
        let (mut control, mut monitor, mut others) = (None, None, Vec::new());
        for (path, listener) in &listeners {
            let accepted = tokio::select! {
                accepted = timeout(PATIENCE, listener.accept()) => accepted??.0,
                status = vmm.wait() => return Err(io::Error::other(format!("the VMM ended: {}", status?))),
            };
            match path.to_string_lossy() {
                name if name.contains("control") => control = Some(accepted),
                name if name.contains("qmp") => monitor = Some(accepted),
                _ => others.push(accepted),
            }
        }
        let control = control.ok_or_else(|| io::Error::other("no control port in the command line"))?;
        let raw = control.as_fd().try_clone_to_owned()?;
        let raw = UnixStream::from_std(raw.into())?;
        let monitor = match monitor {
            Some(stream) => Some(Monitor::greet(stream).await?),
            None => None,
        };
        Ok(Self { vmm, control, raw, monitor, channel: None, _others: others })
    }

    /// The guest's agent; the first call begins the channel's session, and each opens a stream.
    ///
    /// # Errors
    /// The VMM is gone.
    pub async fn guest(&mut self) -> io::Result<GuestClient> {
        if self.channel.is_none() {
            let control = self.control.as_fd().try_clone_to_owned()?;
            self.channel = Some(Connector::new(UnixStream::from_std(control.into())?));
        }
        let channel = self.channel.clone().ok_or_else(|| io::Error::other("no channel"))?;
        let stream = timeout(PATIENCE, channel.open(CONTROL_PORT)).await??;
        client(stream).await.map_err(io::Error::other)
    }

    /// Ends the channel's session without a word to the guest, as a host does that dies.
    pub async fn hang_up(&mut self) {
        self.channel = None;
        // Its task lets go of the connection at its next turn; until then it might read what is not for it.
        tokio::task::yield_now().await;
    }

    /// Reads and forgets what the guest still says, until it is quiet.
    ///
    /// # Errors
    /// The VMM is gone.
    pub async fn drain(&mut self) -> io::Result<()> {
        let mut waste = [0; 64 << 10];
        while let Ok(read) = timeout(std::time::Duration::from_millis(20), self.raw.read(&mut waste)).await {
            if read? == 0 {
                return Err(io::Error::other("the VMM closed the control port"));
            }
        }
        Ok(())
    }

    /// Asks the VMM's monitor.
    ///
    /// # Errors
    /// It refuses, or is gone.
    pub async fn ask(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let monitor = self.monitor.as_mut().ok_or_else(|| io::Error::other("no monitor"))?;
        timeout(PATIENCE, monitor.ask(command, arguments)).await?
    }

    /// The VMM's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vmm.id().unwrap_or_default()
    }

    /// Resident memory of the VMM, in KiB: all of it, and what is its own.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> io::Result<(u64, u64)> {
        let text = fs_err::read_to_string(format!("/proc/{}/smaps_rollup", self.pid()))?;
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        Ok((of("Rss:"), of("Private_Dirty:")))
    }

    /// Kills the VMM and waits for its end.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn end(mut self) -> io::Result<()> {
        self.vmm.kill().await
    }
}

#[derive(Debug)]
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    async fn greet(stream: UnixStream) -> io::Result<Self> {
        let mut monitor = Self(BufReader::new(stream));
        monitor.line().await?;
        monitor.ask("qmp_capabilities", json!({})).await?;
        Ok(monitor)
    }

    async fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the VMM closed its monitor"));
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.0.get_mut().write_all(line.as_bytes()).await?;
        loop {
            let answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            }
            // What is neither is an event.
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }
}
