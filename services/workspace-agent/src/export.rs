//! What was done since the import, as a patch or a bundle, from the guest to the CLI's stream.
//!
//! The guest writes the whole of it to a private file of its own first, so that what fails, fails before any data.

use crate::{
    guest::{Guest, STALL, stalled},
    import::until,
    path,
    script::{CLEAN_EXPORT, EXPORT, READ},
};
use bothy_contract::{
    Code, Error, TicketId,
    workspace::{ExportFormat, ExportReport, Inner, InnerState, OpenExport},
};
use bothy_pack::MAX_PATCH;
use bothy_tickets::FrameWriter;
use tokio::{io::AsyncWrite, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// Where the guest may put the patch while it is on its way.
pub const SCRATCH: &str = "/var/tmp";

const QUEUED: usize = 4;
/// How many repositories inside the repository are passed on; the script gives as many.
const NAMES: usize = 20;

/// Sends the patch to `out`. The end frame is the caller's to send, with the report.
///
/// # Errors
/// The guest's, a patch that is larger than [`MAX_PATCH`], a stream that stands still or is cut, or `stop`. The repository
/// in the guest is untouched in every outcome.
pub async fn export<G: Guest, W: AsyncWrite + Unpin + Send>(
    guest: &G,
    request: &OpenExport,
    scratch: &str,
    out: &mut FrameWriter<W>,
    stop: &CancellationToken,
) -> Result<ExportReport, Error> {
    let path = request.guest_path.as_str();
    path::check("guest path", path)?;
    check_revision(request.base.as_deref())?;
    let nonce = TicketId::new().reveal();
    let done = until(stop, make_and_send(guest, request, path, scratch, &nonce, out)).await;
    if done.as_ref().is_ok_and(|report| report.bytes == 0) {
        // The script keeps nothing then.
        return done;
    }
    let cleaned = match guest.run(&CLEAN_EXPORT, &[scratch, &nonce]).await {
        Ok(end) => end.check(&CLEAN_EXPORT, path).map(drop),
        Err(e) => Err(e),
    };
    if let Err(e) = cleaned {
        tracing::warn!(path, error = %e, "an export left its temporary directory; the next one removes it");
    }
    done
}

/// Refuses early what no revision can be.
pub(crate) fn check_revision(base: Option<&str>) -> Result<(), Error> {
    match base {
        Some(rev) if rev.is_empty() || rev.len() > 250 || rev.chars().any(char::is_control) => {
            Err(Error::invalid(format!("{rev:?} is no revision")).hint("give one such as `HEAD~2` or `main`"))
        }
        _ => Ok(()),
    }
}

/// Reads `name=value` lines, as the script prints them.
fn parse(told: &str) -> Result<ExportReport, Error> {
    let mut report = ExportReport::default();
    for line in told.lines() {
        let Some((name, value)) = line.split_once('=') else { continue };
        let number = || value.trim().parse::<u64>().map_err(|_| odd(line));
        let object = || {
            let hex = matches!(value.len(), 40 | 64) && value.bytes().all(|b| b.is_ascii_hexdigit());
            if hex { Ok(value.to_owned()) } else { Err(odd(line)) }
        };
        let guest = &mut report.guest;
        match name {
            "bytes" => report.bytes = number()?,
            "files" => report.files = number()?,
            "commits" => report.commits = number()?,
            "behind" => guest.behind = number()?,
            "staged" => guest.staged = number()?,
            "unstaged" => guest.unstaged = number()?,
            "untracked" => guest.untracked = number()?,
            "modules" => report.inner_count = number()?,
            "module" if report.inner.len() < NAMES => {
                report.inner.push(inner(value).ok_or_else(|| odd(line))?)
            }
            "base" => guest.base = object()?,
            "head" if !value.is_empty() => guest.head = Some(object()?),
            "tracked" if !value.is_empty() => guest.tracked = Some(object()?),
            "branch" if !value.is_empty() => {
                guest.branch = Some(value.chars().filter(|c| !c.is_control()).take(250).collect());
            }
            _ => {}
        }
    }
    if report.guest.base.is_empty() { Err(odd(told)) } else { Ok(report) }
}

/// `<state> <path>`.
fn inner(told: &str) -> Option<Inner> {
    let (state, path) = told.split_once(' ')?;
    let state = match state {
        "changed" => InnerState::Changed,
        "commits" => InnerState::Commits,
        "gone" => InnerState::Gone,
        "left" => InnerState::Left,
        _ => return None,
    };
    Some(Inner { path: path.chars().map(|c| if c.is_control() { '?' } else { c }).collect(), state })
}

fn odd(told: &str) -> Error {
    let told: String = told.chars().take(100).collect();
    Error::new(Code::Internal, format!("the guest's report of the export is not valid: {told:?}"))
}

async fn make_and_send<G: Guest, W: AsyncWrite + Unpin + Send>(
    guest: &G,
    request: &OpenExport,
    path: &str,
    scratch: &str,
    nonce: &str,
    out: &mut FrameWriter<W>,
) -> Result<ExportReport, Error> {
    let format = match request.format {
        ExportFormat::Patch => "patch",
        ExportFormat::Bundle => "bundle",
        ExportFormat::Status => "status",
    };
    let since = request.base.as_deref().unwrap_or_default();
    let args = [path, scratch, nonce, format, since];
    let told = guest.run(&EXPORT, &args).await?.check(&EXPORT, path)?;
    let report = parse(&told)?;
    let bytes = report.bytes;
    if bytes > MAX_PATCH {
        return Err(Error::new(
            Code::ResourceExhausted,
            format!(
                "the changes in {path} make a patch of {} MiB; at most {} MiB are taken",
                bytes >> 20,
                MAX_PATCH >> 20
            ),
        )
        .hint("have git ignore what needs no export (build outputs, downloads), and export again"));
    }
    if bytes > 0 {
        let sent = send(guest, scratch, nonce, bytes, out).await?;
        if sent != bytes {
            return Err(Error::new(
                Code::Internal,
                format!("the guest gave {sent} bytes of a patch of {bytes}"),
            ));
        }
    }
    Ok(report)
}

/// Moves the patch from the guest to `out`, and no more than it said.
async fn send<G: Guest, W: AsyncWrite + Unpin + Send>(
    guest: &G,
    scratch: &str,
    nonce: &str,
    most: u64,
    out: &mut FrameWriter<W>,
) -> Result<u64, Error> {
    let (from_guest, mut to_cli) = mpsc::channel(QUEUED);
    let args = [scratch, nonce];
    let read = guest.read(&READ, &args, from_guest);
    let write = async {
        let mut sent = 0;
        loop {
            let Some(data) = timeout(STALL, to_cli.recv())
                .await
                .map_err(|_| stalled("the guest gave nothing of the patch"))?
            else {
                return Ok(sent);
            };
            sent += data.len() as u64;
            if sent > most {
                return Err(Error::new(Code::Internal, "the guest gives more of the patch than it said"));
            }
            match timeout(STALL, out.data(&data)).await {
                Err(_) => return Err(stalled("the CLI took nothing of the patch")),
                Ok(Err(e)) => return Err(Error::new(Code::Cancelled, format!("the CLI went away: {e}"))),
                Ok(Ok(())) => {}
            }
        }
    };
    let (end, sent) = tokio::try_join!(read, write)?;
    end.check(&READ, scratch)?;
    Ok(sent)
}
