//! What tests of holders share: a directory for them, a VMM that is quick to start, and no process left afterwards.
#![allow(dead_code, reason = "each test uses its part")]
#![expect(clippy::unwrap_used, reason = "tests may panic")]

use bothy_contract::VmId;
use bothy_testkit::TempDir;
use bothy_vm_agent::vmm::{
    LaunchSpec,
    holder::Holder,
    wire::{self, HolderHandle},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{io::Write, os::unix::fs::PermissionsExt, path::Path, time::Duration};
use tokio::time::timeout;

/// Says that `test` cannot run here, so that `cargo xtask test` counts it; in CI that is a failure.
pub(crate) fn skip(test: &str, why: &str) {
    let message = format!("SKIPPED {test}: {why}");
    assert!(std::env::var_os("BOTHY_TEST_NO_SKIP").is_none_or(|v| v != "1"), "{message}");
    // Not by a macro: the test runner swallows what a passing test prints that way.
    drop(writeln!(std::io::stderr(), "{message}"));
}

/// Says that `test` has not looked at what most machines do not have and need not, CI's among them.
pub(crate) fn not_checked(test: &str, why: &str) {
    drop(writeln!(std::io::stderr(), "NOT CHECKED {test}: {why}"));
}

pub(crate) const LONG: Duration = Duration::from_secs(60);
pub(crate) const UID: u32 = 789_123;

pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_bothy-vmm"))
}

/// A directory for holders, and no process left in it afterwards.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) dir: TempDir,
    started: std::sync::Mutex<Vec<HolderHandle>>,
}

impl Host {
    pub(crate) fn new() -> Self {
        let dir = bothy_testkit::temp_dir();
        // Holders' directories are in one that every VM's user may pass through.
        fs_err::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        Self { dir, started: std::sync::Mutex::default() }
    }

    pub(crate) fn spec(&self) -> LaunchSpec {
        let vm = VmId::new();
        let dir = self.dir.path().join(&vm.to_string()[24..]);
        let socket =
            |name: &str| format!("socket,id={},path={},server=off", &name[..3], dir.join(name).display());
        let mut argv: Vec<String> =
            "qemu-system-x86_64 -accel tcg -M microvm -m 64 -nodefaults -no-user-config -display none \
             -no-reboot -S -serial stdio -device virtio-serial-device,id=serial"
                .split_whitespace()
                .map(str::to_owned)
                .collect();
        for (name, device) in [
            (wire::CONTROL_SOCKET, "virtserialport,bus=serial.0,nr=1,chardev=con,name=bothy.control"),
            (wire::BULK_SOCKET, "virtserialport,bus=serial.0,nr=2,chardev=bul,name=bothy.bulk"),
        ] {
            argv.extend(["-chardev".into(), socket(name), "-device".into(), device.into()]);
        }
        argv.extend([
            "-chardev".into(),
            socket(wire::QMP_SOCKET),
            "-mon".into(),
            "chardev=qmp,mode=control".into(),
        ]);
        LaunchSpec {
            vm,
            vmm: "qemu-microvm test".into(),
            dir,
            argv,
            monitor: wire::Monitor::Qmp,
            tap: None,
            uid: UID,
            gid: UID,
            groups: vec![],
            cgroup: None,
            memory: None,
            restore: None,
            disks: vec![],
            jail: None,
        }
    }

    pub(crate) async fn launch(&self, spec: &LaunchSpec) -> (Holder, HolderHandle) {
        let (holder, running) = timeout(LONG, Holder::launch(program(), spec)).await.unwrap().unwrap();
        let handle = running.handle;
        self.note(handle);
        (holder, handle)
    }

    /// A process that was started otherwise, to be ended with the rest.
    pub(crate) fn note(&self, handle: HolderHandle) {
        self.started.lock().unwrap().push(handle);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for handle in self.started.lock().unwrap().iter() {
            if handle.holder.is_alive() {
                let _ = kill(pid(handle.holder.pid), Signal::SIGKILL);
            }
        }
    }
}

pub(crate) fn pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap())
}

pub(crate) async fn gone(handle: HolderHandle) {
    timeout(LONG, async {
        Holder::gone(handle.vmm).await.unwrap();
        Holder::gone(handle.holder).await.unwrap();
    })
    .await
    .unwrap();
}
