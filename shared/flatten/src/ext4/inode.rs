//! Inodes: their numbers, and what is in each.

use super::{
    FIRST_INODE, INODE, ROOT_INODE, dir, is_directory,
    raw::{Appender, put, put16, put32},
    xattr,
};
use crate::{
    groups,
    space::{BLOCK, Span},
    tree::{Body, Id, Node, ROOT, Tree},
};
use bothy_contract::{Code, Error};

/// The most blocks in one extent.
const EXTENT: u64 = 32768;
/// Extents in an inode, and in a block.
const IN_INODE: usize = 4;
const IN_BLOCK: usize = 340;
/// The most names that a file may have, and subdirectories that are counted.
const MAX_LINKS: u32 = 65000;
const USES_EXTENTS: u64 = 0x8_0000;
/// How many bytes of fields there are behind the 128 of old.
const EXTRA: usize = 32;

/// All nodes that names lead to, with their inodes' numbers.
#[derive(Debug)]
pub(super) struct Numbered {
    /// In the order of the numbers.
    pub(super) order: Vec<(u32, Id)>,
    /// By node.
    of: Vec<u32>,
    links: Vec<u32>,
    /// By node: the directory that it is in, for directories.
    parent: Vec<Id>,
    /// The highest number.
    pub(super) last: u32,
}

impl Numbered {
    fn number(&self, id: Id) -> u32 {
        self.of.get(id).copied().unwrap_or_default()
    }
}

/// Gives numbers to all that names lead to, a directory's files behind one another.
pub(super) fn number(tree: &Tree) -> Result<Numbered, Error> {
    let n = tree.nodes.len();
    let mut numbered = Numbered {
        order: vec![(ROOT_INODE, ROOT)],
        of: vec![0; n],
        links: vec![0; n],
        parent: vec![ROOT; n],
        last: FIRST_INODE - 1,
    };
    set(&mut numbered.of, ROOT, ROOT_INODE);
    set(&mut numbered.links, ROOT, 2);
    let mut directories = vec![ROOT];
    while let Some(directory) = directories.pop() {
        let Some(Node { body: Body::Directory(children), .. }) = tree.node(directory) else { continue };
        let mut below = Vec::new();
        for &id in children.values() {
            if numbered.number(id) == 0 {
                numbered.last = numbered.last.checked_add(1).ok_or_else(too_many)?;
                set(&mut numbered.of, id, numbered.last);
                numbered.order.push((numbered.last, id));
            }
            if is_directory(tree, id) {
                set(&mut numbered.links, id, 2);
                set(&mut numbered.parent, id, directory);
                add(&mut numbered.links, directory);
                below.push(id);
            } else {
                add(&mut numbered.links, id);
                if numbered.links.get(id).is_some_and(|l| *l > MAX_LINKS) {
                    return Err(Error::invalid(format!("a file has more than {MAX_LINKS} names")));
                }
            }
        }
        directories.extend(below.into_iter().rev());
    }
    Ok(numbered)
}

fn too_many() -> Error {
    Error::new(Code::ResourceExhausted, "there are more files than a file system can have")
}

fn set<T>(of: &mut [T], at: usize, value: T) {
    if let Some(place) = of.get_mut(at) {
        *place = value;
    }
}

fn add(links: &mut [u32], at: usize) {
    if let Some(links) = links.get_mut(at) {
        *links = links.saturating_add(1);
    }
}

