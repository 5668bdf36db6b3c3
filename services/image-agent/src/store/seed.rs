//! The work-seed of an image: the one artifact that is made anew in place.

use super::{Image, Store, check::stamp, publish::write_manifest};
use crate::{digest, fault};
use bothy_contract::{Error, image::ImageManifest};
use sha2::{Digest as _, Sha256};
use std::{io, path::Path};

/// The role, and the format of the seeds that are made now: another number makes all seeds stale.
const ROLE: &str = "work-seed";
const FORMAT: u32 = 1;

/// What goes into the work-seed of an image.
pub(crate) fn fingerprint(manifest: &ImageManifest) -> String {
    let mut sha = Sha256::new();
    let rootfs = manifest.artifacts.get("rootfs").map(|a| a.sha256.as_str()).unwrap_or_default();
    for word in [&FORMAT.to_string(), &manifest.home, rootfs]
        .into_iter()
        .chain(manifest.private.iter().map(String::as_str))
    {
        sha.update((word.len() as u64).to_le_bytes());
        sha.update(word);
    }
    hex::encode(sha.finalize())
}

impl Store {
    /// Why the work-seed of `image` may not be used, if so.
    pub(crate) fn check_seed(&self, image: &Image) -> Result<(), String> {
        // One of before fingerprints were kept is of format 1, as those that are made now are.
        let told = image.manifest.seed_fingerprint.as_ref();
        if told.is_some_and(|told| *told != fingerprint(&image.manifest)) || (told.is_none() && FORMAT != 1) {
            return Err("the work-seed is stale".to_owned());
        }
        self.check(image, |role| role == ROLE).map_err(|e| {
            let why = e.message.rsplit_once("used: ").map_or(e.message.as_str(), |(_, why)| why);
            format!("the work-seed cannot be used: {why}")
        })
    }

    /// Puts a new work-seed into the image that `of` describes, if it is still that one.
    pub(crate) fn put_seed(&self, of: &ImageManifest, seed: &Path) -> Result<(), Error> {
        let failed =
            |e: io::Error| fault::io(format!("cannot put a new work-seed into image {}", of.name), &e);
        let sha256 = digest::of_file(seed, &digest::on)?;
        fs_err::File::open(seed).and_then(|f| f.sync_all()).map_err(failed)?;
        let _lock = self.change();
        let mut manifest = self.show(&of.name)?;
        if manifest.created != of.created {
            return Ok(());
        }
        let fingerprint = fingerprint(&manifest);
        let dir = self.dir_of(&of.name);
        let Some(artifact) = manifest.artifacts.get_mut(ROLE) else { return Ok(()) };
        self.blobs.share(seed, &sha256)?;
        let meta = fs_err::symlink_metadata(seed).map_err(failed)?;
        (artifact.sha256, artifact.size, artifact.stamp) = (sha256, meta.len(), Some(stamp(&meta)));
        manifest.seed_fingerprint = Some(fingerprint);
        let place = dir.join(&artifact.file);
        // Between these two the seed is not the one that the manifest names: whoever looks then goes the slower way.
        fs_err::rename(seed, place).map_err(failed)?;
        write_manifest(&dir, &manifest).map_err(failed)?;
        // What the old one took.
        self.blobs.collect().map(drop)
    }
}
