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
        match self {
            Self::Reflink => reflinked(place, image, mib),
            Self::Copy => copied(place, image, mib),
        }
    }

    fn attach(&self, place: &Place) -> Result<Rootfs, Error> {
        Ok(Rootfs { base: place.home.join(ROOT), system: None })
    }

    fn own_file_system(&self, home: &Path) -> Option<PathBuf> {
        Some(home.join(ROOT))
    }
}

/// A clone of the image's root as it is when it has been made ready. That one shares its extents with the image's, so it is kept
/// for the next VM: growing it writes the tables of all the inodes that it can have.
fn reflinked(place: &Place, image: &Image, mib: u64) -> Result<(), Error> {
    let of = |e: io::Error| failed(place, &e);
    let (artifact, rootfs) = image.artifact("rootfs")?;
    let refused = |e: io::Error| match clone::is_refusal(&e) {
        true => {
            let (home, image) = (place.home.display(), image.dir.display());
            let why = format!("a file in {home} cannot share extents with one in {image}: {e}");
            lacks(RootDisk::Reflink, why)
        }
        false => of(e),
    };
    let share = |from: &File, to: &File| clone::reflink(from, to).map_err(refused);
    make_file(&place.home.join(ROOT), place.uid, |temp| {
        let ready = place.roots.keep(&artifact.sha256, mib, |half| {
            let from = fs_err::File::open(&rootfs).map_err(of)?;
            let to =
                fs_err::File::options().read(true).write(true).create_new(true).open(half).map_err(of)?;
            share(from.file(), to.file())?;
            to.set_len(mib * super::MIB).map_err(of)?;
            make_writable(half, image)
        })?;
        share(ready.file(), temp.as_file())
    })
}

/// A copy of the image's root, made ready. None is kept: it would take as much room as the image.
fn copied(place: &Place, image: &Image, mib: u64) -> Result<(), Error> {
    let of = |e: io::Error| failed(place, &e);
    let from = fs_err::File::open(image.artifact("rootfs")?.1).map_err(of)?;
    let length = from.metadata().map_err(of)?.len();
    make_file(&place.home.join(ROOT), place.uid, |temp| {
        clone::copy_data(from.file(), temp.as_file(), length).map_err(of)?;
        temp.as_file().set_len(mib * super::MIB).map_err(of)?;
        make_writable(temp.path(), image)
    })
}

fn failed(place: &Place, err: &io::Error) -> Error {
    fault::io(format!("cannot make the root disk of VM {}", place.vm), err)
}

/// Gives the root of `image` at `path`, which nobody but this agent has written to, the size of its file or device, and a journal. Runs
/// where blocking is allowed, with a runtime beside.
pub(super) fn make_writable(path: &Path, image: &Image) -> Result<(), Error> {
    let journal = !ext4::has_journal(path)?;
    let with = Stage { cancel: CancellationToken::new(), progress: Arc::new(|_, _, _| ()) };
    let ready = Handle::current().block_on(async {
        pack::grow(&with, path).await?;
        if journal { pack::add_journal(&with, path).await } else { Ok(()) }
    });
    ready.map_err(|e| {
        let name = &image.manifest.name;
        let said = e.hint.is_some();
        let e = e.context(format!("the root file system of image {name} could not be grown for a VM"));
        if said {
            return e;
        }
        e.hint(format!(
            "`bothy image verify {name}` says whether it is what it was; if so, bring the image in again, or choose another one"
        ))
    })
}
