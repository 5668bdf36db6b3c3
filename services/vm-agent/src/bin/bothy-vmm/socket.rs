//! `holder.sock`, the only way to this holder: where its file is removed, or another is put in its place, it is made again.
//!
//! The directory is watched (inotify(7)), which costs nothing while nothing happens there.

use bothy_vm_agent::vmm::wire;
use rustix::fs::inotify;
use std::{
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::{UnixListener, UnixStream, unix::pipe};

/// How long to wait before the socket is made again: who removes it over and over must not keep the holder busy.
const PAUSE: Duration = Duration::from_millis(20);

/// A listener that stays at its place.
#[derive(Debug)]
pub(crate) struct HolderSocket {
    path: PathBuf,
    listener: UnixListener,
    /// The file's device and number.
    file: (u64, u64),
    /// Events of the directory; nothing but their coming is of interest. `None` where they cannot be had any more.
    events: Option<pipe::Receiver>,
}

impl HolderSocket {
    /// Listens in `dir`.
    pub(crate) fn listen(dir: &Path) -> io::Result<Self> {
        let path = dir.join(wire::HOLDER_SOCKET);
        let (listener, file) = bind(&path)?;
        // A kernel out of watches is no reason not to hold a VM.
        let events = watch(dir).ok();
        let this = Self { path, listener, file, events };
        Ok(this)
    }

    /// The next connection. Cancel-safe.
    pub(crate) async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return accepted.map(|(stream, _)| stream),
                watched = changed(self.events.as_ref()) => {
                    if watched.is_err() {
                        self.events = None;
                    }
                    self.restore().await;
                }
            }
        }
    }

    /// Makes the socket again if it is not there any more. Where that fails, the directory is gone as well, and with it all
    /// ways to this holder but its process.
    async fn restore(&mut self) {
        let there = fs_err::symlink_metadata(&self.path).map(|meta| (meta.dev(), meta.ino()));
        if there.is_ok_and(|file| file == self.file) {
            return;
        }
        tokio::time::sleep(PAUSE).await;
        drop(fs_err::remove_file(&self.path));
        if let Ok((listener, file)) = bind(&self.path) {
            (self.listener, self.file) = (listener, file);
        }
    }
}

fn bind(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    let listener = UnixListener::bind(path)?;
    // For the agent's group: the directory passes it on.
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    let meta = fs_err::symlink_metadata(path)?;
    Ok((listener, (meta.dev(), meta.ino())))
}

fn watch(dir: &Path) -> io::Result<pipe::Receiver> {
    use inotify::{CreateFlags, WatchFlags};
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let flags = WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::ONLYDIR;
    inotify::add_watch(&fd, dir, flags)?;
    // tokio's only safe way to wait on any pollable descriptor.
    pipe::Receiver::from_owned_fd_unchecked(fd)
}

/// Returns once something in the directory has another name than before; never where it is not watched.
async fn changed(events: Option<&pipe::Receiver>) -> io::Result<()> {
    let Some(events) = events else { return std::future::pending().await };
    events.readable().await?;
    let mut buffer = [0; 4096];
    loop {
        match events.try_read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(err) => return Err(err),
        }
    }
}
