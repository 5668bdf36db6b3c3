//! Guests that are saved and go on: templates and their VMs, suspended guests, and all that may go wrong. With a real QEMU
//! (`BOTHY_TEST_QEMU` names another one than the host's) and a real guest.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod guest;
mod host;

use bothy_contract::{Code, VmId};
use bothy_guest_proto::{BULK_PORT, CONTROL_PORT, GuestClient};
use bothy_vm_agent::vmm::{
    Accel, Driver, Firecracker, Memory, Origin, QemuMicrovm, RunState, Save, SealedMemory, Snapshot, VmPlan,
    holder::Holder,
    liveness::rediscover,
    wire::{HolderHandle, Process},
};
use guest::{UID_TAP, guest, health, network, personalise, plan, qemu, run};
use host::{Host, LONG, UID, gone, pid, program};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
};
use std::{
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tokio::time::{sleep, timeout};

const SECOND: (&str, u32) = ("bothy-tap-1", UID + 1);
const THIRD: (&str, u32) = ("bothy-tap-2", UID + 2);

/// Where saved guests are kept: the agent's, and nobody else gets in.
fn store(host: &Host) -> PathBuf {
    let dir = host.dir.path().join("store");
    fs_err::create_dir_all(&dir).unwrap();
    fs_err::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    dir
}

fn snapshot(store: &Path, name: &str) -> Snapshot {
    Snapshot { state: store.join(format!("{name}.state")), memory: store.join(format!("{name}.memory")) }
}

/// Another VM, with copies of the disks of `plan` as they are now.
fn another(host: &Host, plan: &VmPlan, (tap, uid): (&str, u32), from: Origin) -> VmPlan {
    let vm = VmId::new();
    let copy = |disk: &Path| {
        let to = host.dir.path().join(format!("{}-{uid}", disk.file_name().unwrap().display()));
        let copied = Command::new("cp").arg("--sparse=always").args([disk, &to]).status().unwrap();
        assert!(copied.success());
        std::os::unix::fs::chown(&to, Some(uid), Some(uid)).unwrap();
        to
    };
    VmPlan {
        vm,
        name: format!("another-{uid}"),
        dir: host.dir.path().join(&vm.to_string()[24..]),
        system: plan.system.as_deref().map(copy),
        work: copy(&plan.work),
        tap: tap.into(),
        uid,
        memory: Memory::Own,
        from,
        ..plan.clone()
    }
}

/// Launches a saved guest, sees that it waits, and lets it go on.
async fn go_on(driver: &dyn Driver, host: &Host, plan: &VmPlan) -> (Holder, HolderHandle, GuestClient) {
    let (holder, handle) = host.launch(&driver.launch_spec(plan).unwrap()).await;
    assert_eq!(state(driver, &holder).await, Some(RunState::Paused));
    holder.perform(&driver.resume()).await.unwrap();
    assert_eq!(state(driver, &holder).await, Some(RunState::Running));
    let control = guest(&holder, CONTROL_PORT).await;
    (holder, handle, control)
}

async fn state(driver: &dyn Driver, holder: &Holder) -> Option<RunState> {
    driver.read_run_state(&holder.perform(&driver.run_state()).await.unwrap())
}

async fn quit(driver: &dyn Driver, holder: &Holder, handle: HolderHandle) {
    holder.perform(&driver.quit()).await.unwrap();
    gone(handle).await;
}

/// KiB of the guest's memory that are mapped from a file or a memfd and were not written to, and that were.
fn memory_of(vmm: u32) -> (u64, u64) {
    let text = fs_err::read_to_string(format!("/proc/{vmm}/smaps")).unwrap();
    let (mut inside, mut rss, mut anonymous) = (false, 0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            inside = line.contains("memfd:bothy-template");
        } else if inside {
            let number = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
            match first {
                "Rss:" => rss += number,
                "Anonymous:" => anonymous += number,
                _ => {}
            }
        }
    }
    (rss - anonymous, anonymous)
}

