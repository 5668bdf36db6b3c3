//! The end of a build: digests, the manifest, and the one rename that makes it an image.

use super::Build;
use crate::{
    fault::{self, blocking},
    initramfs::sha256,
    store::{ROLES, VERSION},
};
use bothy_contract::{
    Error,
    image::{Artifact, ImageManifest},
};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::{collections::BTreeMap, io, os::unix::fs::PermissionsExt as _, path::Path};

impl Build {
    pub(super) async fn finish(&self) -> Result<String, Error> {
        let build = self.clone();
        blocking(move || {
            let size = build
                .publish()
                .map_err(|e| fault::io(format!("cannot put image {} into place", build.name), &e))?;
            super::remove(&build.work)?;
            Ok(format!("{} MiB on disk", size >> 20))
        })
        .await
    }

    fn publish(&self) -> io::Result<u64> {
        let out = self.out();
        let mut artifacts = BTreeMap::new();
        for (role, name) in ROLES {
            let path = out.join(name);
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
            let file = fs_err::File::open(&path)?;
            file.sync_all()?;
            let size = file.metadata()?.len();
            let artifact = Artifact { file: name.to_owned(), sha256: sha256(file)?, size };
            artifacts.insert(role.to_owned(), artifact);
        }
        let spec = &self.recipe.spec;
        let manifest = ImageManifest {
            version: VERSION,
            name: self.name.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            created: jiff::Timestamp::now(),
            recipe_sha256: self.recipe.sha256.clone(),
            init: spec.init,
            home: spec.home.clone(),
            wait: spec.wait.clone(),
            kernel_release: fs_err::read_to_string(self.work.join("kernel-release"))?,
            artifacts,
        };
        let path = out.join("manifest.json");
        fs_err::write(&path, serde_json::to_vec_pretty(&manifest)?)?;
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
        fs_err::set_permissions(&out, std::fs::Permissions::from_mode(0o755))?;
        fs_err::File::open(&path)?.sync_all()?;
        fs_err::File::open(&out)?.sync_all()?;
        put_into_place(&out, &self.store.dir_of(&self.name))?;
        fs_err::File::open(self.store.dir())?.sync_all()?;
        on_disk(&self.store.dir_of(&self.name))
    }
}

/// Renames `new` to `place`. An image that is there is exchanged for it in the same instant, and goes with the build's
/// directory; VMs that run from it keep their open files.
fn put_into_place(new: &Path, place: &Path) -> io::Result<()> {
    let flags = if place.exists() { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    renameat_with(CWD, new, CWD, place, flags).map_err(|e| {
        io::Error::new(
            io::Error::from(e).kind(),
            format!("cannot rename {} to {}: {e}", new.display(), place.display()),
        )
    })
}

/// What the files of `dir` take, in bytes.
fn on_disk(dir: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0;
    for entry in fs_err::read_dir(dir)? {
        sum += entry?.metadata()?.blocks() * 512;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_put_into_place_or_exchanged_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (new, place) = (dir.path().join("new"), dir.path().join("place"));
        let put = |text: &str| {
            fs_err::create_dir_all(&new).unwrap();
            fs_err::write(new.join("f"), text).unwrap();
            put_into_place(&new, &place).unwrap();
        };
        put("one");
        assert!(!new.exists());
        put("two");
        assert_eq!(fs_err::read(place.join("f")).unwrap(), b"two");
        assert_eq!(fs_err::read(new.join("f")).unwrap(), b"one");
    }
}
