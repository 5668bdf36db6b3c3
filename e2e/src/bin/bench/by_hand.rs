//! What the runs by hand need beside their command lines: disks and keys as bothy makes them.

use bothy_guest_proto::v1;
use std::{path::Path, process::Command};

/// Puts the image's seeds back in place of the pattern's disks, sized as they were.
pub(crate) fn pristine(image: &Path, disks: &[std::path::PathBuf]) {
    for (disk, seed) in disks.iter().filter_map(|d| Some((d, seed_of(d)?))) {
        let size = fs_err::metadata(disk).expect("a disk").len();
        let copied = Command::new("cp").arg("--sparse=always").arg(image.join(seed)).arg(disk).status();
        assert!(copied.expect("cp").success(), "cannot copy {seed}");
        fs_err::OpenOptions::new().write(true).open(disk).and_then(|f| f.set_len(size)).expect("its size");
    }
}

fn seed_of(disk: &Path) -> Option<&'static str> {
    match disk.file_name()?.to_str()? {
        "system.ext4" => Some("system-seed.ext4"),
        "work.ext4" => Some("work-seed.ext4"),
        _ => None,
    }
}

/// An ssh host key as bothy makes one, so that sshd starts alike.
pub(crate) fn host_keys(scratch: &Path) -> Vec<v1::File> {
    let key = scratch.join("host_key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.expect("ssh-keygen").success(), "no host key");
    let file = |path: &str, from: &Path, mode| v1::File {
        path: path.into(),
        content: fs_err::read(from).expect("the key"),
        mode,
    };
    vec![
        file("/etc/ssh/ssh_host_ed25519_key", &key, 0o600),
        file("/etc/ssh/ssh_host_ed25519_key.pub", &key.with_extension("pub"), 0o644),
    ]
}
