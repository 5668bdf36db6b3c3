//! The agent's own files of a VM, `<state>/vm-agent/vm/<id>/`, mode 0700: the guest's ssh host key, and its memory while it is
//! suspended. The key is made on the
//! host, where that takes milliseconds (an emulated guest needs more than a second), and kept, so that the guest is known
//! by the same key after every start.

use bothy_contract::{Code, Error, VmId};
use bothy_vm_agent::vmm::Snapshot;
use fs_err as fs;
use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

const KEY: &str = "ssh_host_ed25519_key";

/// A guest's ssh host key in OpenSSH's own formats.
#[derive(Debug)]
pub(crate) struct HostKey {
    /// The private half.
    pub(crate) private: Vec<u8>,
    /// The public half, one line.
    pub(crate) public: Vec<u8>,
}

/// Makes `path` a directory that only this user may enter.
pub(crate) fn private_dir(path: &Path) -> Result<(), Error> {
    let failed = |e: io::Error| Error::internal("cannot make a directory", &e);
    fs::create_dir_all(path).map_err(failed)?;
    fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)
}

fn dir(state: &Path, vm: VmId) -> PathBuf {
    state.join("vm").join(vm.to_string())
}

/// Makes the VM's host key unless it is there.
pub(crate) async fn make_host_key(state: &Path, vm: VmId) -> Result<(), Error> {
    let dir = dir(state, vm);
    private_dir(&state.join("vm"))?;
    private_dir(&dir)?;
    let key = dir.join(KEY);
    if key.with_extension("pub").exists() && key.exists() {
        return Ok(());
    }
    // Beside, then renamed, the public half last: a crash leaves no half of a pair that looks whole.
    let new = dir.join("new_key");
    remove(&new)?;
    remove(&new.with_extension("pub"))?;
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Code::Internal, format!("cannot make an ssh host key with `ssh-keygen`: {e}"))
            .hint("install it with `apt-get install openssh-client`")
    };
    let output = tokio::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "bothy", "-f"])
        .arg(&new)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| failed(&e))?;
    if !output.status.success() {
        return Err(failed(&String::from_utf8_lossy(&output.stderr).trim()));
    }
    fs::rename(&new, &key).map_err(|e| failed(&e))?;
    fs::rename(new.with_extension("pub"), key.with_extension("pub")).map_err(|e| failed(&e))
}

/// The VM's host key.
pub(crate) fn host_key(state: &Path, vm: VmId) -> Result<HostKey, Error> {
    let key = dir(state, vm).join(KEY);
    let read = |path: &Path| fs::read(path).map_err(|e| Error::internal("cannot read a host key", &e));
    Ok(HostKey { private: read(&key)?, public: read(&key.with_extension("pub"))? })
}

/// Where the memory of a suspended VM is, whether it is there or not.
pub(crate) fn asleep(state: &Path, vm: VmId) -> Snapshot {
    let dir = dir(state, vm);
    Snapshot { state: dir.join("suspended"), memory: dir.join("suspended-memory") }
}

/// Removes that. The files without their names: their room is free once they are dropped, which takes its time.
pub(crate) fn forget_asleep(state: &Path, vm: VmId) -> Result<Vec<fs::File>, Error> {
    let Snapshot { state, memory } = asleep(state, vm);
    let mut files = Vec::new();
    for path in [state, memory] {
        files.extend(fs::File::open(&path).ok());
        remove(&path)?;
    }
    Ok(files)
}

/// Removes all of the VM's files.
pub(crate) fn remove_vm(state: &Path, vm: VmId) -> Result<(), Error> {
    remove_tree(&dir(state, vm))
}

/// Removes a directory if it is there. Symbolic links in it are removed, not followed.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::internal("cannot remove a directory", &e))
        }
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::internal("cannot remove a file", &e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_forgotten_has_no_name_at_once() {
        let state = tempfile::tempdir_in("/tmp").unwrap();
        let vm = VmId::new();
        assert!(forget_asleep(state.path(), vm).unwrap().is_empty());
        fs::create_dir_all(dir(state.path(), vm)).unwrap();
        fs::write(asleep(state.path(), vm).state, "devices").unwrap();
        let files = forget_asleep(state.path(), vm).unwrap();
        assert_eq!(files.len(), 1);
        assert!(!asleep(state.path(), vm).state.exists());
    }

    #[tokio::test]
    async fn a_host_key_is_made_once_kept_private_and_removed() {
        let state = tempfile::tempdir_in("/tmp").unwrap();
        let vm = VmId::new();
        make_host_key(state.path(), vm).await.unwrap();
        let key = host_key(state.path(), vm).unwrap();
        assert!(key.private.starts_with(b"-----BEGIN OPENSSH PRIVATE KEY-----"));
        assert!(key.public.starts_with(b"ssh-ed25519 "));
        let mode = dir(state.path(), vm).join(KEY).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        make_host_key(state.path(), vm).await.unwrap();
        assert_eq!(host_key(state.path(), vm).unwrap().private, key.private);
        // What a crash between the two renames leaves.
        fs::remove_file(dir(state.path(), vm).join(KEY).with_extension("pub")).unwrap();
        make_host_key(state.path(), vm).await.unwrap();
        assert_ne!(host_key(state.path(), vm).unwrap().private, key.private);
        remove_vm(state.path(), vm).unwrap();
        remove_vm(state.path(), vm).unwrap();
        assert!(host_key(state.path(), vm).is_err());
    }
}
