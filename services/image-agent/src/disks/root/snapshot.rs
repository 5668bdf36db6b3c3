//! A snapshot by the device mapper: the guest reads the image's rootfs, which VMs share, and what it writes goes to `root.cow`, a
//! sparse file of the VM's own. For file systems that share no extents, and guests that want an ordinary root all the same.
//!
//! ```text
//!   root (a block device's node, the VM's user's) = <name>-root: | <name>-snap                        | linear |
//!                                                                | snapshot of rootfs.ext4 (read only)|        |
//!                                        root.cow:               | what is written to that            | more   |
//! ```
//! Names come from the disks' directory and the VM's id, so the devices are found with every record lost. Their loop devices go
//! with them. It takes CAP_SYS_ADMIN, and CAP_MKNOD for the node.

use super::{
    super::{BASE, COW, NODE},
    Backend, Place, failed, lacks, link, make_file,
};
use crate::{
    blockdev::{
        self,
        dm::{Mapper, Target},
        loopdev::{self, Part},
    },
    fault,
    store::Image,
};
use bothy_contract::{
    Error, VmId,
    image::{RootDisk, Rootfs},
};
use sha2::{Digest as _, Sha256};
use std::{
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

const SECTOR: u64 = 512;
/// What is copied at once when the guest first writes to it, in bytes: a page, as ext4's blocks.
const CHUNK: u64 = 4096;

/// Snapshots.
#[derive(Debug)]
pub(super) struct Snapshot;

impl Backend for Snapshot {
    fn kind(&self) -> RootDisk {
        RootDisk::DmSnapshot
    }

    fn what(&self) -> &'static str {
        "root disk"
    }

    fn file(&self) -> &'static str {
        COW
    }

    fn least(&self) -> &'static str {
        "rootfs"
    }

    fn make(&self, place: &Place, image: &Image, mib: u64) -> Result<(), Error> {
        let of = |e: io::Error| failed(self, place.vm, &e);
        let mapper = mapper()?;
        let (artifact, rootfs) = image.artifact("rootfs")?;
        if artifact.size % CHUNK != 0 {
            return Err(lacks(
                self.kind(),
                format!("the rootfs has {} bytes, no multiple of {CHUNK}", artifact.size),
            ));
        }
        let base = place.home.join(BASE);
        link(&rootfs, &base).map_err(of)?;
        if !base.is_file() {
            return Err(lacks(self.kind(), "the images are on another file system than the disks"));
        }
        let names = Names::of(&place.home, place.vm);
        let made = make_file(&place.home.join(COW), 0, |temp| {
            let bytes = cow_length(artifact.size) + mib * super::MIB - artifact.size;
            temp.as_file().set_len(bytes).map_err(of)?;
            // What an earlier one of this VM may have left has another file's blocks.
            names.remove(&mapper).map_err(of)?;
            names.create(&mapper, &base, temp.path()).map_err(of)?;
            let node = place.home.join(NODE);
            let number = names.number(&mapper).map_err(of)?;
            number.make_node(&node, 0).map_err(of)?;
            super::own::make_writable(&node, image)
        });
        if made.is_err() {
            // The first failure is the one to tell.
            let _ = self.detach(place.vm, &place.home);
            let _ = fs_err::remove_file(&base);
        }
        made
    }

    fn attach(&self, place: &Place) -> Result<Rootfs, Error> {
        let of = |e: io::Error| fault::io(format!("cannot take up the root disk of VM {}", place.vm), &e);
        let mapper = mapper()?;
        let (names, node) = (Names::of(&place.home, place.vm), place.home.join(NODE));
        let attach = || {
            if mapper.find(&names.root)?.is_none() {
                // The host has started since, or somebody was at it by halves.
                names.remove(&mapper)?;
                names.create(&mapper, &place.home.join(BASE), &place.home.join(COW))?;
            }
            names.number(&mapper)?.make_node(&node, place.uid)
        };
        attach().map_err(of)?;
        Ok(Rootfs { base: node, system: None })
    }

    fn detach(&self, vm: VmId, home: &Path) -> Result<(), Error> {
        let of = |e: io::Error| fault::io(format!("cannot remove the root device of VM {vm}"), &e);
        blockdev::remove(&home.join(NODE)).map_err(of)?;
        match Mapper::open().map_err(of)? {
            Some(mapper) => Names::of(home, vm).remove(&mapper).map_err(of),
            None => Ok(()),
        }
    }

    fn own_file_system(&self, home: &Path) -> Option<PathBuf> {
        Some(home.join(NODE))
    }

    /// The device's user is [`Backend::attach`]'s work; nobody but the kernel opens the file.
    fn gives_file(&self) -> bool {
        false
    }

    fn size(&self, home: &Path) -> io::Result<u64> {
        let base = fs_err::symlink_metadata(home.join(BASE))?.len();
        let file = fs_err::symlink_metadata(home.join(COW))?.len();
        Ok(base + file.saturating_sub(cow_length(base)))
    }

    fn grow(&self, vm: VmId, home: &Path, bytes: u64) -> io::Result<()> {
        let base = fs_err::symlink_metadata(home.join(BASE))?.len();
        let cow = home.join(COW);
        super::super::sizes::open(&cow)?.set_len(cow_length(base) + bytes.saturating_sub(base))?;
        let names = Names::of(home, vm);
        match Mapper::open()? {
            // Else it has its new size when it is attached.
            Some(mapper) if mapper.find(&names.root)?.is_some() => names.grow(&mapper, base, &cow),
            _ => Ok(()),
        }
    }

    fn sweep(&self, disks: &Path) -> Result<(), Error> {
        let of = |e: io::Error| fault::io("cannot sweep the root devices", &e);
        let mapper = Mapper::open().map_err(of)?;
        for entry in fs_err::read_dir(disks).map_err(of)? {
            let home = entry.map_err(of)?.path();
            let vm = home.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let (Some(vm), true) = (vm, home.join(NODE).exists()) else { continue };
            let root = Names::of(&home, vm).root;
            let number = mapper.as_ref().map_or(Ok(None), |mapper| mapper.find(&root)).map_err(of)?;
            if number.is_none() {
                // The host has started since: another device may have that number by now.
                blockdev::remove(&home.join(NODE)).map_err(of)?;
            }
        }
        let Some(mapper) = mapper else { return Ok(()) };
        let prefix = prefix(disks);
        for name in mapper.names().map_err(of)? {
            let vm = name.strip_prefix(&prefix).and_then(|rest| rest.rsplit_once('-'));
            let Some(vm) = vm.and_then(|(vm, _)| vm.parse::<VmId>().ok()) else { continue };
            let home = disks.join(vm.to_string());
            if !home.join(COW).exists() {
                self.detach(vm, &home)?;
            }
        }
        Ok(())
    }
}

