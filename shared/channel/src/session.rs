//! One session: its two ends inside this process.
//!
//! [`Pipe`] is what yamux reads and writes; [`Feed`] is where the link puts what arrived. The link never waits for
//! yamux: it takes what comes off the wire into the session's queue at once, because a yamux that waits to write a pong
//! does not read, and two of those waiting for each other would wait for ever. What keeps the queue short is yamux' own
//! flow control; a peer that ignores it loses the session.

use crate::frame::{self, Frame, HEADER, Kind, MAX_PAYLOAD};
use bytes::{Buf, Bytes, BytesMut};
use futures::{AsyncRead, AsyncWrite};
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

/// What a session may have queued: every stream's whole window. An honest peer cannot have more under way.
pub(crate) const MAX_QUEUED: usize = crate::mux::MAX_WINDOW + (1 << 20);
/// What one queued frame costs beside its payload, so that many tiny ones count as well.
const FRAME_COST: usize = 64;

/// What both ends of a session share.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// The session is over, by whatever cause: an end of file that a stream sees from now on is not its peer's.
    pub(crate) ended: AtomicBool,
    /// The last frame could not be handed to the wire yet.
    pub(crate) blocked: AtomicBool,
    queued: AtomicUsize,
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("frame {got} arrived where {expected} was due")]
    Gap { expected: u32, got: u32 },
    #[error("the peer sent more than {MAX_QUEUED} bytes beyond what was read")]
    Flood,
    #[error("its streams are no longer served")]
    Unserved,
}

/// The link's end.
#[derive(Debug)]
pub(crate) struct Feed {
    id: u64,
    expected: u32,
    queue: mpsc::UnboundedSender<Bytes>,
    health: Arc<Health>,
}

impl Feed {
    /// Takes in a DATA frame; one of another session is ignored.
    pub(crate) fn deliver(&mut self, frame: Frame) -> Result<(), Broken> {
        if frame.session != self.id {
            return Ok(());
        }
        if frame.seq != self.expected {
            return Err(Broken::Gap { expected: self.expected, got: frame.seq });
        }
        self.expected = self.expected.wrapping_add(1);
        if frame.payload.is_empty() {
            return Ok(());
        }
        let cost = frame.payload.len() + FRAME_COST;
        if self.health.queued.fetch_add(cost, Ordering::Relaxed) + cost > MAX_QUEUED {
            return Err(Broken::Flood);
        }
        self.queue.send(frame.payload).map_err(|_| Broken::Unserved)
    }
}

/// Makes the two ends of session `id`; frames for the wire go to `wire`.
pub(crate) fn new(id: u64, wire: mpsc::Sender<Bytes>) -> (Feed, Pipe) {
    let (queue, arrived) = mpsc::unbounded_channel();
    let health = Arc::new(Health::default());
    let pipe = Pipe {
        id,
        arrived,
        current: Bytes::new(),
        wire: PollSender::new(wire),
        out: BytesMut::new(),
        next: 0,
        health: health.clone(),
    };
    (Feed { id, expected: 0, queue, health }, pipe)
}

/// yamux' end.
#[derive(Debug)]
pub(crate) struct Pipe {
    id: u64,
    arrived: mpsc::UnboundedReceiver<Bytes>,
    current: Bytes,
    wire: PollSender<Bytes>,
    out: BytesMut,
    next: u32,
    health: Arc<Health>,
}

impl Pipe {
    pub(crate) fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.out.len() <= HEADER {
            return Poll::Ready(Ok(()));
        }
        let room = self.wire.poll_reserve(cx);
        self.health.blocked.store(room.is_pending(), Ordering::Relaxed);
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the channel's port is closed");
        ready!(room).map_err(gone)?;
        let frame = frame::seal(&mut self.out, Kind::Data, self.id, self.next);
        self.next = self.next.wrapping_add(1);
        Poll::Ready(self.wire.send_item(frame).map_err(gone))
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.current.is_empty() {
            match ready!(self.arrived.poll_recv(cx)) {
                Some(next) => {
                    self.health.queued.fetch_sub(next.len() + FRAME_COST, Ordering::Relaxed);
                    self.current = next;
                }
                None => {
                    // Before yamux wakes the streams, so that none takes this for its peer's end of file.
                    self.health.ended.store(true, Ordering::Release);
                    return Poll::Ready(Ok(0));
                }
            }
        }
        let n = buf.len().min(self.current.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), self.current.get(..n)) {
            to.copy_from_slice(from);
        }
        self.current.advance(n);
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.out.len() >= HEADER + MAX_PAYLOAD {
            ready!(self.poll_send(cx))?;
        }
        if self.out.is_empty() {
            frame::begin(&mut self.out);
        }
        let n = buf.len().min(HEADER + MAX_PAYLOAD - self.out.len());
        self.out.extend_from_slice(buf.get(..n).unwrap_or_default());
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }
}
