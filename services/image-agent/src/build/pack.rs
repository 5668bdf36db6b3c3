//! File systems made without a mount: mkfs.ext4(8) fills them from a directory and, run by root, keeps owners.

use super::{Build, Stage};
use crate::{
    fault::{self, blocking},
    recipe::walk,
    tools::Tool,
};
use bothy_contract::{Code, Error};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    time::Duration,
};

/// Every file system has blocks of this size: a resize in the guest counts in blocks, and the page size is the best.
const BLOCK: u64 = 4096;
/// A seed's size. Small, since its journal's size is fixed by it and its metadata is what a clone copies.
const SEED_BYTES: u64 = 64 << 20;
/// The journal of a seed, in MiB: it does not grow with the disk, so it is what a disk of tens of GiB wants.
const SEED_JOURNAL_MIB: u64 = 16;
/// A seed's file system can be grown to this many blocks, 4 TiB, while it is mounted.
const SEED_MAX_BLOCKS: u64 = (crate::disks::MAX_MIB << 20) / BLOCK;
/// mkfs of a large tree takes seconds.
const DEADLINE: Duration = Duration::from_secs(10 * 60);

impl Build {
    pub(super) async fn pack_rootfs(&self, with: &Stage) -> Result<String, Error> {
        let tree = self.tree();
        let (blocks, inodes) =
            blocking(move || needs(&tree).map_err(|e| fault::io("cannot measure the image's tree", &e)))
                .await?;
        let image = self.out().join("rootfs.ext4");
        // Nobody ever writes to it: no journal, no room for growth, none reserved, no checksums to compute at each read.
        let mkfs = mkfs(with, &image, "rootfs", blocks)
            .args(["-O", "^has_journal,^resize_inode,^metadata_csum,^64bit", "-m", "0"])
            .args([OsString::from("-N"), inodes.to_string().into(), "-d".into(), self.tree().into()])
            .args([OsString::from(&image), blocks.to_string().into()]);
        mkfs.run(&with.cancel, |_| ()).await?;
        publish(&image).await?;
        Ok(format!("{} MiB", blocks * BLOCK / (1 << 20)))
    }

    pub(super) async fn seeds(&self, with: &Stage) -> Result<String, Error> {
        seeds(with, &self.out(), &self.work.join("home")).await
    }
}

/// Makes both seeds of an image in `out`; the work-seed with what is in `home`.
pub(crate) async fn seeds(with: &Stage, out: &Path, home: &Path) -> Result<String, Error> {
    system_seed(with, &out.join("system-seed.ext4")).await?;
    work_seed(with, &out.join("work-seed.ext4"), home).await?;
    Ok(format!("{} MiB each, growing to {} GiB", SEED_BYTES >> 20, crate::disks::MAX_MIB >> 10))
}

/// Makes an empty file system that grows, for overlays.
pub(crate) async fn system_seed(with: &Stage, image: &Path) -> Result<(), Error> {
    seed(with, image, "system", None).await
}

/// Makes a file system that grows, with what is in `home` as a home.
pub(crate) async fn work_seed(with: &Stage, image: &Path, home: &Path) -> Result<(), Error> {
    seed(with, image, "work", Some(home)).await
}

/// Grows the file system in `image`, one that no guest has written to, to the size of the file or device.
pub(crate) async fn grow(with: &Stage, image: &Path) -> Result<(), Error> {
    // Forced: one that was ever mounted is else to be checked first, whether it was unmounted cleanly or not.
    let tool = Tool::new("resize2fs", "e2fsprogs", DEADLINE).arg("-f").arg(image);
    tool.run(&with.cancel, |_| ()).await.map(drop)
}

/// Gives the file system in `image` a journal.
pub(crate) async fn add_journal(with: &Stage, image: &Path) -> Result<(), Error> {
    let size = format!("size={SEED_JOURNAL_MIB}");
    let tool = Tool::new("tune2fs", "e2fsprogs", DEADLINE).args(["-J", &size]).arg(image);
    tool.run(&with.cancel, |_| ()).await.map(drop)
}

