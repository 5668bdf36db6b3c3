//! Saving a guest, and what a saved one is.
//!
//! Two kinds. A *template's* memory is a file that the guest had as its memory from its boot on (`Memory::Shared`), so that
//! only its devices are left to be saved; any number of VMs go on from it, each with the file mapped privately: what they
//! read they share, what they write is their own. A *whole* save holds one guest for its own waking.
//!
//! Whose files they are: the agent's, mode 0600, in directories of its own. Nobody else opens them by a path.
//!
//! - A save is written through descriptors that the agent has opened and hands to the holder with its request. They have no
//!   name before all is written and on the disk: so there is no half a save, whoever is killed when.
//! - A template's memory is the VM's user's while that guest lives, and becomes the agent's with the save.
//! - VMs of a template run as other users, and a QEMU before 8.2 opens a private mapping's file for writing all the same. So
//!   they get a copy of it in memory ([`SealedMemory`]), one for all of them, which the kernel lets nobody write to.

use super::{
    checksum::{self, BLOCK, Checksum},
    holder::Holder,
    wire::{SaveReply, SaveRequest},
};
use bothy_contract::{Code, Error};
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use serde::{Deserialize, Serialize};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// What a guest's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Memory {
    /// The VMM's own, and gone with it.
    #[default]
    Own,
    /// A file, made by the launch, which [`Save::Devices`] leaves the guest's memory in. A VMM that cannot do that has it as
    /// its own, and writes it out then.
    Shared(PathBuf),
}

/// Where a guest begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Origin {
    /// At its boot.
    #[default]
    Boot,
    /// Where a template was saved by [`Save::Devices`]; it may do so any number of times. The memory is that of
    /// [`SealedMemory::path`].
    Template(Snapshot),
    /// Where this guest was saved by [`Save::Whole`].
    Saved(Snapshot),
}

/// The files of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The state of its machine; under QEMU, all of a whole save.
    pub state: PathBuf,
    /// Its memory, where that is apart.
    pub memory: PathBuf,
}

impl Snapshot {
    /// Writes down what its files are. Blocks.
    ///
    /// # Errors
    /// They cannot be read, or nothing be written beside them.
    pub fn count(&self) -> Result<(), Error> {
        self.files()?.iter().try_for_each(checksum::write_down)
    }

    /// Whether its files are what was saved, as far as that was written down. Blocks.
    ///
    /// # Errors
    /// They are not (`FailedPrecondition`), or cannot be read.
    pub fn check(&self) -> Result<(), Error> {
        self.files()?.iter().try_for_each(checksum::check)
    }

    /// Those that are there.
    fn files(&self) -> Result<Vec<fs_err::File>, Error> {
        let mut files = Vec::new();
        for path in [&self.state, &self.memory] {
            match fs_err::File::open(path) {
                Ok(file) => files.push(file),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::internal("cannot read a saved guest", &e)),
            }
        }
        Ok(files)
    }
}

/// How much of a guest is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Save {
    /// All but the memory, which is in a file already ([`Memory::Shared`]). The guest stays paused for good: what it did
    /// after that would spoil the file.
    Devices,
    /// All of it.
    Whole {
        /// Whether the guest runs afterwards, if the save comes through. It stays paused otherwise.
        resume: bool,
    },
}

/// What a save has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The size of the state's file.
    pub state_bytes: u64,
    /// What the memory's file takes on the disk, where there is one.
    pub memory_bytes: Option<u64>,
}

/// How long writing a guest's state may take, beside what its bytes need.
const SAVE: Duration = Duration::from_secs(30);
/// What the slowest disk that is worth waiting for writes in a second.
const SLOWEST: u64 = 16 << 20;

impl Holder {
    /// Saves the guest into `to`: whole, on the disk, or not at all; what was there stays until then. `memory_mib` is the
    /// guest's, by which it is known how long to wait.
    ///
    /// Where it fails, a guest that ran runs on, and one that was paused stays so.
    ///
    /// # Errors
    /// No holder answers (`Unavailable`), or why the guest could not be saved.
    pub async fn save(&self, to: &Snapshot, what: Save, memory_mib: u64) -> Result<Saved, Error> {
        let limit = SAVE + Duration::from_secs((memory_mib << 20) / SLOWEST);
        let (state, memory) = (Unnamed::beside(&to.state)?, Unnamed::beside(&to.memory)?);
        let request = SaveRequest { what, limit };
        let reply: SaveReply = self.ask_to_save(&request, &[&state.file, &memory.file]).await?;
        let (to, uid) = (to.clone(), self.uid());
        let keep = move || {
            if what == Save::Devices {
                // Whoever waits for a guest to be suspended does not wait for checksums; see [`Snapshot::count`].
                state.count()?;
                if reply.memory_written {
                    memory.count()?;
                }
            }
            let memory = match (reply.memory_written, what) {
                (true, _) => Some(memory.name(&to.memory)?),
                (false, Save::Devices) => Some(take_over(&to.memory, uid)?),
                (false, Save::Whole { .. }) => None,
            };
            // Last: where the state is, all is.
            let state = state.name(&to.state)?;
            Ok(Saved { state_bytes: state.len(), memory_bytes: memory.map(|file| file.blocks() * 512) })
        };
        let kept = tokio::task::spawn_blocking(keep)
            .await
            .map_err(|e| Error::internal("cannot keep a saved guest", &e))
            .flatten();
        match kept {
            Err(err) if reply.ran => Err(match self.run_again().await {
                Ok(()) => err,
                Err(also) => err.context(format!("the guest does not go on: {}", also.message)),
            }),
            kept => kept,
        }
    }