async fn template_and_its_vms(driver: &dyn Driver, host: &Host, first: VmPlan) {
    let to = snapshot(&store(host), "template");
    let plan = VmPlan { memory: Memory::Shared(to.memory.clone()), ..first };
    let spec = driver.launch_spec(&plan).unwrap();
    let (holder, handle) = host.launch(&spec).await;
    let mut control = guest(&holder, CONTROL_PORT).await;
    personalise(&mut control).await;
    let boot = health(&mut control).await.boot_id;
    let mut bulk = guest(&holder, BULK_PORT).await;
    // Still in the guest's memory only, and its disk's journal not at rest.
    run(
        &mut bulk,
        "echo of the template > /root/mark; dd if=/dev/urandom of=/root/noise bs=64k count=32 status=none",
    )
    .await;
    // Where it is a file while the guest lives, it is the VM's user's; from the save on it is the agent's.
    let there = fs_err::metadata(&to.memory).ok();
    assert_eq!(there.map(|meta| meta.uid()), spec.memory.as_ref().map(|_| plan.uid));
    let saved = holder.save(&to, Save::Devices, plan.memory_mib).await.unwrap();
    for file in [&to.state, &to.memory] {
        let meta = fs_err::metadata(file).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600), "{}", file.display());
    }
    assert!(saved.state_bytes < 4 << 20, "its memory is in the state too: {saved:?}");
    assert!(saved.memory_bytes.is_some_and(|bytes| bytes < plan.memory_mib << 20), "{saved:?}");
    assert_eq!(state(driver, &holder).await, Some(RunState::Paused));
    // An agent that did not see the end of that does it again.
    assert!(holder.save(&to, Save::Devices, plan.memory_mib).await.unwrap().state_bytes < 4 << 20);
    assert_eq!(state(driver, &holder).await, Some(RunState::Paused));
    // Whoever asked it before gets no answer from a paused guest, and an end from one that is gone.
    quit(driver, &holder, handle).await;
    assert!(control.health(bothy_guest_proto::v1::HealthRequest {}).await.is_err());

    spoilt(driver, &plan, &to).await;
    let before = fs_err::read(&to.memory).unwrap();
    let sealed = SealedMemory::load(&to.memory).unwrap();
    assert_eq!(sealed.bytes(), plan.memory_mib << 20);
    let from = Snapshot { state: to.state.clone(), memory: sealed.path() };
    let two = [SECOND, THIRD].map(|who| another(host, &plan, who, Origin::Template(from.clone())));
    let mut up = Vec::new();
    for plan in &two {
        let (holder, handle, mut control) = go_on(driver, host, plan).await;
        assert_eq!(health(&mut control).await.boot_id, boot, "it is the same boot of the same guest");
        up.push((holder, handle, guest(&up_holder(plan), BULK_PORT).await, plan.uid));
    }
    for (_, _, bulk, uid) in &mut up {
        assert_eq!(run(bulk, "cat /root/mark").await.trim(), "of the template");
        run(
            bulk,
            &format!(
                "echo {uid} > /root/mine; dd if=/dev/urandom of=/root/noise bs=64k count=64 status=none; sync"
            ),
        )
        .await;
    }
    for (_, handle, bulk, uid) in &mut up {
        assert_eq!(run(bulk, "cat /root/mine").await.trim(), uid.to_string());
        let (shared, own) = memory_of(handle.vmm.pid);
        assert!(shared > 8 << 10, "next to nothing is shared: {shared} KiB, {own} KiB of its own");
    }
    // One that is gone is nothing to the other, nor is what it wrote to the template.
    let (_, handle, ..) = up.remove(0);
    kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
    gone(handle).await;
    let (holder, handle, mut bulk, uid) = up.remove(0);
    assert_eq!(run(&mut bulk, "cat /root/mine").await.trim(), uid.to_string());

    // One of a template is suspended and goes on like any other, on memory of its own.
    let whole = snapshot(&store(host), "second");
    let saved = holder.save(&whole, Save::Whole { resume: false }, plan.memory_mib).await.unwrap();
    assert!(saved.memory_bytes.unwrap_or(saved.state_bytes) > 8 << 20, "{saved:?}");
    quit(driver, &holder, handle).await;
    drop(sealed);
    let woken = VmPlan { from: Origin::Saved(whole), ..two[1].clone() };
    let (holder, handle, mut control) = go_on(driver, host, &woken).await;
    assert_eq!(health(&mut control).await.boot_id, boot);
    let mut bulk = guest(&holder, BULK_PORT).await;
    assert_eq!(run(&mut bulk, "cat /root/mine").await.trim(), uid.to_string());
    quit(driver, &holder, handle).await;
    assert!(fs_err::read(&to.memory).unwrap() == before, "the template has changed");
}

