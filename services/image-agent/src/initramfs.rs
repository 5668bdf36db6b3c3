//! The initramfs of an image: this host's `bothy-guest` as `/init`, and the image's kernel modules.
//!
//! It is made on demand and kept by its key, the digests of what is in it: a new `bothy-guest` or kernel gives a
//! new file, beside the one that VMs of before were started with. It is not compressed: unpacking would be done by
//! the guest's emulated CPU, while the VMM maps the file from the host's page cache.

use crate::{
    cpio, fault,
    store::{Garbage, Image},
};
use bothy_contract::{Code, Error};
use sha2::{Digest as _, Sha256};
use std::{
    io::{self, BufReader, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Mount points that `bothy-guest` finds, with their permissions.
const DIRECTORIES: [(&str, u32); 5] =
    [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)];
/// An initramfs that is not current is kept this long, for a VM that is just being started with it.
const KEEP: Duration = Duration::from_secs(24 * 3600);
/// And this long where somebody asks for room: a create is long over by then.
const KEEP_PRUNING: Duration = Duration::from_secs(3600);

/// The initramfs files of this host.
#[derive(Debug)]
pub(crate) struct Initramfs {
    dir: PathBuf,
    guest: PathBuf,
    /// The digest of the guest binary, good for as long as the file is the same.
    digest: Mutex<Option<(Stamp, String)>>,
    /// One at a time: two makers of one file would only do the same work twice.
    making: Mutex<()>,
}

/// What tells that a file was replaced or written to: device, inode, size, and the time of its last change.
type Stamp = (u64, u64, u64, i64, i64);

impl Initramfs {
    /// Files below `dir`, with the `guest` binary.
    pub(crate) fn new(dir: PathBuf, guest: PathBuf) -> Self {
        Self { dir, guest, digest: Mutex::new(None), making: Mutex::new(()) }
    }

    /// Where the initramfs of `image` is, once it is made.
    fn path_of(&self, image: &Image) -> Result<PathBuf, Error> {
        let guest = self.guest_digest()?;
        let (modules, _) = image.artifact("modules")?;
        let mut key = Sha256::new();
        key.update(&guest);
        key.update(&modules.sha256);
        if let Some(before) = image.manifest.artifacts.get("initrd") {
            key.update(&before.sha256);
        }
        let mut key = hex::encode(key.finalize());
        key.truncate(32);
        Ok(self.dir.join(format!("{key}.cpio")))
    }

    /// The initramfs of `image`, made if it is not there.
    pub(crate) fn ensure(&self, image: &Image) -> Result<PathBuf, Error> {
        let path = self.path_of(image)?;
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if !path.is_file() {
            self.make(image, &path).map_err(|e| {
                fault::io(format!("cannot make the initramfs of image {}", image.manifest.name), &e)
            })?;
            self.prune(&path);
        }
        Ok(path)
    }

    fn make(&self, image: &Image, path: &Path) -> io::Result<()> {
        let temp = tempfile::Builder::new()
            .prefix(".initramfs-")
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(&self.dir)?;
        let mut before = io::BufWriter::new(temp);
        if image.manifest.artifacts.contains_key("initrd") {
            // An image's own archive goes first: where both have a file, the kernel takes the later one, which is ours. Archives
            // begin at multiples of four (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
            let (artifact, path) = image.artifact("initrd").map_err(io::Error::other)?;
            io::copy(&mut fs_err::File::open(path)?, &mut before)?;
            let odd = usize::try_from(artifact.size % 4).unwrap_or_default();
            before.write_all([0; 4].get(odd..).filter(|_| odd > 0).unwrap_or_default())?;
        }
        let mut archive = cpio::Writer::new(before);
        for (dir, permissions) in DIRECTORIES {
            archive.dir(dir, permissions)?;
        }
        archive.character("dev/console", 0o600, (5, 1))?;
        archive.character("dev/null", 0o666, (1, 3))?;
        archive.file("init", 0o755, &fs_err::read(&self.guest)?)?;
        let mut out = archive.finish()?;
        // Archives are joined end to end: the modules' is part of the image.
        let (_, modules) = image.artifact("modules").map_err(io::Error::other)?;
        io::copy(&mut fs_err::File::open(modules)?, &mut out)?;
        out.flush()?;
        let temp = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        // The umask took bits away.
        temp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
        temp.as_file().sync_all()?;
        temp.persist(path).map_err(|e| e.error)?;
        Ok(())
    }

    /// What none of `images` boots and is not recent; removed unless only a `look` is asked for.
    pub(crate) fn prune_all(&self, images: &[Image], look: bool) -> Result<Vec<Garbage>, Error> {
        let failed = |e: io::Error| fault::io("cannot look through the initramfs files", &e);
        let current = images.iter().map(|i| self.path_of(i)).collect::<Result<Vec<_>, _>>()?;
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let mut old = Vec::new();
        for entry in fs_err::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let meta = fs_err::symlink_metadata(&path).map_err(failed)?;
            let age = meta.modified().ok().and_then(|t| SystemTime::now().duration_since(t).ok());
            if !current.contains(&path) && age.is_some_and(|age| age > KEEP_PRUNING) {
                if !look {
                    fs_err::remove_file(&path).map_err(failed)?;
                }
                old.push(Garbage { path, allocated: meta.blocks() * 512 });
            }
        }
        old.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(old)
    }

    /// Removes what is neither current nor recent. What cannot be removed is tried again next time.
    fn prune(&self, current: &Path) {
        let Ok(entries) = fs_err::read_dir(&self.dir) else { return };
        for path in entries.flatten().map(|e| e.path()).filter(|p| p != current) {
            let age = fs_err::metadata(&path)
                .and_then(|m| m.modified())
                .map(|t| SystemTime::now().duration_since(t).unwrap_or_default());
            if age.is_ok_and(|age| age > KEEP) {
                let _ = fs_err::remove_file(&path);
            }
        }
    }

    fn guest_digest(&self) -> Result<String, Error> {
        let failed = |e: io::Error| {
            Error::new(Code::FailedPrecondition, format!("cannot read the guest's agent: {e}")).hint(
                "build it with `cargo xtask guest`; `image.guest_binary` in `bothy.toml` says where it is",
            )
        };
        let file = fs_err::File::open(&self.guest).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let stamp = (meta.dev(), meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
        let mut known = self.digest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, digest)) = &*known
            && *of == stamp
        {
            return Ok(digest.clone());
        }
        let digest = sha256(file).map_err(failed)?;
        *known = Some((stamp, digest.clone()));
        Ok(digest)
    }
}

