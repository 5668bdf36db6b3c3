//! What a guest has written is there after every orderly end.

use bothy_e2e::host::{Host, QUICK};
use bothy_testkit::require_root;
use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

#[test]
fn twenty_restarts_on_the_same_disks_keep_the_data() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("again", &[]);
    let mut boot = host.boot_id("again");
    let mut written = String::new();
    for round in 0..20 {
        host.sh("again", &format!("echo {round} >> /root/rounds; echo {round} >> /etc/rounds")).ok();
        written.push_str(&format!("{round}\n"));
        host.bothy(["vm", "restart", "again"]).ok();
        let read = host.sh("again", "cat /root/rounds; cat /etc/rounds").ok().stdout;
        assert_eq!(read, written.repeat(2), "after restart {round}");
        let now = host.boot_id("again");
        assert_ne!(now, boot, "restart {round} did not boot anew");
        boot = now;
    }
    // The file systems are whole, not only readable: ext4 counts what it found wrong.
    let errors = host.sh("again", "cat /sys/fs/ext4/*/errors_count").ok().stdout;
    assert!(!errors.is_empty() && errors.lines().all(|count| count == "0"), "{errors}");
    host.bothy(["vm", "delete", "again", "--force"]).ok();
    host.finish();
}

#[test]
fn a_stop_loses_no_completed_write() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("writer", &[]);

    // One that the guest has made sure of, and one that it has not.
    let sums = "cd /root && sha256sum synced unsynced /etc/synced /etc/unsynced";
    let write = "for dir in /root /etc; do \
                 dd if=/dev/urandom of=$dir/synced bs=64k count=32 conv=fsync status=none; done; \
                 for dir in /root /etc; do dd if=/dev/urandom of=$dir/unsynced bs=64k count=32 status=none; done; ";
    let before = host.sh("writer", &format!("{write}{sums}")).ok().stdout;
    assert_eq!(before.lines().count(), 4);

    // One that goes on until the stop cuts it off. What the host has heard of was written before.
    let mut command = host.command("bothy");
    let line = "i=0; while :; do i=$((i+1)); echo $i >> /root/count; echo $i; done";
    command.args(["vm", "exec", "writer", "--", "bash", "-c", line]);
    let mut counter = host.spawn(command.stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut lines = BufReader::new(counter.inner().stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "1");
    let heard = std::thread::spawn(move || lines.map_while(Result::ok).last());
    host.bothy(["vm", "stop", "writer"]).ok();
    assert_eq!(host.show("writer")["state"], "stopped");
    let heard: u64 = heard.join().unwrap().expect("more than one line").parse().unwrap();
    let _ = counter.inner().wait();

    host.bothy(["vm", "start", "writer"]).ok();
    assert_eq!(host.sh("writer", sums).ok().stdout, before);
    let kept: u64 = host.sh("writer", "tail -n 1 /root/count").ok().stdout.trim().parse().unwrap();
    assert!(kept >= heard, "the host heard of {heard}, the disk has {kept}");
    let whole = host.sh("writer", &format!("seq 1 {kept} | cmp - /root/count"));
    assert_eq!(whole.status, 0, "{whole:?}");

    // A kill is not orderly, and still loses nothing that was synced.
    host.sh("writer", "echo synced > /root/last && sync /root/last").ok();
    host.bothy(["vm", "kill", "writer"]).ok();
    host.bothy(["vm", "start", "writer"]).ok();
    assert_eq!(host.sh("writer", "cat /root/last").ok().stdout, "synced\n");
    host.bothy(["vm", "delete", "writer", "--force"]).ok();
    assert_eq!(host.bothy(["vm", "list", "--json"]).json().as_array().unwrap().len(), 0, "{QUICK}");
    host.finish();
}