/// A byte that is another one than was saved is seen, in either file; then it is mended again.
async fn spoilt(driver: &dyn Driver, plan: &VmPlan, to: &Snapshot) {
    use std::os::unix::fs::FileExt;
    let turn = |path: &Path| {
        let file = fs_err::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let (mut byte, at) = ([0], file.metadata().unwrap().len() / 2);
        file.file().read_exact_at(&mut byte, at).unwrap();
        file.file().write_all_at(&[!byte[0]], at).unwrap();
    };
    turn(&to.memory);
    let e = SealedMemory::load(&to.memory).unwrap_err();
    assert!(e.code == Code::FailedPrecondition && e.message.contains("not what was saved"), "{e}");
    turn(&to.memory);
    let sealed = SealedMemory::load(&to.memory).unwrap();
    turn(&to.state);
    let from = Origin::Template(Snapshot { state: to.state.clone(), memory: sealed.path() });
    let again = VmPlan { memory: Memory::Own, from, ..plan.clone() };
    let e = Holder::launch(program(), &driver.launch_spec(&again).unwrap()).await.unwrap_err();
    assert!(e.message.contains("not what was saved"), "{e}");
    turn(&to.state);
}

fn up_holder(plan: &VmPlan) -> Holder {
    Holder::new(&plan.dir, plan.uid)
}

async fn suspended(driver: &dyn Driver, host: &Host, plan: &VmPlan) {
    let (holder, handle) = host.launch(&driver.launch_spec(plan).unwrap()).await;
    let mut control = guest(&holder, CONTROL_PORT).await;
    personalise(&mut control).await;
    let boot = health(&mut control).await.boot_id;
    let mut bulk = guest(&holder, BULK_PORT).await;
    let busy = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /root/count; done' > /dev/null 2>&1 &";
    run(&mut bulk, busy).await;
    let store = store(host);
    let to = snapshot(&store, "suspended");

    // Only a template's memory is in a file.
    let e = holder.save(&to, Save::Devices, plan.memory_mib).await.unwrap_err();
    assert!(e.message.contains("only a whole save"), "{e}");
    // Saved and not stopped: the streams that were open go on.
    holder.save(&to, Save::Whole { resume: true }, plan.memory_mib).await.unwrap();
    assert_eq!(state(driver, &holder).await, Some(RunState::Running));
    assert_eq!(health(&mut control).await.boot_id, boot);
    fails(driver, &holder, plan, &store).await;
    assert_eq!(health(&mut control).await.boot_id, boot);

    // A paused one stays so, and is saved again where somebody did not get the first answer.
    holder.perform(&driver.pause()).await.unwrap();
    for _ in 0..2 {
        let saved = holder.save(&to, Save::Whole { resume: false }, plan.memory_mib).await.unwrap();
        assert!(saved.state_bytes > 8 << 20 && saved.memory_bytes.is_none(), "{saved:?}");
        assert_eq!(state(driver, &holder).await, Some(RunState::Paused));
    }
    let meta = fs_err::metadata(&to.state).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600));
    quit(driver, &holder, handle).await;

    let saved = VmPlan { from: Origin::Saved(to.clone()), ..plan.clone() };
    killed_while_it_loads(driver, host, &saved, &store).await;
    refused(driver, &saved, &store).await;
    let (holder, handle, mut control) = go_on(driver, host, &saved).await;
    assert_eq!(health(&mut control).await.boot_id, boot);
    let mut bulk = guest(&holder, BULK_PORT).await;
    let count = run(&mut bulk, "cat /root/count").await;
    timeout(LONG, async { while run(&mut bulk, "cat /root/count").await == count {} }).await.unwrap();

    killed_while_it_saves(driver, &holder, handle, plan, &store).await;
}

