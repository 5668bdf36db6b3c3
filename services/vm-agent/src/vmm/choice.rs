//! Which driver this host is best served by, and why, in words.
//!
//! Firecracker starts faster and weighs less, but runs guests under KVM only, and that `/dev/kvm` opens says little (see
//! [`accel`]). So `auto` is Firecracker where its program is there and a trial has shown that KVM runs a guest. Without an
//! image at hand nothing can be tried; then a choice may be for the time being, and is made again once there is one.

use super::{
    Accel, Driver, FIRECRACKER, Firecracker, QEMU_MICROVM, QemuMicrovm,
    accel::{self, Finding, Trial},
    firecracker::{JAILED, Version},
};
use bothy_config::DriverChoice;
use bothy_contract::{Code, Error};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

const KVM: &str = "/dev/kvm";
const TUN: &str = "/dev/net/tun";

/// What a choice is made from.
#[derive(Debug, Clone)]
pub struct Host<'a> {
    /// What the operator wants.
    pub config: &'a bothy_config::Vm,
    /// Where what was found out about KVM is remembered.
    pub memory: PathBuf,
    /// A kernel and an initramfs to try KVM with, where there is an image.
    pub boot: Option<(&'a Path, &'a Path)>,
}

/// A driver, and why that one.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The driver.
    pub driver: Arc<dyn Driver>,
    /// How it runs guests here; `None` where only a trial can tell, which needs an image.
    pub finding: Option<Finding>,
    /// Why that driver.
    pub reason: String,
}

impl Choice {
    /// Whether another look, with an image at hand, would give the same.
    pub fn is_settled(&self) -> bool {
        self.finding.is_some()
    }
}

/// Chooses the driver for this host.
///
/// # Errors
/// The configuration asks for what is not to be had here, or neither VMM can be run.
pub async fn choose(host: &Host<'_>) -> Result<Choice, Error> {
    let config = host.config;
    match config.driver {
        DriverChoice::QemuMicrovm => qemu(host, "set by `vm.driver`".into()).await,
        DriverChoice::Firecracker => {
            let driver = Firecracker::find(&config.firecracker).await?;
            kvm_opens().and_then(|()| tap_opens(Path::new(TUN))).map_err(|why| {
                Error::new(Code::FailedPrecondition, format!("Firecracker cannot run a guest here: {why}"))
                    .hint("mend that, or set `vm.driver` to `auto` in bothy.toml")
            })?;
            let driver = jailed(driver, config).await?;
            if config.accelerator == bothy_config::Accelerator::Tcg {
                return Err(Error::new(Code::FailedPrecondition, "Firecracker runs guests under KVM only")
                    .hint("`vm.driver` and `vm.accelerator` in bothy.toml contradict each other: set one to `auto`"));
            }
            let finding =
                Finding { accel: Accel::Kvm, reason: "Firecracker runs guests under KVM only".into() };
            Ok(Choice {
                driver: Arc::new(driver),
                finding: Some(finding),
                reason: "set by `vm.driver`".into(),
            })
        }
        DriverChoice::Auto => auto(host).await,
    }
}

async fn auto(host: &Host<'_>) -> Result<Choice, Error> {
    let driver = match Firecracker::find(&host.config.firecracker).await {
        Ok(driver) => driver,
        Err(e) if e.code == Code::NotFound => {
            return qemu(host, format!("Firecracker is not installed ({})", e.message)).await;
        }
        Err(e) => return qemu(host, format!("Firecracker cannot be used: {}", e.message)).await,
    };
    if let Err(why) = kvm_opens().and_then(|()| tap_opens(Path::new(TUN))) {
        return qemu(host, format!("Firecracker {} is there, but {why}", driver.version())).await;
    }
    let driver = match jailed(driver, host.config).await {
        Ok(driver) => driver,
        Err(e) => return qemu(host, e.message).await,
    };
    if host.config.accelerator == bothy_config::Accelerator::Tcg {
        return qemu(host, "Firecracker does not run guests by `vm.accelerator = \"tcg\"`".into()).await;
    }
    let choice = match qemu(host, String::new()).await {
        Ok(choice) => choice,
        // Nothing to try KVM with, and nothing to fall back on.
        Err(e) => {
            let reason = format!("{KVM} opens, and there is no QEMU to try it with: {}", e.message);
            let finding = Finding { accel: Accel::Kvm, reason: reason.clone() };
            return Ok(Choice { driver: Arc::new(driver), finding: Some(finding), reason });
        }
    };
    Ok(match &choice.finding {
        Some(finding) if finding.accel == Accel::Kvm => Choice {
            driver: Arc::new(driver),
            reason: format!("Firecracker is installed, and KVM runs guests: {}", finding.reason),
            finding: choice.finding,
        },
        Some(finding) => {
            let reason = format!("Firecracker is installed, but KVM is of no use: {}", finding.reason);
            Choice { reason, ..choice }
        }
        None => Choice {
            reason: "Firecracker is installed; whether KVM runs guests shows once there is an image".into(),
            ..choice
        },
    })
}

