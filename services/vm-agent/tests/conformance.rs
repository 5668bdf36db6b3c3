//! One suite for every driver: a real guest of the default image, through all that a driver and its holder are for.
//!
//! QEMU is always there (`BOTHY_TEST_QEMU` names another one); a Firecracker where `BOTHY_FIRECRACKER_BIN` names one, on a
//! host whose KVM runs guests.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod guest;
mod host;

use bothy_guest_proto::{BULK_PORT, CONTROL_PORT, GuestClient, v1};
use bothy_vm_agent::vmm::{
    self, Accel, Driver, Firecracker, QemuMicrovm, RunState, VmPlan,
    holder::Holder,
    liveness::{Liveness, look, rediscover},
    wire::{self, HolderHandle, State},
};
use guest::{UID_TAP, WORK, grow, guest, health, network, personalise, plan, qemu, run};
use host::{Host, LONG, gone, pid};
use nix::sys::signal::{Signal, kill};
use std::{os::unix::fs::MetadataExt, path::Path, time::Duration};
use tokio::time::{sleep, timeout};

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

#[test]
fn qemu_conforms() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Tcg) else { return };
    network(&[UID_TAP]).block_on(async {
        let driver = QemuMicrovm::find(&qemu()).await.unwrap();
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
    network(&[UID_TAP]).block_on(async {
        let driver = Firecracker::find(Path::new(&program)).await.unwrap();
        assert!(!driver.capabilities().tcg && !driver.capabilities().power_off);
        conforms(&driver, &host, &plan).await;
    });
}
