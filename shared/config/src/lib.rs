//! Where things are and how they are set: one TOML file that every process of a host reads, `bothy.toml`.
//!
//! `bothy host up` writes one into its state directory; the systemd units use `/etc/bothy/bothy.toml`. Each process
//! owns one directory below `state_dir`, `<state_dir>/<binary name without bothy->`, mode 0700, and opens nobody
//! else's. Sockets that others connect to are in `run_dir`.

use bothy_contract::{Error, HostToken, Service, image::RootDisk};
use serde::{Deserialize, Serialize};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

/// The file that is read where neither `--config` nor `BOTHY_CONFIG` names one.
pub const DEFAULT_PATH: &str = "/etc/bothy/bothy.toml";

/// The environment variable that names the file.
pub const PATH_VARIABLE: &str = "BOTHY_CONFIG";

/// Longest `run_dir`, so that every socket below it fits into the 108 bytes of `sun_path` (unix(7)).
pub const MAX_RUN_DIR: usize = 64;

/// The configuration of one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's token in subjects.
    #[serde(default = "default_host")]
    pub host: HostToken,
    /// What survives a reboot: databases, images, disks.
    pub state_dir: PathBuf,
    /// What does not: sockets, holders' directories.
    pub run_dir: PathBuf,
    /// The bus.
    #[serde(default)]
    pub bus: Bus,
    /// The network of the VMs.
    #[serde(default)]
    pub net: Net,
    /// VMs.
    #[serde(default)]
    pub vm: Vm,
    /// Images.
    #[serde(default)]
    pub image: Image,
    /// Templates.
    #[serde(default)]
    pub template: Template,
}

fn default_host() -> HostToken {
    #[expect(clippy::expect_used, reason = "a constant that is valid")]
    "local".parse().expect("a valid token")
}

/// The bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bus {
    /// The loopback port of nats-server.
    pub port: u16,
    /// The server's program: a name on `PATH` or an absolute path.
    pub server: PathBuf,
}

impl Default for Bus {
    fn default() -> Self {
        Self { port: 4250, server: "nats-server".into() }
    }
}

/// The network of the VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Net {
    /// The bridge device; the nftables table bears the same name.
    pub bridge: String,
    /// The prefix of TAP names: `bothy-tap-` gives `bothy-tap-0`.
    pub tap_prefix: String,
    /// The subnet's first address.
    pub subnet: Ipv4Addr,
    /// The subnet's prefix length, 16 to 29.
    pub prefix: u8,
    /// How many free slots are kept warm.
    pub tap_pool_size: u32,
    /// The file that names the host's own resolvers, in the form of resolv.conf(5): where guests' names are looked up.
    pub resolv_conf: PathBuf,
    /// Whether the host's systemd-resolved, where there is one, is told to ask the bridge for the names of VMs.
    pub resolved: bool,
}

impl Default for Net {
    fn default() -> Self {
        Self {
            bridge: "bothy0".into(),
            tap_prefix: "bothy-tap-".into(),
            subnet: Ipv4Addr::new(10, 77, 0, 0),
            prefix: 24,
            tap_pool_size: 4,
            resolv_conf: "/etc/resolv.conf".into(),
            resolved: true,
        }
    }
}

/// VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// `auto` (Firecracker where it is installed and KVM truly runs a guest, else QEMU), `firecracker` or `qemu-microvm`.
    pub driver: DriverChoice,
    /// QEMU's program: a name on `PATH` or an absolute path.
    pub qemu: PathBuf,
    /// Firecracker's program: a name on `PATH` or an absolute path.
    pub firecracker: PathBuf,
    /// Firecracker's jailer, to start it in a chroot of its own: an absolute path. It needs the agent to be root.
    pub jailer: Option<PathBuf>,
    /// `auto` (KVM where it truly runs a guest, else TCG), `kvm` or `tcg`.
    pub accelerator: Accelerator,
    /// The user id of slot 0's VMM; slot n runs as `uid_base + n`. The range must belong to nobody else.
    pub uid_base: u32,
    /// How long a guest may take from launch to its agent's first answer, in seconds. One that has not answered after half of
    /// it is reset, once: give at least twice what a boot takes.
    pub boot_timeout_s: u32,
    /// How many VMs one user may have, running or not; root may have any number.
    pub max_per_user: u32,
    /// Memory of the host that VMs never get, in MiB: a create that would need it is refused.
    pub memory_reserve_mib: u64,
    /// A running VM that nobody has used for so many seconds is stopped; 0 for never. Used is: an exec, a shell, ssh, an
    /// import or export, or traffic on its network.
    pub auto_stop_stale_after_s: u64,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            driver: DriverChoice::Auto,
            qemu: "qemu-system-x86_64".into(),
            firecracker: "firecracker".into(),
            jailer: None,
            accelerator: Accelerator::Auto,
            uid_base: 780_000,
            boot_timeout_s: 120,
            max_per_user: 32,
            memory_reserve_mib: 512,
            auto_stop_stale_after_s: 0,
        }
    }
}

/// Which VMM runs the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverChoice {
    /// Firecracker where it is installed and KVM truly runs a guest, else QEMU.
    Auto,
    /// Firecracker or nothing.
    Firecracker,
    /// QEMU always.
    QemuMicrovm,
}

/// How guests are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// KVM where it truly runs a guest, else TCG.
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG always.
    Tcg,
}

/// Images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Image {
    /// Where the recipes are: one directory each.
    pub recipe_dir: PathBuf,
    /// The static `bothy-guest` that goes into every initramfs.
    pub guest_binary: PathBuf,
    /// The network namespace that image builds download in, where the services live in one without a way out.
    pub build_netns: Option<PathBuf>,
    /// What the roots of new VMs are kept on: `overlay`, `reflink`, `dm-snapshot`, `copy`, or `auto`.
    pub root_disk: RootDiskChoice,
}

/// What the roots of new VMs are kept on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootDiskChoice {
    /// `reflink` where the file system of the state directory can share extents, else `overlay`.
    Auto,
    /// Overlays over the image's rootfs.
    Overlay,
    /// Clones that share extents, or nothing.
    Reflink,
    /// Snapshots by the device mapper, or nothing.
    DmSnapshot,
    /// Copies.
    Copy,
}

impl RootDiskChoice {
    /// The one that is named; `None` for `auto`.
    pub fn named(self) -> Option<RootDisk> {
        match self {
            Self::Auto => None,
            Self::Overlay => Some(RootDisk::Overlay),
            Self::Reflink => Some(RootDisk::Reflink),
            Self::DmSnapshot => Some(RootDisk::DmSnapshot),
            Self::Copy => Some(RootDisk::Copy),
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            recipe_dir: "/usr/share/bothy/images".into(),
            guest_binary: "/usr/libexec/bothy/bothy-guest".into(),
            build_netns: None,
            root_disk: RootDiskChoice::Overlay,
        }
    }
}

/// Templates: booted guests whose memory is kept on disk, from which creates are resumed instead of booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Template {
    /// How many are kept; the least recently used goes first. 0 for none: then every create boots.
    pub max: u32,
    /// How much disk they may take together, in MiB.
    pub max_mib: u64,
}

impl Default for Template {
    fn default() -> Self {
        Self { max: 8, max_mib: 16 * 1024 }
    }
}