/// What cannot be saved: nothing is left of it, and the guest goes on.
async fn fails(driver: &dyn Driver, holder: &Holder, plan: &VmPlan, store: &Path) {
    let full = store.join("full");
    fs_err::create_dir(&full).unwrap();
    mount(Some("tmpfs"), &full, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
    let mounted = Mounted(full.clone());
    let to = snapshot(&full, "none");
    let e = holder.save(&to, Save::Whole { resume: false }, plan.memory_mib).await.unwrap_err();
    assert!(e.message.contains("No space left"), "{e}");
    assert_eq!(fs_err::read_dir(&full).unwrap().count(), 0);
    assert_eq!(state(driver, holder).await, Some(RunState::Running));
    drop(mounted);

    let e = holder.save(&snapshot(&store.join("nowhere"), "x"), Save::Devices, 1).await.unwrap_err();
    assert!(e.message.contains("nowhere") && e.hint.is_some(), "{e}");

    // Whoever asked goes away.
    let to = snapshot(store, "given-up");
    let asked =
        timeout(Duration::from_millis(60), holder.save(&to, Save::Whole { resume: false }, plan.memory_mib));
    let given_up = asked.await.is_err();
    timeout(LONG, async {
        while given_up && state(driver, holder).await != Some(RunState::Running) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert!(given_up && !to.state.exists() && names(store).iter().all(|name| !name.contains("given-up")));
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn half(file: &Path) -> Vec<u8> {
    let mut bytes = fs_err::read(file).unwrap();
    bytes.truncate(bytes.len() / 2);
    bytes
}

/// Files that are no saved guest of this machine: a plain word, and nothing runs.
async fn refused(driver: &dyn Driver, saved: &VmPlan, store: &Path) {
    let Origin::Saved(good) = &saved.from else { return };
    let torn = half(&good.state);
    let bad = snapshot(store, "bad");
    for (what, bytes) in [("empty", Vec::new()), ("garbage", vec![7; 1 << 20]), ("torn", torn)] {
        fs_err::write(&bad.state, bytes).unwrap();
        nothing_runs(driver, &VmPlan { from: Origin::Saved(bad.clone()), ..saved.clone() }, what).await;
    }
    nothing_runs(driver, &VmPlan { memory_mib: saved.memory_mib + 128, ..saved.clone() }, "of another size")
        .await;
    fs_err::remove_file(&bad.state).unwrap();
    let gone = VmPlan { from: Origin::Saved(bad), ..saved.clone() };
    let e = Holder::launch(program(), &driver.launch_spec(&gone).unwrap()).await.unwrap_err();
    assert!(e.code == Code::NotFound && e.message.contains("bad.state"), "{e}");
}

async fn nothing_runs(driver: &dyn Driver, plan: &VmPlan, what: &str) {
    let e = Holder::launch(program(), &driver.launch_spec(plan).unwrap()).await.unwrap_err();
    assert!(e.message.contains("the saved guest does not go on"), "{what}: {e}");
    assert_eq!(rediscover(&up_holder(plan)).await.unwrap(), None, "{what}");
}

/// The holder is killed while its VMM loads: the state comes through a pipe, and not all of it.
async fn killed_while_it_loads(driver: &dyn Driver, host: &Host, saved: &VmPlan, store: &Path) {
    let Origin::Saved(good) = &saved.from else { return };
    let slow = snapshot(store, "slow");
    nix::unistd::mkfifo(&slow.state, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (pipe, part) = (slow.state.clone(), half(&good.state));
    let plan = VmPlan { from: Origin::Saved(slow.clone()), ..saved.clone() };
    let spec = driver.launch_spec(&plan).unwrap();
    let launch = tokio::spawn(async move { Holder::launch(program(), &spec).await });
    let feed = tokio::task::spawn_blocking(move || {
        let mut pipe = fs_err::OpenOptions::new().write(true).open(pipe).unwrap();
        pipe.write_all(&part).unwrap();
        pipe
    });
    let pipe = timeout(LONG, feed).await.unwrap().unwrap();
    let handle = processes(&plan.dir);
    host.note(handle);
    assert!(!launch.is_finished());
    kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
    let e = timeout(LONG, launch).await.unwrap().unwrap().unwrap_err();
    assert!(e.message.contains("without a word"), "{e}");
    gone(handle).await;
    assert_eq!(rediscover(&up_holder(&plan)).await.unwrap(), None);
    drop(pipe);
    fs_err::remove_file(&slow.state).unwrap();
}

/// The VMM that names that directory, and its parent. Not by asking: a holder answers only once its VMM is up.
fn processes(dir: &Path) -> HolderHandle {
    let dir = format!("{}/", dir.display());
    let pids = fs_err::read_dir("/proc").unwrap();
    let mut pids = pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let vmm = pids.find(|pid| {
        let argv = fs_err::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&argv).contains(&dir)
    });
    let vmm = vmm.unwrap();
    let status = fs_err::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap();
    HolderHandle { holder: Process::find(parent).unwrap(), vmm: Process::find(vmm).unwrap() }
}

/// The holder is killed while its VMM saves: no file, no process.
async fn killed_while_it_saves(
    driver: &dyn Driver,
    holder: &Holder,
    handle: HolderHandle,
    plan: &VmPlan,
    store: &Path,
) {
    let before = names(store);
    let to = snapshot(store, "killed");
    // Stopped in the middle, as soon as QEMU says that it is there; where it was faster, once more.
    for _ in 0..20 {
        let (saver, to, mib) = (holder.clone(), to.clone(), plan.memory_mib);
        let save = tokio::spawn(async move { saver.save(&to, Save::Whole { resume: true }, mib).await });
        let query = serde_json::json!({ "execute": "query-migrate" });
        let active = async || holder.qmp(&query).await.unwrap().get("status").is_some_and(|s| s == "active");
        while !save.is_finished() && !active().await {}
        kill(pid(handle.vmm.pid), Signal::SIGSTOP).unwrap();
        sleep(Duration::from_millis(50)).await;
        if save.is_finished() {
            kill(pid(handle.vmm.pid), Signal::SIGCONT).unwrap();
            save.await.unwrap().unwrap();
            fs_err::remove_file(store.join("killed.state")).unwrap();
            continue;
        }
        kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
        let e = timeout(LONG, save).await.unwrap().unwrap().unwrap_err();
        assert_eq!(e.code, Code::Unavailable, "{e}");
        gone(handle).await;
        assert_eq!(names(store), before);
        assert!(holder.perform(&driver.run_state()).await.is_err());
        return;
    }
    assert!(before.is_empty(), "no save took long enough to be killed");
}

#[test]
fn a_template_goes_on_as_any_number_of_vms() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Tcg) else { return };
    network(&[UID_TAP, SECOND, THIRD]).block_on(async {
        let driver = QemuMicrovm::find(&qemu()).await.unwrap();
        template_and_its_vms(&driver, &host, plan).await;
    });
}

#[test]
fn a_suspended_guest_goes_on_or_is_as_it_was() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Tcg) else { return };
    network(&[UID_TAP]).block_on(async {
        let driver = QemuMicrovm::find(&qemu()).await.unwrap();
        suspended(&driver, &host, &plan).await;
    });
}

#[test]
fn a_template_of_firecracker_goes_on_as_any_number_of_vms() {
    bothy_testkit::require_root!();
    let Some(program) = std::env::var_os("BOTHY_FIRECRACKER_BIN") else {
        host::not_checked(
            "a_template_of_firecracker_goes_on_as_any_number_of_vms",
            "BOTHY_FIRECRACKER_BIN names no Firecracker",
        );
        return;
    };
    let host = Host::new();
    let Some(plan) = plan(&host, Accel::Kvm) else { return };
    network(&[UID_TAP, SECOND, THIRD]).block_on(async {
        let driver = Firecracker::find(Path::new(&program)).await.unwrap();
        assert!(driver.capabilities().snapshot, "{} saves no guests", driver.version());
        template_and_its_vms(&driver, &host, plan).await;
    });
}