async fn seed(with: &Stage, image: &Path, label: &str, home: Option<&Path>) -> Result<(), Error> {
    // A new sparse file is all zeros, so neither mkfs nor the guest's kernel has to write any.
    let mut tool = mkfs(with, image, label, SEED_BYTES / BLOCK)
        .args(["-m", "0", "-J"])
        .arg(format!("size={SEED_JOURNAL_MIB}"))
        .arg("-E")
        .arg(format!("resize={SEED_MAX_BLOCKS},assume_storage_prezeroed=1,root_owner=0:0"));
    if let Some(dir) = home {
        tool = tool.args([OsString::from("-d"), dir.into()]);
    }
    let blocks = (SEED_BYTES / BLOCK).to_string();
    tool.args([OsString::from(image), blocks.into()]).run(&with.cancel, |_| ()).await?;
    if home.is_some() {
        make_home(with, image).await?;
    }
    publish(image).await
}

/// mkfs gives its own mode to the root of a file system and puts a `lost+found` in, which a home has not.
async fn make_home(with: &Stage, image: &Path) -> Result<(), Error> {
    let debugfs = |write: &[&str], command: &str| {
        Tool::new("debugfs", "e2fsprogs", DEADLINE).args(write).args(["-R", command]).arg(image)
    };
    for command in ["set_inode_field / mode 040700", "rmdir lost+found"] {
        debugfs(&["-w"], command).run(&with.cancel, |_| ()).await?;
    }
    // debugfs succeeds whatever it was told: what it did is looked up.
    let root = debugfs(&[], "stat /").run(&with.cancel, |_| ()).await?;
    let names = debugfs(&[], "ls -p /").run(&with.cancel, |_| ()).await?;
    if root.contains("Mode:  0700") && !names.contains("lost+found") {
        return Ok(());
    }
    Err(Error::new(Code::Internal, "debugfs did not make the work-seed a home")
        .hint("install e2fsprogs 1.47.0 or later"))
}

fn mkfs(with: &Stage, image: &Path, label: &str, blocks: u64) -> Tool {
    (with.progress)(0, Some(blocks * BLOCK), &format!("{label}: {}", image.display()));
    Tool::new("mkfs.ext4", "e2fsprogs", DEADLINE).args(["-q", "-F", "-b", "4096", "-L", label])
}

/// Makes a finished file public and read-only for all but root.
async fn publish(file: &Path) -> Result<(), Error> {
    let file = file.to_owned();
    blocking(move || {
        fs_err::set_permissions(&file, std::fs::Permissions::from_mode(0o644))
            .map_err(|e| fault::io("cannot publish an artifact", &e))
    })
    .await
}

/// The blocks and inodes that a file system with the content of `tree` needs, with a margin for its own metadata.
fn needs(tree: &Path) -> io::Result<(u64, u64)> {
    let (mut blocks, mut inodes) = (0, 0);
    let mut linked = BTreeSet::new();
    for path in walk(tree)? {
        let meta = fs_err::symlink_metadata(&path)?;
        if meta.nlink() > 1 && !meta.is_dir() && !linked.insert(meta.ino()) {
            continue;
        }
        inodes += 1;
        // A directory or a long link has at least one block.
        blocks += meta.len().div_ceil(BLOCK).max(u64::from(!meta.is_file()));
    }
    let inodes = inodes + 1024;
    // Inodes of 256 bytes; extents, bitmaps and directories' slack come to a few per cent.
    Ok((blocks + blocks / 20 + inodes * 256 / BLOCK + 4096, inodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tree_needs_counts_hard_links_once() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("a"), vec![1; 40 << 20]).unwrap();
        let (one, _) = needs(dir.path()).unwrap();
        fs_err::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let (both, _) = needs(dir.path()).unwrap();
        assert_eq!(one, both);
        assert!(one * BLOCK > 40 << 20 && one * BLOCK < 80 << 20);
    }
}
