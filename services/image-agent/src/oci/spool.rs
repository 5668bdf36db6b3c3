//! The way in: a ticket's stream goes to a file, and once it is whole an operation begins with it. Credentials for a registry go
//! to no file: they are in memory until their operation takes them.
//!
//! Nothing of it outlives what it is for: a stream that breaks off leaves no file, and the ones that a crash left are swept
//! before the agent answers.

use super::{Arrived, begin, check, room};
use crate::{
    agent::Agent,
    fault::{self, blocking},
};
use bothy_contract::{
    Code, Error, TicketId,
    intake::{Credentials, IntakeSource, MAX_CREDENTIALS, OpenIntake},
    op::Begun,
    vm::Ticket,
};
use bothy_ops::Ops;
use bothy_tickets::{DEFAULT_TTL, Frame, FrameReader, FrameWriter, Tickets};
use std::{
    collections::HashMap,
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWriteExt as _, BufWriter},
    net::UnixStream,
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// The largest archive.
const MAX_BYTES: u64 = 64 << 30;
/// Archives that come in at once; more wait.
const AT_ONCE: usize = 4;
/// How long nothing may come of an archive.
const STALL: Duration = Duration::from_secs(60);
/// How long credentials wait for an operation that was begun with them.
const UNTAKEN: Duration = Duration::from_mins(10);
/// How much is written between two looks at what is free.
const LOOK: u64 = 64 << 20;

/// The archives on their way in.
#[derive(Debug)]
pub(crate) struct Intake {
    tickets: Tickets<OpenIntake>,
    dir: PathBuf,
    places: Semaphore,
    /// Of operations that have not taken them yet, and since when.
    credentials: Mutex<HashMap<String, (Instant, Option<Credentials>)>>,
}

impl Intake {
    /// Streams come in at `socket`, and files go to `dir`.
    pub(crate) fn new(socket: PathBuf, dir: PathBuf) -> Self {
        Self {
            tickets: Tickets::new(socket),
            dir,
            places: Semaphore::new(AT_ONCE),
            credentials: Mutex::default(),
        }
    }