    /// Lets the guest go on, whichever VMM it has. Doing it twice is doing it once.
    async fn run_again(&self) -> Result<(), Error> {
        let vmm = self.status().await?.vmm_version;
        let driver = super::driver_of(&vmm)
            .ok_or_else(|| Error::new(Code::Internal, format!("there is no driver for `{vmm}`")))?;
        self.perform(&driver.resume()).await.map(drop)
    }
}

/// A file that gets its name when it is complete.
#[derive(Debug)]
struct Unnamed {
    file: fs_err::File,
}

impl Unnamed {
    /// One that can be given the name `path`.
    fn beside(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let failed = |err: io::Error| {
            Error::internal(format!("cannot make a file for a saved guest in {}", dir.display()), &err)
                .hint("its file system must know files without a name (O_TMPFILE), as ext4, XFS, btrfs and tmpfs do")
        };
        let file = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
        Ok(Self { file: fs_err::File::from_parts(file.into(), path) })
    }

    /// Writes its checksum down. Blocks.
    fn count(&self) -> Result<(), Error> {
        // It is open for writing only, as QEMU wants it.
        let read = fs_err::File::open(format!("/proc/self/fd/{}", self.file.file().as_raw_fd()));
        let counted = read.and_then(|file| checksum::of(&file)?.keep(&self.file));
        counted.map_err(|e| Error::internal("cannot write down a saved guest's checksum", &e))
    }

    /// Brings it to the disk, then into place of whatever has that name. Blocks.
    fn name(self, path: &Path) -> Result<std::fs::Metadata, Error> {
        let failed = |err: io::Error| Error::internal("cannot keep a saved guest", &err);
        self.file.sync_all().map_err(failed)?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        match fs_err::remove_file(&beside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        // A link to it takes no rights this way (open(2), O_TMPFILE).
        let from = format!("/proc/self/fd/{}", self.file.file().as_raw_fd());
        rustix::fs::linkat(CWD, &from, CWD, &beside, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| failed(io::Error::from(e)))?;
        fs_err::rename(&beside, path).map_err(failed)?;
        sync_directory(path)?;
        self.file.metadata().map_err(failed)
    }
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs_err::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::internal("cannot bring a saved guest's name to the disk", &e))
}

/// Makes the file that was a VM's memory the agent's own, and brings it to the disk. Blocks.
fn take_over(path: &Path, uid: u32) -> Result<std::fs::Metadata, Error> {
    let failed = |err: io::Error| Error::internal("cannot keep a saved guest's memory", &err);
    let file = fs_err::File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    // Its own already where it did not come to the end of an earlier save.
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_file() || ![uid, own].contains(&meta.uid()) {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("{} is not the memory of a VM of user {uid}", path.display()),
        ));
    }
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(|e| failed(e.into()))?;
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    file.sync_all().map_err(failed)?;
    checksum::of(&file).and_then(|sum| sum.keep(&file)).map_err(failed)?;
    sync_directory(path)?;
    file.metadata().map_err(failed)
}

/// A template's memory as VMs of any user can map it: a copy in memory, shared by all of them, that nobody can write to any
/// more (memfd_create(2), F_SEAL_WRITE). It takes the space of the file's data as long as this lives or a VM of it does.
#[derive(Debug)]
pub struct SealedMemory {
    file: fs_err::File,
    bytes: u64,
}

/// How much is copied at once.
const CHUNK: usize = 1 << 20;

impl SealedMemory {
    /// Copies the file's data, its holes left holes. Blocks. The VM whose memory it was must have ended.
    ///
    /// # Errors
    /// It cannot be read, is not what was saved any more (`FailedPrecondition`), or there is not enough memory.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let failed = |err: io::Error| Error::internal("cannot load a template's memory", &err);
        let source = fs_err::File::open(path).map_err(failed)?;
        let bytes = source.metadata().map_err(failed)?.len();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy: OwnedFd =
            rustix::fs::memfd_create("bothy-template", flags).map_err(|e| failed(e.into()))?;
        let copy = fs_err::File::from_parts(copy.into(), "a template's memory");
        copy_and_count(&source, &copy).map_err(failed)?.compare(&source)?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&copy, seals).map_err(|e| failed(e.into()))?;
        Ok(Self { file: copy, bytes })
    }

    /// Where a launch by this process finds it, for [`Origin::Template`]; as long as this lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.file().as_raw_fd()).into()
    }

    /// The copy.
    pub fn file(&self) -> &fs_err::File {
        &self.file
    }

    /// The guest's memory, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Copies what `from` has into `to`, which is empty; holes, and blocks of zeros, become holes. Blocks.
