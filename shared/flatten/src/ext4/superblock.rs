//! The superblock, the groups' descriptors, and the bitmaps that they lead to.

use super::{
    FIRST_INODE, INODE, Shape,
    inode::Numbered,
    is_directory,
    raw::{Bitmap, put, put16, put32, zeros},
};
use crate::{
    groups::{self, PER_GROUP},
    space::{BLOCK, Space},
    tree::Tree,
};
use bothy_contract::Error;
use sha2::{Digest as _, Sha256};

/// The size of a group's descriptor.
pub(super) const DESCRIPTOR: usize = 32;
/// ext_attr.
const COMPATIBLE: u64 = 0x0008;
/// filetype, extents, flex_bg.
const INCOMPATIBLE: u64 = 0x0002 | 0x0040 | 0x0200;
/// sparse_super, large_file, dir_nlink, extra_isize.
const READ_ONLY: u64 = 0x0001 | 0x0002 | 0x0020 | 0x0040;

/// Writes them, and the spare copies of those that have some.
pub(super) fn write(
    space: &Space,
    shape: &Shape,
    used: &Bitmap,
    numbered: &Numbered,
    tree: &Tree,
) -> Result<(), Error> {
    let size = usize::try_from(BLOCK).unwrap_or_default();
    let groups = usize::try_from(shape.groups).unwrap_or_default();
    let mut descriptors = vec![0; (groups * DESCRIPTOR).next_multiple_of(size)];
    let mut inode_bitmaps = vec![0; groups * size];
    let mut block_bitmaps = Vec::with_capacity(groups * size);
    let mut hash = Sha256::new();
    let (mut free_blocks, mut free_inodes) = (0, 0);
    let mut order = numbered.order.iter().peekable();
    for (group, table) in (0..groups).zip(&shape.tables) {
        let g = group as u64;
        let first = g * shape.inodes_per_group + 1;
        let mut bits = Bitmap::new(PER_GROUP);
        if group == 0 {
            bits.set(0, (FIRST_INODE - 1).into());
        }
        let mut directories = 0;
        while let Some((number, id)) = order.next_if(|(n, _)| u64::from(*n) < first + shape.inodes_per_group)
        {
            bits.set(u64::from(*number) - first, 1);
            directories += u64::from(is_directory(tree, *id));
        }
        let here = shape.inodes_per_group - (PER_GROUP - zeros(bits.group(0)));
        // What the bitmap has bits for and the group no inodes.
        bits.set(shape.inodes_per_group, PER_GROUP - shape.inodes_per_group);
        put(&mut inode_bitmaps, group * size, bits.group(0));
        block_bitmaps.extend_from_slice(used.group(g));
        let free = zeros(used.group(g));
        let at = group * DESCRIPTOR;
        put32(&mut descriptors, at, groups::block(shape.metadata + g));
        put32(&mut descriptors, at + 4, groups::block(shape.metadata + shape.groups + g));
        put32(&mut descriptors, at + 8, groups::block(*table));
        put16(&mut descriptors, at + 12, free);
        put16(&mut descriptors, at + 14, here);
        put16(&mut descriptors, at + 16, directories);
        free_blocks += free;
        free_inodes += here;
    }
    hash.update(&block_bitmaps);
    space.write(shape.metadata, &block_bitmaps)?;
    space.write(shape.metadata + shape.groups, &inode_bitmaps)?;
    let mut sb = [0; 1024];
    let fields: [(usize, u64); 18] = [
        (0x00, shape.groups * shape.inodes_per_group),
        (0x04, shape.blocks),
        (0x0c, free_blocks),
        (0x10, free_inodes),
        // Blocks, and what they are counted in, of 1 KiB << 2.
        (0x18, 2),
        (0x1c, 2),
        (0x20, PER_GROUP),
        (0x24, PER_GROUP),
        (0x28, shape.inodes_per_group),
        (0x4c, 1),
        (0x54, FIRST_INODE.into()),
        (0x5c, COMPATIBLE),
        (0x60, INCOMPATIBLE),
        (0x64, READ_ONLY),
        // user_xattr, acl
        (0x100, 0x000c),
        // Names are hashed as signed bytes.
        (0x160, 0x0001),
        (0x174, 4),
        (0x08, 0),
    ];
    for (at, value) in fields {
        put32(&mut sb, at, value);
    }
    // Mounted as often as wanted, magic, clean, go on after errors; the inodes' size and that of their fields.
    for (at, value) in
        [(0x36, 0xffff), (0x38, 0xef53), (0x3a, 1), (0x3c, 1), (0x58, INODE as u64), (0x15c, 32), (0x15e, 32)]
    {
        put16(&mut sb, at, value);
    }
    put(&mut sb, 0xfc, &[1]);
    put(&mut sb, 0x78, b"rootfs");
    // A name of its own, which says the same of the same image.
    let digest = hash.finalize();
    let (uuid, seed) = digest.split_at(16);
    put(&mut sb, 0x68, uuid);
    put(&mut sb, 0xec, seed);
    for group in groups::backups(shape.groups) {
        let at = group * PER_GROUP * BLOCK;
        // Each says where it is.
        put16(&mut sb, 0x5a, group);
        space.write_at(at, &sb)?;
        space.write_at(at + BLOCK, &descriptors)?;
    }
    put16(&mut sb, 0x5a, 0);
    space.write_at(BLOCK, &descriptors)?;
    space.write_at(1024, &sb)
}
