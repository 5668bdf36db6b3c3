//! Whether a template's files are still what was saved: a checksum beside each, in an extended attribute of the file itself
//! (xattr(7)), so that it comes and goes with it. It is looked at where the file is read anyhow.
//!
//! It counts blocks that are not all zeros, with their places: a hole and zeros that were written are the same. It is against
//! disks that forget, not against anybody who may write to the file.

use bothy_contract::{Code, Error};
use std::{io, os::fd::AsFd};

/// What is told apart: a page of the guest, and a block of any file system.
pub(super) const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];
/// The attribute, in hexadecimal digits.
const NAME: &str = "user.bothy.crc32";

/// A checksum in the making.
#[derive(Debug, Default)]
pub(super) struct Checksum(crc32fast::Hasher);

impl Checksum {
    /// Counts the block at `offset`. Says whether it has anything but zeros.
    pub(super) fn count(&mut self, offset: u64, block: &[u8]) -> bool {
        if ZEROS.get(..block.len()).is_some_and(|zeros| zeros == block) {
            return false;
        }
        self.0.update(&offset.to_le_bytes());
        self.0.update(block);
        true
    }

    /// Writes it down beside `file`. A file system that knows no attributes keeps none.
    pub(super) fn keep(self, file: &impl AsFd) -> io::Result<()> {
        let text = format!("{:08x}", self.0.finalize());
        match rustix::fs::fsetxattr(file, NAME, text.as_bytes(), rustix::fs::XattrFlags::empty()) {
            Err(e) if e != rustix::io::Errno::OPNOTSUPP => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Whether it is the one that was written down beside `file`, if any was.
    ///
    /// # Errors
    /// It is another one: what was saved is lost.
    pub(super) fn compare(self, file: &fs_err::File) -> Result<(), Error> {
        let mut kept = [0; 8];
        let failed = |err: io::Error| {
            Error::internal(format!("cannot read the checksum of {}", file.path().display()), &err)
        };
        match rustix::fs::fgetxattr(file, NAME, &mut kept[..]) {
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => return Ok(()),
            Err(e) => return Err(failed(e.into())),
            Ok(_) => {}
        }
        let is = format!("{:08x}", self.0.finalize());
        if kept == is.as_bytes() {
            return Ok(());
        }
        Err(Error::new(
            Code::FailedPrecondition,
            format!(
                "{} is not what was saved any more: its checksum is {is} and was {}",
                file.path().display(),
                String::from_utf8_lossy(&kept)
            ),
        )
        .hint("the disk may be failing; what is made anew is not affected"))
    }
}

/// That of a file which is read for nothing else; small ones, and those whose reader nobody waits for. Blocks.
///
/// # Errors
/// It cannot be read.
pub(super) fn of(file: &fs_err::File) -> io::Result<Checksum> {
    let mut sum = Checksum::default();
    super::snapshot::each_chunk(file, |start, chunk| {
        for (number, block) in chunk.chunks(BLOCK).enumerate() {
            sum.count(start + (number * BLOCK) as u64, block);
        }
        Ok(())
    })?;
    Ok(sum)
}

/// Writes down what `file` is. Blocks.
///
/// # Errors
/// It cannot be read, or nothing be written beside it.
pub fn write_down(file: &fs_err::File) -> Result<(), Error> {
    let done = of(file).and_then(|sum| sum.keep(file));
    done.map_err(|e| Error::internal("cannot write down a saved guest's checksum", &e))
}

/// Whether `file` is what was saved, as far as anything was written down of that. Blocks.
///
/// # Errors
/// It is not, or cannot be read.
pub fn check(file: &fs_err::File) -> Result<(), Error> {
    of(file).map_err(|e| Error::internal("cannot read a saved guest", &e))?.compare(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_changed_byte_is_seen_and_zeros_that_were_written_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        fs_err::write(&path, "x").unwrap();
        let file = fs_err::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        file.file().write_all_at(&[1; 10_000], 1 << 20).unwrap();
        check(&file).unwrap();
        of(&file).unwrap().keep(&file).unwrap();
        check(&file).unwrap();
        file.file().write_all_at(&[0; 1 << 20], 2 << 20).unwrap();
        check(&file).unwrap();
        file.file().write_all_at(&[2], (1 << 20) + 7).unwrap();
        let e = check(&file).unwrap_err();
        assert!(e.code == Code::FailedPrecondition && e.message.contains("not what was saved"), "{e}");
        // The same bytes in another place are another file.
        file.file().write_all_at(&[0; 10_000], 1 << 20).unwrap();
        file.file().write_all_at(&[1; 10_000], 3 << 20).unwrap();
        assert!(check(&file).is_err());
    }
}
