//! File systems made without a mount: mkfs.ext4(8) fills them from a directory and, run by root, keeps owners.

use super::{Build, Stage};
use crate::{
    fault::{self, blocking},
    recipe::walk,
    tools::Tool,
};
use bothy_contract::{Code, Error};
use sha2::{Digest as _, Sha256};
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
/// The most that debugfs is told at once, in bytes.
const SCRIPT: usize = 1 << 20;
/// What an entry takes in a directory, on the average and with room to spare, in bytes.
const ENTRY: u64 = 64;
/// The clock of e2fsprogs' tools, in seconds since the epoch.
const CLOCK: &str = "E2FSPROGS_FAKE_TIME";
/// That of seeds.
const SEED_TIME: u64 = super::tree::EPOCH;
/// mkfs of a large tree takes seconds.
const DEADLINE: Duration = Duration::from_secs(10 * 60);

impl Build {
    pub(super) async fn pack_rootfs(&self, with: &Stage) -> Result<String, Error> {
        let tree = self.tree();
        let (blocks, inodes) =
            blocking(move || needs(&tree).map_err(|e| fault::io("cannot measure the image's tree", &e)))
                .await?;
        let image = self.out().join("rootfs.ext4");
        let time = self.newest().await?;
        clamp(&self.tree(), time).await?;
        // Nobody ever writes to it: no journal, no room for growth, none reserved, no checksums to compute at each read.
        let mkfs = mkfs(with, &image, "rootfs", blocks, time, "")
            .args(["-O", "^has_journal,^resize_inode,^metadata_csum,^64bit", "-m", "0"])
            .args([OsString::from("-N"), inodes.to_string().into(), "-d".into(), self.tree().into()])
            .args([OsString::from(&image), blocks.to_string().into()]);
        mkfs.run(&with.cancel, |_| ()).await?;
        settle(with, &image, &self.tree(), time).await?;
        publish(&image).await?;
        Ok(format!("{} MiB", blocks * BLOCK / (1 << 20)))
    }

