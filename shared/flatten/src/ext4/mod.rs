//! An ext4 file system around data that is in its place already. Format: the kernel's `Documentation/filesystems/ext4`.
//!
//! ```text
//!  0 superblock | 1.. group descriptors | 32.. data, as it came | directories, links, attributes | bitmaps | inodes
//! ```
//! Whoever shares it only reads it: no journal, no reserve. But a VM may have a copy of its own, which grows while it is mounted,
//! and the kernel wants the spare copies of superblock and descriptors for that ([`crate::groups`]); nothing else has to lie in
//! the middle of the data, with `flex_bg` all other metadata may lie behind it. There is no inode for growing: a kernel that
//! needs more blocks of descriptors than there are puts them elsewhere (`meta_bg`). Blocks of data that no file has any more
//! are free space.

mod dir;
mod inode;
mod raw;
mod superblock;
mod xattr;

pub(crate) use xattr::ROOM as XATTR_ROOM;

use crate::{
    Summary,
    groups::{self, HEAD, PER_GROUP},
    space::{BLOCK, Space, Span},
    tree::{Body, Id, Node, ROOT, Tree},
};
use bothy_contract::Error;
use inode::Numbered;
use raw::Bitmap;

/// The size of an inode, and how many are in a block.
const INODE: usize = 256;
const INODES_PER_BLOCK: u64 = BLOCK / INODE as u64;
/// The root directory's inode, and the first that is not reserved.
const ROOT_INODE: u32 = 2;
const FIRST_INODE: u32 = 11;

/// The shape of the file system.
#[derive(Debug)]
struct Shape {
    groups: u64,
    blocks: u64,
    inodes_per_group: u64,
    /// The place where the bitmaps begin: blocks', then inodes'.
    metadata: u64,
    /// The places of the inodes' tables, by group.
    tables: Vec<u64>,
}

impl Shape {
    /// The smallest for `inodes` inodes and what comes before place `metadata`.
    fn new(metadata: u64, inodes: u64) -> Self {
        let mut groups = 1;
        loop {
            let inodes_per_group = inodes.div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
            let each = inodes_per_group / INODES_PER_BLOCK;
            let mut next = metadata + 2 * groups;
            let mut tables = Vec::new();
            for _ in 0..groups {
                // Of a table only the first block is told.
                let table = groups::whole(next, each);
                tables.push(table);
                next = table + each;
            }
            // The last group has room for what may be at its start.
            let blocks = (groups::block(next - 1) + 1).max((groups - 1) * PER_GROUP + HEAD);
            let needed = blocks.div_ceil(PER_GROUP);
            if needed <= groups && inodes_per_group <= PER_GROUP {
                return Self { groups, blocks, inodes_per_group, metadata, tables };
            }
            groups = needed.max(groups + 1);
        }
    }

    /// How many blocks the groups' descriptors have.
    fn descriptors(&self) -> u64 {
        (self.groups * superblock::DESCRIPTOR as u64).div_ceil(BLOCK)
    }
}