/// The SHA-256 of all that `from` gives, in lower-case hex.
pub(crate) fn sha256(from: impl io::Read) -> io::Result<String> {
    let mut sha = Sha256::new();
    let mut from = BufReader::with_capacity(1 << 20, from);
    io::copy(&mut from, &mut sha_writer(&mut sha))?;
    Ok(hex::encode(sha.finalize()))
}

fn sha_writer(sha: &mut Sha256) -> impl io::Write {
    struct Into<'a>(&'a mut Sha256);
    impl io::Write for Into<'_> {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.update(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    Into(sha)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, tests::plant};

    #[test]
    fn a_new_agent_or_kernel_gives_a_new_file_and_the_same_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let name = plant(&store, "a", 8).name;
        let guest = dir.path().join("guest");
        fs_err::write(&guest, "agent one").unwrap();
        let made = dir.path().join("initramfs");
        fs_err::create_dir(&made).unwrap();
        let initramfs = Initramfs::new(made.clone(), guest.clone());
        let first = initramfs.ensure(&store.open(&name).unwrap()).unwrap();
        let content = fs_err::read(&first).unwrap();
        assert!(content.windows(9).any(|w| w == b"agent one"));
        assert!(content.ends_with(&[0; 8]), "the modules are at the end");
        assert_eq!(first.metadata().unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(initramfs.ensure(&store.open(&name).unwrap()).unwrap(), first);
        fs_err::write(&guest, "agent 2").unwrap();
        let second = initramfs.ensure(&store.open(&name).unwrap()).unwrap();
        plant(&store, "a", 9);
        let third = initramfs.ensure(&store.open(&name).unwrap()).unwrap();
        assert!(first != second && second != third);
        assert_eq!(fs_err::read_dir(&made).unwrap().count(), 3);
        fs_err::remove_file(&guest).unwrap();
        let err = initramfs.ensure(&store.open(&name).unwrap()).unwrap_err();
        assert!(err.hint.unwrap().contains("cargo xtask guest"));
    }

    #[test]
    fn digests_are_those_of_fips_180() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&b"abc"[..]).unwrap(), abc);
    }
}