/// The inode of `node`. What does not fit into it goes to blocks.
pub(super) fn write(
    tree: &Tree,
    numbered: &Numbered,
    id: Id,
    node: &Node,
    out: &mut Appender<'_>,
) -> Result<[u8; INODE], Error> {
    let mut inode = [0; INODE];
    let meta = &node.meta;
    let mut size = 0;
    let mut blocks = 0;
    let kind = match &node.body {
        Body::Directory(children) => {
            let own = numbered.number(id);
            let parent = numbered.parent.get(id).map_or(own, |p| numbered.number(*p));
            let dots: [(&[u8], u32, dir::Type); 2] =
                [(b".", own, dir::Type::Directory), (b"..", parent, dir::Type::Directory)];
            let names =
                children.iter().map(|(name, id)| (name.as_ref(), numbered.number(*id), type_of(tree, *id)));
            let data = dir::blocks(dots.into_iter().chain(names));
            size = data.len() as u64;
            let start = out.push(&data)?;
            blocks = extents(&mut inode, Span { start, bytes: size }, out)?;
            0o040_000
        }
        Body::File(span) => {
            size = span.bytes;
            blocks = extents(&mut inode, *span, out)?;
            0o100_000
        }
        Body::Symlink(target) => {
            size = target.len() as u64;
            if target.len() < 60 {
                put(&mut inode, 0x28, target);
            } else {
                let start = out.push(target)?;
                blocks = extents(&mut inode, Span { start, bytes: size }, out)?;
            }
            0o120_000
        }
        Body::Device { block, major, minor } => {
            let (major, minor) = (u64::from(*major), u64::from(*minor));
            if major < 256 && minor < 256 {
                put32(&mut inode, 0x28, (major << 8) | minor);
            } else {
                put32(&mut inode, 0x2c, (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12));
            }
            if *block { 0o060_000 } else { 0o020_000 }
        }
        Body::Fifo => 0o010_000,
    };
    put16(&mut inode, 0x80, EXTRA as u64);
    if !meta.xattrs.is_empty() {
        let (_, room) = inode.split_at_mut(128 + EXTRA);
        if !xattr::inside(&meta.xattrs, room) {
            let block = xattr::block(&meta.xattrs)
                .ok_or_else(|| Error::new(Code::Internal, "attributes do not fit into their block"))?;
            put32(&mut inode, 0x68, groups::block(out.push(&block)?));
            blocks += 1;
        }
    }
    put16(&mut inode, 0, kind | u64::from(meta.mode));
    let (uid, gid) = (u64::from(meta.uid), u64::from(meta.gid));
    put16(&mut inode, 0x02, uid);
    put16(&mut inode, 0x78, uid >> 16);
    put16(&mut inode, 0x18, gid);
    put16(&mut inode, 0x7a, gid >> 16);
    put32(&mut inode, 0x04, size);
    put32(&mut inode, 0x6c, size >> 32);
    let (seconds, extra) = time(meta.mtime);
    for (at, more) in [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)] {
        put32(&mut inode, at, seconds);
        put32(&mut inode, more, extra);
    }
    let links = numbered.links.get(id).copied().unwrap_or(1);
    // Of a directory, one says that there are too many to count.
    put16(&mut inode, 0x1a, if links > MAX_LINKS { 1 } else { links.into() });
    put32(&mut inode, 0x1c, blocks * (BLOCK / 512));
    Ok(inode)
}

fn type_of(tree: &Tree, id: Id) -> dir::Type {
    match tree.node(id).map(|n| &n.body) {
        Some(Body::Directory(_)) => dir::Type::Directory,
        Some(Body::Symlink(_)) => dir::Type::Symlink,
        Some(Body::Device { block: true, .. }) => dir::Type::Block,
        Some(Body::Device { .. }) => dir::Type::Character,
        Some(Body::Fifo) => dir::Type::Fifo,
        Some(Body::File(_)) | None => dir::Type::File,
    }
}

/// A time as two numbers: 32 bits of seconds, and nanoseconds with two more bits of the seconds' upper part.
fn time((seconds, nanos): (i64, u32)) -> (u64, u64) {
    let seconds = seconds.clamp(i64::from(i32::MIN), (3 << 32) + i64::from(i32::MAX));
    let low = seconds & 0xffff_ffff;
    let epoch = (seconds - i64::from((low as u32).cast_signed())) >> 32;
    (low.cast_unsigned(), (u64::from(nanos) << 2) | (epoch.cast_unsigned() & 3))
}

/// Says in an inode which blocks its data has; gives their number, with those that say so.
fn extents(inode: &mut [u8; INODE], span: Span, out: &mut Appender<'_>) -> Result<u64, Error> {
    put32(inode, 0x20, USES_EXTENTS);
    let blocks = span.blocks();
    let mut all = Vec::new();
    let mut logical = 0;
    for (mut block, mut count) in groups::runs(span.start, blocks) {
        while count > 0 {
            let here = count.min(EXTENT);
            all.push((logical, block, here));
            (logical, block, count) = (logical + here, block + here, count - here);
        }
    }
    let (_, root) = inode.split_at_mut(0x28);
    if all.len() <= IN_INODE {
        leaf(root, IN_INODE, &all);
        return Ok(blocks);
    }
    let leaves: Vec<_> = all.chunks(IN_BLOCK).collect();
    if leaves.len() > IN_INODE {
        return Err(Error::new(Code::ResourceExhausted, "a file is larger than 160 GiB"));
    }
    head(root, leaves.len(), IN_INODE, 1);
    for (n, extents) in leaves.iter().enumerate() {
        let mut block = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
        leaf(&mut block, IN_BLOCK, extents);
        let at = groups::block(out.push(&block)?);
        let first = extents.first().map_or(0, |(logical, ..)| *logical);
        put32(root, 12 + 12 * n, first);
        put32(root, 16 + 12 * n, at);
        put16(root, 20 + 12 * n, at >> 32);
    }
    Ok(blocks + leaves.len() as u64)
}

fn head(node: &mut [u8], entries: usize, room: usize, depth: u64) {
    put16(node, 0, 0xf30a);
    put16(node, 2, entries as u64);
    put16(node, 4, room as u64);
    put16(node, 6, depth);
}

fn leaf(node: &mut [u8], room: usize, extents: &[(u64, u64, u64)]) {
    head(node, extents.len(), room, 0);
    for (n, (logical, start, length)) in extents.iter().enumerate() {
        let at = 12 + 12 * n;
        put32(node, at, *logical);
        put16(node, at + 4, *length);
        put16(node, at + 6, start >> 32);
        put32(node, at + 8, *start);
    }
}