/// Writes all but the data of `tree` to `space`. `written` are all runs of data that layers had, wanted or not.
pub(crate) fn write(mut tree: Tree, space: &Space, written: &mut [Span]) -> Result<Summary, Error> {
    // Checkers of file systems want it there.
    if tree.child(ROOT, b"lost+found").is_none() {
        let meta = crate::layer::Meta { mode: 0o700, ..Default::default() };
        tree.put(
            ROOT,
            b"lost+found",
            Node { meta, body: Body::Directory(std::collections::BTreeMap::new()) },
        );
    }
    let numbered = inode::number(&tree)?;
    let mut summary = Summary::default();
    let mut live = Vec::new();
    let mut made = Vec::new();
    let mut out = raw::Appender::new(space);
    for (_, id) in &numbered.order {
        let Some(node) = tree.node(*id) else { continue };
        match &node.body {
            Body::Directory(_) => summary.directories += 1,
            Body::File(span) => {
                summary.files += 1;
                summary.bytes += span.bytes;
                live.push(*span);
            }
            _ => {}
        }
        made.push(inode::write(&tree, &numbered, *id, node, &mut out)?);
    }
    out.flush()?;
    let inodes = u64::from(numbered.last.max(FIRST_INODE));
    let shape = Shape::new(space.next(), inodes);
    debug_assert!(shape.descriptors() < HEAD);

    let mut used = Bitmap::new(shape.groups * PER_GROUP);
    for group in std::iter::once(0).chain(groups::backups(shape.groups)) {
        used.set(group * PER_GROUP, 1 + shape.descriptors());
    }
    live.iter().for_each(|span| used.set_places(span.start, span.blocks()));
    out.taken().iter().for_each(|(place, count)| used.set_places(*place, *count));
    used.set_places(shape.metadata, 2 * shape.groups);
    let each = shape.inodes_per_group / INODES_PER_BLOCK;
    shape.tables.iter().for_each(|place| used.set_places(*place, each));
    // There are no blocks behind the last one.
    used.set(shape.blocks, shape.groups * PER_GROUP - shape.blocks);
    summary.hidden = punch(space, written, &mut live);

    tables(space, &shape, &numbered, &made)?;
    superblock::write(space, &shape, &used, &numbered, &tree)?;
    summary.size = shape.blocks * BLOCK;
    space.set_blocks(shape.blocks)?;
    Ok(summary)
}

/// Gives back the data that no file has, and says how much that is.
fn punch(space: &Space, written: &mut [Span], live: &mut Vec<Span>) -> u64 {
    written.sort_unstable();
    live.sort_unstable();
    live.dedup();
    let mut hidden = 0;
    let mut hole: Option<(u64, u64)> = None;
    for span in written.iter().filter(|s| s.bytes > 0 && live.binary_search(s).is_err()) {
        hidden += span.bytes;
        match &mut hole {
            Some((start, blocks)) if *start + *blocks == span.start => *blocks += span.blocks(),
            _ => {
                if let Some((start, blocks)) = hole.replace((span.start, span.blocks())) {
                    space.punch(start, blocks);
                }
            }
        }
    }
    if let Some((start, blocks)) = hole {
        space.punch(start, blocks);
    }
    hidden
}

/// Writes the inodes, a group at a time.
fn tables(space: &Space, shape: &Shape, numbered: &Numbered, made: &[[u8; INODE]]) -> Result<(), Error> {
    let mut inodes = numbered.order.iter().zip(made).peekable();
    for (group, place) in (0..).zip(&shape.tables) {
        let first = group * shape.inodes_per_group + 1;
        let size = usize::try_from(shape.inodes_per_group).unwrap_or_default() * INODE;
        let mut table = vec![0; size];
        let end = first + shape.inodes_per_group;
        while let Some(((number, _), inode)) = inodes.next_if(|((n, _), _)| u64::from(*n) < end) {
            let at = usize::try_from(u64::from(*number) - first).unwrap_or_default() * INODE;
            if let Some(place) = table.get_mut(at..at + INODE) {
                place.copy_from_slice(inode);
            }
        }
        space.write(*place, &table)?;
    }
    Ok(())
}

