//! The channel over a virtio socket device: each connection is a stream to its port, and the kernel keeps them apart.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, bind, getpeername, listen, shutdown,
    socket,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::{kmsg, sys};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Listens on one port for the host.
#[derive(Debug)]
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `port`.
    ///
    /// # Errors
    /// `EAFNOSUPPORT` where the kernel has no vsock; its drivers may not be in the image.
    pub(crate) fn new(port: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Self(sys::watch(fd, Interest::READABLE)?))
    }

    /// The host's next connection. One that does not come from the host is closed: nobody in the guest gets at the agent by
    /// way of a loopback.
    ///
    /// # Errors
    /// The kernel's; descriptors may be used up, which passes.
    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        loop {
            let accepted = self.0.async_io(Interest::READABLE, |fd| sys::accept(fd)).await?;
            let from = getpeername::<VsockAddr>(accepted.as_raw_fd())?.cid();
            if from == libc::VMADDR_CID_HOST {
                return Ok(Stream(sys::watch(accepted, Interest::READABLE | Interest::WRITABLE)?));
            }
            kmsg::info(&format!("refused a connection from vsock address {from}: it is not the host's"));
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Stream(AsyncFd<OwnedFd>);

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let read =
                guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref().as_fd(), into.initialize_unfilled())?));
            match read {
                Ok(Ok(count)) => {
                    into.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // It was not ready after all; the guard has noted that.
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref().as_fd(), from)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return Poll::Ready(done),
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match shutdown(self.0.get_ref().as_raw_fd(), Shutdown::Write) {
            // The host has gone already.
            Err(nix::errno::Errno::ENOTCONN) => Ok(()),
            done => done.map_err(io::Error::from),
        })
    }
}
