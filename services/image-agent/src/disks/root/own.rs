//! A root of the VM's own, made from the image's rootfs: by sharing its extents (XFS, btrfs), or by copying what it holds.
//!
//! The image's rootfs is made to be read only: small, and without a journal. So before anybody has written to the disk, it is
//! given the size that it is to have, and a journal where it has none, for a guest may lose its power at any moment.

use super::{super::ROOT, Backend, Place, lacks, make_file};
use crate::{
    build::{Stage, pack},
    clone, ext4, fault,
    store::Image,
};
use bothy_contract::{
    Error,
    image::{RootDisk, Rootfs},
};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// Both.
#[derive(Debug)]
pub(super) enum Own {
    /// Clones that share extents.
    Reflink,
    /// Copies.
    Copy,
}

impl Backend for Own {
    fn kind(&self) -> RootDisk {
        match self {
            Self::Reflink => RootDisk::Reflink,
            Self::Copy => RootDisk::Copy,
        }
    }

    fn what(&self) -> &'static str {
        "root disk"
    }

    fn file(&self) -> &'static str {
        ROOT
    }

    fn least(&self) -> &'static str {
        "rootfs"
    }

    fn make(&self, place: &Place, image: &Image, mib: u64) -> Result<(), Error> {
        make(place, image, mib, |from, to| {
            let filled = match self {
                Self::Reflink => clone::reflink(from, to),
                Self::Copy => copy(from, to),
            };
            filled.map_err(|e| match self {
                Self::Reflink if clone::is_refusal(&e) => {
                    let (home, image) = (place.home.display(), image.dir.display());
                    let why = format!("a file in {home} cannot share extents with one in {image}: {e}");
                    lacks(self.kind(), why)
                }
                _ => super::failed(self, place.vm, &e),
            })
        })
    }

    fn attach(&self, place: &Place) -> Result<Rootfs, Error> {
        Ok(Rootfs { base: place.home.join(ROOT), system: None })
    }

    fn own_file_system(&self, home: &Path) -> Option<PathBuf> {
        Some(home.join(ROOT))
    }
}

fn copy(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    clone::copy_data(from, to, length)?;
    to.set_len(length)
}

/// Makes the disk, filled by `fill` from the image's rootfs.
fn make(
    place: &Place,
    image: &Image,
    mib: u64,
    fill: impl FnOnce(&File, &File) -> Result<(), Error>,
) -> Result<(), Error> {
    let of = |e: io::Error| fault::io(format!("cannot make the root disk of VM {}", place.vm), &e);
    let (_, rootfs) = image.artifact("rootfs")?;
    let from = fs_err::File::open(rootfs).map_err(of)?;
    make_file(&place.home.join(ROOT), place.uid, |temp| {
        fill(from.file(), temp.as_file())?;
        temp.as_file().set_len(mib * super::MIB).map_err(of)?;
        make_writable(temp.path())
    })
}

/// Gives the file system at `path`, which nobody but this agent has written to, the size of its file or device, and a journal. Runs
/// where blocking is allowed, with a runtime beside.
pub(super) fn make_writable(path: &Path) -> Result<(), Error> {
    let journal = !ext4::has_journal(path)?;
    let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
    Handle::current().block_on(async {
        pack::grow(&with, path).await?;
        if journal { pack::add_journal(&with, path).await } else { Ok(()) }
    })
}