async fn qemu(host: &Host<'_>, reason: String) -> Result<Choice, Error> {
    let driver = QemuMicrovm::find(&host.config.qemu).await?;
    let finding = match host.boot {
        Some((kernel, initrd)) => {
            let trial = Trial {
                qemu: driver.program(),
                version: driver.version(),
                kernel,
                initrd,
                memory: host.memory.clone(),
            };
            Some(accel::decide(host.config.accelerator, &trial).await?)
        }
        None => accel::known(host.config.accelerator, driver.version(), &host.memory),
    };
    Ok(Choice { driver: Arc::new(driver), finding, reason })
}

fn kvm_opens() -> Result<(), String> {
    fs_err::OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map(drop)
        .map_err(|e| format!("KVM cannot be opened: {e}"))
}

/// Firecracker opens its TAP by itself, as the VM's user, who is in no group that could help.
fn tap_opens(node: &Path) -> Result<(), String> {
    let meta = fs_err::metadata(node).map_err(|e| format!("there is no TAP driver: {e}"))?;
    if meta.mode() & 0o006 == 0o006 {
        return Ok(());
    }
    let mode = meta.mode() & 0o777;
    Err(format!("{} is not for every user to open, its mode is {mode:o} and not 666", node.display()))
}

/// Nobody who asks for a jail gets a VMM without one.
async fn jailed(driver: Firecracker, config: &bothy_config::Vm) -> Result<Firecracker, Error> {
    match &config.jailer {
        None => Ok(driver),
        Some(jailer) => driver.jailed(jailer).await,
    }
}

