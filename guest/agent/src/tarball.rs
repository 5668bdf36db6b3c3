//! Tar streams in and out of the guest. The `tar` crate is blocking, so the work runs on a blocking thread and
//! bounded queues of chunks join it to the stream: nothing is ever held as a whole.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bothy_guest_proto::CHUNK;
use tar::{Archive, Builder, EntryType, Header};
use tokio::sync::mpsc;

/// How much an archive had in it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) entries: u64,
    /// Bytes of file contents.
    pub(crate) bytes: u64,
}

/// Unpacks `archive` below `directory`, which is made if it is not there: modes, links and times as they are in the
/// archive, all owned by root. An entry that would land elsewhere ends it with an error.
///
/// # Errors
/// When the archive is broken or leads out of `directory`, or the disk is full; what was unpacked so far stays.
pub(crate) fn unpack(archive: impl Read, directory: &Path) -> io::Result<Unpacked> {
    fs_err::create_dir_all(directory)?;
    let directory = fs_err::canonicalize(directory)?;
    let mut archive = Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(false);
    archive.set_overwrite(true);
    let mut done = Unpacked::default();
    // Directories last, deepest first: their files would change their times, and a read-only one could not be filled.
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        done.entries += 1;
        if entry.header().entry_type() == EntryType::Directory {
            directories.push(entry);
            continue;
        }
        let size = entry.size();
        inside(entry.unpack_in(&directory)?, &entry.path_bytes())?;
        done.bytes += size;
    }
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut entry in directories {
        inside(entry.unpack_in(&directory)?, &entry.path_bytes())?;
        // The crate leaves out the times of directories.
        let name = entry.path()?;
        let path = directory.join(name.strip_prefix("/").unwrap_or(&name));
        if fs_err::symlink_metadata(&path)?.is_dir() {
            let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(entry.header().mtime()?);
            fs_err::File::open(&path)?.file().set_modified(modified)?;
        }
    }
    Ok(done)
}

fn inside(unpacked: bool, name: &[u8]) -> io::Result<()> {
    let name = String::from_utf8_lossy(name);
    if unpacked {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("entry `{name}` leads out of the directory")))
    }
}

/// Packs a directory's content (names relative to it) or one file (by its name) as a tar stream. Sockets are left out.
///
/// # Errors
/// When something cannot be read, or the receiver is gone.
pub(crate) fn pack(path: &Path, to: impl Write) -> io::Result<()> {
    let mut builder = Builder::new(to);
    builder.follow_symlinks(false);
    if !fs_err::symlink_metadata(path)?.is_dir() {
        append(&mut builder, path, Path::new(path.file_name().unwrap_or_default()))?;
        return builder.into_inner()?.flush();
    }
    let mut seen = HashSet::new();
    let mut left = vec![PathBuf::from(".")];
    while let Some(name) = left.pop() {
        let from = path.join(&name);
        append(&mut builder, &from, &name)?;
        if fs_err::symlink_metadata(&from)?.is_dir() && seen.insert(name.clone()) {
            for entry in fs_err::read_dir(&from)? {
                let entry = entry?.file_name();
                left.push(if name == Path::new(".") { entry.into() } else { name.join(entry) });
            }
        }
    }
    builder.into_inner()?.flush()
}

fn append(builder: &mut Builder<impl Write>, from: &Path, name: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let meta = fs_err::symlink_metadata(from)?;
    if meta.is_file() {
        // Not the builder's own way: a file that shrinks or grows meanwhile would break the archive.
        let mut header = Header::new_gnu();
        header.set_metadata(&meta);
        let file = fs_err::File::open(from)?;
        return builder.append_data(&mut header, name, Exactly { file, left: meta.len() });
    }
    if meta.file_type().is_socket() {
        return Ok(());
    }
    builder.append_path_with_name(from, name)
}

/// A file as exactly `left` bytes, zeros after its end.
struct Exactly {
    file: fs_err::File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let into = into.get_mut(..wanted).unwrap_or_default();
        let mut count = self.file.read(into)?;
        if count == 0 {
            into.fill(0);
            count = wanted;
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// The blocking reader's end of a queue of chunks. An error in the queue (the host is gone) is a read error, so that
/// half an archive is never taken for a whole one.
pub(crate) struct QueueReader {
    queue: mpsc::Receiver<io::Result<Vec<u8>>>,
    chunk: io::Cursor<Vec<u8>>,
}

impl QueueReader {
    /// Reads from `queue`.
    pub(crate) fn new(queue: mpsc::Receiver<io::Result<Vec<u8>>>) -> Self {
        Self { queue, chunk: io::Cursor::default() }
    }
}

impl Read for QueueReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.chunk.read(into)?;
            if count > 0 || into.is_empty() {
                return Ok(count);
            }
            match self.queue.blocking_recv() {
                Some(chunk) => self.chunk = io::Cursor::new(chunk?),
                None => return Ok(0),
            }
        }
    }
}

