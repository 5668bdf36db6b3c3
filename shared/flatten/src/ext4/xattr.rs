//! Extended attributes: in the inode where they fit there, else in a block of their own.

use super::raw::{put, put16, put32};

/// What all attributes of an inode may take together, each with its head: less than a block, whose own head is 32 bytes.
pub(crate) const ROOM: usize = 4000;

const MAGIC: u64 = 0xea02_0000;
/// An entry without its name.
const ENTRY: usize = 16;
/// The head of a block of attributes.
const HEAD: usize = 32;

/// The number that stands for the first part of a name, and the rest of it.
fn split(name: &[u8]) -> (u8, &[u8]) {
    for (index, prefix) in [(1, b"user.".as_slice()), (6, b"security.")] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return (index, rest);
        }
    }
    (0, name)
}

/// The attributes in the order in which ext4 has them.
fn sorted(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<(u8, &[u8], &[u8])> {
    let mut all: Vec<_> = xattrs
        .iter()
        .map(|(name, value)| {
            let (index, name) = split(name);
            (index, name, value.as_slice())
        })
        .collect();
    all.sort_by_key(|(index, name, _)| (*index, name.len(), name.to_vec()));
    all
}

/// Puts the attributes behind the fields of an inode, if they fit into `room`.
pub(super) fn inside(xattrs: &[(Vec<u8>, Vec<u8>)], room: &mut [u8]) -> bool {
    let (head, rest) = room.split_at_mut(4);
    let mut area = vec![0; rest.len()];
    if fill(&sorted(xattrs), &mut area, 0, 0).is_none() {
        return false;
    }
    put32(head, 0, MAGIC);
    rest.copy_from_slice(&area);
    true
}

/// A block with the attributes.
pub(super) fn block(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<Vec<u8>> {
    let mut block = vec![0; usize::try_from(crate::space::BLOCK).ok()?];
    let hash = fill(&sorted(xattrs), &mut block, HEAD, 0)?;
    put32(&mut block, 0, MAGIC);
    // One inode has it, and it is one block.
    put32(&mut block, 4, 1);
    put32(&mut block, 8, 1);
    put32(&mut block, 12, hash.into());
    Some(block)
}

/// Entries from `at` on, values from the end down, with four zero bytes between. Offsets count from `base`.
fn fill(xattrs: &[(u8, &[u8], &[u8])], area: &mut [u8], mut at: usize, base: usize) -> Option<u32> {
    let mut end = area.len();
    let mut all = 0_u32;
    for (index, name, value) in xattrs {
        let length = (ENTRY + name.len()).next_multiple_of(4);
        end = end.checked_sub(value.len().next_multiple_of(4))?;
        if at + length + 4 > end {
            return None;
        }
        let hash = hash(name, value);
        put(area, at, &[u8::try_from(name.len()).ok()?, *index]);
        put16(area, at + 2, if value.is_empty() { 0 } else { (end - base) as u64 });
        put32(area, at + 8, value.len() as u64);
        put32(area, at + 12, hash.into());
        put(area, at + ENTRY, name);
        put(area, end, value);
        all = all.rotate_left(16) ^ hash;
        at += length;
    }
    Some(all)
}

/// The hash of one attribute: of its name, then of its value as little-endian words.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    let name = name.iter().fold(0_u32, |hash, b| hash.rotate_left(5) ^ u32::from(*b));
    value.chunks(4).fold(name, |hash, chunk| {
        let word = chunk.iter().rev().fold(0_u32, |word, b| (word << 8) | u32::from(*b));
        hash.rotate_left(16) ^ word
    })
}
