//! Kernel and modules out of Debian's kernel package, which is unpacked and never installed.

use super::{Build, Stage};
use crate::{
    cpio,
    fault::{self, blocking},
    kernel,
    modules::{self, Modules},
    tools::Tool,
};
use bothy_contract::{Code, Error, error::chain};
use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

impl Build {
    pub(super) async fn kernel(&self, with: &Stage) -> Result<String, Error> {
        let dir = self.work.join("kernel");
        let package = blocking({
            let dir = dir.clone();
            move || one_file(&dir, "deb").map_err(|e| fault::io("cannot find the kernel's package", &e))
        })
        .await?;
        let unpacked = dir.join("unpacked");
        Tool::new("dpkg-deb", "dpkg", Duration::from_secs(120))
            .args([OsString::from("-x"), package.into(), unpacked.clone().into()])
            .run(&with.cancel, |_| ())
            .await?;
        let (out, release) = (self.out(), self.work.join("kernel-release"));
        blocking(move || {
            let name = take(&unpacked, &out)?;
            fs_err::write(release, &name).map_err(|e| fault::io("cannot note the kernel's release", &e))?;
            Ok(name)
        })
        .await
    }
}

/// Puts `vmlinux` and `modules.cpio` from an unpacked package into `out`; the kernel's release comes back.
fn take(unpacked: &Path, out: &Path) -> Result<String, Error> {
    let failed = |what: &'static str| move |e: io::Error| fault::io(what, &e);
    let lib =
        [unpacked.join("lib/modules"), unpacked.join("usr/lib/modules")].into_iter().find(|d| d.is_dir());
    let tree = lib.and_then(|lib| {
        let mut entries = fs_err::read_dir(lib).ok()?.flatten();
        entries.next().map(|e| e.path())
    });
    let (tree, release) = tree
        .and_then(|t| t.file_name().and_then(|n| n.to_str()).map(str::to_owned).map(|n| (t, n)))
        .ok_or_else(|| Error::new(Code::FailedPrecondition, "the kernel's package has no modules"))?;
    let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs_err::read(image).map_err(failed("cannot read the kernel"))?;
    let kernel = kernel::vmlinux(&image).map_err(|e| {
        Error::new(Code::FailedPrecondition, format!("cannot unpack the kernel {release}: {}", chain(&e)))
            .hint("use a kernel package whose kernel is compressed with LZ4, as Debian 12's cloud kernel is")
    })?;
    fs_err::write(out.join("vmlinux"), kernel).map_err(failed("cannot write the kernel"))?;
    let order = modules::in_load_order(&tree).map_err(|e| {
        Error::new(
            Code::FailedPrecondition,
            format!("cannot use the modules of kernel {release}: {}", chain(&e)),
        )
    })?;
    fs_err::write(out.join("modules.cpio"), archive(&order).map_err(failed("cannot pack the modules"))?)
        .map_err(failed("cannot write the modules"))?;
    Ok(release)
}

/// The modules as `/modules/*.ko`, with `/modules/order` and `/modules/vsock`, one file name per line, to be joined to an
/// initramfs.
fn archive(modules: &Modules) -> io::Result<Vec<u8>> {
    let mut archive = cpio::Writer::new(Vec::new());
    archive.dir("modules", 0o755)?;
    for (list, paths) in [("order", &modules.always), ("vsock", &modules.vsock)] {
        let mut names = String::new();
        for path in paths {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            archive.file(&format!("modules/{name}"), 0o644, &fs_err::read(path)?)?;
            names.push_str(name);
            names.push('\n');
        }
        archive.file(&format!("modules/{list}"), 0o644, names.as_bytes())?;
    }
    archive.finish()
}

/// The only file in `dir` with that extension.
fn one_file(dir: &Path, extension: &str) -> io::Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(io::Error::other(format!("{} does not hold one .{extension} file", dir.display()))),
    }
}