    /// When the newest package was made, as `customise` has found.
    async fn newest(&self) -> Result<u64, Error> {
        let noted = self.work.join("newest");
        blocking(move || {
            let text = fs_err::read_to_string(noted)
                .map_err(|e| fault::io("cannot tell how new the packages are", &e))?;
            text.parse().map_err(|e| Error::internal("cannot tell how new the packages are", &e))
        })
        .await
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
    let grows = format!(",resize={SEED_MAX_BLOCKS},assume_storage_prezeroed=1,root_owner=0:0");
    let mut tool = mkfs(with, image, label, SEED_BYTES / BLOCK, SEED_TIME, &grows)
        .args(["-m", "0", "-J"])
        .arg(format!("size={SEED_JOURNAL_MIB}"));
    if let Some(dir) = home {
        clamp(dir, SEED_TIME).await?;
        tool = tool.args([OsString::from("-d"), dir.into()]);
    }
    let blocks = (SEED_BYTES / BLOCK).to_string();
    tool.args([OsString::from(image), blocks.into()]).run(&with.cancel, |_| ()).await?;
    if let Some(dir) = home {
        settle(with, image, dir, SEED_TIME).await?;
        make_home(with, image).await?;
    }
    publish(image).await
}

/// mkfs gives its own mode to the root of a file system and puts a `lost+found` in, which a home has not.
async fn make_home(with: &Stage, image: &Path) -> Result<(), Error> {
    let debugfs = |write: &[&str], command: &str| {
        let tool = Tool::new("debugfs", "e2fsprogs", DEADLINE).env(CLOCK, SEED_TIME.to_string());
        tool.args(write).args(["-R", command]).arg(image)
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

/// A file system that is the same whenever it is made of the same: it is made at `time`, and what is random elsewhere comes from its
/// label. `extended` are more of the options of `-E`, a comma in front of each.
fn mkfs(with: &Stage, image: &Path, label: &str, blocks: u64, time: u64, extended: &str) -> Tool {
    (with.progress)(0, Some(blocks * BLOCK), &format!("{label}: {}", image.display()));
    let [id, seed] = ["", " directories"].map(|of| uuid(&format!("bothy {label}{of}")));
    Tool::new("mkfs.ext4", "e2fsprogs", DEADLINE).env(CLOCK, time.to_string()).args([
        "-q",
        "-F",
        "-b",
        "4096",
        "-L",
        label,
        "-U",
        &id,
        "-E",
        &format!("hash_seed={seed}{extended}"),
    ])
}

/// Makes nothing in `tree`, and not itself, newer than `time`, in seconds since the epoch, and all last read then: mkfs.ext4 takes both
/// over.
async fn clamp(tree: &Path, time: u64) -> Result<(), Error> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let (tree, time) = (tree.to_owned(), time.cast_signed());
    let clamp = move || {
        for path in walk(&tree)?.into_iter().chain([tree]) {
            let changed = fs_err::symlink_metadata(&path)?.mtime().min(time);
            let [last_access, last_modification] =
                [time, changed].map(|tv_sec| Timespec { tv_sec, tv_nsec: 0 });
            let times = Timestamps { last_access, last_modification };
            utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok::<_, io::Error>(())
    };
    blocking(move || clamp().map_err(|e| fault::io("cannot set the times of an image's files", &e))).await
}

/// Gives what `image` has of `tree` the time `time` as that of its last change of status, which no file of the host can be given and
/// mkfs.ext4 takes over as well.
async fn settle(with: &Stage, image: &Path, tree: &Path, time: u64) -> Result<(), Error> {
    let of = tree.to_owned();
    let scripts = blocking(move || {
        scripts(&of, time).map_err(|e| fault::io("cannot look through an image's files", &e))
    })
    .await?;
    for script in scripts {
        let file = image.with_extension("debugfs");
        fs_err::write(&file, script).map_err(|e| fault::io("cannot write to the image's directory", &e))?;
        let tool =
            Tool::new("debugfs", "e2fsprogs", DEADLINE).env(CLOCK, time.to_string()).args(["-w", "-f"]);
        let ran = tool.args([&file, image]).run(&with.cancel, |_| ()).await;
        fs_err::remove_file(&file).map_err(|e| fault::io("cannot tidy the image's directory", &e))?;
        ran?;
    }
    Ok(())
}

/// What debugfs is told for that, in parts: it repeats each line, and only so much of what a tool says is read.
fn scripts(tree: &Path, time: u64) -> io::Result<Vec<String>> {
    let mut scripts = vec![String::new()];
    for path in walk(tree)? {
        let inside = path.strip_prefix(tree).unwrap_or(&path);
        // No package has others.
        let Some(name) = inside.to_str().filter(|name| !name.contains(['"', '\n'])) else { continue };
        if scripts.last().is_none_or(|last| last.len() > SCRIPT) {
            scripts.push(String::new());
        }
        if let Some(last) = scripts.last_mut() {
            last.push_str(&format!("set_inode_field \"/{name}\" ctime @{time}\n"));
        }
    }
    Ok(scripts)
}

/// A UUID made from `text`, RFC 9562's version 8.
fn uuid(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let mut bytes: [u8; 16] = digest.first_chunk().copied().unwrap_or_default();
    for (at, keep, version) in [(6, 0x0f, 0x80), (8, 0x3f, 0x80)] {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *byte & keep | version;
        }
    }
    let hex = hex::encode(bytes);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
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
        if meta.is_dir() {
            // Not by its size here, which depends on what was ever in it.
            inodes += 1;
            blocks += (fs_err::read_dir(&path)?.count() as u64 * ENTRY).div_ceil(BLOCK).max(1);
            continue;
        }
        if meta.nlink() > 1 && !linked.insert(meta.ino()) {
            continue;
        }
        inodes += 1;
        // A long link has at least one block.
        blocks += meta.len().div_ceil(BLOCK).max(u64::from(!meta.is_file()));
    }
    let inodes = inodes + 1024;
    // Inodes of 256 bytes; extents, bitmaps and directories' slack come to a few per cent.
    Ok((blocks + blocks / 20 + inodes * 256 / BLOCK + 4096, inodes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// The digests of a root file system and both seeds, made of a tree that was made just now.
    async fn packed(dir: &Path) -> Vec<String> {
        let build = Build {
            name: "a".parse().unwrap(),
            recipe: crate::recipe::Recipe::load(
                &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/images"),
                &bothy_contract::ImageName::default_image(),
            )
            .unwrap(),
            store: crate::store::Store::new(dir),
            netns: None,
            work: dir.join("work"),
        };
        let (tree, home) = (build.tree(), build.work.join("home"));
        for dir in [&tree.join("etc/deep"), &build.out(), &home.join(".ssh")] {
            fs_err::create_dir_all(dir).unwrap();
        }
        // A directory that had much in it.
        for n in 0..500 {
            fs_err::write(tree.join(format!("etc/{n}-{}", "x".repeat(100))), "").unwrap();
        }
        for n in 0..500 {
            fs_err::remove_file(tree.join(format!("etc/{n}-{}", "x".repeat(100)))).unwrap();
        }
        for n in 0..60 {
            fs_err::write(tree.join(format!("etc/deep/{n}")), format!("{n}").repeat(n * 100)).unwrap();
        }
        std::os::unix::fs::symlink("deep/1", tree.join("etc/link")).unwrap();
        fs_err::hard_link(tree.join("etc/deep/2"), tree.join("etc/same")).unwrap();
        fs_err::write(home.join(".profile"), "a home").unwrap();
        fs_err::write(build.work.join("newest"), "1750000000").unwrap();
        let with =
            Stage { cancel: tokio_util::sync::CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
        build.pack_rootfs(&with).await.unwrap();
        build.seeds(&with).await.unwrap();
        let files = ["rootfs.ext4", "system-seed.ext4", "work-seed.ext4"];
        files.map(|file| crate::digest::of_file(&build.out().join(file), &crate::digest::on).unwrap()).into()
    }

    #[tokio::test]
    async fn the_same_files_make_the_same_image_at_another_time() {
        bothy_testkit::require_root!();
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let first = packed(dirs[0].path()).await;
        // Another second, in which files, directories and file systems are made.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert_eq!(packed(dirs[1].path()).await, first);
        let other = tempfile::tempdir().unwrap();
        fs_err::create_dir_all(other.path().join("work/tree")).unwrap();
        fs_err::write(other.path().join("work/tree/more"), "").unwrap();
        assert_ne!(packed(other.path()).await[0], first[0], "and others another");
    }

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
