//! Leaving the initramfs: the agent first, which lives in the new root from its first line on, then PID 1 itself.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, execv};

use super::mounts;
use super::{BootError, Tried};

/// Where the new root is mounted until the switch.
pub(crate) const NEW_ROOT: &str = "/newroot";

/// systemd's shutdown leaves processes of root alone whose argv[0] begins with `@` (systemd: ROOT_STORAGE_DAEMONS);
/// so the agent answers until the machine is off.
const AGENT_NAME: &str = "@bothy-guest";

/// Starts the agent with its end of the link as standard input. It changes into the new root by itself, by path,
/// before it says anything, so the later move of that mount cannot race with it.
pub(super) fn spawn_agent(link: UnixStream) -> io::Result<Child> {
    // /dev and /proc have moved into the new root already.
    let null =
        fs_err::OpenOptions::new().read(true).write(true).open(format!("{NEW_ROOT}/dev/null"))?.into_file();
    Command::new("/init")
        .arg0(AGENT_NAME)
        .arg("agent")
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(link)))
        .stdout(Stdio::from(null.try_clone()?))
        .stderr(Stdio::from(null))
        .spawn()
}

/// Makes the new root `/` of PID 1 and of all that it starts.
pub(super) fn into_new_root() -> Result<(), BootError> {
    mounts::mount_pts(Path::new(NEW_ROOT))?;
    // What is in the initramfs is memory; the running binary stays until nobody runs it.
    for gone in ["/modules", "/init"] {
        let path = Path::new(gone);
        let removed = if path.is_dir() { fs_err::remove_dir_all(path) } else { fs_err::remove_file(path) };
        removed.tried(|| "empty the initramfs".into())?;
    }
    chdir(NEW_ROOT).tried(|| "change into the new root".into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .tried(|| "move the new root to /".into())?;
    chroot(".").tried(|| "make the new root the root".into())?;
    chdir("/").tried(|| "change to /".into())
}

/// Becomes the image's init.
pub(super) fn into_init() -> Result<Infallible, BootError> {
    into_new_root()?;
    let path = CString::from(c"/sbin/init");
    execv(&path, std::slice::from_ref(&path))
        .tried(|| "become the image's /sbin/init (an image without one has init style `agent`)".into())
}