/// The driver that knows the verbs of a running VMM, by what its launch called it, `firecracker 1.16.1`, or by the name
/// alone: of a VM that an earlier agent started, perhaps with a VMM that is not installed any more. It is not for launching.
pub fn driver_of(vmm: &str) -> Option<Arc<dyn Driver>> {
    let mut words = vmm.split_ascii_whitespace();
    let (name, version) = (words.next()?, words.next().unwrap_or_default());
    match name {
        QEMU_MICROVM => Some(Arc::new(QemuMicrovm::new(QEMU_MICROVM, version))),
        FIRECRACKER => {
            let version = Version::from_words(version).unwrap_or(Version::UNKNOWN);
            let driver = Firecracker::new(FIRECRACKER, version);
            let jailed = words.next() == Some(JAILED);
            Some(Arc::new(if jailed { driver.of_jailed() } else { driver }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A program that says it is that version.
    fn program(dir: &Path, name: &str, says: &str) -> PathBuf {
        let path = dir.join(name);
        fs_err::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn config(dir: &Path) -> bothy_config::Vm {
        bothy_config::Vm {
            qemu: program(dir, "qemu", "QEMU emulator version 10.0.2 (Debian)"),
            firecracker: dir.join("firecracker"),
            ..bothy_config::Vm::default()
        }
    }

    async fn chosen(config: &bothy_config::Vm, dir: &Path) -> Result<Choice, Error> {
        choose(&Host { config, memory: dir.join("accel.json"), boot: None }).await
    }

    #[tokio::test]
    async fn auto_is_qemu_without_firecracker_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let choice = chosen(&config, dir.path()).await.unwrap();
        assert_eq!((choice.driver.name(), choice.driver.version()), (QEMU_MICROVM, "10.0.2"));
        assert!(choice.reason.starts_with("Firecracker is not installed"), "{}", choice.reason);

        program(dir.path(), "firecracker", "Firecracker v1.9.0");
        let choice = chosen(&config, dir.path()).await.unwrap();
        assert_eq!(choice.driver.name(), QEMU_MICROVM);
        assert!(choice.reason.contains("Firecracker 1.9.0 is not one from 1.10.0"), "{}", choice.reason);
    }

    #[tokio::test]
    async fn what_the_operator_sets_is_what_there_is_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let wants = bothy_config::Vm { driver: DriverChoice::Firecracker, ..config(dir.path()) };
        assert_eq!(chosen(&wants, dir.path()).await.unwrap_err().code, Code::NotFound);
        program(dir.path(), "firecracker", "Firecracker v2.0.0");
        let e = chosen(&wants, dir.path()).await.unwrap_err();
        assert!(e.code == Code::FailedPrecondition && e.hint.is_some(), "{e}");
        program(dir.path(), "firecracker", "Firecracker v1.16.1");
        if kvm_opens().and_then(|()| tap_opens(Path::new(TUN))).is_ok() {
            assert_eq!(chosen(&wants, dir.path()).await.unwrap().driver.name(), FIRECRACKER);
            let tcg = bothy_config::Vm { accelerator: bothy_config::Accelerator::Tcg, ..wants.clone() };
            assert!(chosen(&tcg, dir.path()).await.unwrap_err().message.contains("KVM only"));
            // Nobody who asks for a jail gets a VMM without one.
            let jailer = dir.path().join("jailer");
            let jailed = bothy_config::Vm { jailer: Some(jailer.clone()), ..wants.clone() };
            let e = chosen(&jailed, dir.path()).await.unwrap_err();
            assert!(e.message.contains(&format!("cannot run {}", jailer.display())), "{e}");
            let auto = bothy_config::Vm { driver: DriverChoice::Auto, ..jailed };
            let choice = chosen(&auto, dir.path()).await.unwrap();
            assert!(choice.driver.name() == QEMU_MICROVM && choice.reason.contains("jailer"), "{choice:?}");
        }
        let wants = bothy_config::Vm { driver: DriverChoice::QemuMicrovm, ..wants };
        assert_eq!(chosen(&wants, dir.path()).await.unwrap().reason, "set by `vm.driver`");
    }

    #[tokio::test]
    async fn auto_is_firecracker_only_once_kvm_was_seen_to_work() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        program(dir.path(), "firecracker", "Firecracker v1.16.1");
        let before = chosen(&config, dir.path()).await.unwrap();
        assert_eq!(before.driver.name(), QEMU_MICROVM);
        if kvm_opens().and_then(|()| tap_opens(Path::new(TUN))).is_err() {
            assert!(before.reason.contains("is there, but"), "{}", before.reason);
            return;
        }
        assert!(!before.is_settled() && before.reason.contains("shows once there is an image"));
        for (accel, driver) in [(Accel::Kvm, FIRECRACKER), (Accel::Tcg, QEMU_MICROVM)] {
            accel::tests::seen(&dir.path().join("accel.json"), "10.0.2", accel);
            let choice = chosen(&config, dir.path()).await.unwrap();
            assert!(choice.is_settled() && choice.driver.name() == driver, "{choice:?}");
            assert!(choice.reason.contains("as a test says"), "{}", choice.reason);
        }
        // And never against what the operator says of KVM.
        let tcg = bothy_config::Vm { accelerator: bothy_config::Accelerator::Tcg, ..config };
        assert_eq!(chosen(&tcg, dir.path()).await.unwrap().driver.name(), QEMU_MICROVM);
    }

    #[test]
    fn a_tap_that_only_root_opens_is_no_tap_for_firecracker() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("tun");
        assert!(tap_opens(&node).unwrap_err().contains("no TAP driver"));
        fs_err::write(&node, "").unwrap();
        for (mode, good) in [(0o600, false), (0o660, false), (0o664, false), (0o666, true)] {
            fs_err::set_permissions(&node, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(tap_opens(&node).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn a_running_vmm_is_known_by_what_its_launch_called_it() {
        let of = |vmm| driver_of(vmm).map(|driver| (driver.name(), driver.capabilities().snapshot));
        assert_eq!(of("firecracker 1.16.1"), Some((FIRECRACKER, true)));
        assert_eq!(of("firecracker 1.16.1 jailed"), Some((FIRECRACKER, false)));
        assert_eq!(of("firecracker (kvm)"), Some((FIRECRACKER, false)));
        assert_eq!(of("qemu-microvm 10.0.2"), Some((QEMU_MICROVM, true)));
        assert_eq!(of("cloud-hypervisor 45"), None);
    }
}
