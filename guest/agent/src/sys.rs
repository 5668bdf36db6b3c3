//! What needs `unsafe`: four ioctls, signals outside the standard 31, descriptors that tokio watches or accept4 makes, and
//! the moment between fork and exec.
//! Everything else in this crate goes through the safe wrappers of `nix`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Grows the mounted ext4 file system that `directory` is on to `blocks` *file-system* blocks; the same or a
/// smaller number of blocks changes nothing (EXT4_IOC_RESIZE_FS, fs/ext4/ioctl.c).
///
/// # Errors
/// The kernel's, for instance `EBUSY` while another resize runs.
#[expect(unsafe_code, reason = "an ioctl that nix does not wrap")]
pub fn ext4_resize(directory: impl AsFd, blocks: u64) -> io::Result<()> {
    nix::ioctl_write_ptr!(resize_fs, b'f', 16, u64);
    // SAFETY: the descriptor is open for the call, and the kernel reads one u64 from a pointer to a live one.
    unsafe { resize_fs(directory.as_fd().as_raw_fd(), &raw const blocks) }?;
    Ok(())
}

/// The most entropy that one call of [`add_entropy`] takes, in bytes.
pub const MAX_ENTROPY: usize = 512;

/// Mixes `bytes` into the kernel's pool, credits them in full, and reseeds every CPU's generator at once, without
/// which clones of one snapshot go on reading identical bytes (random(4): RNDADDENTROPY, RNDRESEEDCRNG).
///
/// # Errors
/// When there are more than [`MAX_ENTROPY`] bytes, or the kernel refuses.
#[expect(unsafe_code, reason = "ioctls that nix does not wrap")]
pub fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; MAX_ENTROPY],
    }
    nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, 8), PoolInfo);
    nix::ioctl_none!(rnd_reseed, b'R', 0x07);
    let mut info = PoolInfo { entropy_bits: 0, size: 0, bytes: [0; MAX_ENTROPY] };
    let size = libc::c_int::try_from(bytes.len()).map_err(io::Error::other)?;
    info.bytes
        .get_mut(..bytes.len())
        .ok_or_else(|| io::Error::other(format!("more than {MAX_ENTROPY} bytes of entropy")))?
        .copy_from_slice(bytes);
    info.size = size;
    info.entropy_bits = size.saturating_mul(8);
    let random = fs_err::OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the descriptor is open; the kernel reads the two ints and then `size` bytes, all inside `info`.
    unsafe { rnd_add_entropy(random.as_raw_fd(), &raw const info) }?;
    // SAFETY: the descriptor is open and the request has no argument.
    unsafe { rnd_reseed(random.as_raw_fd()) }?;
    Ok(())
}

/// Sets the size of the terminal behind a pty's master; the kernel tells the foreground group (tty_ioctl(4)).
///
/// # Errors
/// The kernel's.
#[expect(unsafe_code, reason = "an ioctl that nix does not wrap")]
pub fn set_window(master: impl AsFd, rows: u16, cols: u16) -> io::Result<()> {
    nix::ioctl_write_ptr_bad!(set_winsize, libc::TIOCSWINSZ, libc::winsize);
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open for the call, and the kernel reads one winsize from a live one.
    unsafe { set_winsize(master.as_fd().as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Sends any signal, the real-time ones too (which `nix` cannot name), to a process, or to a group when `pid` is
/// negative (kill(2)).
///
/// # Errors
/// The kernel's: `ESRCH` when nobody is there.
#[expect(unsafe_code, reason = "nix has no real-time signals")]
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory.
    Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Has tokio watch `descriptor`, within a runtime.
///
/// # Errors
/// When epoll cannot watch such a descriptor.
#[expect(unsafe_code, reason = "tokio trusts the caller that the descriptor stays the same one")]
pub fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives, and `AsyncFd` gives out no `&mut` by itself.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// The next connection of a listening, non-blocking socket; it is non-blocking too.
///
/// # Errors
/// The kernel's; `WouldBlock` where there is none.
#[expect(unsafe_code, reason = "nix gives a number where it makes a descriptor")]
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    use nix::sys::socket::{SockFlag, accept4};
    let number = accept4(listener.as_fd().as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 has just made the descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What a command's process becomes between fork and exec.
#[derive(Debug, Clone)]
pub struct Become {
    /// The user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// All its groups.
    pub groups: Vec<u32>,
    /// Whether standard input is a terminal that shall be the controlling one.
    pub tty: bool,
}

/// Makes `command` run as `who` in a session (and so a process group) of its own.
#[expect(unsafe_code, reason = "code between fork and exec")]
pub fn on_start(command: &mut std::process::Command, who: Become) {
    use std::os::unix::process::CommandExt;
    let groups: Vec<libc::gid_t> = who.groups.clone();
    let prepare = move || -> io::Result<()> {
        // SAFETY: setsid takes nothing.
        Errno::result(unsafe { libc::setsid() })?;
        if who.tty {
            // SAFETY: descriptor 0 is the terminal; TIOCSCTTY takes an integer.
            Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        }
        // The raw system calls: glibc's would tell other threads of the parent, which are not there after a fork.
        // SAFETY: the kernel reads `groups.len()` ids from a live vector that was made before the fork.
        Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
        // SAFETY: takes integers.
        Errno::result(unsafe { libc::syscall(libc::SYS_setgid, who.gid) })?;
        // SAFETY: takes integers.
        Errno::result(unsafe { libc::syscall(libc::SYS_setuid, who.uid) })?;
        Ok(())
    };
    // SAFETY: `prepare` runs in the forked child: it makes system calls only, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}
