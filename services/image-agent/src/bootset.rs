//! A boot set: a kernel and the modules that a guest needs with it, as two files.
//!
//! Kernel and modules are checked against one another here, where the two are put together: a kernel refuses the modules of
//! another, and a guest without its modules has no disk to say so on.

use crate::{
    cpio, fault, kernel,
    modules::{self, Modules},
};
use bothy_contract::{Code, Error, error::chain};
use std::{
    io,
    path::{Path, PathBuf},
};

/// The files' names.
pub(crate) const KERNEL: &str = "vmlinux";
pub(crate) const MODULES: &str = "modules.cpio";

/// What a boot set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootFiles {
    /// The kernel's release, as it says of itself.
    pub(crate) release: String,
    /// The modules' names, in the order in which they are loaded.
    pub(crate) modules: Vec<String>,
}

/// Puts the boot set of the kernel in the file `image` and the modules below `tree` into `out`. Without a tree it is one of a
/// kernel that has all built in.
///
/// # Errors
/// Either is not what it should be, or the modules are those of another kernel.
pub(crate) fn put(image: &Path, tree: Option<&Path>, out: &Path) -> Result<BootFiles, Error> {
    let failed = |what: &'static str| move |e: io::Error| fault::io(what, &e);
    let data = fs_err::read(image).map_err(failed("cannot read the kernel"))?;
    let refused = |why: String| Error::new(Code::FailedPrecondition, why);
    let vmlinux = kernel::vmlinux(&data).map_err(|e| {
        refused(format!("cannot use the kernel {}: {}", image.display(), chain(&e))).hint(
            "give an unpacked vmlinux, or a bzImage that is compressed with LZ4, as Debian's kernels are",
        )
    })?;
    let release = kernel::release(&vmlinux).ok_or_else(|| {
        refused(format!("{} does not say which release of Linux it is", image.display()))
            .hint("give the kernel itself: a vmlinux or a bzImage")
    })?;
    let order = match tree {
        Some(tree) => modules::in_load_order(tree)
            .map_err(|e| refused(format!("cannot use the modules in {}: {}", tree.display(), chain(&e))))?,
        None => Modules { always: Vec::new(), vsock: Vec::new() },
    };
    let mut names = Vec::new();
    for path in order.always.iter().chain(&order.vsock) {
        let module = fs_err::read(path).map_err(failed("cannot read a module"))?;
        let of = modules::release(&module);
        if of.as_ref().is_some_and(|of| *of != release) {
            let of = of.unwrap_or_default();
            return Err(refused(format!(
                "{} is a module of kernel {of}, and {} is {release}",
                path.display(),
                image.display()
            ))
            .hint(format!("give the modules that came with this kernel, `.../lib/modules/{release}`")));
        }
        names.push(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    }
    fs_err::write(out.join(KERNEL), vmlinux).map_err(failed("cannot write the kernel"))?;
    let archive = archive(&order).map_err(failed("cannot pack the modules"))?;
    fs_err::write(out.join(MODULES), archive).map_err(failed("cannot write the modules"))?;
    Ok(BootFiles { release, modules: names })
}

/// The boot set of an unpacked distribution package, or of a root file system's `/boot` and `/lib/modules`, into `out`. Where
/// there are several kernels, the one whose release sorts last, numbers as numbers.
///
/// # Errors
/// There is none, or see [`put`].
pub(crate) fn put_from_root(root: &Path, out: &Path) -> Result<BootFiles, Error> {
    let missing = |what: String| {
        Error::new(Code::FailedPrecondition, what)
            .hint("it must hold `boot/vmlinuz-<release>` and `lib/modules/<release>`")
    };
    let lib = [root.join("lib/modules"), root.join("usr/lib/modules")];
    let mut found = Vec::new();
    for lib in lib.iter().filter(|d| d.is_dir()) {
        let entries = fs_err::read_dir(lib).map_err(|e| fault::io("cannot look for modules", &e))?;
        for entry in entries.flatten() {
            let release = entry.file_name().to_string_lossy().into_owned();
            let kernel = ["boot/vmlinuz-", "boot/vmlinux-"].map(|p| root.join(format!("{p}{release}")));
            found.extend(kernel.into_iter().find(|k| k.is_file()).map(|k| (release, k, entry.path())));
        }
    }
    let best = found.into_iter().max_by_key(|(release, ..)| numbers(release));
    let (_, kernel, modules) =
        best.ok_or_else(|| missing("there is no kernel with its modules".to_owned()))?;
    put(&kernel, Some(&modules), out)
}

/// A release as what it is sorted by: its numbers, then its text.
pub(crate) fn numbers(release: &str) -> (Vec<u64>, String) {
    let numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    (numbers, release.to_owned())
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
pub(crate) fn one_file(dir: &Path, extension: &str) -> io::Result<PathBuf> {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        kernel::tests::{bzimage, lz4, vmlinux_of},
        modules::tests::plant as plant_modules,
    };

    /// `boot` and `lib/modules` below `root`, for a kernel of `release` with the modules of `modules`.
    pub(crate) fn plant(root: &Path, release: &str, modules: &str) {
        fs_err::create_dir_all(root.join("boot")).unwrap();
        let kernel = bzimage(&lz4(&vmlinux_of(release)));
        fs_err::write(root.join(format!("boot/vmlinuz-{release}")), kernel).unwrap();
        plant_modules(&root.join("lib/modules").join(release), modules);
    }

    #[test]
    fn the_newest_kernel_with_its_modules_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let out = tempfile::tempdir().unwrap();
        let none = put_from_root(dir.path(), out.path()).unwrap_err();
        assert_eq!(none.code, Code::FailedPrecondition);
        plant(dir.path(), "6.1.0-9-a", "6.1.0-9-a");
        plant(dir.path(), "6.1.0-10-a", "6.1.0-10-a");
        // Modules alone, as a removed kernel leaves them.
        fs_err::create_dir_all(dir.path().join("lib/modules/6.2.0")).unwrap();
        let made = put_from_root(dir.path(), out.path()).unwrap();
        assert_eq!(made.release, "6.1.0-10-a");
        assert_eq!(made.modules.last().unwrap(), "overlay");
        assert!(fs_err::read(out.path().join(KERNEL)).unwrap().starts_with(b"\x7fELF"));
        let modules = fs_err::read(out.path().join(MODULES)).unwrap();
        assert!(modules.windows(13).any(|w| w == b"modules/order"));
    }

    #[test]
    fn a_kernel_with_another_ones_modules_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), "6.1.0-9-a", "6.1.0-8-a");
        let out = tempfile::tempdir().unwrap();
        let err = put_from_root(dir.path(), out.path()).unwrap_err();
        assert!(err.message.contains("is a module of kernel 6.1.0-8-a"), "{err}");
        assert!(err.hint.unwrap().contains("lib/modules/6.1.0-9-a"));
        assert_eq!(fs_err::read_dir(out.path()).unwrap().count(), 0);
        fs_err::write(dir.path().join("x"), "text").unwrap();
        assert!(put(&dir.path().join("x"), None, out.path()).unwrap_err().message.contains("neither an ELF"));
    }
}
