//! Reading an ext4 file system without mounting it: debugfs(8), which needs no kernel to trust what is in there.

use crate::{build::Stage, fault, tools::Tool};
use bothy_contract::{Code, Error};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// Dumping the modules of a large kernel takes seconds.
const DEADLINE: Duration = Duration::from_secs(300);
/// Where the superblock is, and in it the magic number and the incompatible features (Linux,
/// Documentation/filesystems/ext4/super.rst).
const SUPERBLOCK: u64 = 1024;
const MAGIC: (usize, u16) = (0x38, 0xEF53);
const INCOMPAT: usize = 0x60;
const RECOVER: u32 = 0x4;
const COMPAT: usize = 0x5c;
const HAS_JOURNAL: u32 = 0x4;
const SPARSE_SUPER2: u32 = 0x200;

/// Whether the ext4 file system in the file or device at `path` has a journal.
pub(crate) fn has_journal(path: &Path) -> Result<bool, Error> {
    let features = compatible(path).map_err(|e| fault::io("cannot read a root file system", &e))?;
    Ok(features & HAS_JOURNAL != 0)
}

/// Whether the kernel can grow the ext4 file system at `path` while it is mounted: not where it has no spare superblocks but those
/// that it names (fs/ext4/resize.c).
pub(crate) fn grows_mounted(path: &Path) -> io::Result<bool> {
    Ok(compatible(path)? & SPARSE_SUPER2 == 0)
}

/// The compatible features of the file system at `path`.
fn compatible(path: &Path) -> io::Result<u32> {
    use fs_err::os::unix::fs::FileExt as _;
    let mut word = [0; 4];
    fs_err::File::open(path)?.read_exact_at(&mut word, SUPERBLOCK + COMPAT as u64)?;
    Ok(u32::from_le_bytes(word))
}

/// Checks that the file at `path` is an ext4 file system that can be mounted as it is.
pub(crate) fn check(path: &Path) -> Result<(), Error> {
    use fs_err::os::unix::fs::FileExt as _;
    let mut block = [0; 1024];
    let refused = |why: &str| Error::new(Code::InvalidArgument, format!("{} {why}", path.display()));
    let file = fs_err::File::open(path).map_err(|e| fault::io("cannot read the root file system", &e))?;
    file.read_exact_at(&mut block, SUPERBLOCK).map_err(|_| refused("is too short for a file system"))?;
    let bytes =
        |at: usize| block.get(at..at + 4).and_then(|b| b.first_chunk::<4>()).copied().unwrap_or_default();
    let [low, high, ..] = bytes(MAGIC.0);
    if u16::from_le_bytes([low, high]) != MAGIC.1 {
        return Err(refused("is not an ext4 file system").hint(
            "make one with `mkfs.ext4 -d DIRECTORY FILE SIZE`, or bring a tar in with `bothy image import`",
        ));
    }
    if u32::from_le_bytes(bytes(INCOMPAT)) & RECOVER != 0 {
        return Err(refused(
            "was not unmounted cleanly: its journal must be replayed, and guests mount it read-only",
        )
        .hint(format!("`e2fsck -p {}`, and see that nothing has it mounted", path.display())));
    }
    Ok(())
}

/// An ext4 file system in a file.
pub(crate) struct Ext4<'a> {
    /// The file.
    pub(crate) file: &'a Path,
    /// Whose work this is.
    pub(crate) with: &'a Stage,
}

impl Ext4<'_> {
    async fn ask(&self, request: String) -> Result<String, Error> {
        let tool = Tool::new("debugfs", "e2fsprogs", DEADLINE).args(["-R", &request]).arg(self.file);
        tool.run(&self.with.cancel, |_| ()).await
    }

    /// The names in the directory `dir`; none where it is not there. Those that are no plain words are left out: they go into
    /// other requests.
    pub(crate) async fn names(&self, dir: &str) -> Result<Vec<String>, Error> {
        // With the dot a link is followed, as `/sbin` often is one to `usr/sbin`.
        let list = self.ask(format!("ls -p {}/.", dir.trim_end_matches('/'))).await?;
        // `/<inode>/<mode>/<uid>/<gid>/<name>/<size>/`
        let names = list.lines().filter_map(|line| line.split('/').nth(5));
        let plain = |name: &&str| {
            !name.is_empty()
                && !name.starts_with('.')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._+~".contains(c))
        };
        Ok(names.filter(plain).map(str::to_owned).collect())
    }

    /// Copies the tree at `path` to `to`, a directory that is there, under its own name.
    pub(crate) async fn dump_tree(&self, path: &str, to: &Path) -> Result<PathBuf, Error> {
        self.ask(format!("rdump {path} {}", quoted(to)?)).await?;
        self.dumped(path, to)
    }

    /// Copies the file at `path` into `to`, a directory that is there, under its own name.
    pub(crate) async fn dump(&self, path: &str, to: &Path) -> Result<PathBuf, Error> {
        let file = to.join(Path::new(path).file_name().unwrap_or_default());
        self.ask(format!("dump {path} {}", quoted(&file)?)).await?;
        self.dumped(path, to)
    }

    /// debugfs succeeds whatever it was told: what it did is looked up.
    fn dumped(&self, path: &str, to: &Path) -> Result<PathBuf, Error> {
        let made = to.join(Path::new(path).file_name().unwrap_or_default());
        match fs_err::symlink_metadata(&made) {
            Ok(_) => Ok(made),
            Err(_) => Err(Error::new(
                Code::FailedPrecondition,
                format!("{path} could not be read out of {}", self.file.display()),
            )),
        }
    }
}

/// A path as debugfs reads it.
fn quoted(path: &Path) -> Result<String, Error> {
    match path.to_str().filter(|p| !p.contains(['"', '\n'])) {
        Some(path) => Ok(format!("\"{path}\"")),
        None => Err(Error::invalid(format!("{} is no path that debugfs understands", path.display()))),
    }
}
