//! The layers of an OCI image, or the archive of a root file system, become one ext4 file system in a file.
//!
//! ```text
//!  layer file -> digest -> decompress -> digest -> entries + data ---.   one thread pair per layer, two layers at once
//!                                          |                         |
//!                                          | data: straight to its   | what each entry is and where its data went
//!                                          v blocks of the image     v
//!                                        [space]                   [tree]: layers laid over one another, whiteouts
//!                                          ^                         |
//!                                          '---- [ext4]: directories, inodes, bitmaps, superblock
//! ```
//! Nothing is mounted, and nothing of an archive ever becomes a file of the host: names, links and device nodes exist
//! only in a tree in memory and in the blocks of the image. So an archive has nothing to break out of: `..` is refused, a
//! symbolic link on the way to an entry is followed inside the tree, as a container runtime does inside its root.
//! Each file's data is written once, to the place where it stays; what a later layer hides is given back as a hole.
//!
//! All that an archive can make us use up is bounded by [`Limits`].

mod archive;
mod codec;
mod ext4;
mod groups;
mod layer;
mod space;
mod tree;

pub use archive::{Entry, Kind, Reader};
pub use codec::{Beat, Decoder, decompress};

use bothy_contract::{Code, Error, error::chain};
use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

/// A layer, or the whole of a root file system: a tar archive, as it is or compressed with gzip or zstd.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The file that holds it.
    pub file: PathBuf,
    /// Where it begins in that file.
    pub offset: u64,
    /// How long it is there, in bytes; to the file's end where nothing is said.
    pub length: Option<u64>,
    /// The SHA-256 that it must have as it is there, in lower-case hex.
    pub digest: Option<String>,
    /// The SHA-256 that it must have once decompressed.
    pub diff_id: Option<String>,
    /// Whether `.wh.` in front of a name hides that name of the layers below, as OCI has it.
    pub whiteouts: bool,
}

/// The most that archives may make us use up.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Decompressed bytes of all layers together.
    pub bytes: u64,
    /// Entries of all layers together.
    pub entries: u64,
    /// Bytes of names, link targets and attributes of all layers together.
    pub names: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 4_000_000, names: 512 << 20 }
    }
}

/// What a file system was made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Regular files, each counted once however many names it has.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes that were written and then hidden by a later layer.
    pub hidden: u64,
    /// The file system's size.
    pub size: u64,
    /// What was left out because a guest must not have it or ext4 cannot hold it: device nodes that overlayfs would take
    /// for whiteouts, and attributes that only a host means something by.
    pub dropped: Dropped,
}

/// What was left out of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Device nodes.
    pub devices: u64,
    /// Extended attributes.
    pub xattrs: u64,
}

/// Makes `out`, which must not be there, an ext4 file system of `layers`, the lowest first. `beat` hears of each piece of a
/// layer that was read, and its error stops the work. On failure a part of `out` may be left.
///
/// # Errors
/// An archive is not what it should be, has another digest, would use up more than `limits`, or the file system says no.
pub fn flatten(layers: &[Layer], out: &Path, limits: &Limits, beat: Beat<'_>) -> Result<Summary, Error> {
    let space = space::Space::create(out, limits.bytes)?;
    let read = read_all(layers, &space, limits, beat)?;
    let mut tree = tree::Tree::new();
    let mut spans = Vec::new();
    let mut dropped = Dropped::default();
    for (layer, read) in layers.iter().zip(read) {
        spans.extend(read.entries.iter().filter_map(|e| match e.kind {
            layer::Placed::File(span) => Some(span),
            _ => None,
        }));
        dropped.devices += read.dropped.devices;
        dropped.xattrs += read.dropped.xattrs;
        tree.apply(read.entries, layer.whiteouts).map_err(|e| e.context(name(layer)))?;
    }
    let mut summary = ext4::write(tree, &space, &mut spans)?;
    summary.dropped = dropped;
    Ok(summary)
}

/// What a layer is called in errors.
fn name(layer: &Layer) -> String {
    match &layer.digest {
        Some(digest) => format!("layer sha256:{}", digest.get(..12).unwrap_or(digest)),
        None => "the archive".to_owned(),
    }
}

/// Reads all layers, as many at once as there are processors, each with its data going to its place.
fn read_all(
    layers: &[Layer],
    space: &space::Space,
    limits: &Limits,
    beat: Beat<'_>,
) -> Result<Vec<layer::Read>, Error> {
    let shared = layer::Shared::new(limits);
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(layers.len());
    let work = || -> Vec<(usize, Result<layer::Read, Error>)> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(layer) = layers.get(index) else { return done };
            let read = layer::read(layer, space, &shared, beat).map_err(|e| e.context(name(layer)));
            // The others need not go on with what is lost.
            if read.is_err() {
                shared.stop();
            }
            done.push((index, read));
        }
    };
    let mut results: Vec<_> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    results.sort_by_key(|(index, _)| *index);
    // The error that stopped the others, not what it did to them.
    if let Some(at) = results.iter().position(|(_, r)| matches!(r, Err(e) if !layer::is_stopped(e))) {
        results.swap(0, at);
    }
    results.into_iter().map(|(_, read)| read).collect()
}

/// The error for `what` having failed with `err`, the kernel's. A full disk is told apart, since a person can do something about it.
pub fn failed(what: impl std::fmt::Display, err: &io::Error) -> Error {
    let message = format!("{what}: {}", chain(err));
    if err.kind() == io::ErrorKind::StorageFull || err.raw_os_error() == Some(28) {
        return Error::new(Code::ResourceExhausted, message)
            .hint("free some space where the state directory is (`df -h`), then try again");
    }
    Error::new(Code::Internal, message)
}
