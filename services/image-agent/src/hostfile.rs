//! Files of the host that root names: what is checked before they are used.

use crate::fault;
use bothy_contract::{Code, Error};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

fn resolved(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_absolute() {
        return Err(Error::invalid(format!("{} is not an absolute path", path.display())));
    }
    fs_err::canonicalize(path).map_err(|e| fault::io("cannot use a file of the host", &e))
}

/// The regular file at an absolute path, with no link in it any more.
pub(crate) fn file(path: &Path) -> Result<PathBuf, Error> {
    let path = resolved(path)?;
    if path.is_file() { Ok(path) } else { Err(Error::invalid(format!("{} is not a file", path.display()))) }
}

/// The directory at an absolute path, with no link in it any more.
pub(crate) fn directory(path: &Path) -> Result<PathBuf, Error> {
    let path = resolved(path)?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(Error::invalid(format!("{} is not a directory", path.display())))
    }
}

/// Like [`file`], for one that VMMs read where it is: their users must get to it.
pub(crate) fn public(path: &Path) -> Result<PathBuf, Error> {
    let path = file(path)?;
    let has = |path: &Path, bit| fs_err::metadata(path).is_ok_and(|m| m.permissions().mode() & bit != 0);
    if !has(&path, 0o004) {
        return Err(closed(
            format!("{} is not readable for all", path.display()),
            &format!("chmod o+r {}", path.display()),
        ));
    }
    match path.ancestors().skip(1).find(|dir| !has(dir, 0o001)) {
        None => Ok(path),
        Some(dir) => Err(closed(
            format!("others cannot pass {} to {}", dir.display(), path.display()),
            &format!("chmod o+x {}", dir.display()),
        )),
    }
}

fn closed(why: String, remedy: &str) -> Error {
    Error::new(Code::PermissionDenied, why)
        .hint(format!("VMMs run as users of their own: `{remedy}`, or put the file elsewhere"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_is_a_plain_file_that_vmms_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rootfs");
        fs_err::write(&path, "x").unwrap();
        let mode =
            |path: &Path, mode| fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(dir.path(), 0o755);
        mode(&path, 0o644);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(public(&link).unwrap(), fs_err::canonicalize(&path).unwrap());
        assert_eq!(file(Path::new("rootfs")).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(file(&dir.path().join("gone")).unwrap_err().code, Code::NotFound);
        assert!(file(dir.path()).unwrap_err().message.contains("is not a file"));
        mode(&path, 0o600);
        assert!(public(&path).unwrap_err().hint.unwrap().contains("chmod o+r"));
        mode(&path, 0o644);
        mode(dir.path(), 0o700);
        assert!(public(&path).unwrap_err().hint.unwrap().contains("chmod o+x"));
    }
}
