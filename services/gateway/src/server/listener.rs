//! The gateway's listener: it gives each user their share of connections.
//!
//! Everybody may connect, and a connection may be silent for as long as it likes: a channel or a watched operation mostly
//! is. So a user who opens connections without end must run out of them before the gateway runs out of descriptors, or
//! the vm-agent out of streams, for the others.

use super::Peer;
use crate::api;
use axum::serve::Listener;
use bothy_contract::{Code, Error};
use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
};

/// Connections that one user may have open at a time; each takes up to two descriptors here, and as many in the vm-agent.
/// Root has no such limit.
const MAX_CONNECTIONS: usize = 128;

type Open = Arc<Mutex<HashMap<u32, usize>>>;

/// Listens for everybody, and counts.
#[derive(Debug)]
pub struct PerUser {
    inner: UnixListener,
    open: Open,
}

impl PerUser {
    pub(super) fn new(inner: UnixListener) -> Self {
        Self { inner, open: Open::default() }
    }
}

impl Listener for PerUser {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        loop {
            // This one logs what fails, and tries again after a pause.
            let (stream, _) = Listener::accept(&mut self.inner).await;
            let peer = Peer::of(&stream);
            match Place::take(&self.open, peer) {
                Some(place) => return (Connection { stream, peer, _place: place }, ()),
                None => refuse(&stream, peer),
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Says why, as far as that can be said without waiting.
fn refuse(stream: &UnixStream, peer: Peer) {
    tracing::debug!(uid = peer.uid, "a user has too many connections");
    let message = format!("user {} has {MAX_CONNECTIONS} connections, which is the most", peer.uid);
    let error = Error::new(Code::ResourceExhausted, message)
        .hint("end some of the commands, channels or watches that are running");
    let body = serde_json::to_string(&error).unwrap_or_default();
    let status = api::status(error.code);
    let answer = format!(
        "HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    // A peer that is not there any more needs no reason.
    let _ = stream.try_write(answer.as_bytes());
}

/// One of a user's connections; given back when this is dropped.
#[derive(Debug)]
struct Place {
    open: Open,
    uid: u32,
}

impl Place {
    fn take(open: &Open, peer: Peer) -> Option<Self> {
        let mut users = open.lock().unwrap_or_else(PoisonError::into_inner);
        let have = users.entry(peer.uid).or_default();
        if peer.uid != 0 && *have >= MAX_CONNECTIONS {
            return None;
        }
        *have += 1;
        Some(Self { open: Arc::clone(open), uid: peer.uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut users = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(have) = users.get_mut(&self.uid) {
            *have -= 1;
            if *have == 0 {
                users.remove(&self.uid);
            }
        }
    }
}

/// A connection, and its place among its user's; also once it is a channel.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    peer: Peer,
    _place: Place,
}

impl Connection {
    pub(super) fn peer(&self) -> Peer {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_their_own_share() {
        let open = Open::default();
        let (alice, bob, root) = (Peer { uid: 1000 }, Peer { uid: 1001 }, Peer { uid: 0 });
        let mut places: Vec<_> = (0..MAX_CONNECTIONS).map(|_| Place::take(&open, alice).unwrap()).collect();
        assert!(Place::take(&open, alice).is_none());
        assert!(Place::take(&open, bob).is_some());
        places.pop();
        places.push(Place::take(&open, alice).unwrap());
        assert!(Place::take(&open, alice).is_none());
        let roots: Vec<_> = (0..=MAX_CONNECTIONS).filter_map(|_| Place::take(&open, root)).collect();
        assert_eq!(roots.len(), MAX_CONNECTIONS + 1);
        drop((places, roots));
        assert!(open.lock().unwrap().is_empty(), "who has gone is forgotten");
    }
}
