//! The wire's two directions: a task that writes frames, and the reading side with its decoder.

use crate::frame::{self, Decoder, Frame, Kind};
use bytes::Bytes;
use std::io;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
    task::JoinHandle,
};

/// Frames on their way to the wire, from all streams together. Few, so that a ping does not wait behind much.
const WRITE_QUEUE: usize = 4;
/// How much is read from the wire at once.
const READ: usize = 64 << 10;

/// What happened on the link.
#[derive(Debug)]
pub(crate) enum Event {
    /// A frame arrived.
    Frame(Frame),
    /// The control frame asked for last is on its way; frames sent from now on arrive after it.
    ControlSent,
}

/// The link over `io`. It reads and sends control frames while [`Link::next`] is awaited.
#[derive(Debug)]
pub(crate) struct Link<T> {
    reader: ReadHalf<T>,
    decoder: Decoder,
    wire: mpsc::Sender<Bytes>,
    /// The latest word on the session; an older one that was not sent yet no longer matters.
    control: Option<(Kind, u64)>,
    writer: JoinHandle<()>,
}

impl<T: AsyncRead + AsyncWrite + Send + 'static> Link<T> {
    /// Takes `io` over and starts the writing task; must be called within a tokio runtime.
    pub(crate) fn new(io: T) -> Self {
        let (reader, writer) = tokio::io::split(io);
        let (wire, frames) = mpsc::channel(WRITE_QUEUE);
        let writer = tokio::spawn(write(writer, frames));
        Self { reader, decoder: Decoder::default(), wire, control: None, writer }
    }

    /// Where frames for the wire go.
    pub(crate) fn wire(&self) -> mpsc::Sender<Bytes> {
        self.wire.clone()
    }

    /// Says `kind` about `session` as soon as the wire takes it.
    pub(crate) fn say(&mut self, kind: Kind, session: u64) {
        self.control = Some((kind, session));
    }

    /// What was last asked to be said and is not on its way yet.
    pub(crate) fn unsaid(&self) -> Option<Kind> {
        self.control.map(|(kind, _)| kind)
    }

    /// The next event; an error means that the port is gone. Cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<Event> {
        loop {
            if let Some(frame) = self.decoder.next() {
                return Ok(Event::Frame(frame));
            }
            let skipped = self.decoder.take_skipped();
            if skipped > 0 {
                tracing::trace!(skipped, "bytes outside of frames");
            }
            self.decoder.buffer().reserve(READ);
            tokio::select! {
                biased;
                room = self.wire.reserve(), if self.control.is_some() => {
                    let room = room.map_err(|_| closed())?;
                    if let Some((kind, session)) = self.control.take() {
                        room.send(frame::control(kind, session));
                        return Ok(Event::ControlSent);
                    }
                }
                () = self.wire.closed() => return Err(closed()),
                n = self.reader.read_buf(self.decoder.buffer()) => {
                    if n? == 0 {
                        return Err(closed());
                    }
                }
            }
        }
    }
}

impl<T> Drop for Link<T> {
    fn drop(&mut self) {
        // It may wait for a peer that never reads.
        self.writer.abort();
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the channel's port is closed")
}

async fn write<T: AsyncWrite>(mut io: WriteHalf<T>, mut frames: mpsc::Receiver<Bytes>) {
    while let Some(frame) = frames.recv().await {
        let written = async {
            io.write_all(&frame).await?;
            io.flush().await
        };
        if let Err(err) = written.await {
            tracing::debug!(%err, "writing to the channel's port");
            return;
        }
    }
}
