//! Entries of the tar stream: what is written is exactly what the header said, or the pack ends with an error.

use bothy_contract::{Code, Error};
use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

/// A writer that counts.
pub(crate) struct Counting<W> {
    inner: W,
    pub(crate) bytes: u64,
}

impl<W> Counting<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self { inner, bytes: 0 }
    }
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Exactly `left` bytes of a file: one that grew is cut, one that shrank is an error.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let n = (&mut self.inner).take(self.left).read(buf)?;
        if n == 0 && !buf.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter while it was read",
            ));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// The tar stream of a pack.
pub(crate) struct Entries<W: Write> {
    tar: tar::Builder<Counting<W>>,
}

impl<W: Write> Entries<W> {
    pub(crate) fn new(out: W) -> Self {
        let mut tar = tar::Builder::new(Counting::new(out));
        tar.follow_symlinks(false);
        Self { tar }
    }

    /// A plain entry of `size` bytes.
    pub(crate) fn put(&mut self, name: &str, size: u64, data: impl Read) -> Result<(), Error> {
        let mut header = header(size, 0o600, 0);
        self.tar
            .append_data(&mut header, name, Exactly { inner: data, left: size })
            .map_err(|e| cannot(name.as_bytes(), &e))
    }

    /// The file or symbolic link `name` (relative, as git lists it) of the working tree, below `dir`. Gives its size,
    /// or nothing where it was not one of the two: other things cannot be packed.
    pub(crate) fn put_file(&mut self, root: &Path, dir: &str, name: &[u8]) -> Result<Option<u64>, Error> {
        let path = root.join(OsStr::from_bytes(name));
        let inside = Path::new(dir).join(OsStr::from_bytes(name));
        let told = fs_err::symlink_metadata(&path).map_err(|e| cannot(name, &e))?;
        if told.is_symlink() {
            let target = fs_err::read_link(&path).map_err(|e| cannot(name, &e))?;
            let mut header = header(0, 0o777, told.mtime());
            header.set_entry_type(tar::EntryType::Symlink);
            self.tar.append_link(&mut header, inside, target).map_err(|e| cannot(name, &e))?;
            return Ok(Some(0));
        }
        if !told.is_file() {
            return Ok(None);
        }
        let file = fs_err::File::open(&path).map_err(|e| cannot(name, &e))?;
        let real = file.metadata().map_err(|e| cannot(name, &e))?;
        if (real.dev(), real.ino()) != (told.dev(), told.ino()) {
            return Err(cannot(name, &io::Error::other("the file was replaced while it was packed")));
        }
        let mut header = header(real.len(), real.mode() & 0o777, real.mtime());
        let data = Exactly { inner: file, left: real.len() };
        self.tar.append_data(&mut header, inside, data).map_err(|e| cannot(name, &e))?;
        Ok(Some(real.len()))
    }

    /// Ends the stream; gives its size in bytes.
    pub(crate) fn finish(self) -> Result<u64, Error> {
        let end = |e: io::Error| Error::new(Code::Unavailable, format!("cannot write the pack: {e}"));
        let mut out = self.tar.into_inner().map_err(end)?;
        out.flush().map_err(end)?;
        Ok(out.bytes)
    }
}

/// A header that tells nothing of the user but the file itself.
fn header(size: u64, mode: u32, mtime: i64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(u64::try_from(mtime).unwrap_or(0));
    header
}

fn cannot(name: &[u8], err: &io::Error) -> Error {
    Error::new(Code::FailedPrecondition, format!("cannot pack {}: {err}", crate::names::display(name)))
}
