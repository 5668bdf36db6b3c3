//! One suite for every driver: a real guest of the default image, through all that a driver and its holder are for.
//!
//! QEMU is always there; a Firecracker where `BOTHY_FIRECRACKER_BIN` names one, on a host whose KVM runs guests. The image is
//! the one that the tests of `e2e` build and keep (`target/bothy/images/debian`), or the one that `BOTHY_TEST_IMAGE` names.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

mod host;

use bothy_contract::VmId;
use bothy_guest_proto::{
    BULK_PORT, CONTROL_PORT, GuestClient, client,
    v1::{self, exec_input::Input, exec_output::Output},
};
use bothy_testkit::Netns;
use bothy_vm_agent::vmm::{
    self, Accel, Driver, Firecracker, Memory, Origin, QemuMicrovm, RunState, VmPlan, clock,
    holder::Holder,
    liveness::{Liveness, look, rediscover},
    wire::{self, HolderHandle, State},
};
use host::{Host, LONG, UID, gone, pid};
use nix::sys::signal::{Signal, kill};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tokio::time::{sleep, timeout};

const TAP: &str = "bothy-tap-0";
/// The work disk before it grows, and after.
const WORK: (u64, u64) = (96 << 20, 160 << 20);

/// The default image and the guest's binary, if they are built.
fn image() -> Option<(PathBuf, PathBuf)> {
    let target = bothy_testkit::target_dir().parent().unwrap().to_owned();
    let image = std::env::var_os("BOTHY_TEST_IMAGE")
        .map_or_else(|| target.join("bothy/images/debian"), PathBuf::from);
    let guest = target.join("x86_64-unknown-linux-gnu/guest/bothy-guest");
    for needed in [&image.join("vmlinux"), &guest] {
        if !needed.exists() {
            host::skip("conformance", &format!("needs {}; `cargo xtask test` builds it", needed.display()));
            return None;
        }
    }
    Some((image, guest))
}

/// An archive of the kind that the kernel unpacks (`newc`, initramfs buffer format), of directories and one file.
fn initramfs(init: &[u8]) -> Vec<u8> {
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
fn plan(host: &Host, accel: Accel) -> Option<VmPlan> {
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
        system: at("system-seed.ext4"),
        work: at("work-seed.ext4"),
        cpus: 1,
        memory_mib: 384,
        memory: Memory::Own,
        from: Origin::Boot,
        tap: TAP.into(),
        mac: "52:54:00:00:00:02".into(),
        uid: UID,
        groups: groups(accel),
        accel,
        tsc_khz: clock::tsc_khz(),
    })
}

/// The group of `/dev/kvm`, where that is what lets a VM's user use it.
fn groups(accel: Accel) -> Vec<u32> {
    let meta = fs_err::metadata("/dev/kvm").ok().filter(|meta| accel == Accel::Kvm && meta.gid() != 0);
    meta.map(|meta| meta.gid()).into_iter().collect()
}

fn grow(file: &Path, bytes: u64) {
    fs_err::OpenOptions::new().write(true).open(file).unwrap().set_len(bytes).unwrap();
}

/// The agent's client on one port of the guest, once it answers.
async fn guest(holder: &Holder, port: u32) -> GuestClient {
    timeout(LONG, async { client(holder.connect(port).await.unwrap()).await.unwrap() }).await.unwrap()
}

async fn health(guest: &mut GuestClient) -> v1::HealthReply {
    timeout(LONG, guest.health(v1::HealthRequest {})).await.unwrap().unwrap().into_inner()
}

