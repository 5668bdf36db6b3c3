//! Open descriptors through a socket: how a file gets to a process that may not open it by its path (unix(7), SCM_RIGHTS).

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};
use tokio::{io::Interest, net::UnixStream};

/// The most descriptors that come with one request.
pub const MAX_FDS: usize = 2;

/// Sends `bytes`, few as they are, and with the first of them `fds` (sendmsg(2), SCM_RIGHTS).
///
/// # Errors
/// The peer is gone, or takes no more at the moment than a part.
pub async fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let bytes = [io::IoSlice::new(bytes)];
            Ok(sendmsg::<()>(stream.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None)?)
        })
        .await?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads one byte into `byte`, and the descriptors that come with it into `fds`; gives how many bytes that were, 0 at the end.
/// Cancel-safe.
///
/// # Errors
/// As for reading.
pub async fn receive(stream: &UnixStream, byte: &mut [u8; 1], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    stream
        .async_io(Interest::READABLE, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut into = [io::IoSliceMut::new(byte)];
            let got = recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            Ok(got.bytes)
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_err::os::unix::fs::FileExt;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn a_file_gets_through_with_its_byte_and_no_other() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&near, b"a", &[]).await.unwrap();
        send(&near, b"b", &[file.as_fd(), file.as_fd()]).await.unwrap();
        drop(near);
        let (mut byte, mut fds) = ([0], Vec::new());
        assert_eq!(receive(&far, &mut byte, &mut fds).await.unwrap(), 1);
        assert_eq!((byte, fds.len()), ([b'a'], 0));
        assert_eq!(receive(&far, &mut byte, &mut fds).await.unwrap(), 1);
        assert_eq!((byte, fds.len()), ([b'b'], 2));
        let got = fs_err::File::from_parts(fds.remove(0).into(), "received");
        got.write_all_at(b"through", 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 7);
        assert_eq!(receive(&far, &mut byte, &mut fds).await.unwrap(), 0);
    }
}
