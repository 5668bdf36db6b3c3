//! The guest's end: accepts the streams that the host opens.

use crate::{
    Stream,
    frame::Kind,
    link::{Event, Link},
    mux::Mux,
    session::{self, Feed},
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use std::{future::poll_fn, io, task::Poll};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    sync::mpsc,
    task::JoinHandle,
};

/// Accepts streams on one virtio-serial port.
///
/// The work is done by a task of its own, which ends, and every stream with it, when the listener is dropped.
#[derive(Debug)]
pub struct Listener {
    accepted: mpsc::UnboundedReceiver<(u32, Stream)>,
    task: JoinHandle<io::Error>,
    failed: bool,
}

impl Listener {
    /// Starts listening on `io`; must be called within a tokio runtime.
    ///
    /// For a real port, `io` must not report an end of file while the host is away (a non-blocking read of 0 bytes with
    /// POLLHUP, see virtio-serial): it must wait. An end of file here means that the port is gone for good.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        // Unbounded, but never longer than the number of streams that yamux lets the host have open.
        let (accepted_tx, accepted) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move { Driver::new(io, accepted_tx).run().await });
        Self { accepted, task, failed: false }
    }

    /// The next stream and the port it was opened to. Sessions may come and go meanwhile.
    ///
    /// # Errors
    /// Only where the port itself is gone; every later call fails as well.
    pub async fn accept(&mut self) -> io::Result<(u32, Stream)> {
        if let Some(accepted) = self.accepted.recv().await {
            return Ok(accepted);
        }
        if std::mem::replace(&mut self.failed, true) {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the channel's port is closed"));
        }
        Err((&mut self.task).await.unwrap_or_else(io::Error::other))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Streams whose first four bytes are still to come.
type Opening = FuturesUnordered<BoxFuture<'static, Option<(u32, Stream)>>>;

struct Live {
    id: u64,
    feed: Feed,
    mux: Mux,
}

struct Driver<T> {
    link: Link<T>,
    accepted: mpsc::UnboundedSender<(u32, Stream)>,
    /// HELLO came and ACK is not on its way yet.
    greeted: Option<u64>,
    live: Option<Live>,
    opening: Opening,
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Driver<T> {
    fn new(io: T, accepted: mpsc::UnboundedSender<(u32, Stream)>) -> Self {
        Self { link: Link::new(io), accepted, greeted: None, live: None, opening: Opening::new() }
    }

    async fn run(mut self) -> io::Error {
        self.link.say(Kind::Ready, 0);
        loop {
            let event = tokio::select! {
                event = self.link.next() => event,
                stream = inbound(&mut self.live) => {
                    self.on_inbound(stream);
                    continue;
                }
                Some(opened) = self.opening.next() => {
                    if let Some(opened) = opened {
                        // The listener may just have been dropped; then the stream is as well.
                        drop(self.accepted.send(opened));
                    }
                    continue;
                }
            };
            match event {
                Ok(event) => self.on_link(event),
                Err(err) => return err,
            }
        }
    }

    fn on_link(&mut self, event: Event) {
        match event {
            Event::ControlSent => {
                if let Some(id) = self.greeted.take() {
                    let (feed, pipe) = session::new(id, self.link.wire());
                    self.live = Some(Live { id, feed, mux: Mux::new(pipe, yamux::Mode::Server) });
                }
            }
            Event::Frame(frame) => match frame.kind {
                Kind::Hello => {
                    let known = self.greeted.or(self.live.as_ref().map(|live| live.id));
                    // The host says it twice where our READY crossed its first.
                    if known != Some(frame.session) {
                        self.end();
                        self.greeted = Some(frame.session);
                        self.link.say(Kind::Ack, frame.session);
                    }
                }
                Kind::Data => {
                    if let Some(Err(err)) = self.live.as_mut().map(|live| live.feed.deliver(frame)) {
                        self.lost(&err);
                    }
                }
                Kind::Ready | Kind::Ack => {}
            },
        }
    }

    fn on_inbound(&mut self, stream: io::Result<yamux::Stream>) {
        match (stream, &self.live) {
            (Ok(stream), Some(live)) => {
                let mut stream = Stream::new(stream, live.mux.health());
                let port = async move {
                    let port = stream.read_u32().await.ok()?;
                    Some((port, stream))
                };
                self.opening.push(port.boxed());
            }
            (Err(err), _) => self.lost(&err),
            (Ok(_), None) => {}
        }
    }

    /// The session cannot go on, and the host may not know: ask it for a new one.
    fn lost(&mut self, err: &dyn std::error::Error) {
        tracing::debug!(%err, "the session is lost");
        self.end();
        self.link.say(Kind::Ready, 0);
    }

    fn end(&mut self) {
        self.greeted = None;
        self.live = None;
        self.opening.clear();
    }
}

async fn inbound(live: &mut Option<Live>) -> io::Result<yamux::Stream> {
    poll_fn(|cx| match live {
        Some(live) => live.mux.poll_inbound(cx),
        None => Poll::Pending,
    })
    .await
}
