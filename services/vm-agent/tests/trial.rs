//! The trial of KVM ends with whoever makes it, however that ends: no QEMU of it is left behind.
//!
//! The one that makes it is this very program, started again beside a `bothy-vmm`, where an agent's is.

mod host;

use bothy_vm_agent::vmm::{
    accel::{self, Trial},
    holder::Holder,
    wire::Process,
};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::time::{sleep, timeout};

const DIR: &str = "BOTHY_TEST_TRIAL";
const LONG: Duration = Duration::from_secs(60);

/// Not a test: makes a trial with a QEMU that never says anything.
#[tokio::test]
#[ignore = "started by the other test"]
async fn the_agent() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let there = Path::new("/dev/null");
    let trial = Trial {
        qemu: &dir.join("qemu"),
        version: "10.0.2",
        kernel: there,
        initrd: there,
        memory: dir.join("accel.json"),
    };
    let finding = accel::find(&trial).await;
    fs_err::write(dir.join("found"), finding.reason).unwrap();
}

#[tokio::test]
async fn a_killed_agent_leaves_no_trial_behind() {
    if fs_err::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        host::not_checked("a_killed_agent_leaves_no_trial_behind", "without /dev/kvm there is no trial");
        return;
    }
    let dir = bothy_testkit::temp_dir();
    let at = |name: &str| dir.path().join(name);
    for (from, name) in [
        (std::env::current_exe().unwrap(), "agent"),
        (PathBuf::from(env!("CARGO_BIN_EXE_bothy-vmm")), "bothy-vmm"),
    ] {
        fs_err::copy(from, at(name)).unwrap();
    }
    fs_err::write(at("qemu"), format!("#!/bin/sh\necho $$ > {}\nexec sleep 1000\n", at("pid").display()))
        .unwrap();
    fs_err::set_permissions(at("qemu"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut agent = tokio::process::Command::new(at("agent"))
        .args(["--ignored", "--exact", "the_agent"])
        .env(DIR, dir.path())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let qemu = timeout(LONG, async {
        loop {
            assert!(!at("found").exists(), "no QEMU was started: {:?}", fs_err::read_to_string(at("found")));
            let pid = fs_err::read_to_string(at("pid")).ok().and_then(|text| text.trim().parse().ok());
            if let Some(process) = pid.and_then(Process::find) {
                return process;
            }
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap();
    assert!(qemu.is_alive());
    agent.kill().await.unwrap();
    timeout(LONG, Holder::gone(qemu)).await.unwrap().unwrap();
    assert!(!at("accel.json").exists(), "what was not found out is not remembered");
}
