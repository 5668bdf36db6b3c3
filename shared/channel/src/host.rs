//! The host's end: opens streams to ports of the guest.

use crate::{
    MAX_STREAMS, Stream,
    frame::Kind,
    link::{Event, Link},
    mux::Mux,
    session::{self, Feed, Health},
};
use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, mpsc, oneshot, watch},
};

/// Requests that wait for the guest's session.
const OPEN_QUEUE: usize = 16;

/// Opens streams over one virtio-serial port; clones share it.
///
/// The work is done by a task of its own, which ends when the last clone and the last stream are gone; what the guest has
/// not answered to by then may not have reached it.
#[derive(Debug, Clone)]
pub struct Connector {
    opens: mpsc::Sender<Open>,
    up: watch::Receiver<bool>,
    streams: Arc<Semaphore>,
}

type Opened = (yamux::Stream, Arc<Health>);
type Open = oneshot::Sender<Opened>;

impl Connector {
    /// Starts greeting the guest behind `io`; must be called within a tokio runtime.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (opens, requests) = mpsc::channel(OPEN_QUEUE);
        let (up_tx, up) = watch::channel(false);
        tokio::spawn(async move { Driver::new(io, requests, up_tx).run().await });
        Self { opens, up, streams: Arc::new(Semaphore::new(MAX_STREAMS)) }
    }

    /// Waits until the guest has answered and streams can be opened.
    ///
    /// # Errors
    /// The port is gone, which is for good.
    pub async fn ready(&self) -> io::Result<()> {
        self.up.clone().wait_for(|up| *up).await.map(|_| ()).map_err(|_| closed())
    }

    /// Whether the guest has answered and its session stands at the moment.
    pub fn is_ready(&self) -> bool {
        *self.up.borrow()
    }

    /// Opens a stream to `port`, once the guest's session is up. It waits for that as long as it takes: give it a
    /// deadline where that matters. Whether anything serves the port shows only when the stream is read: it is reset
    /// where nothing does.
    ///
    /// # Errors
    /// The port is gone (`BrokenPipe`, for good), [`MAX_STREAMS`] are open already (`QuotaExceeded`), or the session ended
    /// just now (`ConnectionReset`; trying again is safe).
    pub async fn open(&self, port: u32) -> io::Result<Stream> {
        let permit = self.streams.clone().try_acquire_owned().map_err(|_| {
            io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("{MAX_STREAMS} streams to the guest are open already"),
            )
        })?;
        let (reply, opened) = oneshot::channel();
        self.opens.send(reply).await.map_err(|_| closed())?;
        let (stream, health) =
            opened.await.map_err(|_| if self.opens.is_closed() { closed() } else { reset() })?;
        let mut stream = Stream::new(stream, health).holding((permit, self.clone()));
        stream.write_all(&port.to_be_bytes()).await?;
        stream.flush().await?;
        Ok(stream)
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the channel's port is closed")
}

fn reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the guest channel was reset")
}

struct Driver<T> {
    link: Link<T>,
    requests: mpsc::Receiver<Open>,
    up: watch::Sender<bool>,
    /// The session that was last said HELLO for.
    id: u64,
    live: Option<(Feed, Mux)>,
}

enum Step {
    Link(Event),
    Lost(io::Error),
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Driver<T> {
    fn new(io: T, requests: mpsc::Receiver<Open>, up: watch::Sender<bool>) -> Self {
        Self { link: Link::new(io), requests, up, id: 0, live: None }
    }

    /// Runs until the port is gone or nobody uses the channel any more.
    async fn run(mut self) {
        let Err(err) = self.serve().await else { return };
        tracing::debug!(%err, "the channel is closed");
    }

    async fn serve(&mut self) -> io::Result<()> {
        self.greet()?;
        loop {
            let step = tokio::select! {
                event = self.link.next() => Step::Link(event?),
                err = streams(&mut self.live, &mut self.requests) => Step::Lost(err),
                // Connectors hold the receivers, and streams hold connectors.
                () = self.up.closed() => return Ok(()),
            };
            match step {
                Step::Link(event) => self.on_link(event)?,
                Step::Lost(err) => self.lost(&err)?,
            }
        }
    }

    fn on_link(&mut self, event: Event) -> io::Result<()> {
        let Event::Frame(frame) = event else { return Ok(()) };
        match frame.kind {
            Kind::Ack if frame.session == self.id && self.live.is_none() => {
                let (feed, pipe) = session::new(self.id, self.link.wire());
                self.live = Some((feed, Mux::new(pipe, yamux::Mode::Client)));
                self.up.send_replace(true);
                Ok(())
            }
            Kind::Ready if self.live.is_some() => {
                self.lost(&io::Error::new(io::ErrorKind::ConnectionReset, "the guest began anew"))
            }
            Kind::Ready => {
                // Whoever read our HELLO may have died with it: say it again. The guest ignores it where it did not.
                if self.link.unsaid().is_none() {
                    self.link.say(Kind::Hello, self.id);
                }
                Ok(())
            }
            Kind::Data => match self.live.as_mut().map(|(feed, _)| feed.deliver(frame)) {
                Some(Err(err)) => self.lost(&err),
                _ => Ok(()),
            },
            Kind::Ack | Kind::Hello => Ok(()),
        }
    }

    fn lost(&mut self, err: &dyn std::error::Error) -> io::Result<()> {
        tracing::debug!(%err, "the session is lost");
        self.greet()
    }

    /// Ends the session, if any, and begins a new one.
    fn greet(&mut self) -> io::Result<()> {
        self.live = None;
        self.up.send_replace(false);
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(io::Error::other)?;
        self.id = u64::from_ne_bytes(id);
        self.link.say(Kind::Hello, self.id);
        Ok(())
    }
}

/// Moves the session's streams and opens the ones asked for, until the session ends.
async fn streams(live: &mut Option<(Feed, Mux)>, requests: &mut mpsc::Receiver<Open>) -> io::Error {
    poll_fn(|cx| match live {
        Some((_, mux)) => poll_streams(mux, requests, cx),
        None => Poll::Pending,
    })
    .await
}

fn poll_streams(mux: &mut Mux, requests: &mut mpsc::Receiver<Open>, cx: &mut Context<'_>) -> Poll<io::Error> {
    loop {
        match mux.poll_inbound(cx) {
            // Only the host opens streams: dropping this one resets it.
            Poll::Ready(Ok(stream)) => {
                tracing::debug!(%stream, "the guest tried to open a stream");
                continue;
            }
            Poll::Ready(Err(err)) => return Poll::Ready(err),
            Poll::Pending => {}
        }
        // Pending has registered us for the wire, so we are woken when it takes more.
        if mux.is_blocked() {
            return Poll::Pending;
        }
        // No more requests does not end the session: open streams go on.
        let Some(reply) = ready!(requests.poll_recv(cx)) else { return Poll::Pending };
        if reply.is_closed() {
            continue;
        }
        match mux.poll_open(cx) {
            Poll::Ready(Ok(stream)) => drop(reply.send((stream, mux.health()))),
            Poll::Ready(Err(err)) => return Poll::Ready(err),
            // yamux waits for acknowledgements: dropping the reply tells the caller to try again.
            Poll::Pending => {}
        }
    }
}
