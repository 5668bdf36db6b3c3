//! Logs that cannot fill the disk, whatever a guest writes.

use fs_err::os::unix::fs::OpenOptionsExt;
use std::{
    io::{self, Write},
    path::PathBuf,
};

/// How long a log may grow before it becomes the older half: twice this is all it ever takes.
const HALF: u64 = 1 << 20;

/// A log file and its older half, `<path>.1`.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: fs_err::File,
    length: u64,
}

impl Log {
    /// Opens the log at `path` for appending.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let file = fs_err::OpenOptions::new().append(true).create(true).mode(0o640).open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self { path, file, length })
    }

    /// Appends, and starts anew where the log has grown long.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length > 0 && self.length + bytes.len() as u64 > HALF {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs_err::rename(&self.path, &older)?;
            *self = Self::open(std::mem::take(&mut self.path))?;
        }
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_keeps_its_end_and_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(path.clone()).unwrap();
        for i in 0..3_000_000u32 / 8 {
            log.write(format!("{i:07}\n").as_bytes()).unwrap();
        }
        let (new, old) =
            (fs_err::read(&path).unwrap(), fs_err::read(dir.path().join("console.log.1")).unwrap());
        assert!(new.len() as u64 <= HALF && old.len() as u64 <= HALF);
        assert!(new.ends_with(b"0374999\n"));
        let next: u32 = String::from_utf8_lossy(&old[old.len() - 8..]).trim().parse().unwrap();
        assert!(new.starts_with(format!("{:07}\n", next + 1).as_bytes()));
    }
}
