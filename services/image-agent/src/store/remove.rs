//! Images out of the store.
//!
//! An image goes in one rename, to a name that no image has; then its files, and the blobs that only it had. A crash in
//! between leaves a directory with a dot in front, which the next start sweeps, and blobs that the next collection takes.

use super::Store;
use crate::fault;
use bothy_contract::{Error, ImageName, OpId, catalogue::Pruned};
use std::{io, os::unix::fs::MetadataExt as _, path::Path};

impl Store {
    /// Removes an image, whatever state it is in. Who may still need it is the caller's business.
    ///
    /// # Errors
    /// It is not there, or the file system says no.
    pub(crate) fn remove(&self, name: &ImageName) -> Result<Pruned, Error> {
        let failed = |e: io::Error| fault::io(format!("cannot remove image {name}"), &e);
        let dir = self.dir_of(name);
        let gone = self.dir().join(format!(".gone-{}", OpId::new()));
        {
            let _lock = self.change();
            fs_err::rename(&dir, &gone).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => Error::not_found(format!("there is no image {name}"))
                    .hint("`bothy image list` shows what is there"),
                _ => failed(e),
            })?;
            fs_err::File::open(self.dir()).and_then(|d| d.sync_all()).map_err(failed)?;
        }
        let mut freed = only_here(&gone).map_err(failed)?;
        fs_err::remove_dir_all(&gone).map_err(failed)?;
        let garbage = self.collect()?;
        freed += garbage.iter().map(|g| g.allocated).sum::<u64>();
        Ok(Pruned { images: vec![name.clone()], files: garbage.into_iter().map(|g| g.path).collect(), freed })
    }

    /// What removing an image would free, in bytes: what no blob keeps, and the blobs that only it has.
    pub(crate) fn would_free(&self, name: &ImageName) -> Result<u64, Error> {
        let failed = |e: io::Error| fault::io(format!("cannot look at image {name}"), &e);
        let mut sum = 0;
        for entry in fs_err::read_dir(self.dir_of(name)).map_err(failed)? {
            let meta = entry.and_then(|e| e.metadata()).map_err(failed)?;
            // Itself and its blob; a third link is another image's or a VM's.
            if meta.is_file() && meta.nlink() <= 2 {
                sum += meta.blocks() * 512;
            }
        }
        Ok(sum)
    }
}

/// What the files of `dir` take that nothing else has a link to, in bytes.
fn only_here(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs_err::read_dir(dir)? {
        let meta = entry?.metadata()?;
        if meta.is_file() && meta.nlink() == 1 {
            sum += meta.blocks() * 512;
        }
    }
    Ok(sum)
}
