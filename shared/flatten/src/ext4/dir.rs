//! Directories: blocks of entries, one behind the other.

use super::raw::{put, put16, put32};
use crate::space::BLOCK;

/// What an entry says that its inode is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Type {
    File = 1,
    Directory = 2,
    Character = 3,
    Block = 4,
    Fifo = 5,
    Symlink = 7,
}

/// The head of an entry, before its name.
const HEAD: usize = 8;

/// A directory's blocks with `entries`, the first two of which are `.` and `..`.
pub(super) fn blocks<'a>(entries: impl Iterator<Item = (&'a [u8], u32, Type)>) -> Vec<u8> {
    let size = usize::try_from(BLOCK).unwrap_or_default();
    let mut out = vec![0; size];
    // Where the next entry goes, and where the last one began, whose length reaches to the end of its block.
    let (mut at, mut last) = (0, 0);
    for (name, inode, kind) in entries {
        let length = (HEAD + name.len()).next_multiple_of(4);
        let left = out.len() - at;
        if length > left {
            put16(&mut out, last + 4, (out_end(at, size) - last) as u64);
            at = out_end(at, size);
            out.resize(at + size, 0);
        }
        put32(&mut out, at, inode.into());
        put16(&mut out, at + 4, length as u64);
        put(&mut out, at + 6, &[u8::try_from(name.len()).unwrap_or(u8::MAX), kind as u8]);
        put(&mut out, at + HEAD, name);
        (last, at) = (at, at + length);
    }
    let end = out.len();
    put16(&mut out, last + 4, (end - last) as u64);
    out
}

/// The end of the block that `at` is in, or is the end of.
fn out_end(at: usize, size: usize) -> usize {
    at.next_multiple_of(size)
}
