//! Whether a VMM lives, and how its holder is found again when what was known of it is lost, stale or damaged: with the real
//! `bothy-vmm` and a real QEMU.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod host;

use bothy_contract::Code;
use bothy_vm_agent::vmm::{
    holder::Holder,
    liveness::{Found, Liveness, look, rediscover},
    wire::{self, HolderHandle, Process, State},
};
use host::{Host, LONG, UID, gone, pid};
use nix::sys::signal::{Signal, kill};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Waits until the holder answers.
async fn answers(holder: &Holder) -> wire::Status {
    timeout(LONG, async {
        loop {
            if let Ok(status) = holder.status().await {
                return status;
            }
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_holder_whose_socket_is_lost_listens_again() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = host.spec();
    let (holder, handle) = host.launch(&spec).await;
    let socket = spec.dir.join(wire::HOLDER_SOCKET);
    // Removed, again and again.
    for _ in 0..3 {
        fs_err::remove_file(&socket).unwrap();
        assert_eq!(answers(&holder).await.handle, handle);
    }
    // Replaced by somebody else's, which is then not talked to, and by what is no socket.
    let beside = spec.dir.join("vmm.log.other");
    let other = std::os::unix::net::UnixListener::bind(&beside).unwrap();
    fs_err::rename(&beside, &socket).unwrap();
    assert_eq!(answers(&holder).await.handle, handle);
    drop(other);
    fs_err::write(&beside, "").unwrap();
    fs_err::rename(&beside, &socket).unwrap();
    assert_eq!(answers(&holder).await.handle, handle);
    // Other files come and go without harm, and the way is as it was.
    fs_err::write(&beside, "").unwrap();
    fs_err::remove_file(&beside).unwrap();
    use std::os::unix::fs::MetadataExt;
    let meta = fs_err::metadata(&socket).unwrap();
    assert_eq!((meta.mode() & 0o777, meta.uid(), meta.gid()), (0o660, UID, 0));
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Alive(_)));
    holder.kill(9).await.unwrap();
    gone(handle).await;
    assert!(!socket.exists(), "it is not made again once its VMM has ended");
}

#[tokio::test]
async fn a_stale_handle_is_seen_through() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = host.spec();
    let (holder, handle) = host.launch(&spec).await;
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Alive(status) if status.handle == handle));
    assert!(matches!(look(&holder, None).await, Liveness::Alive(status) if status.handle == handle));
    let me = Process::find(std::process::id()).unwrap();
    let later = |process: Process| Process { start_time: process.start_time + 1, ..process };
    let stale = [
        // The ids came back to others.
        HolderHandle { vmm: later(handle.vmm), ..handle },
        HolderHandle { holder: later(handle.holder), ..handle },
        // Processes that live, and are somebody else.
        HolderHandle { vmm: me, ..handle },
        HolderHandle { holder: me, vmm: me },
        // Nobody at all.
        HolderHandle { holder: Process { pid: 0, start_time: 0 }, ..handle },
        HolderHandle { vmm: Process { pid: u32::MAX, start_time: 1 }, ..handle },
    ];
    for stale in &stale {
        assert!(!matches!(look(&holder, Some(stale)).await, Liveness::Alive(_)), "{stale:?}");
        let found = look(&holder, Some(stale)).await;
        assert!(matches!(&found, Liveness::Other(status) if status.handle == handle), "{stale:?}: {found:?}");
    }
    holder.kill(9).await.unwrap();
    gone(handle).await;
    for known in stale.iter().filter(|stale| stale.vmm != me && stale.holder != me).chain([&handle]) {
        let found = look(&holder, Some(known)).await;
        assert!(matches!(&found, Liveness::Dead { why } if !why.is_empty()), "{known:?}: {found:?}");
    }
    // Two that live, and keep nothing here.
    let found = look(&holder, Some(&HolderHandle { holder: me, vmm: me })).await;
    assert!(matches!(&found, Liveness::Mute { why } if why.code == Code::Unavailable), "{found:?}");
    assert_eq!(rediscover(&holder).await.unwrap(), None);
}

#[tokio::test]
async fn a_holder_is_found_again_without_any_record() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let (spec, beside) = (host.spec(), host.spec());
    let (holder, handle) = host.launch(&spec).await;
    let (_, neighbour) = host.launch(&beside).await;
    // What a record says is damaged beyond reading; the holder itself knows.
    let damaged = serde_json::to_string(&handle).unwrap().replace(':', ";");
    assert!(serde_json::from_str::<HolderHandle>(&damaged).is_err());
    let found = rediscover(&holder).await.unwrap().unwrap();
    assert_eq!(found.handle, handle);
    assert_eq!(found.status.unwrap().state, State::Running);

    // Its socket is gone and it does not get to making another: only its processes are left to be found by.
    kill(pid(handle.holder.pid), Signal::SIGSTOP).unwrap();
    fs_err::remove_file(spec.dir.join(wire::HOLDER_SOCKET)).unwrap();
    assert_eq!(rediscover(&holder).await.unwrap(), Some(Found { handle, status: None }));
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Mute { .. }));
    // By its own directory and user, though a neighbour runs as the same one here.
    let other = Holder::new(&beside.dir, UID);
    assert_eq!(rediscover(&other).await.unwrap().unwrap().handle, neighbour);
    let stranger = Holder::new(&spec.dir, UID + 1);
    assert_eq!(rediscover(&stranger).await.unwrap(), None);
    let nowhere = Holder::new(host.dir.path().join("none"), UID);
    assert_eq!(rediscover(&nowhere).await.unwrap(), None);

    kill(pid(handle.holder.pid), Signal::SIGCONT).unwrap();
    assert_eq!(answers(&holder).await.handle, handle);
    // A VMM for which nobody answers can still be ended, and that alone.
    kill(pid(neighbour.holder.pid), Signal::SIGSTOP).unwrap();
    fs_err::remove_file(beside.dir.join(wire::HOLDER_SOCKET)).unwrap();
    let later = Process { start_time: neighbour.vmm.start_time + 1, ..neighbour.vmm };
    other.kill_vmm(&HolderHandle { vmm: later, ..neighbour }, 9).await.unwrap();
    assert!(neighbour.vmm.is_alive());
    other.kill_vmm(&neighbour, 9).await.unwrap();
    timeout(LONG, Holder::gone(neighbour.vmm)).await.unwrap().unwrap();
    kill(pid(neighbour.holder.pid), Signal::SIGCONT).unwrap();
    timeout(LONG, Holder::gone(neighbour.holder)).await.unwrap().unwrap();
    assert_eq!(other.exit().unwrap().unwrap().signal, Some(9), "the holder comes to writing it down");

    // A holder that dies takes its VMM along, and then nothing is found.
    kill(pid(handle.holder.pid), Signal::SIGKILL).unwrap();
    gone(handle).await;
    assert!(matches!(look(&holder, Some(&handle)).await, Liveness::Dead { .. }));
    assert_eq!(rediscover(&holder).await.unwrap(), None);
}