///
/// # Errors
/// Either cannot be read or written.
pub fn copy_sparse(from: &fs_err::File, to: &fs_err::File) -> io::Result<()> {
    copy_and_count(from, to).map(drop)
}

/// The same, with the checksum of all that was read.
fn copy_and_count(from: &fs_err::File, to: &fs_err::File) -> io::Result<Checksum> {
    to.set_len(from.metadata()?.len())?;
    let mut sum = Checksum::default();
    each_chunk(from, |start, chunk| {
        // Blocks side by side in one go.
        let (mut from, mut at) = (0, 0);
        let write = |from: usize, to_here: usize| match chunk.get(from..to_here) {
            Some(run) if !run.is_empty() => to.file().write_all_at(run, start + from as u64),
            _ => Ok(()),
        };
        for block in chunk.chunks(BLOCK) {
            if !sum.count(start + at as u64, block) {
                write(from, at)?;
                from = at + block.len();
            }
            at += block.len();
        }
        write(from, at)
    })?;
    Ok(sum)
}

/// Gives all data of the file to `each`, piece by piece, with its place: whole blocks, but for the file's end.
pub(super) fn each_chunk(
    file: &fs_err::File,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while let Some((start, end)) = data(file, at)? {
        at = start - start % BLOCK as u64;
        let end = end.next_multiple_of(BLOCK as u64).min(length);
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let Some(part) = buffer.get_mut(..most) else { break };
            file.file().read_exact_at(part, at)?;
            each(at, part)?;
            at += most as u64;
        }
    }
    // Looking for data has moved the place at which whoever gets the descriptor begins to read.
    rustix::fs::seek(file, SeekFrom::Start(0))?;
    Ok(())
}

/// Where the next data at or after `at` begins and ends; `None` where all that follows is a hole.
fn data(file: &fs_err::File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok(Some((start, rustix::fs::seek(file, SeekFrom::Hole(start))?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_has_its_name_once_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs_err::write(&path, "old").unwrap();
        fs_err::write(dir.path().join("state.new"), "of a crash").unwrap();
        let mut unnamed = Unnamed::beside(&path).unwrap();
        unnamed.file.write_all(b"new").unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), b"old");
        let meta = unnamed.name(&path).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777), (3, 0o600));
        assert_eq!(fs_err::read(&path).unwrap(), b"new");
        // One that is given up leaves nothing.
        drop(Unnamed::beside(&path).unwrap());
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
        assert!(Unnamed::beside(&dir.path().join("none/state")).is_err());
    }

    #[test]
    fn memory_becomes_the_agents_once_and_nobody_elses_file_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        fs_err::write(&path, "m").unwrap();
        fs_err::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let me = rustix::process::geteuid().as_raw();
        for vm in [me, me + 7] {
            assert_eq!(take_over(&path, vm).unwrap().mode() & 0o7777, 0o600);
        }
        assert!(take_over(dir.path(), me).unwrap_err().message.contains("is not the memory"));
        if me == 0 {
            std::os::unix::fs::chown(&path, Some(12), None).unwrap();
            assert!(take_over(&path, 13).is_err());
        }
        assert!(take_over(&dir.path().join("none"), me).is_err());
    }

    #[test]
    fn sealed_memory_is_what_the_file_was_and_stays_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut file = fs_err::File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all(&[1; 5000]).unwrap();
        file.file().write_all_at(&[2; 3 << 20], 4 << 20).unwrap();
        let sealed = SealedMemory::load(&path).unwrap();
        assert_eq!(sealed.bytes(), 8 << 20);
        assert!(fs_err::read(sealed.path()).unwrap() == fs_err::read(&path).unwrap());
        // As sparse as it was, and nobody's to change, even who may open it for writing.
        assert!(fs_err::metadata(sealed.path()).unwrap().blocks() * 512 <= 4 << 20);
        let writer = fs_err::OpenOptions::new().read(true).write(true).open(sealed.path()).unwrap();
        let refused = writer.file().write_all_at(&[3], 0).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(writer.set_len(0).is_err());
        assert!(SealedMemory::load(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_saved_guest_is_held_against_what_was_written_down() {
        let dir = tempfile::tempdir().unwrap();
        let saved = Snapshot { state: dir.path().join("state"), memory: dir.path().join("none") };
        saved.check().unwrap();
        fs_err::write(&saved.state, "devices and all").unwrap();
        saved.check().unwrap();
        saved.count().unwrap();
        saved.check().unwrap();
        let file = fs_err::OpenOptions::new().write(true).open(&saved.state).unwrap();
        file.file().write_all_at(b"D", 0).unwrap();
        assert_eq!(saved.check().unwrap_err().code, Code::FailedPrecondition);
    }
}
