//! The same VM without bothy: the very command line that bothy gave QEMU, on the same kernel and pristine disks, brought
//! to the same readiness (agent healthy, sshd accepting). What `bothy vm create` is measured against.
//!
//! The command line is read from `/proc/<pid>/cmdline` of a VM that bothy started, so it cannot drift apart from it; only
//! the directory of its sockets is another.

use bothy_channel::host::Connector;
use bothy_guest_proto::{CONTROL_PORT, client, v1};
use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{net::UnixListener, process::Command, time::timeout};

/// How long a guest may take. Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to start one VM by hand.
#[derive(Debug, Clone)]
pub struct Recipe {
    argv: Vec<String>,
    /// The directory of the sockets, as the command line names it.
    sockets: PathBuf,
    /// What the guest is told to be.
    personality: v1::PersonaliseRequest,
}

/// When the guest was how far, since the VMM's start.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// The agent answered.
    pub agent: Duration,
    /// sshd accepted a connection.
    pub ready: Duration,
}

impl Recipe {
    /// The recipe of a running VM, from its record and its VMM's command line.
    ///
    /// # Errors
    /// Where the VMM's command line cannot be read.
    pub fn of(vm: &serde_json::Value, holder_dir: &Path) -> io::Result<Self> {
        let raw = fs_err::read(format!("/proc/{}/cmdline", vm["vmm_pid"]))?;
        let argv = raw.split(|b| *b == 0).filter(|a| !a.is_empty());
        let argv = argv.map(|a| String::from_utf8_lossy(a).into_owned());
        let text =
            |pointer: &str| vm.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        Ok(Self {
            // bothy hands QEMU the TAP as an open descriptor; by hand it opens the same one by name.
            argv: argv
                .map(|a| {
                    if a.starts_with("tap,") {
                        format!("tap,id=net,ifname={},script=no,downscript=no,vhost=off", text("/lease/tap"))
                    } else {
                        a
                    }
                })
                .collect(),
            sockets: holder_dir.to_owned(),
            personality: v1::PersonaliseRequest {
                hostname: "by-hand".into(),
                machine_id: "0123456789abcdef0123456789abcdef".into(),
                nic: Some(v1::Nic {
                    mac: text("/lease/mac"),
                    address: text("/lease/address"),
                    prefix: vm["lease"]["prefix"].as_u64().and_then(|p| p.try_into().ok()).unwrap_or(24),
                    gateway: text("/lease/gateway"),
                    dns: vec![],
                    ..Default::default()
                }),
                unix_time_us: 0,
                entropy: vec![7; 256],
                files: vec![],
                home: "/root".into(),
                init_systemd: true,
                ..Default::default()
            },
        })
    }

    /// The value of every `path=` of the command line that is a socket, and every `file=` that is a disk.
    pub fn paths(&self, key: &str) -> Vec<PathBuf> {
        let parts = self.argv.iter().flat_map(|a| a.split(','));
        parts.filter_map(|p| p.strip_prefix(key)).map(PathBuf::from).collect()
    }

    /// Boots it to readiness and ends it. `files` are put into the guest as bothy puts its ssh host keys.
    ///
    /// # Errors
    /// Whatever goes wrong on the way.
    pub async fn boot(&self, files: Vec<v1::File>) -> io::Result<Times> {
        fs_err::create_dir_all(&self.sockets)?;
        let listen = |path: &PathBuf| {
            let _ = fs_err::remove_file(path);
            UnixListener::bind(path)
        };
        let listeners: Vec<(PathBuf, UnixListener)> = self
            .paths("path=")
            .into_iter()
            .filter(|p| p.starts_with(&self.sockets))
            .map(|p| listen(&p).map(|l| (p, l)))
            .collect::<io::Result<_>>()?;
        let start = Instant::now();
        let (program, args) =
            self.argv.split_first().ok_or_else(|| io::Error::other("an empty command line"))?;
        let mut vmm = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut control = None;
        let mut others = Vec::new();
        for (path, listener) in &listeners {
            let (stream, _) = timeout(PATIENCE, listener.accept()).await??;
            if path.to_string_lossy().contains("control") {
                control = Some(Connector::new(stream));
            } else {
                others.push(stream);
            }
        }
        let control = control.ok_or_else(|| io::Error::other("no control port in the command line"))?;
        let times = timeout(PATIENCE, self.ready(&control, files, start)).await??;
        vmm.kill().await?;
        drop(others);
        Ok(times)
    }

    async fn ready(&self, control: &Connector, files: Vec<v1::File>, start: Instant) -> io::Result<Times> {
        let mut guest = client(control.open(CONTROL_PORT).await?).await.map_err(io::Error::other)?;
        guest.health(v1::HealthRequest {}).await.map_err(io::Error::other)?;
        let agent = start.elapsed();
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_err(io::Error::other)?;
        let personality = v1::PersonaliseRequest {
            unix_time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            files,
            ..self.personality.clone()
        };
        guest.personalise(personality).await.map_err(io::Error::other)?;
        let wait = v1::WaitServiceRequest { port: 22, timeout_ms: 120_000, ..Default::default() };
        let reply = guest.wait_service(wait).await.map_err(io::Error::other)?.into_inner();
        if !reply.ready {
            return Err(io::Error::other("sshd did not come up"));
        }
        Ok(Times { agent, ready: start.elapsed() })
    }
}
