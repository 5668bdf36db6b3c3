//! Small files, each written so that a reader sees the old content or the new one and never a part.

use std::io::{self, Write};
use std::path::{Component, Path};

use bothy_guest_proto::v1;
use fs_err::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

/// Refuses paths that are not plain absolute ones.
///
/// # Errors
/// Says which path and why.
pub(crate) fn check_path(path: &str) -> Result<(), String> {
    let plain =
        Path::new(path).components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.starts_with('/') && plain && !path.contains('\0') {
        Ok(())
    } else {
        Err(format!("`{path}` is not a plain absolute path"))
    }
}

/// Refuses what [`write_all`] could not do, before anything is written.
///
/// # Errors
/// Says which file and why.
pub(crate) fn check(files: &[v1::File]) -> Result<(), String> {
    for file in files {
        check_path(&file.path)?;
        if Path::new(&file.path).file_name().is_none() {
            return Err(format!("`{}` names no file", file.path));
        }
        if file.mode & !0o7777 != 0 {
            return Err(format!("{}: {:o} is not a mode", file.path, file.mode));
        }
    }
    Ok(())
}

/// Writes every file below `root`, making directories as needed.
///
/// # Errors
/// The first failure; files before it are written.
pub(crate) fn write_all(root: &Path, files: &[v1::File]) -> io::Result<()> {
    put_all(root, files, write)
}

/// How a file gets its content and mode: [`write`] or [`overwrite`].
pub(crate) type Put = fn(&Path, &[u8], u32) -> io::Result<()>;

/// Has every file below `root` put as `put` does.
///
/// # Errors
/// The first failure; files before it are there.
pub(crate) fn put_all(root: &Path, files: &[v1::File], put: Put) -> io::Result<()> {
    for file in files {
        put(&root.join(file.path.trim_start_matches('/')), &file.content, file.mode)?;
    }
    Ok(())
}

/// Waits until the files are on the disk, where a loss of power cannot take them back.
///
/// # Errors
/// When one is not there any more, or the disk fails.
pub(crate) fn make_durable(root: &Path, files: &[v1::File]) -> io::Result<()> {
    files
        .iter()
        .try_for_each(|file| fs_err::File::open(root.join(file.path.trim_start_matches('/')))?.sync_all())
}

/// Replaces `path` by a regular file of this content and mode, also where it was a symbolic link. The same content
/// and mode already: nothing is touched.
///
/// # Errors
/// When the directory cannot be made or the file not be written.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let now = fs_err::symlink_metadata(path).ok();
    let same_mode = now.is_some_and(|now| now.is_file() && now.permissions().mode() & 0o7777 == mode);
    if same_mode && fs_err::read(path)? == content {
        return Ok(());
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other(format!("{}: names no file", path.display())));
    };
    make_directories(parent)?;
    let temporary = parent.join(format!(".{}.bothy-{}", name.to_string_lossy(), std::process::id()));
    // A leftover of a run that was cut short is not worth an error.
    let _ = fs_err::remove_file(&temporary);
    let result = (|| {
        let mut file =
            fs_err::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        fs_err::rename(&temporary, path)
    })();
    if result.is_err() {
        let _ = fs_err::remove_file(&temporary);
    }
    result
}

/// The same where nobody looks and a loss of power brings the old content back with all the rest of it: in the file that is
/// there, which takes a fraction of the time.
///
/// # Errors
/// When the directory cannot be made or the file not be written.
pub(crate) fn overwrite(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let now = fs_err::symlink_metadata(path).ok();
    let Some(now) = now.filter(|now| {
        now.is_file()
            && now.permissions().mode() & 0o7777 == mode
            && std::os::unix::fs::MetadataExt::nlink(now) == 1
    }) else {
        return write(path, content, mode);
    };
    let mut file = fs_err::OpenOptions::new().write(true).open(path)?;
    file.write_all(content)?;
    let length = content.len() as u64;
    if now.len() > length { file.set_len(length) } else { Ok(()) }
}

/// Makes `directory` and what is missing above it. A `.ssh` is its owner's alone: nobody else has business there.
fn make_directories(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make_directories(parent)?;
    }
    let private = directory.file_name().is_some_and(|name| name == ".ssh");
    // The mode is there from the first moment on, which `fs_err` has no word for.
    let mut builder = std::fs::DirBuilder::new();
    match builder.mode(if private { 0o700 } else { 0o755 }).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(io::Error::new(error.kind(), format!("make the directory {}: {error}", directory.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_even_where_a_link_was() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("stub");
        fs_err::write(&target, "stub").unwrap();
        fs_err::os::unix::fs::symlink(&target, dir.path().join("resolv.conf")).unwrap();
        let file = v1::File {
            path: "/resolv.conf".into(),
            content: b"nameserver 10.0.0.1\n".to_vec(),
            mode: 0o4640,
        };
        for _ in 0..2 {
            write_all(dir.path(), std::slice::from_ref(&file)).unwrap();
            let meta = fs_err::symlink_metadata(dir.path().join("resolv.conf")).unwrap();
            assert!(meta.is_file());
            assert_eq!(meta.permissions().mode() & 0o7777, 0o4640);
        }
        assert_eq!(fs_err::read_to_string(&target).unwrap(), "stub", "the link's target is left alone");
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn a_file_of_a_template_is_written_over_and_another_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, link, linked) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs_err::write(&plain, "a longer line").unwrap();
        fs_err::set_permissions(&plain, std::fs::Permissions::from_mode(0o600)).unwrap();
        let inode =
            |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs_err::symlink_metadata(path).unwrap());
        let before = inode(&plain);
        for content in ["short", "a longer line again", "same mode"] {
            overwrite(&plain, content.as_bytes(), 0o600).unwrap();
            assert_eq!((fs_err::read_to_string(&plain).unwrap().as_str(), inode(&plain)), (content, before));
        }
        // Another mode, a link and a second name are what a new file is for.
        overwrite(&plain, b"x", 0o644).unwrap();
        assert_ne!(inode(&plain), before);
        fs_err::os::unix::fs::symlink(&plain, &link).unwrap();
        fs_err::hard_link(&plain, &linked).unwrap();
        for path in [&link, &linked] {
            overwrite(path, b"y", 0o644).unwrap();
        }
        assert_eq!(fs_err::read_to_string(&plain).unwrap(), "x");
    }

    #[test]
    fn a_new_ssh_directory_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = v1::File {
            path: "/home/dev/.ssh/authorized_keys".into(),
            content: b"key\n".to_vec(),
            mode: 0o600,
        };
        write_all(dir.path(), std::slice::from_ref(&file)).unwrap();
        let mode = |path: &str| fs_err::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("home/dev/.ssh"), mode("home/dev")), (0o700, 0o755));
    }

    #[test]
    fn odd_paths_and_modes_are_refused() {
        let file = |path: &str, mode| v1::File { path: path.into(), content: Vec::new(), mode };
        assert!(check(&[file("/etc/x", 0o644)]).is_ok());
        for bad in
            [file("etc/x", 0), file("/etc/../x", 0), file("/", 0), file("/x", 0o100_644), file("/a\0b", 0)]
        {
            assert!(check(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
    }
}
