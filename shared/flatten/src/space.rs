//! The blocks of an image under way, given out in order to whoever has data, so that data of all layers can be written
//! side by side, each file in one run of blocks.

use crate::{
    failed,
    groups::{self, HEAD},
};
use bothy_contract::{Code, Error};
use fs_err::File;
use std::{
    io::Read,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// The size of a block.
pub(crate) const BLOCK: u64 = 4096;
/// What a writer of small files takes at once, in blocks.
const REGION: u64 = 1024;
/// A file of at least this many blocks gets blocks of its own.
const LARGE: u64 = 256;
/// What is written at once.
const CHUNK: usize = 1 << 20; // a multiple of a block

/// A file's data, at places behind one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    /// The place of its first block; 0 where it is empty.
    pub(crate) start: u64,
    /// The data's length in bytes.
    pub(crate) bytes: u64,
}

impl Span {
    /// How many blocks it has.
    pub(crate) fn blocks(self) -> u64 {
        self.bytes.div_ceil(BLOCK)
    }
}

/// The image's file and the first place that nobody has.
#[derive(Debug)]
pub(crate) struct Space {
    file: File,
    next: AtomicU64,
    end: u64,
}

impl Space {
    /// A new image at `path`, for at most `bytes` of data.
    pub(crate) fn create(path: &Path, bytes: u64) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| failed("cannot make the image", &e))?;
        // Files end in the middle of blocks, and directories need some too.
        let end = HEAD + (bytes / BLOCK).saturating_mul(2).clamp(1 << 20, 1 << 26);
        Ok(Self { file, next: AtomicU64::new(HEAD), end })
    }

    /// Takes `blocks` places in a row.
    pub(crate) fn take(&self, blocks: u64) -> Result<u64, Error> {
        let start = self.next.fetch_add(blocks, Ordering::Relaxed);
        if blocks > self.end || start > self.end - blocks {
            let most = ((self.end - HEAD) * BLOCK) >> 30;
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("the image would be larger than {most} GiB"),
            ));
        }
        Ok(start)
    }

    /// The first place that nobody has taken.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Writes at a place and those behind it.
    pub(crate) fn write(&self, place: u64, mut data: &[u8]) -> Result<(), Error> {
        for (block, count) in groups::runs(place, (data.len() as u64).div_ceil(BLOCK)) {
            let bytes = usize::try_from(count * BLOCK).unwrap_or(usize::MAX).min(data.len());
            let (here, behind) = data.split_at(bytes);
            self.write_at(block * BLOCK, here)?;
            data = behind;
        }
        Ok(())
    }

    /// Writes at a byte of the image.
    pub(crate) fn write_at(&self, at: u64, data: &[u8]) -> Result<(), Error> {
        self.file.file().write_all_at(data, at).map_err(|e| failed("cannot write the image", &e))
    }

    /// Makes the image so many blocks long.
    pub(crate) fn set_blocks(&self, blocks: u64) -> Result<(), Error> {
        self.file.set_len(blocks * BLOCK).map_err(|e| failed("cannot give the image its size", &e))
    }

    /// Gives the blocks at places back to the host, where its file system can do so. They read as zeros then, or as what they were:
    /// either is free space of the image.
    pub(crate) fn punch(&self, place: u64, count: u64) {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (block, count) in groups::runs(place, count) {
            let _ = fallocate(self.file.file(), flags, block * BLOCK, count * BLOCK);
        }
    }
}

/// Puts files into the image, one after the other.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    space: &'a Space,
    /// Where what is in `buffer` goes.
    at: u64,
    buffer: Vec<u8>,
    /// Blocks of the region behind `at`, those in `buffer` too.
    room: u64,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(space: &'a Space) -> Self {
        Self { space, at: 0, buffer: Vec::new(), room: 0 }
    }

    /// Writes the next `bytes` bytes of `from`, which must have as many.
    pub(crate) fn file(&mut self, bytes: u64, from: &mut impl Read) -> Result<Span, Error> {
        let span = Span { start: 0, bytes };
        let blocks = span.blocks();
        if blocks == 0 {
            return Ok(span);
        }
        if blocks >= LARGE {
            return self.large(span, from);
        }
        if self.room < self.waiting() + blocks {
            self.flush()?;
            self.at = self.space.take(REGION)?;
            self.room = REGION;
        }
        let start = self.at + self.waiting();
        let whole = self.buffer.len() + usize::try_from(blocks * BLOCK).unwrap_or(usize::MAX);
        fill(from, &mut self.buffer, bytes)?;
        self.buffer.resize(whole, 0);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(Span { start, bytes })
    }

    fn large(&self, span: Span, from: &mut impl Read) -> Result<Span, Error> {
        let start = self.space.take(span.blocks())?;
        let mut buffer = Vec::with_capacity(CHUNK);
        let mut done = 0;
        while done < span.bytes {
            let n = (span.bytes - done).min(CHUNK as u64);
            buffer.clear();
            fill(from, &mut buffer, n)?;
            self.space.write(start + done / BLOCK, &buffer)?;
            done += n;
        }
        Ok(Span { start, ..span })
    }

    /// Blocks in the buffer.
    fn waiting(&self) -> u64 {
        self.buffer.len() as u64 / BLOCK
    }

    /// Writes what waits.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        if !self.buffer.is_empty() {
            self.space.write(self.at, &self.buffer)?;
            let waiting = self.waiting();
            self.at += waiting;
            self.room -= waiting.min(self.room);
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Appends exactly `bytes` bytes.
fn fill(from: &mut impl Read, to: &mut Vec<u8>, bytes: u64) -> Result<(), Error> {
    let n = from.take(bytes).read_to_end(to).map_err(|e| failed("cannot read the archive", &e))?;
    if n as u64 == bytes {
        return Ok(());
    }
    Err(Error::invalid("it ends in the middle of a file's data"))
}
