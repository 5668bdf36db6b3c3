//! A pack from the CLI's stream into the guest, and there into a repository.
//!
//! ```text
//!  frames -> meta -> prepare (guest) -> tar -> import (guest): build beside, rename -> clean (guest)
//! ```
//! What fails, fails before the rename; clean-up runs in every outcome.

use crate::{
    guest::{Guest, STALL, stalled},
    path,
    script::{CLEAN, IMPORT, PREPARE, SYNC},
};
use bothy_contract::{
    Code, Error, TicketId,
    workspace::{ImportReport, OpenImport, SyncReport},
};
use bothy_pack::{Meta, Mode};
use bothy_tickets::{Frame, FrameReader};
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use tokio::{io::AsyncRead, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// Chunks on their way to the guest; more would only be memory.
const QUEUED: usize = 4;
/// How long a guest may take to end unpacking what was cut short.
const SETTLE: Duration = Duration::from_secs(5);
/// How many names of conflicts are passed on; the script gives as many.
const NAMES: usize = 20;

/// Takes the pack from `pack` and makes the repository at `request.guest_path`.
///
/// # Errors
/// The pack's, the guest's, a stream that is cut or stands still, or `stop`. The guest is as it was before.
pub async fn import<G: Guest, R: AsyncRead + Unpin + Send>(
    guest: &G,
    request: &OpenImport,
    pack: &mut FrameReader<R>,
    stop: &CancellationToken,
) -> Result<ImportReport, Error> {
    let path = request.guest_path.as_str();
    path::check("guest path", path)?;
    let (meta, start) = until(stop, first_entry(pack)).await?;
    let nonce = TicketId::new().reveal();

    let force = if request.force { "yes" } else { "" };
    let prepare = [path, &nonce, meta.mode.as_str(), force];
    let first_made = guest.run(&PREPARE, &prepare).await?.check(&PREPARE, path)?;
    let done = until(stop, build(guest, request, &nonce, &meta, start, pack)).await;
    let undo = if done.is_err() { first_made.as_str() } else { "" };
    let cleaned = match guest.run(&CLEAN, &[path, &nonce, undo]).await {
        Ok(end) => end.check(&CLEAN, path).map(drop),
        Err(e) => Err(e),
    };
    match (done, cleaned) {
        (Ok((bytes, sync)), cleaned) => {
            if let Err(e) = cleaned {
                tracing::warn!(path, error = %e, "an import left its temporary directory; the next one removes it");
            }
            Ok(ImportReport {
                guest_path: path.to_owned(),
                head: meta.head,
                branch: meta.branch,
                bytes,
                sync,
            })
        }
        (Err(e), Err(c)) if e.code != Code::Unavailable => Err(Error {
            message: format!("{}; and cleaning up after it failed too: {}", e.message, c.message),
            ..e
        }),
        (Err(e), _) => Err(e),
    }
}

/// Runs `work` until `stop`.
pub(crate) async fn until<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        done = work => done,
        () = stop.cancelled() => Err(Error::new(Code::Unavailable, "the workspace-agent is being stopped")
            .hint("run the same again in a moment")),
    }
}

/// The next piece of the pack; `None` at its end.
async fn next<R: AsyncRead + Unpin>(pack: &mut FrameReader<R>) -> Result<Option<Bytes>, Error> {
    match timeout(STALL, pack.next()).await {
        Err(_) => Err(stalled("nothing came from the CLI")),
        Ok(Err(e)) => Err(e.context("the pack did not arrive whole")),
        Ok(Ok(Frame::Data(data))) => Ok(Some(data)),
        Ok(Ok(Frame::End(_))) => Ok(None),
    }
}

/// Reads as much as holds the first entry.
async fn first_entry<R: AsyncRead + Unpin>(pack: &mut FrameReader<R>) -> Result<(Meta, Bytes), Error> {
    let mut start = BytesMut::new();
    loop {
        if let Some(meta) = Meta::from_start(&start)? {
            return Ok((meta, start.freeze()));
        }
        let data = next(pack).await?.ok_or_else(|| Error::invalid("the pack ends within its first entry"))?;
        start.extend_from_slice(&data);
    }
}

/// Sends the pack on and builds the repository, or changes the one that is there; gives the pack's size in bytes.
async fn build<G: Guest, R: AsyncRead + Unpin + Send>(
    guest: &G,
    request: &OpenImport,
    nonce: &str,
    meta: &Meta,
    start: Bytes,
    pack: &mut FrameReader<R>,
) -> Result<(u64, Option<SyncReport>), Error> {
    let path = request.guest_path.as_str();
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let dir = format!("{parent}/.bothy-import-{nonce}/pack");
    let (to_guest, from_cli) = mpsc::channel(QUEUED);
    let put = guest.put_tar(&dir, from_cli);
    // Gives `None` where the guest takes no more: then the guest has the reason.
    let feed = async move {
        let mut bytes = 0;
        let mut data = start;
        loop {
            bytes += data.len() as u64;
            match timeout(STALL, to_guest.send(data)).await {
                Err(_) => return Err(stalled("the guest took nothing of the pack")),
                Ok(Err(_)) => return Ok(None),
                Ok(Ok(())) => {}
            }
            match next(pack).await? {
                Some(more) => data = more,
                None => return Ok(Some(bytes)),
            }
        }
    };
    tokio::pin!(put, feed);
    let mut unpacked = None;
    let fed = tokio::select! {
        fed = &mut feed => match fed {
            Ok(fed) => fed,
            Err(e) => {
                // What is on its way already is written first: behind a clean-up it would stay.
                drop(timeout(SETTLE, &mut put).await);
                return Err(e);
            }
        },
        done = &mut put => {
            // A reader of tar may stop at the archive's end, before the stream's.
            unpacked = Some(done?);
            feed.await?
        }
    };
    if unpacked.is_none() {
        timeout(IMPORT.limit, put).await.map_err(|_| stalled("the guest did not end unpacking"))??;
    }
    let bytes = fed.ok_or_else(|| Error::invalid("the pack goes on behind its end"))?;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    if meta.mode == Mode::Sync {
        let args = [path, nonce, &text(&meta.tree), if request.force { "yes" } else { "" }];
        let told = guest.run(&SYNC, &args).await?.check(&SYNC, path)?;
        return Ok((bytes, Some(synced(&told)?)));
    }
    let (branch, name, email) = (text(&meta.branch), text(&meta.git_name), text(&meta.git_email));
    let (mode, readonly) = (meta.mode.as_str(), if request.readonly { "yes" } else { "" });
    let format = meta.object_format.as_str();
    let args = [path, nonce, &meta.head, format, &branch, &name, &email, mode, readonly];
    guest.run(&IMPORT, &args).await?.check(&IMPORT, path)?;
    Ok((bytes, None))
}

/// Reads `name=value` lines, as the script prints them.
fn synced(told: &str) -> Result<SyncReport, Error> {
    let mut report = SyncReport::default();
    for line in told.lines() {
        let number = |value: &str| {
            value.trim().parse().map_err(|_| {
                let line: String = line.chars().take(100).collect();
                Error::new(Code::Internal, format!("the guest's report of the sync is not valid: {line:?}"))
            })
        };
        match line.split_once('=') {
            Some(("changed", value)) => report.changed = number(value)?,
            Some(("conflicts", value)) => report.conflicts = number(value)?,
            Some(("conflict", name)) if report.names.len() < NAMES => report.names.push(name.to_owned()),
            _ => {}
        }
    }
    Ok(report)
}