/// The host's device mapper.
fn mapper() -> Result<Mapper, Error> {
    let open = Mapper::open().map_err(|e| fault::io("cannot reach the device mapper", &e))?;
    open.ok_or_else(|| {
        lacks(
            RootDisk::DmSnapshot,
            "there is no device mapper that this service may use (`modprobe dm-snapshot loop` loads it where it is a module)",
        )
    })
}

/// How much of the file takes what is written to a base of that size: all of it, with the snapshot's own tables. A snapshot that
/// ran full would be lost.
fn cow_length(base: u64) -> u64 {
    let chunks = base.div_ceil(CHUNK);
    // One chunk of the tables has places for CHUNK / 16 others; a header; some to spare.
    (chunks + chunks / (CHUNK / 16) + 16) * CHUNK
}

/// What the names of devices of the disks in `disks` begin with.
pub(super) fn prefix(disks: &Path) -> String {
    let digest = hex::encode(Sha256::digest(disks.as_os_str().as_bytes()));
    format!("bothy-{}-", digest.get(..8).unwrap_or_default())
}

/// The devices of one VM.
#[derive(Debug)]
struct Names {
    snap: String,
    root: String,
}

impl Names {
    fn of(home: &Path, vm: VmId) -> Self {
        let prefix = prefix(home.parent().unwrap_or(home));
        Self { snap: format!("{prefix}{vm}-snap"), root: format!("{prefix}{vm}-root") }
    }

    /// Makes both; on failure neither.
    fn create(&self, mapper: &Mapper, base: &Path, cow: &Path) -> io::Result<()> {
        let length = fs_err::symlink_metadata(base)?.len();
        let rootfs = loopdev::open(base, Part { offset: 0, length: 0 }, true)?;
        let writes = loopdev::open(cow, Part { offset: 0, length: cow_length(length) }, false)?;
        let snapshot = Target {
            sectors: length / SECTOR,
            kind: "snapshot",
            params: format!("{} {} P {}", rootfs.number, writes.number, CHUNK / SECTOR),
        };
        mapper.create(&self.snap, &[snapshot])?;
        let made = self.on_snapshot(mapper, length, cow, |table| mapper.create(&self.root, table));
        if made.is_err() {
            mapper.remove(&self.snap)?;
        }
        made
    }

    /// Has the root be as large as its files by now.
    fn grow(&self, mapper: &Mapper, base: u64, cow: &Path) -> io::Result<()> {
        self.on_snapshot(mapper, base, cow, |table| mapper.load(&self.root, table))
    }

    /// Uses the table of a root over a snapshot of `base` bytes, with what more there is of `cow` behind it.
    fn on_snapshot(
        &self,
        mapper: &Mapper,
        base: u64,
        cow: &Path,
        work: impl FnOnce(&[Target]) -> io::Result<blockdev::Number>,
    ) -> io::Result<()> {
        let snap = mapper.find(&self.snap)?.ok_or_else(|| io::Error::other("the snapshot is not there"))?;
        let linear = |sectors, params| Target { sectors, kind: "linear", params };
        let mut table = vec![linear(base / SECTOR, format!("{snap} 0"))];
        let offset = cow_length(base);
        let more = fs_err::symlink_metadata(cow)?.len().saturating_sub(offset) / SECTOR;
        // Open until the device has it open.
        let rest = match more {
            0 => None,
            _ => Some(loopdev::open(cow, Part { offset, length: 0 }, false)?),
        };
        table.extend(rest.as_ref().map(|rest| linear(more, format!("{} 0", rest.number))));
        work(&table).map(drop)
    }

    /// Removes what is there of both.
    fn remove(&self, mapper: &Mapper) -> io::Result<()> {
        mapper.remove(&self.root)?;
        mapper.remove(&self.snap)
    }

    /// The number of the root, which is there.
    fn number(&self, mapper: &Mapper) -> io::Result<blockdev::Number> {
        mapper.find(&self.root)?.ok_or_else(|| io::Error::other("the root device is not there"))
    }
}
