//! One layer: its entries, with the data of files already in its place.

use crate::{
    Dropped, Layer, Limits,
    archive::{Entry, Kind, Reader},
    codec::{self, Beat},
    ext4::XATTR_ROOM,
    failed,
    space::{Space, Span, Writer},
};
use bothy_contract::{Code, Error};
use fs_err::File;
use std::{
    io::{Read as _, Seek as _, SeekFrom},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// An entry whose data is in its place.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) path: Vec<u8>,
    pub(crate) meta: Meta,
    pub(crate) kind: Placed,
}

/// What an inode has, whatever it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meta {
    /// Permissions only.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug)]
pub(crate) enum Placed {
    File(Span),
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Device { block: bool, major: u32, minor: u32 },
    Fifo,
}

/// What was in a layer.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) entries: Vec<Item>,
    pub(crate) dropped: Dropped,
}

/// What all layers use up together.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: Limits,
    bytes: AtomicU64,
    entries: AtomicU64,
    names: AtomicU64,
    stop: AtomicBool,
}

const STOPPED: &str = "another layer failed";

/// Whether a layer only ended because another one failed.
pub(crate) fn is_stopped(e: &Error) -> bool {
    e.code == Code::Cancelled && e.message.ends_with(STOPPED)
}

impl Shared {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            bytes: AtomicU64::new(0),
            entries: AtomicU64::new(0),
            names: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// Ends all layers at their next piece.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn bytes(&self, more: u64) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Cancelled, STOPPED));
        }
        let most = self.limits.bytes;
        if self.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more) > most {
            return Err(too_large(format!("it unpacks to more than {} MiB", most >> 20)));
        }
        Ok(())
    }

    fn entry(&self, entry: &Entry) -> Result<(), Error> {
        let (most, names) = (self.limits.entries, self.limits.names);
        if self.entries.fetch_add(1, Ordering::Relaxed) >= most {
            return Err(too_large(format!("it has more than {most} entries")));
        }
        let more = entry.weight();
        if self.names.fetch_add(more, Ordering::Relaxed).saturating_add(more) > names {
            return Err(too_large(format!("its names come to more than {} MiB", names >> 20)));
        }
        Ok(())
    }
}

fn too_large(what: String) -> Error {
    Error::new(Code::ResourceExhausted, what)
        .hint("is this what it should be? Images of that size are not taken")
}

/// Reads `layer`. Its files' data goes to `space`.
pub(crate) fn read(layer: &Layer, space: &Space, shared: &Shared, beat: Beat<'_>) -> Result<Read, Error> {
    let unreadable = |e: std::io::Error| failed("it cannot be read", &e);
    let mut file = File::open(&layer.file).map_err(unreadable)?;
    file.seek(SeekFrom::Start(layer.offset)).map_err(unreadable)?;
    let source = file.take(layer.length.unwrap_or(u64::MAX));
    let (to, pieces) = codec::pair();
    std::thread::scope(|scope| {
        let decoding = scope.spawn(move || {
            let decoded = codec::decode(source, &to, |more| shared.bytes(more), beat);
            drop(to);
            decoded
        });
        let taken = take(pieces, space, shared);
        let decoded = match decoding.join() {
            Ok(decoded) => decoded,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // A stream that broke off is why the archive makes no sense.
        let digests = decoded?;
        let read = taken?;
        let digests = digests.ok_or_else(|| Error::new(Code::Internal, "its end was not read"))?;
        check("digest", layer.digest.as_deref(), &digests.outer)?;
        check("digest once decompressed", layer.diff_id.as_deref(), &digests.inner)?;
        Ok(read)
    })
}

fn check(what: &str, expected: Option<&str>, found: &str) -> Result<(), Error> {
    match expected {
        Some(expected) if expected != found => {
            Err(Error::invalid(format!("its {what} is sha256:{found}, and should be sha256:{expected}"))
                .hint("it was damaged or altered on its way: get it again"))
        }
        _ => Ok(()),
    }
}

fn take(pieces: codec::Pieces, space: &Space, shared: &Shared) -> Result<Read, Error> {
    let mut archive = Reader::new(pieces);
    let mut writer = Writer::new(space);
    let mut read = Read::default();
    while let Some(entry) = archive.entry()? {
        shared.entry(&entry)?;
        let Entry { path, kind, mode, uid, gid, mtime, xattrs } = entry;
        let kind = match kind {
            Kind::File(size) => Placed::File(writer.file(size, &mut archive)?),
            Kind::Directory => Placed::Directory,
            Kind::Symlink(target) => Placed::Symlink(target),
            Kind::HardLink(target) => Placed::HardLink(target),
            Kind::Fifo => Placed::Fifo,
            Kind::Device { block, major, minor } => {
                // 0:0 is how overlayfs says that a name is hidden, and the guest lays an overlay over this.
                if (!block && major == 0 && minor == 0) || major > 0xfff || minor > 0xf_ffff {
                    read.dropped.devices += 1;
                    continue;
                }
                Placed::Device { block, major, minor }
            }
        };
        let before = xattrs.len();
        let xattrs = keep(xattrs);
        read.dropped.xattrs += (before - xattrs.len()) as u64;
        let mode = u16::try_from(mode & 0o7777).unwrap_or(0o644);
        read.entries.push(Item { path, meta: Meta { mode, uid, gid, mtime, xattrs }, kind });
    }
    writer.flush()?;
    // The rest is padding, which belongs to the digest.
    archive.drain()?;
    Ok(read)
}

/// The attributes that mean the same in a guest: capabilities, and the user's own. Those that overlayfs reads would let an
/// image lie to it, and labels are another machine's.
fn keep(mut xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut room = XATTR_ROOM;
    let mut seen = std::collections::BTreeSet::new();
    xattrs.retain(|(name, value)| {
        let wanted = name.as_slice() == b"security.capability"
            || (name.starts_with(b"user.") && name.len() > 5 && !name.starts_with(b"user.overlay."));
        let size = 20 + name.len() + value.len() + 4;
        let fits = name.is_ascii() && name.len() < 256 && size <= room;
        let kept = wanted && fits && seen.insert(name.clone());
        if kept {
            room -= size;
        }
        kept
    });
    xattrs
}
