//! A real guest of the default image for tests, and what can be asked of it. The image is the one that the tests of `e2e`
//! build and keep (`target/bothy/images/debian`), or the one that `BOTHY_TEST_IMAGE` names.
#![allow(dead_code, reason = "each test uses its part")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

use crate::host::{self, Host, LONG, UID};
use bothy_contract::VmId;
use bothy_guest_proto::{
    GuestClient, client,
    v1::{self, exec_input::Input, exec_output::Output},
};
use bothy_testkit::Netns;
use bothy_vm_agent::vmm::{Accel, Memory, Origin, VmPlan, clock, holder::Holder};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};
use tokio::time::timeout;

/// The first VM's TAP, and whose it is.
pub(crate) const UID_TAP: (&str, u32) = ("bothy-tap-0", UID);
/// The work disk before it grows, and after.
pub(crate) const WORK: (u64, u64) = (96 << 20, 160 << 20);

/// The default image and the guest's binary, if they are built.
pub(crate) fn image() -> Option<(PathBuf, PathBuf)> {
    let target = bothy_testkit::target_dir().parent().unwrap().to_owned();
    let image = std::env::var_os("BOTHY_TEST_IMAGE")
        .map_or_else(|| target.join("bothy/images/debian"), PathBuf::from);
    let guest = target.join("x86_64-unknown-linux-gnu/guest/bothy-guest");
    for needed in [&image.join("vmlinux"), &guest] {
        if !needed.exists() {
            host::skip(
                "a test with a real guest",
                &format!("needs {}; `cargo xtask test` builds it", needed.display()),
            );
            return None;
        }
    }
    Some((image, guest))
}

/// An archive of the kind that the kernel unpacks (`newc`, initramfs buffer format), of directories and one file.
pub(crate) fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let entries: [(&str, u32, &[u8]); 5] = [
        ("dev", 0o040_755, b""),
        ("proc", 0o040_755, b""),
        ("sys", 0o040_755, b""),
        ("init", 0o100_755, init),
        ("TRAILER!!!", 0, b""),
    ];
    for (number, (name, mode, data)) in entries.iter().enumerate() {
        let mut head = "070701".to_owned();
        for field in [number, *mode as usize, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            head.push_str(&format!("{field:08x}"));
        }
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A VM's files, which its user owns.
pub(crate) fn plan(host: &Host, accel: Accel) -> Option<VmPlan> {
    let (image, guest) = image()?;
    let at = |name: &str| host.dir.path().join(name);
    // Links would do, but not every VM's user gets through to a checkout.
    for name in ["vmlinux", "rootfs.ext4", "system-seed.ext4", "work-seed.ext4"] {
        let copied = Command::new("cp").arg("--sparse=always").args([image.join(name), at(name)]).status();
        assert!(copied.unwrap().success(), "cannot copy {name}");
    }
    let mut initrd = initramfs(&fs_err::read(guest).unwrap());
    initrd.extend(fs_err::read(image.join("modules.cpio")).unwrap());
    fs_err::write(at("initrd"), initrd).unwrap();
    for name in ["system-seed.ext4", "work-seed.ext4"] {
        std::os::unix::fs::chown(at(name), Some(UID), Some(UID)).unwrap();
    }
    grow(&at("work-seed.ext4"), WORK.0);
    let vm = VmId::new();
    Some(VmPlan {
        vm,
        name: "conformance".into(),
        dir: at(&vm.to_string()[24..]),
        kernel: at("vmlinux"),
        initrd: at("initrd"),
        rootfs: at("rootfs.ext4"),
        system: Some(at("system-seed.ext4")),
        work: at("work-seed.ext4"),
        cpus: 1,
        memory_mib: 384,
        memory: Memory::Own,
        from: Origin::Boot,
        tap: UID_TAP.0.into(),
        mac: "52:54:00:00:00:02".into(),
        uid: UID,
        groups: groups(accel),
        accel,
        tsc_khz: clock::tsc_khz(),
    })
}

/// The group of `/dev/kvm`, where that is what lets a VM's user use it.
pub(crate) fn groups(accel: Accel) -> Vec<u32> {
    let meta = fs_err::metadata("/dev/kvm").ok().filter(|meta| accel == Accel::Kvm && meta.gid() != 0);
    meta.map(|meta| meta.gid()).into_iter().collect()
}

pub(crate) fn grow(file: &Path, bytes: u64) {
    fs_err::OpenOptions::new().write(true).open(file).unwrap().set_len(bytes).unwrap();
}

/// The agent's client on one port of the guest, once it answers.
pub(crate) async fn guest(holder: &Holder, port: u32) -> GuestClient {
    timeout(LONG, async { client(holder.connect(port).await.unwrap()).await.unwrap() }).await.unwrap()
}

pub(crate) async fn health(guest: &mut GuestClient) -> v1::HealthReply {
    timeout(LONG, guest.health(v1::HealthRequest {})).await.unwrap().unwrap().into_inner()
}

/// Makes the guest a machine of its own, so that commands run.
pub(crate) async fn personalise(guest: &mut GuestClient) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let who = v1::PersonaliseRequest {
        hostname: "conformance".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        nic: Some(v1::Nic {
            mac: "52:54:00:00:00:02".into(),
            address: "10.9.0.2".into(),
            prefix: 24,
            gateway: "10.9.0.1".into(),
            dns: vec![],
            ..Default::default()
        }),
        unix_time_us: u64::try_from(now.as_micros()).unwrap(),
        entropy: vec![7; 64],
        files: vec![],
        home: "/root".into(),
        init_systemd: false,
        ..Default::default()
    };
    timeout(LONG, guest.personalise(who)).await.unwrap().unwrap();
}

/// What a shell in the guest prints.
pub(crate) async fn run(guest: &mut GuestClient, script: &str) -> String {
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let start = v1::ExecStart { argv, ..Default::default() };
    let begin = futures::stream::iter([v1::ExecInput { input: Some(Input::Start(start)) }]);
    let input = futures::StreamExt::chain(begin, futures::stream::pending());
    let work = async {
        let mut output = guest.exec(input).await.unwrap().into_inner();
        let mut said = String::new();
        while let Some(message) = output.message().await.unwrap() {
            match message.output.unwrap() {
                Output::Stdout(data) | Output::Stderr(data) => said.push_str(&String::from_utf8_lossy(&data)),
                Output::Failed(failed) => panic!("{script}: {failed:?}"),
                _ => {}
            }
        }
        said
    };
    timeout(LONG, work).await.unwrap()
}

/// A network of its own with VMs' TAPs, each its user's.
pub(crate) fn network(taps: &[(&str, u32)]) -> Netns {
    let net = Netns::new();
    net.run(|| {
        for (tap, user) in taps {
            let user = user.to_string();
            for args in [
                ["tuntap", "add", "dev", tap, "mode", "tap", "user", &user, "vnet_hdr"].as_slice(),
                ["link", "set", tap, "up"].as_slice(),
            ] {
                assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
            }
        }
    });
    net
}

/// The QEMU that is tested.
pub(crate) fn qemu() -> PathBuf {
    std::env::var_os("BOTHY_TEST_QEMU").map_or_else(|| "qemu-system-x86_64".into(), PathBuf::from)
}
