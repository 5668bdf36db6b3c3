//! The files of a saved guest, opened while `launch` is still the agent: the VM's user gets to them by their descriptors alone.

use crate::os_error;
use bothy_contract::{Code, Error};
use bothy_vm_agent::vmm::wire::{LaunchSpec, MemoryFile};
use fs_err::os::unix::fs::OpenOptionsExt;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{Gid, Uid, fchown},
};
use std::path::Path;

/// The least number of a descriptor in the VMM: out of the way of all that a process opens by itself.
const LEAST: i32 = 100;

/// What of these there is to be.
#[derive(Debug)]
pub(crate) struct Files {
    memory: Option<fs_err::File>,
    state: Option<fs_err::File>,
}

impl Files {
    /// Opens, or makes, what `spec` names.
    pub(crate) fn open(spec: &LaunchSpec) -> Result<Self, Error> {
        let memory = match &spec.memory {
            None => None,
            Some(MemoryFile::Make { path, bytes }) => Some(make(path, *bytes, spec)?),
            Some(MemoryFile::Map { path, bytes }) => Some(map(path, *bytes)?),
        };
        let state = spec.restore.as_ref().map(|restore| fs_err::File::open(&restore.state));
        let state =
            state.transpose().map_err(|err| lost(err, "cannot open what the guest was saved into"))?;
        Ok(Self { memory, state })
    }

    /// The number under which every program started from now on finds the guest's memory.
    pub(crate) fn memory(&self) -> Result<Option<i32>, Error> {
        // Without close-on-exec: being inherited is what it is for.
        let passed = self.memory.as_ref().map(|file| fcntl(file.file(), FcntlArg::F_DUPFD(LEAST)));
        passed.transpose().map_err(|err| Error::internal("cannot pass on the guest's memory", &err))
    }

    /// The saved state.
    pub(crate) fn state(&self) -> Option<&fs_err::File> {
        self.state.as_ref()
    }
}

fn make(path: &Path, bytes: u64, spec: &LaunchSpec) -> Result<fs_err::File, Error> {
    let failed = os_error("cannot make the file of the guest's memory");
    let made = || {
        let file = fs_err::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(path)?;
        // Before it is the VM's user's: from then on only that may.
        file.set_len(bytes)?;
        fchown(file.file(), Some(Uid::from_raw(spec.uid)), Some(Gid::from_raw(spec.gid)))?;
        Ok(file)
    };
    made().map_err(failed)
}

fn map(path: &Path, bytes: u64) -> Result<fs_err::File, Error> {
    let failed = "cannot open the memory of the saved guest";
    let file = fs_err::File::open(path).map_err(|err| lost(err, failed))?;
    let there = file.metadata().map_err(os_error(failed))?.len();
    if there != bytes {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("{} has {there} bytes and the guest's memory {bytes}", path.display()),
        ));
    }
    Ok(file)
}

fn lost(err: std::io::Error, what: &str) -> Error {
    match err.kind() {
        std::io::ErrorKind::NotFound => Error::new(Code::NotFound, format!("{what}: {err}")),
        _ => os_error(what)(err),
    }
}
