//! A guest's port that can be held: what is to be saved with the guest must not move meanwhile.
//!
//! What QEMU has read from the port's socket it may still put into the guest's memory, and what it has not, stays in the
//! socket; what the holder reads while QEMU saves, the guest that goes on from there says again. So first nothing is written
//! any more, then it is read until nothing comes, then nothing is read.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    time::sleep,
};

const OPEN: u8 = 0;
const NO_WRITES: u8 = 1;
const HELD: u8 = 2;

/// How long a port must be silent to be quiet: QEMU hands on in microseconds what it has.
const SILENCE: Duration = Duration::from_millis(10);
/// How often that is tried. What comes from a guest that is stopped is a few MiB at most.
const TRIES: u32 = 200;

#[derive(Debug, Default)]
struct Shared {
    state: AtomicU8,
    read: AtomicU64,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

/// A port's stream.
#[derive(Debug)]
pub(crate) struct Port {
    stream: UnixStream,
    shared: Arc<Shared>,
}

/// Holds and releases it.
#[derive(Debug)]
pub(crate) struct Gate(Arc<Shared>);

/// A port and its gate, open.
pub(crate) fn new(stream: UnixStream) -> (Port, Gate) {
    let shared = Arc::new(Shared::default());
    (Port { stream, shared: shared.clone() }, Gate(shared))
}

impl Shared {
    /// Whether at least that much is held; then whoever asks is woken once it may be different.
    fn holds(&self, least: u8, waker: &AtomicWaker, cx: &Context<'_>) -> bool {
        if self.state.load(Ordering::Acquire) < least {
            return false;
        }
        waker.register(cx.waker());
        self.state.load(Ordering::Acquire) >= least
    }
}

/// Ports that are held, as long as this lives.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a [Gate]);

impl<'a> Held<'a> {
    /// Holds them once the stopped guest's last words are read.
    pub(crate) async fn quiet(gates: &'a [Gate]) -> Result<Self, String> {
        let held = Self(gates);
        held.set(NO_WRITES);
        for _ in 0..TRIES {
            let before = held.read();
            sleep(SILENCE).await;
            if held.read() == before {
                held.set(HELD);
                return Ok(held);
            }
        }
        Err("the guest's ports do not fall silent".into())
    }

    fn set(&self, state: u8) {
        for Gate(shared) in self.0 {
            shared.state.store(state, Ordering::Release);
            shared.reader.wake();
            shared.writer.wake();
        }
    }

    fn read(&self) -> u64 {
        self.0.iter().map(|Gate(shared)| shared.read.load(Ordering::Acquire)).sum()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.set(OPEN);
    }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.shared.holds(HELD, &self.shared.reader, cx) {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.shared.read.fetch_add((buf.filled().len() - before) as u64, Ordering::AcqRel);
        polled
    }
}

impl AsyncWrite for Port {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.shared.holds(NO_WRITES, &self.shared.writer, cx) {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    #[tokio::test]
    async fn a_held_port_moves_nothing_and_loses_nothing() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (port, gate) = new(near);
        let (mut reader, mut writer) = tokio::io::split(port);
        far.write_all(b"before").await.unwrap();
        let reading = tokio::spawn(async move {
            let mut all = [0; 11];
            reader.read_exact(&mut all[..6]).await.unwrap();
            reader.read_exact(&mut all[6..]).await.unwrap();
            all
        });
        let gates = [gate];
        let held = Held::quiet(&gates).await.unwrap();
        far.write_all(b"after").await.unwrap();
        let writing = tokio::spawn(async move {
            writer.write_all(b"held").await.unwrap();
        });
        let mut word = [0; 4];
        assert!(timeout(Duration::from_millis(50), far.read_exact(&mut word)).await.is_err());
        assert!(!reading.is_finished() && !writing.is_finished());
        drop(held);
        far.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"held");
        assert_eq!(&reading.await.unwrap(), b"beforeafter");
    }

    #[tokio::test]
    async fn a_port_that_never_falls_silent_is_not_held() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (mut port, gate) = new(near);
        let busy = tokio::spawn(async move {
            while far.write_all(b"x").await.is_ok() {
                sleep(Duration::from_millis(1)).await;
            }
        });
        let reading = tokio::spawn(async move { while port.read_u8().await.is_ok() {} });
        let gates = [gate];
        assert!(Held::quiet(&gates).await.unwrap_err().contains("silent"));
        assert_eq!(gates[0].0.state.load(Ordering::Acquire), OPEN);
        reading.abort();
        busy.abort();
    }
}