impl Config {
    /// A configuration with every setting at its default.
    pub fn new(state_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Self {
        Self {
            host: default_host(),
            state_dir: state_dir.into(),
            run_dir: run_dir.into(),
            bus: Bus::default(),
            net: Net::default(),
            vm: Vm::default(),
            image: Image::default(),
            template: Template::default(),
        }
    }

    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// Says what is wrong with the file, by line, and what is right.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = fs_err::read_to_string(path).map_err(|e| {
            Error::not_found(format!("cannot read the configuration: {e}"))
                .hint("start with `bothy host up`, or name the file with `--config` or `BOTHY_CONFIG`")
        })?;
        let config: Self = toml::from_str(&text)
            .map_err(|e| Error::invalid(format!("{} is not a valid configuration: {e}", path.display())))?;
        config.check().map_err(|e| e.context(path.display()))?;
        Ok(config)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string(self).map_err(|e| Error::internal("cannot write the configuration", &e))
    }

    /// Checks what the types alone do not.
    pub fn check(&self) -> Result<(), Error> {
        for (what, dir) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if !dir.is_absolute() {
                return Err(Error::invalid(format!("{what} {} is not an absolute path", dir.display())));
            }
        }
        if self.run_dir.as_os_str().len() > MAX_RUN_DIR {
            return Err(Error::invalid(format!(
                "run_dir {} is longer than {MAX_RUN_DIR} bytes, so socket paths below it would not fit",
                self.run_dir.display()
            ))
            .hint("choose a shorter directory, such as `/run/bothy`"));
        }
        if !(16..=29).contains(&self.net.prefix) {
            return Err(Error::invalid(format!("net.prefix {} is not within 16 to 29", self.net.prefix)));
        }
        // IFNAMSIZ is 16 with the closing zero (netdevice(7)).
        if self.net.bridge.is_empty() || self.net.bridge.len() > 15 || self.net.tap_prefix.len() > 10 {
            return Err(Error::invalid("net.bridge must have 1 to 15 bytes and net.tap_prefix at most 10"));
        }
        if self.vm.uid_base < 1000 {
            return Err(Error::invalid("vm.uid_base must be 1000 or more"));
        }
        Ok(())
    }

    /// The directory that only `service` opens.
    pub fn service_dir(&self, service: Service) -> PathBuf {
        let binary = service.binary();
        self.state_dir.join(binary.strip_prefix("bothy-").unwrap_or(binary))
    }

    /// The bus server's directory: its configuration, identities and JetStream store.
    pub fn bus_dir(&self) -> PathBuf {
        self.state_dir.join("bus")
    }

    /// The nkey seed by which `service` is known on the bus.
    pub fn bus_seed(&self, service: Service) -> PathBuf {
        self.bus_dir().join("identity").join(format!("{}.nk", service.token()))
    }

    /// The bus server's address.
    pub fn bus_url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.bus.port)
    }

    /// The gateway's socket, which people's processes connect to.
    pub fn gateway_socket(&self) -> PathBuf {
        self.run_dir.join("gateway.sock")
    }

    /// The socket on which `service` redeems tickets.
    pub fn ticket_socket(&self, service: Service) -> PathBuf {
        self.run_dir.join(format!("{}.sock", service.token()))
    }

    /// The directory of one VM's holder: its sockets, its console log, its exit record.
    pub fn holder_dir(&self, vm: bothy_contract::VmId) -> PathBuf {
        self.run_dir.join("vm").join(vm.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_reads_back_and_wrong_ones_are_refused() {
        let dir = Path::new("/tmp/x");
        let config = Config::new(dir, dir.join("run"));
        let back: Config = toml::from_str(&config.to_toml().unwrap()).unwrap();
        assert_eq!(config, back);
        assert!(toml::from_str::<Config>("state_dir = '/a'\nrun_dir = '/b'\nno_such = 1").is_err());
        let root = |word| toml::from_str::<Image>(&format!("root_disk = '{word}'"));
        assert_eq!(root("dm-snapshot").unwrap().root_disk.named(), Some(RootDisk::DmSnapshot));
        assert_eq!(root("auto").unwrap().root_disk.named(), None);
        assert!(root("qcow2").unwrap_err().to_string().contains("expected one of `auto`, `overlay`"));
        let long = Config::new("/a", format!("/{}", "x".repeat(64)));
        assert!(long.check().unwrap_err().message.contains("longer than 64 bytes"));
        assert!(Config::new("a", "/b").check().is_err());
    }
}
