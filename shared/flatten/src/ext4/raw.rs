//! Little-endian numbers into blocks, blocks in a row, and bitmaps.

use crate::{
    groups,
    space::{BLOCK, Space},
};
use bothy_contract::Error;

/// Puts bytes at an offset. What would not fit is not put: offsets are constants of the format.
pub(super) fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    debug_assert!(at + bytes.len() <= block.len());
    if let Some(place) = block.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// The low 16 bits of a number.
pub(super) fn put16(block: &mut [u8], at: usize, value: u64) {
    let [a, b, ..] = value.to_le_bytes();
    put(block, at, &[a, b]);
}

/// The low 32 bits of a number.
pub(super) fn put32(block: &mut [u8], at: usize, value: u64) {
    let [a, b, c, d, ..] = value.to_le_bytes();
    put(block, at, &[a, b, c, d]);
}

/// Blocks that are written one behind the other.
pub(super) struct Appender<'a> {
    space: &'a Space,
    start: u64,
    buffer: Vec<u8>,
    taken: Vec<(u64, u64)>,
}

/// What is written at once.
const CHUNK: usize = 1 << 20;

impl<'a> Appender<'a> {
    pub(super) fn new(space: &'a Space) -> Self {
        Self { space, start: 0, buffer: Vec::new(), taken: Vec::new() }
    }

    /// Takes whole blocks and says at which place they begin.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<u64, Error> {
        let blocks = (data.len() as u64).div_ceil(BLOCK);
        let start = self.space.take(blocks)?;
        match self.taken.last_mut() {
            // Nobody else takes any by now.
            Some((first, n)) if *first + *n == start => *n += blocks,
            _ => self.taken.push((start, blocks)),
        }
        if self.buffer.is_empty() {
            self.start = start;
        }
        let whole = self.buffer.len() + usize::try_from(blocks * BLOCK).unwrap_or_default();
        self.buffer.extend_from_slice(data);
        self.buffer.resize(whole, 0);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(start)
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.space.write(self.start, &self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    /// The places that were taken, as runs.
    pub(super) fn taken(&self) -> &[(u64, u64)] {
        &self.taken
    }
}

/// Which blocks are used.
pub(super) struct Bitmap {
    bytes: Vec<u8>,
}

impl Bitmap {
    pub(super) fn new(bits: u64) -> Self {
        Self { bytes: vec![0; usize::try_from(bits.div_ceil(8)).unwrap_or_default()] }
    }

    /// Sets the bits of the blocks at `count` places from `place`.
    pub(super) fn set_places(&mut self, place: u64, count: u64) {
        groups::runs(place, count).for_each(|(block, count)| self.set(block, count));
    }

    /// Sets `count` bits from `start`.
    pub(super) fn set(&mut self, start: u64, count: u64) {
        let mut bit = start;
        let end = start + count;
        while bit < end {
            let at = usize::try_from(bit / 8).unwrap_or(usize::MAX);
            let Some(byte) = self.bytes.get_mut(at) else { return };
            if bit.is_multiple_of(8) && end - bit >= 8 {
                *byte = 0xff;
                bit += 8;
            } else {
                *byte |= 1 << (bit % 8);
                bit += 1;
            }
        }
    }

    /// The bits of a group, as its block has them.
    pub(super) fn group(&self, group: u64) -> &[u8] {
        let size = usize::try_from(BLOCK).unwrap_or_default();
        let at = usize::try_from(group).unwrap_or_default() * size;
        self.bytes.get(at..at + size).unwrap_or_default()
    }
}

/// The bits that are not set.
pub(super) fn zeros(bits: &[u8]) -> u64 {
    bits.iter().map(|b| u64::from(b.count_zeros())).sum()
}
