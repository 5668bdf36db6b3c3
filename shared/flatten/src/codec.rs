//! From the bytes of a layer's file to those of its archive, with the digests of both, on a thread of its own: the
//! archive is taken apart while the next piece is decompressed.

use bothy_contract::{Code, Error};
use sha2::{Digest as _, Sha256};
use std::{
    io::{self, BufRead, Read},
    sync::{
        OnceLock,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

/// Told of bytes of layers that were gone through. Its error stops the work.
pub type Beat<'a> = &'a (dyn Fn(u64) -> Result<(), Error> + Send + Sync);

/// A piece of an archive on its way, and how many may wait.
const PIECE: usize = 512 << 10;
const WAITING: usize = 4;

/// The digests of a stream that was read to its end.
#[derive(Debug)]
pub(crate) struct Digests {
    /// As it is in its file.
    pub(crate) outer: String,
    /// Decompressed.
    pub(crate) inner: String,
}

/// A reader that takes the digest of what it gives.
struct Hashing<'a, R> {
    inner: R,
    hash: Sha256,
    beat: Beat<'a>,
    stopped: &'a OnceLock<Error>,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(to)?;
        self.hash.update(to.get(..n).unwrap_or_default());
        if let Err(e) = (self.beat)(n as u64) {
            let _ = self.stopped.set(e);
            return Err(io::Error::other("stopped"));
        }
        Ok(n)
    }
}

/// A stream, decompressed where it begins as a compressed one does.
pub struct Decoder<R: BufRead>(Inner<R>);

enum Inner<R: BufRead> {
    Plain(R),
    Gzip(Box<flate2::bufread::MultiGzDecoder<R>>),
    Zstd(zstd::Decoder<'static, R>),
}

impl<R: BufRead> std::fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("compressed", &self.is_compressed()).finish_non_exhaustive()
    }
}

impl<R: BufRead> Decoder<R> {
    /// The stream that `source` is at the start of.
    ///
    /// # Errors
    /// It cannot be read, or is compressed in a way that is not known here.
    pub fn new(mut source: R) -> Result<Self, Error> {
        let unreadable = |e: io::Error| Error::invalid(format!("it is damaged: {e}"));
        let start = source.fill_buf().map_err(unreadable)?;
        Ok(Self(match start {
            [0x1f, 0x8b, ..] => Inner::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                Inner::Zstd(zstd::Decoder::with_buffer(source).map_err(unreadable)?)
            }
            [0xfd, b'7', b'z', b'X', b'Z', ..] => return Err(unknown("xz")),
            [b'B', b'Z', b'h', ..] => return Err(unknown("bzip2")),
            _ => Inner::Plain(source),
        }))
    }

    /// Whether it is compressed.
    pub fn is_compressed(&self) -> bool {
        !matches!(self.0, Inner::Plain(_))
    }

    fn into_inner(self) -> R {
        match self.0 {
            Inner::Plain(r) => r,
            Inner::Gzip(d) => d.into_inner(),
            Inner::Zstd(d) => d.finish(),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Inner::Plain(r) => r.read(to),
            Inner::Gzip(d) => d.read(to),
            Inner::Zstd(d) => d.read(to),
        }
    }
}

fn unknown(what: &str) -> Error {
    Error::invalid(format!("it is compressed with {what}, which is not known here"))
        .hint("compress it with gzip or zstd, or not at all")
}

/// The end at which the archive comes out.
#[derive(Debug)]
pub(crate) struct Pieces {
    from: Receiver<Vec<u8>>,
    piece: io::Cursor<Vec<u8>>,
}

impl Read for Pieces {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.piece.read(to)?;
        if n > 0 || to.is_empty() {
            return Ok(n);
        }
        // The other end is gone: the end of the stream, or an error that it tells by itself.
        let Ok(next) = self.from.recv() else { return Ok(0) };
        self.piece = io::Cursor::new(next);
        self.piece.read(to)
    }
}

/// The two ends of a stream between threads.
pub(crate) fn pair() -> (SyncSender<Vec<u8>>, Pieces) {
    let (to, from) = sync_channel(WAITING);
    (to, Pieces { from, piece: io::Cursor::new(Vec::new()) })
}

/// Decompresses `source` into `to`, at most `limit` bytes, to the end of both. `None` where nobody takes the rest.
///
/// # Errors
/// The stream is damaged or too long, cannot be read, or `beat` says so.
pub(crate) fn decode<R: Read>(
    source: R,
    to: &SyncSender<Vec<u8>>,
    limit: impl Fn(u64) -> Result<(), Error>,
    beat: Beat<'_>,
) -> Result<Option<Digests>, Error> {
    let stopped = OnceLock::new();
    let outer = Hashing { inner: source, hash: Sha256::new(), beat, stopped: &stopped };
    let damaged = |e: &io::Error| {
        stopped.get().cloned().unwrap_or_else(|| Error::invalid(format!("it is damaged: {e}")))
    };
    let mut decoder = Decoder::new(io::BufReader::with_capacity(256 << 10, outer))
        .map_err(|e| stopped.get().cloned().unwrap_or(e))?;
    let mut hash = Sha256::new();
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let read = Read::by_ref(&mut decoder).take(PIECE as u64).read_to_end(&mut piece);
        if let Err(e) = read {
            return Err(damaged(&e));
        }
        if piece.is_empty() {
            break;
        }
        limit(piece.len() as u64)?;
        hash.update(&piece);
        if to.send(piece).is_err() {
            return Ok(None);
        }
    }
    let mut rest = decoder.into_inner();
    let copied = io::copy(&mut rest, &mut io::sink());
    if let Err(e) = copied {
        return Err(damaged(&e));
    }
    let outer = rest.into_inner();
    Ok(Some(Digests { outer: hex::encode(outer.hash.finalize()), inner: hex::encode(hash.finalize()) }))
}

/// Decompresses the whole of `source` into `to`, at most `limit` bytes.
///
/// # Errors
/// As for a layer; or `to` cannot be written.
pub fn decompress<R: Read>(
    source: R,
    to: &mut impl io::Write,
    limit: u64,
    beat: Beat<'_>,
) -> Result<u64, Error> {
    let stopped = OnceLock::new();
    let outer = Hashing { inner: source, hash: Sha256::new(), beat, stopped: &stopped };
    let damaged = |e: &io::Error| {
        stopped.get().cloned().unwrap_or_else(|| Error::invalid(format!("it is damaged: {e}")))
    };
    let decoder = Decoder::new(io::BufReader::with_capacity(256 << 10, outer))
        .map_err(|e| stopped.get().cloned().unwrap_or(e))?;
    let mut decoder = decoder.take(limit.saturating_add(1));
    match io::copy(&mut decoder, to) {
        Ok(n) if n > limit => Err(Error::new(
            Code::ResourceExhausted,
            format!("it has more than {} MiB once decompressed", limit >> 20),
        )),
        Ok(n) => Ok(n),
        Err(e) => Err(damaged(&e)),
    }
}
