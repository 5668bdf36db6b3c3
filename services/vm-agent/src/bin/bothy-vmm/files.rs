//! The files of a saved guest, opened while `launch` is still the agent: the VM's user gets to them by their descriptors alone.

use crate::os_error;
use bothy_contract::{Code, Error};
use bothy_vm_agent::vmm::{
    SealedMemory, checksum,
    wire::{self, LaunchSpec, MemoryFile, Monitor},
};
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
    state: State,
}

/// What a guest goes on from.
#[derive(Debug)]
enum State {
    None,
    /// For the holder, which passes it on to its VMM.
    Held(fs_err::File),
    /// For a VMM that opens it itself, as a user who may not open the file: a copy, for whoever has the descriptor.
    Copied(SealedMemory),
}

impl Files {
    /// Opens, or makes, what `spec` names.
    pub(crate) fn open(spec: &LaunchSpec) -> Result<Self, Error> {
        let memory = match &spec.memory {
            None => None,
            Some(MemoryFile::Make { path, bytes }) => Some(make(path, *bytes, spec)?),
            Some(MemoryFile::Map { path, bytes }) => Some(map(path, *bytes)?),
            Some(MemoryFile::Own { path, bytes }) => {
                let file = map(path, *bytes)?;
                give(&file, spec).map_err(os_error("cannot hand over the saved guest's memory"))?;
                Some(file)
            }
        };
        let state = match (&spec.restore, &spec.monitor) {
            (None, _) => State::None,
            (Some(restore), Monitor::Qmp) => {
                let file = fs_err::File::open(&restore.state)
                    .map_err(|err| lost(err, "cannot open what the guest was saved into"))?;
                if restore.memory_apart {
                    // Small enough.
                    checksum::check(&file)?;
                }
                State::Held(file)
            }
            (Some(restore), Monitor::Api { .. }) => State::Copied(SealedMemory::load(&restore.state)?),
        };
        Ok(Self { memory, state })
    }

    /// The numbers under which every program started from now on finds them, and what stands for those until then.
    pub(crate) fn passed_on(&self) -> Result<Vec<(&'static str, i32)>, Error> {
        let copy = match &self.state {
            State::Copied(copy) => Some(copy.file()),
            State::None | State::Held(_) => None,
        };
        let files = [(wire::MEMORY_FD, self.memory.as_ref()), (wire::STATE_FD, copy)];
        let files = files.into_iter().filter_map(|(placeholder, file)| Some((placeholder, file?)));
        let passed = files.map(|(placeholder, file)| {
            // Without close-on-exec: being inherited is what it is for.
            Ok((placeholder, fcntl(file.file(), FcntlArg::F_DUPFD(LEAST))?))
        });
        passed
            .collect::<Result<_, nix::Error>>()
            .map_err(|err| Error::internal("cannot pass on a saved guest", &err))
    }

    /// What the holder gets.
    pub(crate) fn state(&self) -> Option<&fs_err::File> {
        match &self.state {
            State::Held(file) => Some(file),
            State::None | State::Copied(_) => None,
        }
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
        give(&file, spec)?;
        Ok(file)
    };
    made().map_err(failed)
}

fn give(file: &fs_err::File, spec: &LaunchSpec) -> std::io::Result<()> {
    Ok(fchown(file.file(), Some(Uid::from_raw(spec.uid)), Some(Gid::from_raw(spec.gid)))?)
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
