//! A VM's logs as streams. The files are in the holder's directory, which belongs to the VM's user: they are opened
//! without following links, and read as long as they are regular files, never believed.

use crate::lifecycle::Agent;
use bothy_contract::{Error, VmId, vm::LogSource};
use bothy_vm_agent::vmm::wire::{self, Process};
use fs_err::{self as fs, os::unix::fs::OpenOptionsExt};
use nix::fcntl::OFlag;
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::sleep,
};

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// The longest that the older half may be; the holder keeps it far shorter.
const MAX_OLDER: u64 = 16 << 20;

/// A log of a VM, and the process that writes it.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    writer: Option<Process>,
}

impl Log {
    /// The log `source` of `vm`.
    pub(crate) async fn open(agent: &Agent, vm: VmId, source: LogSource) -> Result<Self, Error> {
        let row = agent.vm(vm).await?;
        let name = match source {
            LogSource::Console => wire::CONSOLE_LOG,
            LogSource::Vmm => wire::VMM_LOG,
        };
        let path = agent.config.holder_dir(vm).join(name);
        if fs::symlink_metadata(&path).is_err() {
            return Err(Error::not_found(format!("VM {} has no such log yet", row.facts.name))
                .hint("a VM has logs from its first launch until it is deleted"));
        }
        Ok(Self { path, writer: row.phase.live().map(|live| live.vmm.handle.holder) })
    }

    /// Writes the log to `to`: the older half, what there is, and with `follow` what comes until the holder ends.
    pub(crate) async fn stream(self, mut to: UnixStream, follow: bool) {
        if let Err(e) = self.copy(&mut to, follow).await {
            // Mostly the reader has gone, which is how following ends.
            tracing::debug!(path = %self.path.display(), error = %e, "a log's stream ended");
        }
        drop(to.shutdown().await);
    }

    async fn copy(&self, to: &mut UnixStream, follow: bool) -> io::Result<()> {
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        match wire::read_untrusted(Path::new(&older), MAX_OLDER) {
            Ok(bytes) => to.write_all(&bytes).await?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let (mut file, mut inode) = open_plain(&self.path)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            // Asked before reading: what was written before the end is still read.
            let ended = !follow || self.writer.is_none_or(|w| !w.is_alive());
            // The same before the rest is read: the holder renames a log that has grown long.
            let now = fs::symlink_metadata(&self.path).map(|m| m.ino()).ok();
            loop {
                let n = file.read(&mut buffer).await?;
                if n == 0 {
                    break;
                }
                to.write_all(buffer.split_at(n).0).await?;
            }
            if now.is_some_and(|now| now != inode) {
                (file, inode) = open_plain(&self.path)?;
                continue;
            }
            if ended {
                return Ok(());
            }
            // A reader that has gone must not be followed for.
            tokio::select! {
                () = sleep(LOOK) => {}
                () = gone(to) => return Ok(()),
            }
        }
    }
}

/// Returns once the peer has closed. What it says is not read for anything.
async fn gone(stream: &UnixStream) {
    let mut scratch = [0; 256];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut scratch) {
            Ok(0) => return,
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

/// Opens a regular file, and nothing else, and says which one it is.
fn open_plain(path: &Path) -> io::Result<(tokio::fs::File, u64)> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is not a file", path.display())));
    }
    Ok((tokio::fs::File::from_std(file.into_parts().0), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(log: Log, follow: bool) -> String {
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(log.stream(theirs, follow));
        let mut all = String::new();
        mine.read_to_string(&mut all).await.unwrap();
        task.await.unwrap();
        all
    }

    #[tokio::test]
    async fn both_halves_are_given_and_links_are_not_followed() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("console.log");
        fs::write(&path, "new").unwrap();
        fs::write(dir.path().join("console.log.1"), "old ").unwrap();
        let log = || Log { path: path.clone(), writer: None };
        assert_eq!(read_all(log(), false).await, "old new");
        assert_eq!(read_all(log(), true).await, "old new", "a dead writer ends it");
        fs::remove_file(&path).unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, "of the host").unwrap();
        fs::os::unix::fs::symlink(&secret, &path).unwrap();
        assert_eq!(read_all(log(), false).await, "old ");
    }

    #[tokio::test]
    async fn a_followed_log_goes_on_over_a_rotation_until_its_writer_ends() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("console.log");
        fs::write(&path, "one ").unwrap();
        let mut writer = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let log = Log { path: path.clone(), writer: Process::find(writer.id()) };
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        let task = tokio::spawn(log.stream(theirs, true));
        let mut some = [0; 4];
        mine.read_exact(&mut some).await.unwrap();
        assert_eq!(&some, b"one ");
        fs::rename(&path, dir.path().join("console.log.1")).unwrap();
        fs::write(&path, "two ").unwrap();
        mine.read_exact(&mut some).await.unwrap();
        assert_eq!(&some, b"two ");
        fs::write(&path, "two and more").unwrap();
        writer.kill().unwrap();
        writer.wait().unwrap();
        let mut rest = String::new();
        mine.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "and more");
        task.await.unwrap();
    }
}
