//! A virtio-serial port as an async byte stream.
//!
//! A port is not a connection (MACHINE facts): with no host it polls readable and hung-up, reads 0 and accepts no
//! write, and later works again on the same descriptor. So a read of 0 means "nothing yet", never the end. Tokio
//! takes a hang-up for final and would spin; therefore tokio watches an inner edge-triggered epoll instance,
//! which only ever becomes readable, and that one watches the port.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys;

const CLASS: &str = "/sys/class/virtio-ports";

/// Opens the port called `name`, waiting for the host's console device to announce it: ports appear after the
/// driver is loaded, and their names a moment after them.
///
/// # Errors
/// When the port does not appear within ten seconds, or cannot be opened (`EBUSY`: somebody has it).
pub(crate) async fn open(name: &str) -> io::Result<Port> {
    let until = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(device) = find(Path::new(CLASS), name) {
            return Port::open(&device);
        }
        if tokio::time::Instant::now() > until {
            let text = format!("no virtio-serial port `{name}`: is it on the VMM's command line?");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn find(class: &Path, name: &str) -> Option<PathBuf> {
    fs_err::read_dir(class).ok()?.flatten().find_map(|entry| {
        let text = fs_err::read_to_string(entry.path().join("name")).ok()?;
        (text.trim() == name).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// An open virtio-serial port.
#[derive(Debug)]
pub(crate) struct Port {
    file: std::fs::File,
    readable: Readiness,
    writable: Readiness,
}

impl Port {
    fn open(device: &Path) -> io::Result<Self> {
        use fs_err::os::unix::fs::OpenOptionsExt;
        let file = fs_err::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(device)?
            .into_file();
        Self::new(file)
    }

    /// `file` must be non-blocking.
    fn new(file: std::fs::File) -> io::Result<Self> {
        Ok(Self {
            readable: Readiness::new(&file, EpollFlags::EPOLLIN)?,
            writable: Readiness::new(&file, EpollFlags::EPOLLOUT)?,
            file,
        })
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.file.read(into.initialize_unfilled()) {
                Ok(0) => {}
                Ok(count) => {
                    into.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Poll::Ready(Err(error)),
            }
            ready!(this.readable.poll(context))?;
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            match this.file.write(from) {
                Ok(0) if !from.is_empty() => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                done => return Poll::Ready(done),
            }
            ready!(this.writable.poll(context))?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// "Something happened on the port in this direction since you last asked."
#[derive(Debug)]
struct Readiness(AsyncFd<std::os::fd::OwnedFd>, Epoll);

impl Readiness {
    fn new(port: &impl AsFd, flags: EpollFlags) -> io::Result<Self> {
        let inner = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        inner.add(port, EpollEvent::new(flags | EpollFlags::EPOLLET, 0))?;
        Ok(Self(sys::watch(inner.0.try_clone()?, Interest::READABLE)?, inner))
    }

    /// Ready once per event: the caller tries its read or write again, and comes back when that would block.
    fn poll(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.0.poll_read_ready(context))?;
        // In this order: an event between the two lines sets tokio's flag again and costs one more try.
        guard.clear_ready();
        self.1.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)?;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn pair() -> (Port, tokio::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let port = Port::new(std::fs::File::from(OwnedFd::from(ours))).unwrap();
        (port, tokio::net::UnixStream::from_std(theirs).unwrap())
    }

    #[tokio::test]
    async fn bytes_flow_both_ways_beyond_what_the_kernel_buffers() {
        let (port, host) = pair();
        let (mut port_in, mut port_out) = tokio::io::split(port);
        let (mut host_in, mut host_out) = tokio::io::split(host);
        let sent: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
        let (a, b) = (sent.clone(), sent.clone());
        let to_host = tokio::spawn(async move { port_out.write_all(&a).await });
        let to_port = tokio::spawn(async move { host_out.write_all(&b).await });
        let (mut at_host, mut at_port) = (vec![0; sent.len()], vec![0; sent.len()]);
        let (one, two) = tokio::join!(host_in.read_exact(&mut at_host), port_in.read_exact(&mut at_port));
        one.unwrap();
        two.unwrap();
        to_host.await.unwrap().unwrap();
        to_port.await.unwrap().unwrap();
        assert!(at_host == sent && at_port == sent);
    }

    #[tokio::test]
    async fn a_host_that_goes_is_not_the_end_and_costs_no_cpu() {
        let (mut port, host) = pair();
        drop(host);
        let mut polls = 0_u32;
        let mut buffer = [0; 8];
        let read = std::future::poll_fn(|context| {
            polls += 1;
            Pin::new(&mut port).poll_read(context, &mut ReadBuf::new(&mut buffer))
        });
        assert!(
            tokio::time::timeout(Duration::from_millis(200), read).await.is_err(),
            "never an end of file"
        );
        assert!(polls < 10, "polled {polls} times");
    }
}
