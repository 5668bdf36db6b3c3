//! The directories of VMs, while disks are being made in them.
//!
//! A create has a VM's root and its work disk made side by side. Whoever makes the first one makes the directory, and who leaves it
//! empty removes it; but not while somebody else is about to put something there, whose failure would then say that a
//! directory is missing, and hide why the other one failed.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How many are at work in each.
#[derive(Debug, Clone, Default)]
pub(super) struct Homes(Arc<Mutex<BTreeMap<PathBuf, usize>>>);

/// One who is at work in a directory. It is there for as long; with the last one it goes, if it is empty.
#[derive(Debug)]
pub(super) struct Home {
    homes: Homes,
    path: PathBuf,
}

impl Homes {
    /// Makes the directory `path`, unless it is there. It is root's; the VM's user can go through it and see only what is its own.
    pub(super) fn enter(&self, path: &Path) -> io::Result<Home> {
        let mut homes = self.lock();
        match fs_err::create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        *homes.entry(path.to_owned()).or_default() += 1;
        drop(homes);
        let home = Home { homes: self.clone(), path: path.to_owned() };
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o711))?;
        Ok(home)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let mut homes = self.homes.lock();
        if let Some(others) = homes.get_mut(&self.path) {
            *others -= 1;
            if *others > 0 {
                return;
            }
        }
        homes.remove(&self.path);
        // One with something in it stays, and that is right.
        let _ = fs_err::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_with_the_last_who_leaves_it_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (homes, path) = (Homes::default(), dir.path().join("home"));
        let (one, two) = (homes.enter(&path).unwrap(), homes.enter(&path).unwrap());
        drop(one);
        assert!(path.is_dir(), "somebody else is there");
        drop(two);
        assert!(!path.exists());
        let three = homes.enter(&path).unwrap();
        fs_err::write(path.join("disk"), "whole").unwrap();
        drop(three);
        assert!(path.join("disk").is_file());
        assert!(homes.enter(&path.join("disk/x")).is_err());
        assert!(homes.lock().is_empty());
    }
}
