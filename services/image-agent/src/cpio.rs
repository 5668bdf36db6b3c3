//! A writer of cpio archives in the `newc` format, the one that the kernel unpacks as an initramfs
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst). Archives may simply be joined end to end.
//!
//! The output depends on the entries alone, no clock and no owner, so the same content has the same digest.

use std::io::{self, Write};

/// Type bits of a mode, from stat(2).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// Writes one archive.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// An archive into `out`.
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// A directory; its parents must have been written before.
    pub(crate) fn dir(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | permissions, (0, 0), &[])
    }

    /// A file with its content.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | permissions, (0, 0), content)
    }

    /// A character device `(major, minor)`.
    pub(crate) fn character(&mut self, path: &str, permissions: u32, device: (u32, u32)) -> io::Result<()> {
        self.entry(path, CHARACTER | permissions, device, &[])
    }

    /// Ends the archive and gives back what it was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX; // the trailer's is 0
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        self.inode = self.inode.wrapping_add(1);
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{path} is larger than an archive's 4 GiB")))?;
        let name = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08X}"));
        }
        head.push_str(path);
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(content)
    }

    /// Header with name, and content, are each padded to 4 bytes.
    fn padded(&mut self, data: &[u8]) -> io::Result<()> {
        self.out.write_all(data)?;
        let pad = data.len().wrapping_neg() % 4;
        self.out.write_all([0; 3].get(..pad).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut w = Writer::new(Vec::new());
        w.dir("dev", 0o755).unwrap();
        w.character("dev/console", 0o600, (5, 1)).unwrap();
        w.file("init", 0o755, b"hello").unwrap();
        w.finish().unwrap()
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let archive = sample();
        let head = "070701000000010000\
            41ED00000000000000000000000200000000000000000000000000000000000000000000000000000004\
            00000000dev\0";
        assert_eq!(String::from_utf8_lossy(&archive[..114]), head);
        assert_eq!(archive.len() % 4, 0);
        assert_eq!(archive, sample());
    }

    #[test]
    fn another_reader_finds_the_same_entries() {
        // Python's and cpio's readers are not everywhere; bsdtar and cpio are asked where they are.
        let mut found = None;
        for (tool, args) in [("cpio", &["-itv", "--quiet"][..]), ("bsdtar", &["-tvf", "-"])] {
            let child = Command::new(tool).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
            if let Ok(mut child) = child {
                child.stdin.take().unwrap().write_all(&sample()).unwrap();
                found = Some(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap());
                break;
            }
        }
        let Some(listing) = found else {
            eprintln!("neither cpio nor bsdtar is installed: the golden bytes above must do");
            return;
        };
        let lines: Vec<_> = listing.lines().collect();
        assert_eq!(lines.len(), 3, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[1].starts_with("crw-------"), "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with(" init"), "{listing}");
    }
}
