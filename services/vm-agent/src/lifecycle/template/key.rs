//! What a template is good for, as one word. Memory that was saved goes on only in a machine that is the same to the last
//! device, over the same bytes on disk, and the guest in it has found all that it was going to look for: so whatever a guest
//! could tell a difference by is in the key, and where any of it changes the template is never found again.

use bothy_contract::{image::BootSet, vm::Shape};
use bothy_vm_agent::vmm::{Accel, Choice};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

/// Counts up when the machine that the drivers make, or what a template is saved with, is another than before.
const LAYOUT: u32 = 1;

#[derive(Serialize)]
struct Parts<'a> {
    layout: u32,
    /// Name and kernel come with it.
    image: &'a BootSet,
    vmm: String,
    /// The host's time-stamp counter in units of 10 MHz: each agent measures it anew, and never quite the same.
    tsc: Option<u32>,
    cpus: u32,
    memory_mib: u64,
    system_mib: u64,
}

/// The key of templates of the image `boot` with the processors, memory and system disk of `shape`, on this host as it is
/// now. The initramfs, whose name is its content's, stands for kernel modules and guest agent.
pub(crate) fn key(boot: &BootSet, choice: &Choice, tsc_khz: Option<u32>, shape: &Shape) -> String {
    let Shape { cpus, memory_mib, system_mib, work_mib: _ } = *shape;
    let accel = choice.finding.as_ref().map_or(Accel::Tcg, |finding| finding.accel);
    let vmm = choice.driver.version_key(accel);
    let tsc = tsc_khz.map(|khz| khz.saturating_add(5000) / 10_000);
    let parts = Parts { layout: LAYOUT, image: boot, vmm, tsc, cpus, memory_mib, system_mib };
    let text = serde_json::to_vec(&parts).unwrap_or_default();
    hex::encode(Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{
        ImageName,
        image::{InitStyle, RootDisk},
    };
    use bothy_vm_agent::vmm::QemuMicrovm;
    use std::sync::Arc;

    #[test]
    fn all_that_a_guest_could_tell_by_changes_the_key() {
        let boot = BootSet {
            image: ImageName::default_image(),
            kernel: "/k".into(),
            initrd: "/i".into(),
            init: InitStyle::Systemd,
            home: "/root".into(),
            wait: vec![],
            digest: "d".into(),
            defaults: Default::default(),
            root_disk: RootDisk::Overlay,
        };
        let choice = |version: &str| Choice {
            driver: Arc::new(QemuMicrovm::new("qemu", version)),
            finding: None,
            reason: String::new(),
        };
        let (qemu, shape) = (choice("7.2.0"), Shape::default());
        let first = key(&boot, &qemu, None, &shape);
        let measured = |khz| key(&boot, &qemu, Some(khz), &shape);
        assert_eq!(measured(2_400_000), measured(2_400_031), "as another agent measures it");
        assert_eq!(key(&boot, &qemu, None, &Shape { work_mib: 99, ..shape.clone() }), first);
        for other in [
            key(&BootSet { digest: "e".into(), ..boot.clone() }, &qemu, None, &shape),
            key(&BootSet { root_disk: RootDisk::Copy, ..boot.clone() }, &qemu, None, &shape),
            key(&BootSet { initrd: "/j".into(), ..boot.clone() }, &qemu, None, &shape),
            key(&boot, &choice("7.2.1"), None, &shape),
            key(&boot, &qemu, Some(2_400_000), &shape),
            key(&boot, &qemu, Some(3_400_000), &shape),
            key(&boot, &qemu, None, &Shape { cpus: 1, ..shape.clone() }),
            key(&boot, &qemu, None, &Shape { memory_mib: 512, ..shape.clone() }),
            key(&boot, &qemu, None, &Shape { system_mib: 512, ..shape.clone() }),
        ] {
            assert_ne!(other, first);
        }
    }
}
