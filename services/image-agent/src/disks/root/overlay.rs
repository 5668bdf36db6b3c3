//! The image's rootfs, shared and read-only, and a clone of the image's system-seed, which the guest lays over it (overlayfs) and
//! grows. The base is a hard link, so that an image that is built anew leaves the ground under an overlay as it is.

use super::{
    super::{BASE, SYSTEM},
    Backend, Place, failed, link, make_clone,
};
use crate::store::Image;
use bothy_contract::{
    Error,
    image::{RootDisk, Rootfs},
};

/// Overlays.
#[derive(Debug)]
pub(super) struct Overlay;

impl Backend for Overlay {
    fn kind(&self) -> RootDisk {
        RootDisk::Overlay
    }

    fn what(&self) -> &'static str {
        "system overlay"
    }

    fn file(&self) -> &'static str {
        SYSTEM
    }

    fn least(&self) -> &'static str {
        "system-seed"
    }

    fn make(&self, place: &Place, image: &Image, mib: u64) -> Result<(), Error> {
        let (base, system) = (place.home.join(BASE), place.home.join(SYSTEM));
        let of = |e| failed(self, place.vm, &e);
        let make = || {
            // The base first: an overlay without the one that it was begun with is worth nothing.
            link(&image.artifact("rootfs")?.1, &base).map_err(of)?;
            let seed = fs_err::File::open(image.artifact("system-seed")?.1).map_err(of)?;
            make_clone(&seed, &system, place.uid, mib)
        };
        make().map(drop).inspect_err(|_| {
            let _ = fs_err::remove_file(&base);
        })
    }

    fn attach(&self, place: &Place) -> Result<Rootfs, Error> {
        Ok(Rootfs { base: place.home.join(BASE), system: Some(place.home.join(SYSTEM)) })
    }
}
