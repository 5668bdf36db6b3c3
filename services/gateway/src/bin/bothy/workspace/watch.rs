//! Waiting until tracked files of a repository change, by inotify(7). Only directories with tracked files are watched, so what
//! a build writes beside them costs nothing; and a file becomes tracked by a change of the index, which is watched too.

use bothy_contract::{Code, Error};
use bothy_pack::{Places, Repository};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::timeout};

/// How long nothing must change before it counts as done: an editor or a check-out writes many files.
const QUIET: Duration = Duration::from_millis(300);
/// Who never stops writing is not waited for any longer than for that many.
const PATIENCE: u32 = 10;

/// What is watched at present.
pub(super) struct Watch {
    inotify: Arc<Inotify>,
    places: Places,
    git: Arc<Mutex<Option<WatchDescriptor>>>,
    news: Arc<Notify>,
}

impl Watch {
    /// Watches `repository` from now on, until the process ends.
    pub(super) fn new(repository: &Repository) -> Result<Self, Error> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(|e| cannot_watch(repository, e))?;
        let places = repository.places()?;
        let (inotify, git, news) = (Arc::new(inotify), Arc::default(), Arc::new(Notify::new()));
        let watch = Self { inotify, places, git, news };
        watch.add(repository)?;
        let (inotify, git, news) =
            (Arc::clone(&watch.inotify), Arc::clone(&watch.git), Arc::clone(&watch.news));
        std::thread::Builder::new()
            .name("inotify".to_owned())
            .spawn(move || {
                while let Ok(events) = inotify.read_events() {
                    let git = *git.lock().unwrap_or_else(PoisonError::into_inner);
                    if events.iter().any(|event| counts(event, git)) {
                        news.notify_one();
                    }
                }
            })
            .map_err(|e| Error::internal("cannot start a thread", &e))?;
        Ok(watch)
    }

    fn add(&self, repository: &Repository) -> Result<(), Error> {
        let files = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        for dir in &self.places.directories {
            match self.inotify.add_watch(dir, files) {
                // One whose files are all deleted, or that is something else now: the directory above tells of its return.
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(e) => return Err(cannot_watch(repository, e)),
            }
        }
        // git writes beside and renames.
        let git = self
            .inotify
            .add_watch(&self.places.git, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE)
            .map_err(|e| cannot_watch(repository, e))?;
        *self.git.lock().unwrap_or_else(PoisonError::into_inner) = Some(git);
        Ok(())
    }

    /// Watches what there is to be watched of `repository` by now; whether that was anything new, so that what happened there
    /// before may have gone unseen.
    pub(super) fn renew(&mut self, repository: &Repository) -> Result<bool, Error> {
        let places = repository.places()?;
        let new = places != self.places;
        self.places = places;
        // Also where it is the same: a directory that was gone and is back has no watch.
        self.add(repository)?;
        Ok(new)
    }

    /// Returns once something may have changed and nothing did for a moment.
    pub(super) async fn changed(&self) {
        self.news.notified().await;
        for _ in 0..PATIENCE {
            if timeout(QUIET, self.news.notified()).await.is_err() {
                break;
            }
        }
    }
}

/// Whether an event may mean that a tracked file has changed; of git's own files only two do.
fn counts(event: &InotifyEvent, git: Option<WatchDescriptor>) -> bool {
    Some(event.wd) != git || event.name.as_ref().is_some_and(|name| name == "index" || name == "HEAD")
}

fn cannot_watch(repository: &Repository, e: Errno) -> Error {
    let error = Error::new(
        Code::ResourceExhausted,
        format!("cannot watch {} for changes: {e}", repository.root().display()),
    );
    match e {
        Errno::ENOSPC => error.hint("raise the limit: `sysctl fs.inotify.max_user_watches=524288`"),
        Errno::EMFILE => error.hint("raise the limit: `sysctl fs.inotify.max_user_instances=512`"),
        _ => Error { code: Code::Internal, ..error },
    }
}
