//! The accepting side.

use crate::{HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, MAX_STREAMS, Tickets, handshake, table::Table};
use bothy_contract::{Code, Error};
use fs_err as fs;
use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Who may connect: the owner and the group, which is how a service shares its socket with the others.
const MODE: u32 = 0o660;
/// A pause after a failed accept: the usual cause, too many open files, does not go away at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection whose ticket was good, not answered yet.
///
/// Dropped without an answer it just closes, which the peer sees as an unavailable service.
#[derive(Debug)]
pub struct Redeemed {
    stream: UnixStream,
}

impl Redeemed {
    /// Answers `OK`: from here on the stream is the handler's.
    ///
    /// # Errors
    /// When the peer has gone.
    pub async fn accept(mut self) -> io::Result<UnixStream> {
        handshake::accept(&mut self.stream).await?;
        Ok(self.stream)
    }

    /// Answers with `error` and closes.
    pub async fn refuse(self, error: &Error) {
        handshake::refuse(self.stream, error).await;
    }
}

impl<T: Send + 'static> Tickets<T> {
    /// Listens on the socket (mode 0660) and gives every stream whose ticket was good to `handler`, each in a task of its
    /// own. Ends after `shutdown`, once all handlers have ended; they see the same token if they were given it.
    ///
    /// # Errors
    /// Where the socket cannot be made, or where another process answers on it.
    pub async fn serve<H, F>(&self, handler: H, shutdown: CancellationToken) -> Result<(), Error>
    where
        H: Fn(T, UnixStream) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let handler = Arc::new(handler);
        self.serve_redeemed(
            move |payload, redeemed| {
                let handler = Arc::clone(&handler);
                async move {
                    if let Ok(stream) = redeemed.accept().await {
                        handler(payload, stream).await;
                    }
                }
            },
            shutdown,
        )
        .await
    }

    /// Like [`Tickets::serve`], for handlers that have something to do which may fail before the stream can begin: they
    /// accept or refuse by themselves.
    ///
    /// # Errors
    /// As for [`Tickets::serve`].
    pub async fn serve_redeemed<H, F>(&self, handler: H, shutdown: CancellationToken) -> Result<(), Error>
    where
        H: Fn(T, Redeemed) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = bind(&self.socket).await?;
        let strangers = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let streams = Arc::new(Semaphore::new(MAX_STREAMS));
        let handler = Arc::new(handler);
        let tasks = TaskTracker::new();
        loop {
            let next = async {
                let place = Arc::clone(&strangers).acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                () = shutdown.cancelled() => break,
                next = next => next,
            };
            match (place, accepted) {
                (Ok(place), Ok((stream, _))) => {
                    let (table, streams) = (Arc::clone(&self.table), Arc::clone(&streams));
                    let handler = Arc::clone(&handler);
                    tasks.spawn(async move {
                        let redeemed = redeem(stream, &table, &streams).await;
                        drop(place);
                        if let Some((payload, redeemed, permit)) = redeemed {
                            handler(payload, redeemed).await;
                            drop(permit);
                        }
                    });
                }
                (_, Err(e)) => {
                    tracing::warn!(error = %e, socket = %self.socket.display(), "cannot accept a stream");
                    sleep(ACCEPT_PAUSE).await;
                }
                // The semaphore is never closed.
                (Err(_), _) => break,
            }
        }
        drop(listener);
        // Somebody may have put a socket of their own there by now only if they removed ours; a missing one is as good.
        drop(fs::remove_file(self.socket.as_path()));
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}

async fn redeem<T>(
    mut stream: UnixStream,
    table: &Table<T>,
    streams: &Arc<Semaphore>,
) -> Option<(T, Redeemed, OwnedSemaphorePermit)> {
    let told = match timeout(HANDSHAKE_TIMEOUT, handshake::read_ticket(&mut stream)).await {
        Ok(told) => told,
        // Whoever says nothing is told nothing.
        Err(_) => return None,
    };
    let outcome = told.and_then(|id| {
        // The place is taken first: a refusal for want of room does not use up the ticket.
        let permit = Arc::clone(streams).try_acquire_owned().map_err(|_| {
            let mut full =
                Error::new(Code::ResourceExhausted, format!("all {MAX_STREAMS} streams are in use"))
                    .hint("close some, or try again later");
            full.retryable = true;
            full
        })?;
        let payload = table.redeem(&id).ok_or_else(|| {
            Error::new(Code::PermissionDenied, "the ticket is unknown, used, or too old")
                .hint("ask for a new ticket")
        })?;
        Ok((payload, permit))
    });
    match outcome {
        Ok((payload, permit)) => Some((payload, Redeemed { stream }, permit)),
        Err(e) => {
            handshake::refuse(stream, &e).await;
            None
        }
    }
}

/// Listens on `path`, in place of a socket that a dead process left there.
async fn bind(path: &Path) -> Result<UnixListener, Error> {
    let failed = |e: &io::Error| Error::internal(format!("cannot listen on {}", path.display()), e);
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(Code::FailedPrecondition, format!("{} is not a socket", path.display()))
                .hint("move it away"));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(Error::new(
                Code::AlreadyExists,
                format!("another process answers on {}", path.display()),
            )
            .hint("stop it first, or use another run_dir"));
        }
        Ok(_) => fs::remove_file(path).map_err(|e| failed(&e))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(&e)),
    }
    let listener = UnixListener::bind(path).map_err(|e| failed(&e))?;
    fs::set_permissions(path, std::fs::Permissions::from_mode(MODE)).map_err(|e| failed(&e))?;
    Ok(listener)
}