/// The directory that a node is in needs no number of its own: it is in the order before.
fn is_directory(tree: &Tree, id: Id) -> bool {
    tree.node(id).is_some_and(|n| matches!(n.body, Body::Directory(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Meta;
    use std::{os::unix::fs::FileExt as _, process::Command};

    #[test]
    fn large_files_have_as_many_extents_as_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let space = Space::create(&path, 64 << 30).unwrap();
        let mut tree = Tree::new();
        let mut spans = Vec::new();
        // Four extents are in the inode, more in a block. The data itself is holes.
        for (name, bytes) in [("three", 300 << 20), ("seven", (900 << 20) + 5), ("none", 0)] {
            let mut span = Span { start: 0, bytes };
            span.start = space.take(span.blocks()).unwrap();
            spans.push(span);
            tree.put(ROOT, name.as_bytes(), Node { meta: Meta::default(), body: Body::File(span) });
        }
        let summary = write(tree, &space, &mut spans).unwrap();
        assert_eq!((summary.files, summary.hidden), (3, 0));
        drop(space);
        let out = Command::new("e2fsck").arg("-fn").arg(&path).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        let said = Command::new("debugfs").args(["-R", "stat seven"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("Size: 943718405") && said.contains("(ETB0)"), "{said}");
    }

    /// Small files and large ones, directories, links and tables around the spare copies of groups 1 and 3.
    #[test]
    fn what_reaches_across_spare_copies_is_whole_and_the_copies_can_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let space = Space::create(&path, 64 << 30).unwrap();
        let mut tree = Tree::new();
        let mut put = |name: &str, body| {
            tree.put(ROOT, name.as_bytes(), Node { meta: Meta::default(), body });
        };
        let mut spans = Vec::new();
        let content = |seed: u32, blocks: u64| -> Vec<u8> {
            (0..blocks * BLOCK / 4 - 1).flat_map(|n| (n as u32).wrapping_mul(seed).to_le_bytes()).collect()
        };
        // To just before the copies, then files over them.
        let mut files = Vec::new();
        for (group, name, blocks) in [(1, "small", 7), (3, "large", 1000)] {
            let before = groups::runs(space.next(), 4 * PER_GROUP)
                .take_while(|(block, _)| *block < group * PER_GROUP)
                .map(|(_, count)| count)
                .sum::<u64>();
            space.take(before - 3).unwrap();
            let data = content(group as u32, blocks);
            let mut writer = crate::space::Writer::new(&space);
            let span = writer.file(data.len() as u64, &mut data.as_slice()).unwrap();
            writer.flush().unwrap();
            assert!(groups::runs(span.start, span.blocks()).count() == 2, "{name}");
            spans.push(span);
            put(name, Body::File(span));
            files.push((name, data));
        }
        for n in 0..200 {
            put(&format!("link{n}"), Body::Symlink(vec![b'x'; 100]));
        }
        let summary = write(tree, &space, &mut spans).unwrap();
        drop(space);
        let run = |program: &str, args: &[&str]| {
            let out = Command::new(program).args(args).arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(out.status.success(), "{program} {args:?}: {said}");
            (said, out.stdout)
        };
        run("e2fsck", &["-fn"]);
        for (name, data) in files {
            assert!(run("debugfs", &["-R", &format!("cat {name}")]).1 == data, "{name}");
        }
        // The copies, once the first of all is gone.
        fs_err::File::options().write(true).open(&path).unwrap().file().write_all_at(&[0; 2048], 0).unwrap();
        for group in [1, 3] {
            let said = run(
                "dumpe2fs",
                &["-o", "blocksize=4096", "-o", &format!("superblock={}", group * PER_GROUP)],
            )
            .0;
            assert!(said.contains(&format!("Block count:              {}", summary.size / BLOCK)), "{said}");
        }
        let mended =
            Command::new("e2fsck").args(["-fy", "-B", "4096", "-b", "98304"]).arg(&path).output().unwrap();
        assert!(matches!(mended.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&mended.stdout));
        run("e2fsck", &["-fn"]);
    }

    #[test]
    fn shapes_hold_what_they_must() {
        for (metadata, inodes) in [
            (40, 11),
            (32_700, 11),
            (40, 1_000_000),
            (3 * PER_GROUP, 70_000),
            (PER_GROUP - 3, 16),
            (3 * PER_GROUP - 40, 600_000),
        ] {
            let shape = Shape::new(metadata, inodes);
            assert!(shape.groups * shape.inodes_per_group >= inodes && shape.inodes_per_group <= PER_GROUP);
            assert_eq!(shape.blocks.div_ceil(PER_GROUP), shape.groups);
            let each = shape.inodes_per_group / INODES_PER_BLOCK;
            assert_eq!(shape.tables.len() as u64, shape.groups);
            for place in shape.tables {
                let runs: Vec<_> = groups::runs(place, each).collect();
                assert!(matches!(runs[..], [(first, count)] if first + count <= shape.blocks));
            }
        }
    }
}
