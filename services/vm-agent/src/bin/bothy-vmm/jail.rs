//! A jail and what is in it, made while `launch` is still root; and the holder's part in it ([`bothy_vm_agent::vmm::jail`]).

use crate::{os_error, user};
use bothy_contract::Error;
use bothy_vm_agent::vmm::{
    jail::{Jail, PLACE, ROOT},
    wire::{LaunchSpec, Process},
};
use fs_err::os::unix::fs::symlink;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
};
use std::{
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::Path,
};

/// For the copy of Firecracker's program that its jailer makes, and little else.
const SIZE: &str = "size=64m,mode=0755";
const NONE: Option<&str> = None;

/// Makes the jail of `spec`, in a mount namespace of this process and of those that it starts, the first of which is the first
/// of a pid namespace too. Before the directory is the VM's user's: nobody can have put anything in the way.
pub(crate) fn make(spec: &LaunchSpec, jail: &Jail) -> Result<(), Error> {
    let place = spec.dir.join(PLACE);
    let made = || {
        umask(Mode::from_bits_truncate(0o022));
        std::fs::DirBuilder::new().mode(0o755).create(&place)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        // What the host mounts or takes down later shows here, too; nothing of here shows there.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
        // A file system of its own, since the run directory's may forbid programs and devices.
        mount(Some("bothy-jail"), &place, Some("tmpfs"), MsFlags::MS_NOSUID, Some(SIZE))?;
        let root = place.join(jail.root(spec.vm));
        fs_err::create_dir_all(&root)?;
        symlink(jail.root(spec.vm), place.join(ROOT))?;
        for file in &jail.files {
            let target = root.join(&file.name);
            fs_err::File::create_new(&target)?;
            bind(&file.path, &target, file.read_only)?;
        }
        fs_err::set_permissions(&root, std::fs::Permissions::from_mode(0o700))?;
        std::os::unix::fs::chown(&root, Some(spec.uid), Some(spec.gid))?;
        Ok(unshare(CloneFlags::CLONE_NEWPID)?)
    };
    made().map_err(|e: io::Error| {
        os_error(format!("cannot make the jail {}", place.display()))(e).hint(
            "the jail takes root with all its capabilities; without `vm.jailer` in bothy.toml there is none",
        )
    })
}

fn bind(from: &Path, to: &Path, read_only: bool) -> io::Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)?;
    if read_only {
        let flags = MsFlags::MS_REMOUNT
            | MsFlags::MS_BIND
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount(NONE, to, NONE, flags, NONE)?;
    }
    Ok(())
}

/// For the holder, which is root until the VMM's process is there: makes it the VM's user, as any other.
pub(crate) fn leave_root(spec: &LaunchSpec) -> Result<(), Error> {
    user::become_user(spec)?;
    // A change of user makes a process unreadable to others of that user, the agent's look into /proc among them; exec(2) would
    // undo that.
    nix::sys::prctl::set_dumpable(true).map_err(|e| Error::internal("cannot be seen by the agent", &e))
}

/// Lets the process that waits in [`wait`] go on.
pub(crate) fn release(word: OwnedFd) -> io::Result<()> {
    std::fs::File::from(word).write_all(b"\n")
}

/// For `exec`: waits until the holder is ready for its VMM.
pub(crate) fn wait() -> io::Result<()> {
    io::stdin().read_exact(&mut [0])
}

/// This process as the host knows it: `/proc` is the host's, whose numbers are others than those in the pid namespace.
pub(crate) fn this_process() -> Option<Process> {
    let own = fs_err::read_link("/proc/self").ok()?;
    Process::find(own.to_str()?.parse().ok()?)
}

/// Its only child, as the host knows it (proc_pid_task(5), `children`).
pub(crate) fn child() -> Option<Process> {
    let children = fs_err::read_to_string("/proc/thread-self/children").ok()?;
    Process::find(children.split_ascii_whitespace().next()?.parse().ok()?)
}
