//! The same VM without bothy: the very command line that bothy gave QEMU, on the same kernel and pristine disks, brought
//! to the same readiness (agent healthy, sshd accepting). What `bothy vm create` is measured against.
//!
//! The command line is read from `/proc/<pid>/cmdline` of a VM that bothy started, so it cannot drift apart from it; only
//! the directory of its sockets is another.

mod initrd;
mod machine;
mod template;

pub use machine::Machine;
pub use template::{Resumed, Saved};

use bothy_guest_proto::v1;
use bothy_vm_agent::vmm::{Accel, Driver, Memory, Origin, QemuMicrovm, VmPlan, clock};
use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::time::timeout;

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
            argv: argv.map(|word| by_name(word, &text("/lease/tap"))).collect(),
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

    /// The recipe of a machine of the image in `image` with the agent `guest`, its files in `dir` and its NIC the TAP `tap`,
    /// by the command line that bothy would give it: for tests of guests, which need no host of bothy's.
    ///
    /// # Errors
    /// Where there is no QEMU, or the initramfs cannot be made.
    pub async fn of_image(image: &Path, guest: &Path, dir: &Path, tap: &str) -> io::Result<Self> {
        let initrd = dir.join("initrd");
        initrd::write(image, guest, &initrd)?;
        let plan = VmPlan {
            vm: bothy_contract::VmId::new(),
            name: "by-hand".into(),
            dir: dir.to_owned(),
            kernel: image.join("vmlinux"),
            initrd,
            rootfs: image.join("rootfs.ext4"),
            system: Some(dir.join("system.ext4")),
            work: dir.join("work.ext4"),
            cpus: 1,
            memory_mib: 384,
            memory: Memory::Own,
            from: Origin::Boot,
            tap: tap.to_owned(),
            mac: "52:54:00:00:00:01".into(),
            uid: 0,
            groups: vec![],
            accel: Accel::Tcg,
            tsc_khz: clock::tsc_khz(),
        };
        let qemu = QemuMicrovm::find(Path::new("qemu-system-x86_64")).await.map_err(io::Error::other)?;
        let argv = qemu.launch_spec(&plan).map_err(io::Error::other)?.argv;
        let argv = argv.into_iter().map(|word| by_name(word, tap)).collect();
        Ok(Self { argv, sockets: dir.to_owned(), personality: v1::PersonaliseRequest::default() })
    }

    /// The value of every `path=` of the command line that is a socket, and every `file=` that is a disk.
    pub fn paths(&self, key: &str) -> Vec<PathBuf> {
        paths(&self.argv, key)
    }

    /// The file of the disk with that id.
    pub fn disk(&self, id: &str) -> Option<PathBuf> {
        let drive = self.argv.iter().find(|word| word.starts_with(&format!("id={id},file=")))?;
        drive.split(',').find_map(|part| part.strip_prefix("file=")).map(PathBuf::from)
    }

    /// The same machine with another file for a disk.
    #[must_use]
    pub fn with_disk(&self, id: &str, file: &Path) -> Self {
        let mut other = self.clone();
        for word in other.argv.iter_mut().filter(|word| word.starts_with(&format!("id={id},file="))) {
            let rest = word.splitn(3, ',').nth(2).unwrap_or_default();
            *word = format!("id={id},file={},{rest}", file.display());
        }
        other
    }

    /// The same machine with its sockets in another directory.
    #[must_use]
    pub fn with_sockets(&self, dir: &Path) -> Self {
        let mut other = self.clone();
        let (old, new) = (format!("path={}/", self.sockets.display()), format!("path={}/", dir.display()));
        for word in &mut other.argv {
            *word = word.replace(&old, &new);
        }
        other.sockets = dir.to_owned();
        other
    }

    /// The same machine on another TAP.
    #[must_use]
    pub fn with_tap(&self, tap: &str) -> Self {
        let mut other = self.clone();
        other.argv = other.argv.into_iter().map(|word| by_name(word, tap)).collect();
        other
    }

    /// The same machine with more on its command line.
    #[must_use]
    pub fn with(&self, words: &[&str]) -> Self {
        let mut other = self.clone();
        other.argv.extend(words.iter().map(|word| (*word).to_owned()));
        other
    }

    /// Starts it, and nothing more.
    ///
    /// # Errors
    /// The VMM does not start, or does not connect to its sockets.
    pub async fn start(&self) -> io::Result<Machine> {
        Machine::start(&self.argv, &self.sockets).await
    }

    /// Boots it to readiness and ends it. `files` are put into the guest as bothy puts its ssh host keys.
    ///
    /// # Errors
    /// Whatever goes wrong on the way.
    pub async fn boot(&self, files: Vec<v1::File>) -> io::Result<Times> {
        let start = Instant::now();
        let mut machine = self.start().await?;
        let times = timeout(PATIENCE, self.ready(&mut machine, files, start)).await??;
        machine.end().await?;
        Ok(times)
    }

    async fn ready(&self, machine: &mut Machine, files: Vec<v1::File>, start: Instant) -> io::Result<Times> {
        let mut guest = machine.guest().await?;
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

/// bothy hands QEMU the TAP as an open descriptor; by hand it opens the same one by name.
fn by_name(word: String, tap: &str) -> String {
    if word.starts_with("tap,") {
        return format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
    }
    word
}

fn paths(argv: &[String], key: &str) -> Vec<PathBuf> {
    let parts = argv.iter().flat_map(|word| word.split(','));
    parts.filter_map(|part| part.strip_prefix(key)).map(PathBuf::from).collect()
}
