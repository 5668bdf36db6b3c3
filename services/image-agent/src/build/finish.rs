//! The end of a build: what the recipe says of the image, and the step into the store.

use super::{Build, Stage};
use crate::{
    fault::{self, blocking},
    store::Over,
};
use bothy_contract::{Error, image::ImageManifest};
use std::{io, path::Path};

impl Build {
    pub(super) async fn finish(&self, with: &Stage) -> Result<String, Error> {
        let (build, with) = (self.clone(), with.clone());
        blocking(move || {
            let failed = |e: io::Error| fault::io(format!("cannot put image {} into place", build.name), &e);
            let out = build.out();
            let total = on_disk(&out).map_err(failed)?.0;
            build.store.publish(&out, build.manifest().map_err(failed)?, Over::Any, &with.bytes(total))?;
            let size = on_disk(&build.store.dir_of(&build.name)).map_err(failed)?.1;
            super::remove(&build.work)?;
            // What only the image of before had.
            if let Err(e) = build.store.collect() {
                tracing::warn!(error = %e, "blobs that nothing needs are left");
            }
            Ok(format!("{} MiB on disk", size >> 20))
        })
        .await
    }

    fn manifest(&self) -> io::Result<ImageManifest> {
        let spec = &self.recipe.spec;
        Ok(ImageManifest {
            recipe_sha256: self.recipe.sha256.clone(),
            home: spec.home.clone(),
            wait: spec.wait.clone(),
            kernel_release: fs_err::read_to_string(self.work.join("kernel-release"))?,
            origin: format!("recipe {}", self.name),
            private: spec.private.clone(),
            ..ImageManifest::new(self.name.clone(), spec.init)
        })
    }
}

/// How long the files of `dir` are and what they take, in bytes.
fn on_disk(dir: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let (mut length, mut taken) = (0, 0);
    for entry in fs_err::read_dir(dir)? {
        let meta = entry?.metadata()?;
        length += meta.len();
        taken += meta.blocks() * 512;
    }
    Ok((length, taken))
}