/// The blocking writer's end of a queue of chunks, each [`CHUNK`] long but the last.
pub(crate) struct QueueWriter {
    queue: mpsc::Sender<Vec<u8>>,
    chunk: Vec<u8>,
}

impl QueueWriter {
    /// Writes to `queue`.
    pub(crate) fn new(queue: mpsc::Sender<Vec<u8>>) -> Self {
        Self { queue, chunk: Vec::with_capacity(CHUNK) }
    }
}

impl Write for QueueWriter {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = from.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(from.get(..count).unwrap_or_default());
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        self.queue
            .blocking_send(chunk)
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the host is gone"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let from = tempfile::tempdir().unwrap();
        let root = from.path();
        let odd = std::ffi::OsStr::from_bytes(b"a \xff\n");
        fs_err::create_dir_all(root.join("deep/er")).unwrap();
        fs_err::write(root.join("deep/er").join(odd), vec![7; 200_000]).unwrap();
        fs_err::write(root.join("tool"), "#!/bin/sh\n").unwrap();
        fs_err::set_permissions(root.join("tool"), PermissionsExt::from_mode(0o4751)).unwrap();
        fs_err::os::unix::fs::symlink("../tool", root.join("deep/link")).unwrap();
        fs_err::os::unix::fs::symlink("/nowhere", root.join("dangling")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        for path in ["tool", "deep"] {
            std::fs::OpenOptions::new().read(true).open(root.join(path)).unwrap().set_modified(old).unwrap();
        }
        let mut packed = Vec::new();
        pack(root, &mut packed).unwrap();

        let to = tempfile::tempdir().unwrap();
        let dir = to.path().join("new/place");
        let done = unpack(packed.as_slice(), &dir).unwrap();
        assert_eq!(done, Unpacked { entries: 7, bytes: 200_010 });
        assert_eq!(fs_err::read(dir.join("deep/er").join(odd)).unwrap(), vec![7; 200_000]);
        let tool = fs_err::metadata(dir.join("tool")).unwrap();
        assert_eq!((tool.mode() & 0o7777, tool.mtime()), (0o4751, 1_000_000_000));
        assert_eq!(fs_err::metadata(dir.join("deep")).unwrap().mtime(), 1_000_000_000);
        assert_eq!(fs_err::read_link(dir.join("deep/link")).unwrap(), Path::new("../tool"));
        assert_eq!(fs_err::read_link(dir.join("dangling")).unwrap(), Path::new("/nowhere"));
        assert!(!dir.join("socket").exists());
    }

    fn archive_with(name: &[u8], link: Option<&str>) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
        header.set_mode(0o644);
        let data: &[u8] = if link.is_some() { b"" } else { b"evil" };
        header.set_size(data.len() as u64);
        if let Some(link) = link {
            header.set_entry_type(EntryType::Symlink);
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        let mut builder = Builder::new(Vec::new());
        builder.append(&header, data).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn nothing_is_written_outside_the_directory() {
        let to = tempfile::tempdir().unwrap();
        let dir = to.path().join("in");
        assert!(unpack(archive_with(b"../out", None).as_slice(), &dir).is_err());
        let link = archive_with(b"door", Some(to.path().to_str().unwrap()));
        unpack(link.as_slice(), &dir).unwrap();
        assert!(unpack(archive_with(b"door/out", None).as_slice(), &dir).is_err());
        unpack(archive_with(b"/out", None).as_slice(), &dir).unwrap();
        assert!(!to.path().join("out").exists());
        assert!(dir.join("out").exists(), "a leading slash is below the directory");
    }

    #[test]
    fn an_archive_that_ends_early_is_an_error() {
        let whole = archive_with(b"file", None);
        let to = tempfile::tempdir().unwrap();
        assert!(unpack(&whole[..514], &to.path().join("in")).is_err());
        let (sender, queue) = mpsc::channel(2);
        sender.blocking_send(Ok(whole[..512].to_vec())).unwrap();
        sender.blocking_send(Err(io::Error::other("gone"))).unwrap();
        assert!(unpack(QueueReader::new(queue), &to.path().join("in")).is_err());
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_packed_keeps_the_archive_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("log"), "abc").unwrap();
        let file = fs_err::File::open(dir.path().join("log")).unwrap();
        let mut all = Vec::new();
        Exactly { file, left: 5 }.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abc\0\0");
    }
}