    /// Removes what an earlier process left.
    pub(crate) fn sweep(&self) -> Result<(), Error> {
        let made = || -> io::Result<()> {
            if self.dir.exists() {
                fs_err::remove_dir_all(&self.dir)?;
            }
            fs_err::create_dir_all(&self.dir)?;
            fs_err::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o700))
        };
        made().map_err(|e| fault::io("cannot sweep the archives' directory", &e))
    }

    /// A ticket for the stream that brings what an image is to be made of.
    pub(crate) async fn open(&self, agent: Agent, ask: OpenIntake) -> Result<Ticket, Error> {
        let asked = ask.clone();
        blocking(move || check(&agent, &asked)).await?;
        Ok(self.tickets.issue(ask, DEFAULT_TTL))
    }

    /// Takes streams until `stop`.
    pub(crate) async fn serve(agent: Agent, ops: Ops, stop: CancellationToken) -> Result<(), Error> {
        let intake = agent.intake.clone();
        let halt = stop.clone();
        let handler = move |ask: OpenIntake, stream: UnixStream| {
            let (agent, ops, stop) = (agent.clone(), ops.clone(), halt.clone());
            async move {
                let (read, write) = stream.into_split();
                let mut out = FrameWriter::new(write);
                let told = match agent.intake.take(&ops, ask, FrameReader::new(read), &stop).await {
                    Ok(begun) => out.end(&begun).await,
                    Err(error) => {
                        tracing::warn!(code = %error.code, "an archive was not taken: {error}");
                        out.fail(&error).await
                    }
                };
                if let Err(e) = told {
                    tracing::info!(error = %e, "the client went away before it could be told of its import");
                }
            }
        };
        intake.tickets.serve(handler, stop).await
    }

    async fn take<R: AsyncRead + Unpin>(
        &self,
        ops: &Ops,
        ask: OpenIntake,
        mut from: FrameReader<R>,
        stop: &CancellationToken,
    ) -> Result<Begun, Error> {
        let stopped = || Error::new(Code::Unavailable, "the image-agent is being stopped");
        if let IntakeSource::Registry { .. } = ask.source {
            let credentials = tokio::select! {
                credentials = credentials(&mut from) => credentials?,
                () = stop.cancelled() => return Err(stopped()),
            };
            let key = TicketId::new().reveal();
            self.hold(key.clone(), credentials);
            let begun = begin(ops, ask, Arrived::Credentials(key.clone())).await;
            // An operation that is another's has its own; one that has begun may have taken them already, and a later step of
            // it does not ask again.
            if !matches!(&begun, Ok((_, true))) {
                self.held().remove(&key);
            }
            return begun.map(|(begun, _)| begun);
        }
        let path = Spooled(self.dir.join(TicketId::new().reveal()));
        let copied = async {
            let _place = self.places.acquire().await.map_err(|e| Error::internal("no place", &e))?;
            copy(&mut from, &path.0).await
        };
        tokio::select! {
            copied = copied => copied?,
            () = stop.cancelled() => return Err(stopped()),
        }
        let (begun, _) = begin(ops, ask, Arrived::Archive(path.0.clone())).await?;
        // It is the operation's now, or will be swept.
        std::mem::forget(path);
        Ok(begun)
    }

    fn hold(&self, key: String, credentials: Option<Credentials>) {
        let now = Instant::now();
        let mut held = self.held();
        // Those of operations that were stopped before they took them.
        held.retain(|_, (since, _)| now.duration_since(*since) < UNTAKEN);
        held.insert(key, (now, credentials));
    }

    /// What an operation that was begun here asks its registry as. Once.
    pub(super) fn take_credentials(&self, key: &str) -> Result<Option<Credentials>, Error> {
        let (_, credentials) = self.held().remove(key).ok_or_else(|| {
            Error::new(Code::Unavailable, "the image-agent was started anew, and knows no longer who asked")
                .hint("pull it again")
        })?;
        Ok(credentials)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, (Instant, Option<Credentials>)>> {
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a stream brings for a registry: JSON, or nothing.
async fn credentials<R: AsyncRead + Unpin>(from: &mut FrameReader<R>) -> Result<Option<Credentials>, Error> {
    let mut text = Vec::new();
    loop {
        let frame = timeout(STALL, from.next())
            .await
            .map_err(|_| Error::new(Code::DeadlineExceeded, "the credentials did not arrive"))?;
        match frame.map_err(|e| e.context("the credentials did not arrive whole"))? {
            Frame::Data(data) => text.extend_from_slice(&data),
            Frame::End(_) => break,
        }
        if text.len() > MAX_CREDENTIALS {
            return Err(Error::new(Code::ResourceExhausted, "the credentials are too long"));
        }
    }
    if text.is_empty() {
        return Ok(None);
    }
    // Without the reason: it may quote them.
    serde_json::from_slice(&text).map_err(|_| Error::invalid("the credentials make no sense"))
}

/// A file that goes unless somebody takes it.
struct Spooled(PathBuf);

impl Drop for Spooled {
    fn drop(&mut self) {
        let _ = fs_err::remove_file(&self.0);
    }
}

async fn copy<R: AsyncRead + Unpin>(from: &mut FrameReader<R>, to: &Path) -> Result<(), Error> {
    let failed = |e: io::Error| fault::io("cannot keep the archive", &e);
    let file = fs_err::tokio::File::create(to).await.map_err(failed)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let (mut done, mut may) = (0, 0);
    loop {
        let frame = timeout(STALL, from.next()).await.map_err(|_| {
            Error::new(
                Code::DeadlineExceeded,
                format!("nothing came of the archive for {} s", STALL.as_secs()),
            )
        })?;
        let data = match frame.map_err(|e| e.context("the archive did not arrive whole"))? {
            Frame::Data(data) => data,
            Frame::End(_) => break,
        };
        done += data.len() as u64;
        if done > MAX_BYTES {
            return Err(too_large(format!("the archive is larger than {} GiB", MAX_BYTES >> 30)));
        }
        if done > may {
            let dir = to.parent().unwrap_or(to).to_owned();
            if blocking(move || room(&dir)).await? < LOOK {
                return Err(too_large("there is no space left for the archive".to_owned())
                    .hint("free some space where the state directory is (`df -h`), then try again"));
            }
            may = done + LOOK;
        }
        file.write_all(&data).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)
}

fn too_large(what: String) -> Error {
    Error::new(Code::ResourceExhausted, what)
}