/// Makes the guest a machine of its own, so that commands run.
async fn personalise(guest: &mut GuestClient) {
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
async fn run(guest: &mut GuestClient, script: &str) -> String {
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

async fn run_state(driver: &dyn Driver, holder: &Holder) -> Option<RunState> {
    driver.read_run_state(&holder.perform(&driver.run_state()).await.unwrap())
}

/// Everything, against one driver.
async fn conforms(driver: &dyn Driver, host: &Host, plan: &VmPlan) {
    let spec = driver.launch_spec(plan).unwrap();
    let (holder, handle) = host.launch(&spec).await;
    launched(driver, plan, &holder, handle).await;
    let mut control = guest(&holder, CONTROL_PORT).await;
    let boot = health(&mut control).await.boot_id;
    pauses(driver, &holder, &mut control).await;
    personalise(&mut control).await;
    let mut bulk = guest(&holder, BULK_PORT).await;
    let status = holder.status().await.unwrap();
    assert!(status.control_up && status.bulk_up);
    console(&holder, &mut bulk).await;
    grows(driver, plan, &holder, &mut bulk).await;
    let holder = adopted(plan, handle).await;

    // Streams of an agent that is gone are nothing to the guest, and there may be many at once.
    drop((control, bulk));
    for _ in 0..8 {
        let (mut one, mut two) = (guest(&holder, CONTROL_PORT).await, guest(&holder, BULK_PORT).await);
        assert_eq!(
            (health(&mut one).await.boot_id, health(&mut two).await.boot_id),
            (boot.clone(), boot.clone())
        );
    }

    // Ended by the VMM's own way out, with a record, and for good.
    holder.perform(&driver.quit()).await.unwrap();
    gone(handle).await;
    let exit = holder.exit().unwrap().unwrap();
    assert!(exit.status == Some(0) || exit.signal == Some(15), "{exit:?}");
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Dead { .. }));
    assert!(holder.perform(&driver.quit()).await.is_err());

    // Again on the same disks: killed, and said so.
    let (holder, handle) = host.launch(&spec).await;
    assert_eq!(holder.exit().unwrap(), None);
    let mut control = guest(&holder, CONTROL_PORT).await;
    assert_ne!(health(&mut control).await.boot_id, boot);
    // The button may go unheard, but is there to be pressed, and harms nobody.
    holder.perform(&driver.powerdown()).await.unwrap();
    holder.kill(9).await.unwrap();
    gone(handle).await;
    assert_eq!(holder.exit().unwrap().unwrap().signal, Some(9));

    // The guest ends by itself, whatever kind of end its machine has.
    let (holder, handle) = host.launch(&spec).await;
    let mut control = guest(&holder, CONTROL_PORT).await;
    personalise(&mut control).await;
    timeout(LONG, control.shutdown(v1::ShutdownRequest { reboot: false })).await.unwrap().unwrap();
    gone(handle).await;
    let exit = holder.exit().unwrap().unwrap();
    assert_eq!((exit.status, exit.signal), (Some(0), None));

    // A holder that dies takes its VMM along.
    let (holder, handle) = host.launch(&spec).await;
    kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
    gone(handle).await;
    assert_eq!(holder.exit().unwrap(), None, "nobody was there to see it end");
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Dead { .. }));
}

async fn launched(driver: &dyn Driver, plan: &VmPlan, holder: &Holder, handle: HolderHandle) {
    let status = holder.status().await.unwrap();
    assert_eq!(
        (status.vm, status.handle, status.state, status.exit),
        (plan.vm, handle, State::Running, None)
    );
    assert_eq!(status.vmm_version, format!("{} {}", driver.name(), driver.version()));
    // Whoever knows only that has the driver for its verbs.
    let again = vmm::driver_of(&status.vmm_version).unwrap();
    assert_eq!(
        (again.name(), again.version(), again.capabilities(), again.pause()),
        (driver.name(), driver.version(), driver.capabilities(), driver.pause())
    );
    assert_eq!(run_state(driver, holder).await, Some(RunState::Running));
    for process in [handle.holder, handle.vmm] {
        let meta = fs_err::metadata(format!("/proc/{}", process.pid)).unwrap();
        assert_eq!(meta.uid(), plan.uid);
    }
}

async fn pauses(driver: &dyn Driver, holder: &Holder, control: &mut GuestClient) {
    for _ in 0..2 {
        holder.perform(&driver.pause()).await.unwrap();
        assert_eq!(run_state(driver, holder).await, Some(RunState::Paused));
    }
    for _ in 0..2 {
        holder.perform(&driver.resume()).await.unwrap();
        assert_eq!(run_state(driver, holder).await, Some(RunState::Running));
    }
    health(control).await;
}

