//! A pseudo-terminal: the agent holds the master, the command has the other end as its three standard streams.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::unistd::{Uid, fchown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The master's end; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Master(Arc<AsyncFd<OwnedFd>>);

/// Opens a terminal that belongs to the user `uid`. The second value is the command's end.
///
/// # Errors
/// When `/dev/pts` is missing or no terminal is free.
pub(crate) fn open(rows: u16, cols: u16, uid: u32) -> io::Result<(Master, OwnedFd)> {
    let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    let ends = openpty(&size, None)?;
    for end in [&ends.master, &ends.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fchown(&ends.slave, Some(Uid::from_raw(uid)), None)?;
    fcntl(&ends.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok((Master(Arc::new(sys::watch(ends.master, Interest::READABLE | Interest::WRITABLE)?)), ends.slave))
}

impl Master {
    /// Reads what the command wrote. 0 when all its ends are closed and everything is read.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, into)?)).await;
        match read {
            // How Linux says "no other end is open any more", after the last byte.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => Ok(0),
            read => read,
        }
    }

    /// Types `bytes` on the terminal.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written =
                self.0.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?)).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// The process group in the foreground, which the terminal's keys send their signals to; `None` where there is none.
    pub(crate) fn foreground(&self) -> Option<i32> {
        nix::unistd::tcgetpgrp(self.0.get_ref()).ok().map(nix::unistd::Pid::as_raw)
    }

    /// Changes the size of the terminal; its foreground commands get SIGWINCH.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn resize(&self, rows: u16, cols: u16) -> io::Result<()> {
        sys::set_window(self.0.get_ref(), rows, cols)
    }
}
