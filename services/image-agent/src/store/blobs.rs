//! Blobs: the files of all images by their digests, each once, `<store>/blobs/<sha256>`.
//!
//! An image's files are hard links to blobs, and so are the bases of VMs; so the link count is the reference count. It
//! cannot be wrong after a crash, since it is kept by the file system itself. A blob with no other link is garbage.

use crate::{digest, fault};
use bothy_contract::Error;
use std::{
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// The blobs below one directory. Whoever calls holds the store's lock.
#[derive(Debug, Clone)]
pub(crate) struct Blobs {
    dir: PathBuf,
}

/// A blob that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Garbage {
    /// The file.
    pub(crate) path: PathBuf,
    /// What it takes on disk, in bytes.
    pub(crate) allocated: u64,
}

impl Blobs {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Makes `file`, whose digest is `sha256`, and the blob of that digest one and the same file. A blob that is damaged is
    /// replaced: its place is given to the good file.
    pub(crate) fn share(&self, file: &Path, sha256: &str) -> Result<(), Error> {
        let failed = |e: io::Error| fault::io(format!("cannot share {}", file.display()), &e);
        fs_err::create_dir_all(&self.dir).map_err(failed)?;
        fs_err::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
        let blob = self.dir.join(sha256);
        let own = fs_err::symlink_metadata(file).map_err(failed)?;
        match fs_err::symlink_metadata(&blob) {
            Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => return Ok(()),
            Ok(there) => {
                let same = there.is_file()
                    && there.len() == own.len()
                    && digest::of_file(&blob, &digest::on)? == sha256;
                if same && replace_by_link(&blob, file).map_err(failed)? {
                    return Ok(());
                }
                if !same {
                    tracing::warn!(blob = %blob.display(), "a damaged blob is replaced");
                }
                fs_err::remove_file(&blob).map_err(failed)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        match fs_err::hard_link(file, &blob) {
            // No links here, or no more of this one: the image has a file of its own then.
            Err(e) if unlinkable(&e) => Ok(()),
            linked => linked.map_err(failed),
        }
    }

    /// The blobs that no image and no VM has a link to.
    pub(crate) fn garbage(&self) -> Result<Vec<Garbage>, Error> {
        let failed = |e: io::Error| fault::io("cannot look through the blobs", &e);
        let mut found = Vec::new();
        let entries = match fs_err::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let meta = fs_err::symlink_metadata(&path).map_err(failed)?;
            if meta.nlink() < 2 {
                found.push(Garbage { path, allocated: meta.blocks() * 512 });
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Removes the garbage; what it took comes back.
    pub(crate) fn collect(&self) -> Result<Vec<Garbage>, Error> {
        let garbage = self.garbage()?;
        for blob in &garbage {
            fs_err::remove_file(&blob.path)
                .map_err(|e| fault::io("cannot remove a blob that nothing needs", &e))?;
        }
        Ok(garbage)
    }
}

/// Puts a link to `blob` in the place of `file`, in one step. False where the file system will not have another link.
fn replace_by_link(blob: &Path, file: &Path) -> io::Result<bool> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let beside = file.with_file_name(format!(".{name}.link"));
    match fs_err::hard_link(blob, &beside) {
        Err(e) if unlinkable(&e) => return Ok(false),
        linked => linked?,
    }
    fs_err::rename(&beside, file)?;
    Ok(true)
}

fn unlinkable(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::TooManyLinks | io::ErrorKind::CrossesDevices | io::ErrorKind::Unsupported
    ) || e.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_content_is_one_file_and_the_last_link_frees_it() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(dir.path().join("blobs"));
        let inode = |p: &Path| fs_err::metadata(p).unwrap().ino();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs_err::write(&a, "kernel").unwrap();
        fs_err::write(&b, "kernel").unwrap();
        let sha = digest::of_file(&a, &digest::on).unwrap();
        blobs.share(&a, &sha).unwrap();
        blobs.share(&a, &sha).unwrap();
        blobs.share(&b, &sha).unwrap();
        assert_eq!(inode(&a), inode(&b));
        assert_eq!(fs_err::metadata(&a).unwrap().nlink(), 3);
        assert_eq!(blobs.collect().unwrap(), []);
        fs_err::remove_file(&a).unwrap();
        assert_eq!(blobs.collect().unwrap(), []);
        fs_err::remove_file(&b).unwrap();
        assert_eq!(blobs.garbage().unwrap().len(), 1);
        assert_eq!(blobs.collect().unwrap().len(), 1);
        assert_eq!(blobs.garbage().unwrap(), []);
    }

    #[test]
    fn a_damaged_blob_spoils_no_new_image() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(dir.path().join("blobs"));
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs_err::write(&a, "good").unwrap();
        let sha = digest::of_file(&a, &digest::on).unwrap();
        blobs.share(&a, &sha).unwrap();
        fs_err::write(&a, "evil").unwrap();
        fs_err::write(&b, "good").unwrap();
        blobs.share(&b, &sha).unwrap();
        assert_eq!(fs_err::read(&b).unwrap(), b"good");
        assert_eq!(fs_err::read(dir.path().join("blobs").join(&sha)).unwrap(), b"good");
    }
}
