//! A stream as users of this crate see it.

use crate::session::Health;
use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

/// A flow-controlled stream of bytes to or from a numbered guest port.
///
/// Shutting it down ends the direction to the peer, who reads to the end of file; the other direction goes on. Dropping
/// it without that is an abort: the peer reads what was written so far and then `ConnectionReset`, so that what was cut
/// off is never taken for complete. The end of the session is `ConnectionReset` too.
pub struct Stream {
    inner: Compat<yamux::Stream>,
    health: Arc<Health>,
    shut: bool,
    eof: bool,
    /// What must live as long as the stream: the host's count of streams, and its link.
    _held: Option<Box<dyn std::any::Any + Send>>,
}

impl Stream {
    pub(crate) fn new(inner: yamux::Stream, health: Arc<Health>) -> Self {
        Self { inner: inner.compat(), health, shut: false, eof: false, _held: None }
    }

    pub(crate) fn holding(mut self, held: impl Send + 'static) -> Self {
        self._held = Some(Box::new(held));
        self
    }

    /// yamux says the same end of file for a peer that finished and for one that vanished.
    fn was_cut_off(&self) -> bool {
        (self.inner.get_ref().is_closed() && !self.shut) || self.health.ended.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.inner.get_ref().id().to_string()).finish()
    }
}

fn reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the guest channel was reset")
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.eof || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if let Err(err) = ready!(Pin::new(&mut self.inner).poll_read(cx, buf)) {
            tracing::trace!(%err, "reading a stream");
            return Poll::Ready(Err(reset()));
        }
        if buf.filled().len() == before {
            if self.was_cut_off() {
                return Poll::Ready(Err(reset()));
            }
            self.eof = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.shut {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "the stream was shut down")));
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        Pin::new(&mut self.inner).poll_write(cx, buf).map_err(|_| reset())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx).map_err(|_| reset())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.inner).poll_shutdown(cx)).map_err(|_| reset())?;
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}