/// What the guest writes on its console is in the log.
async fn console(holder: &Holder, bulk: &mut GuestClient) {
    run(bulk, "echo all is well > /dev/console").await;
    timeout(LONG, async {
        while !fs_err::read_to_string(holder.dir().join(wire::CONSOLE_LOG)).unwrap().contains("all is well") {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

/// A disk grows under the running guest, where the driver says so.
async fn grows(driver: &dyn Driver, plan: &VmPlan, holder: &Holder, bulk: &mut GuestClient) {
    const SIZE: &str = "blockdev --getsize64 $(findmnt -no SOURCE /root)";
    assert_eq!(run(bulk, SIZE).await.trim(), WORK.0.to_string());
    grow(&plan.work, WORK.1);
    let told = holder.perform(&driver.resize_disk("work", WORK.1)).await;
    assert_eq!(told.is_ok(), driver.capabilities().resize_disk, "{told:?}");
    if told.is_err() {
        return;
    }
    timeout(LONG, async {
        while run(bulk, SIZE).await.trim() != WORK.1.to_string() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    // It holds what it could not have held before.
    let wrote =
        run(bulk, "dd if=/dev/zero of=/root/large bs=1M count=1 status=none && sync && echo yes").await;
    assert_eq!(wrote.trim(), "yes");
    assert!(holder.perform(&driver.resize_disk("no-such-disk", WORK.1)).await.is_err());
}

/// What another process than the one that launched it sees: what was written down, or nothing at all.
async fn adopted(plan: &VmPlan, handle: HolderHandle) -> Holder {
    let written = serde_json::to_string(&handle).unwrap();
    let read: HolderHandle = serde_json::from_str(&written).unwrap();
    let holder = Holder::new(&plan.dir, plan.uid);
    assert!(matches!(look(&holder, Some(&read)).await, Liveness::Alive(status) if status.vm == plan.vm));
    assert_eq!(rediscover(&holder).await.unwrap().unwrap().handle, handle);
    holder
}

/// A network of its own with the VM's TAP.
fn network() -> Netns {
    let net = Netns::new();
    net.run(|| {
        let user = UID.to_string();
        for args in [
            ["tuntap", "add", "dev", TAP, "mode", "tap", "user", &user, "vnet_hdr"].as_slice(),
            ["link", "set", TAP, "up"].as_slice(),
        ] {
            assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
        }
    });
    net
}

#[test]
fn qemu_conforms() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Tcg) else { return };
    network().block_on(async {
        let driver = QemuMicrovm::find(Path::new("qemu-system-x86_64")).await.unwrap();
        assert!(driver.capabilities().tcg && driver.capabilities().power_off);
        conforms(&driver, &host, &plan).await;
        // It says that guests can be saved: nothing in the machine may be in the way of that.
        let (holder, handle) = host.launch(&driver.launch_spec(&plan).unwrap()).await;
        let migrate = serde_json::json!({ "execute": "query-migrate" });
        let blocked = holder.qmp(&migrate).await.unwrap().get("blocked-reasons").cloned();
        assert_eq!(blocked.is_none(), driver.capabilities().snapshot, "{blocked:?}");
        holder.kill(9).await.unwrap();
        gone(handle).await;
    });
}

#[test]
fn firecracker_conforms() {
    bothy_testkit::require_root!();
    let Some(program) = std::env::var_os("BOTHY_FIRECRACKER_BIN") else {
        host::not_checked("firecracker_conforms", "BOTHY_FIRECRACKER_BIN names no Firecracker");
        return;
    };
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Kvm) else { return };
    network().block_on(async {
        let driver = Firecracker::find(Path::new(&program)).await.unwrap();
        assert!(!driver.capabilities().tcg && !driver.capabilities().power_off);
        conforms(&driver, &host, &plan).await;
    });
}
