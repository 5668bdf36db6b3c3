//! `cargo xtask dist`: a tree to install or to put on `PATH`: `bin/`, `libexec/`, `share/`, as the units expect it.

use crate::{
    guest,
    say::{Failure, root, step, target},
    test,
};
use fs_err as fs;
use std::path::Path;

/// The binaries of the host.
const BINARIES: [&str; 7] = [
    "bothy",
    "bothy-gateway",
    "bothy-vm-agent",
    "bothy-vmm",
    "bothy-net-agent",
    "bothy-image-agent",
    "bothy-workspace-agent",
];

/// Builds and lays out `target/dist`.
pub(crate) fn run() -> Result<(), Failure> {
    let guest_binary = guest::run()?;
    test::check("build", &["build", "--workspace", "--bins", "--release"])?;
    let dist = target().join("dist");
    for dir in ["bin", "libexec/bothy", "share/bothy"] {
        fs::create_dir_all(dist.join(dir))?;
    }
    // What a recipe no longer has must not stay in an image built from here.
    fs::remove_dir_all(dist.join("share/bothy"))?;
    for name in BINARIES {
        replace(&target().join("release").join(name), &dist.join("bin").join(name))?;
    }
    let server = target().join("tools/nats-server");
    if server.is_file() {
        replace(&server, &dist.join("bin/nats-server"))?;
    }
    replace(&guest_binary, &dist.join("libexec/bothy/bothy-guest"))?;
    copy_tree(&root().join("guest/images"), &dist.join("share/bothy/images"))?;
    copy_tree(&root().join("deploy"), &dist.join("share/bothy/deploy"))?;
    step("dist", dist.display());
    Ok(())
}

/// A running program cannot be written to, but its file can be replaced.
fn replace(from: &Path, to: &Path) -> Result<(), Failure> {
    let beside = to.with_extension("new");
    fs::copy(from, &beside)?;
    Ok(fs::rename(&beside, to)?)
}

/// Links stay links: a recipe's tree has some that lead nowhere but in a guest.
fn copy_tree(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            fs::os::unix::fs::symlink(fs::read_link(entry.path())?, &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
