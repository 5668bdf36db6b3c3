//! Kernel and modules out of Debian's kernel package, which is unpacked and never installed.

use super::{Build, Stage};
use crate::{
    bootset,
    fault::{self, blocking},
    tools::Tool,
};
use bothy_contract::Error;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

impl Build {
    pub(super) async fn kernel(&self, with: &Stage) -> Result<String, Error> {
        let dir = self.work.join("kernel");
        let package = blocking({
            let dir = dir.clone();
            move || {
                bootset::one_file(&dir, "deb").map_err(|e| fault::io("cannot find the kernel's package", &e))
            }
        })
        .await?;
        let unpacked = dir.join("unpacked");
        unpack_package(with, &package, &unpacked).await?;
        let (out, release) = (self.out(), self.work.join("kernel-release"));
        blocking(move || {
            let made = bootset::put_from_root(&unpacked, &out)?;
            fs_err::write(release, &made.release)
                .map_err(|e| fault::io("cannot note the kernel's release", &e))?;
            Ok(made.release)
        })
        .await
    }
}

/// Unpacks a Debian package into `to`; nothing of it is run.
pub(crate) async fn unpack_package(with: &Stage, package: &Path, to: &Path) -> Result<(), Error> {
    let args: [OsString; 3] = ["-x".into(), package.into(), PathBuf::from(to).into()];
    Tool::new("dpkg-deb", "dpkg", Duration::from_secs(120)).args(args).run(&with.cancel, |_| ()).await?;
    Ok(())
}
