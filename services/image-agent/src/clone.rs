//! Copies of disk images that cost what is in them, not what they could hold.
//!
//! Where the file system can share extents (XFS, btrfs) a clone is a reflink, FICLONE of ioctl_ficlonerange(2).
//! Elsewhere the data is copied inside the kernel and holes stay holes: seeds are almost nothing but holes.

use rustix::{
    fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek},
    io::Errno,
};
use std::{fs::File, io};

/// How a clone was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// The extents are shared.
    Reflink,
    /// The data was copied, the holes were not.
    Copy,
}

impl How {
    /// The word for it in replies.
    pub(crate) fn word(self) -> &'static str {
        match self {
            How::Reflink => "reflink",
            How::Copy => "copy",
        }
    }
}

/// Makes `to`, an empty file, a clone of `from`, then `size` bytes long, which must not be less than `from` has.
pub(crate) fn clone(from: &File, to: &File, size: u64) -> io::Result<How> {
    let length = from.metadata()?.len();
    if size < length {
        return Err(io::Error::other(format!("{size} bytes are fewer than the {length} of what is cloned")));
    }
    let how = match reflink(from, to) {
        Ok(()) => How::Reflink,
        Err(e) if is_refusal(&e) => {
            copy_data(from, to, length)?;
            How::Copy
        }
        Err(e) => return Err(e),
    };
    to.set_len(size)?;
    Ok(how)
}

/// Makes `to`, an empty file, one that shares its extents with `from`.
pub(crate) fn reflink(from: &File, to: &File) -> io::Result<()> {
    Ok(ioctl_ficlone(to, from)?)
}

/// Whether `reflink` failed since extents are not shared here: not on this file system, not across two, or not by these files. A
/// full disk, for one, is no reason to copy instead.
pub(crate) fn is_refusal(err: &io::Error) -> bool {
    let refusals = [Errno::OPNOTSUPP, Errno::NOTTY, Errno::XDEV, Errno::INVAL, Errno::NOSYS, Errno::PERM];
    refusals.iter().any(|errno| err.raw_os_error() == Some(errno.raw_os_error()))
}

/// Copies the parts of `from` that hold data.
pub(crate) fn copy_data(from: &File, to: &File, length: u64) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break, // only a hole is left
            Err(e) => return Err(e.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read, mut write) = (start, start);
    while read < end {
        let want = usize::try_from(end - read).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(from, Some(&mut read), to, Some(&mut write), want) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file got shorter meanwhile"));
            }
            Ok(_) => {}
            Err(Errno::INTR) => {}
            // Two file systems that the kernel does not copy between.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS) => return copy_by_hand(from, to, read, end),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    const MIB: u64 = 1 << 20;

    fn sparse(dir: &std::path::Path) -> File {
        let path = dir.join("from");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&[1; 5000], 0).unwrap();
        file.write_all_at(&[2; 70_000], 17 * MIB + 123).unwrap();
        file.write_all_at(&[3; 1], 64 * MIB - 1).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut all = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    #[test]
    fn a_clone_has_the_content_and_the_holes_and_its_own_size() {
        let dir = tempfile::tempdir().unwrap();
        let from = sparse(dir.path());
        let to = tempfile::tempfile_in(dir.path()).unwrap();
        clone(&from, &to, 1024 * MIB).unwrap();
        let meta = to.metadata().unwrap();
        assert_eq!(meta.len(), 1024 * MIB);
        assert!(meta.blocks() * 512 < 2 * MIB, "{} blocks are allocated", meta.blocks());
        to.set_len(64 * MIB).unwrap();
        assert_eq!(content(&to), content(&from));
    }

    #[test]
    fn copying_works_where_reflinks_do_not_and_between_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let from = sparse(dir.path());
        for target in [dir.path(), std::path::Path::new("/dev/shm")] {
            let to = tempfile::tempfile_in(target).unwrap();
            copy_data(&from, &to, 64 * MIB).unwrap();
            assert!(to.metadata().unwrap().blocks() * 512 < 2 * MIB);
            assert_eq!(content(&to), content(&from));
        }
        let by_hand = tempfile::tempfile_in(dir.path()).unwrap();
        copy_by_hand(&from, &by_hand, 0, 64 * MIB).unwrap();
        assert_eq!(content(&by_hand), content(&from));
    }

    #[test]
    fn a_clone_never_loses_the_end_of_a_seed() {
        let dir = tempfile::tempdir().unwrap();
        let from = sparse(dir.path());
        let to = tempfile::tempfile_in(dir.path()).unwrap();
        assert!(clone(&from, &to, 63 * MIB).unwrap_err().to_string().contains("fewer than"));
        assert_eq!(to.metadata().unwrap().len(), 0);
    }
}
