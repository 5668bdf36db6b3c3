//! A template's files here: `<service>/templates/<id>/` with its memory and the state of its devices. They are the agent's and
//! nobody else's; what has no row is swept.

use crate::lifecycle::files::{private_dir, remove_tree};
use bothy_contract::{Error, VmId};
use bothy_vm_agent::vmm::Snapshot;
use fs_err as fs;
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

fn dir(state: &Path) -> PathBuf {
    state.join("templates")
}

fn of(state: &Path, template: VmId) -> PathBuf {
    dir(state).join(template.to_string())
}

/// Makes the directory of a template that is about to be made.
///
/// # Errors
/// It cannot be made.
pub(crate) fn make(state: &Path, template: VmId) -> Result<(), Error> {
    private_dir(&dir(state))?;
    private_dir(&of(state, template))
}

/// The files of a template, whether they are there or not.
pub(crate) fn snapshot(state: &Path, template: VmId) -> Snapshot {
    let dir = of(state, template);
    Snapshot { state: dir.join("state"), memory: dir.join("memory") }
}

/// What they take on disk, in bytes.
///
/// # Errors
/// They are not there.
pub(crate) fn allocated(state: &Path, template: VmId) -> Result<u64, Error> {
    let Snapshot { state, memory } = snapshot(state, template);
    let size = |path: &Path| {
        let meta = fs::symlink_metadata(path);
        meta.map(|meta| meta.blocks() * 512)
            .map_err(|e| Error::internal("cannot look at the files of a template", &e))
    };
    Ok(size(&state)? + size(&memory)?)
}

/// Removes the files of a template, if there are any.
///
/// # Errors
/// They cannot be removed.
pub(crate) fn remove(state: &Path, template: VmId) -> Result<(), Error> {
    remove_tree(&of(state, template))
}

/// The templates that have files.
///
/// # Errors
/// They cannot be listed.
pub(crate) fn list(state: &Path) -> Result<Vec<VmId>, Error> {
    let failed = |e| Error::internal("cannot list the files of templates", &e);
    private_dir(&dir(state))?;
    let mut templates = Vec::new();
    for entry in fs::read_dir(dir(state)).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        templates.extend(name.to_str().and_then(|name| name.parse::<VmId>().ok()));
    }
    Ok(templates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_counted_and_removed() {
        let state = tempfile::tempdir_in("/tmp").unwrap();
        let template = VmId::new();
        assert_eq!(list(state.path()).unwrap(), []);
        make(state.path(), template).unwrap();
        assert!(allocated(state.path(), template).is_err());
        let files = snapshot(state.path(), template);
        fs::write(&files.state, "devices").unwrap();
        fs::write(&files.memory, vec![1; 100_000]).unwrap();
        assert!(allocated(state.path(), template).unwrap() >= 100_000);
        assert_eq!(list(state.path()).unwrap(), [template]);
        remove(state.path(), template).unwrap();
        remove(state.path(), template).unwrap();
        assert_eq!(list(state.path()).unwrap(), []);
    }
}
