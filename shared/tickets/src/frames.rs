//! Framed streams: 1 byte type, 4 bytes big-endian length, payload. `D` is data, `E` the end with a JSON report, `X` an
//! error in its place. A stream without `E` or `X` was cut, and reading it is an error; so half a patch is never taken
//! for a whole one.

use bothy_contract::{Code, Error};
use bytes::{Buf, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// The most data in one frame, in bytes.
pub const MAX_DATA: usize = 64 << 10;
/// The longest report or error, in bytes.
pub const MAX_REPORT: usize = 1 << 20;

const HEADER: usize = 5;

/// Writes frames to `W`. After [`end`](Self::end) or [`fail`](Self::fail) nothing more may follow.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// A writer at the start of a stream.
    pub fn new(inner: W) -> Self {
        Self { inner }
    }

    /// Sends `data`, in as many frames as it takes.
    ///
    /// # Errors
    /// When the peer has gone.
    pub async fn data(&mut self, data: &[u8]) -> io::Result<()> {
        for part in data.chunks(MAX_DATA) {
            self.frame(b'D', part).await?;
        }
        Ok(())
    }

    /// Sends all of `reader` as data, with no more in memory than one frame, and says how many bytes that were.
    ///
    /// # Errors
    /// Reading or writing; the caller that can still write should [`fail`](Self::fail) the stream then.
    pub async fn copy_from<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> io::Result<u64> {
        let mut buffer = BytesMut::with_capacity(MAX_DATA);
        let mut total = 0;
        loop {
            buffer.clear();
            if reader.read_buf(&mut buffer).await? == 0 {
                return Ok(total);
            }
            total += buffer.len() as u64;
            self.data(&buffer).await?;
        }
    }

    /// Ends the stream well, with `report`, and flushes.
    ///
    /// # Errors
    /// When the peer has gone, or where `report` is no JSON or longer than [`MAX_REPORT`].
    pub async fn end<T: Serialize>(&mut self, report: &T) -> io::Result<()> {
        self.json(b'E', report).await
    }

    /// Ends the stream with `error`, and flushes.
    ///
    /// # Errors
    /// When the peer has gone.
    pub async fn fail(&mut self, error: &Error) -> io::Result<()> {
        self.json(b'X', error).await
    }

    /// The stream below.
    pub fn into_inner(self) -> W {
        self.inner
    }

    async fn json<T: Serialize>(&mut self, kind: u8, value: &T) -> io::Result<()> {
        let json = serde_json::to_vec(value)?;
        if json.len() > MAX_REPORT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the report is too long for a frame"));
        }
        self.frame(kind, &json).await?;
        self.inner.flush().await
    }

    async fn frame(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes();
        let [a, b, c, d] = length;
        let header = [kind, a, b, c, d];
        let mut whole = Buf::chain(&header[..], payload);
        self.inner.write_all_buf(&mut whole).await
    }
}

/// What a frame says. An `X` frame is an error of [`FrameReader::next`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Data, 1 to [`MAX_DATA`] bytes.
    Data(Bytes),
    /// The end, with a report.
    End(serde_json::Value),
}

/// Reads frames from `R`. It is also the data alone as an [`AsyncRead`], whose end of file is the `E` frame; the report is
/// there afterwards. It never reads beyond the frame it is in.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    header: [u8; HEADER],
    filled: usize,
    payload: BytesMut,
    /// Data that `poll_read` has not given yet.
    ready: Bytes,
    report: Option<serde_json::Value>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader at the start of a stream.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            header: [0; HEADER],
            filled: 0,
            payload: BytesMut::new(),
            ready: Bytes::new(),
            report: None,
        }
    }

    /// The next frame. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The peer's own, from an `X` frame; [`Code::Unavailable`] where the stream was cut; [`Code::Internal`] where it is not
    /// made of frames.
    pub async fn next(&mut self) -> Result<Frame, Error> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// The report, once the end was read. Reads to the end if it is not there yet, and refuses data before it.
    ///
    /// # Errors
    /// As for [`FrameReader::next`], or where the report is not a `T`.
    pub async fn report<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        let report = match self.report.take() {
            Some(report) => report,
            None => match self.next().await? {
                Frame::End(report) => report,
                Frame::Data(_) => return Err(garbled("data where the report should be")),
            },
        };
        serde_json::from_value(report).map_err(|e| garbled(&format!("an unknown report: {e}")))
    }

    /// The stream below.
    pub fn into_inner(self) -> R {
        self.inner
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, Error>> {
        while self.filled < HEADER {
            let (_, rest) = self.header.split_at_mut(self.filled);
            let n = ready!(poll_some(&mut self.inner, cx, rest))?;
            self.filled += n;
        }
        let [kind, a, b, c, d] = self.header;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let limit = match kind {
            b'D' => MAX_DATA,
            b'E' | b'X' => MAX_REPORT,
            _ => return Poll::Ready(Err(garbled("a frame of unknown type"))),
        };
        if length > limit || length == 0 {
            return Poll::Ready(Err(garbled("a frame of forbidden length")));
        }
        let mut part = [0; 16 << 10];
        while self.payload.len() < length {
            let want = (length - self.payload.len()).min(part.len());
            let (space, _) = part.split_at_mut(want);
            let n = ready!(poll_some(&mut self.inner, cx, space))?;
            self.payload.extend_from_slice(space.split_at(n).0);
        }
        self.filled = 0;
        let payload = self.payload.split().freeze();
        Poll::Ready(match kind {
            b'D' => Ok(Frame::Data(payload)),
            b'E' => serde_json::from_slice(&payload)
                .map(Frame::End)
                .map_err(|_| garbled("a report that is no JSON")),
            _ => {
                Err(serde_json::from_slice(&payload).unwrap_or_else(|_| garbled("an error that is no JSON")))
            }
        })
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for FrameReader<R> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ready.is_empty() && this.report.is_none() {
            match ready!(this.poll_frame(cx)).map_err(io::Error::other)? {
                Frame::Data(data) => this.ready = data,
                Frame::End(report) => this.report = Some(report),
            }
        }
        let n = this.ready.len().min(buf.remaining());
        buf.put_slice(&this.ready.split_to(n));
        Poll::Ready(Ok(()))
    }
}

/// Reads at least one byte, or fails.
fn poll_some<R: AsyncRead + Unpin>(
    reader: &mut R,
    cx: &mut Context<'_>,
    space: &mut [u8],
) -> Poll<Result<usize, Error>> {
    let mut buf = ReadBuf::new(space);
    let read = ready!(Pin::new(reader).poll_read(cx, &mut buf));
    Poll::Ready(match read {
        Ok(()) if buf.filled().is_empty() => {
            Err(Error::new(Code::Unavailable, "the stream was cut before its end"))
        }
        Ok(()) => Ok(buf.filled().len()),
        Err(e) => Err(Error::new(Code::Unavailable, format!("the stream broke: {e}"))),
    })
}

fn garbled(what: &str) -> Error {
    Error::new(Code::Internal, format!("the stream is not made of frames: {what}"))
}
