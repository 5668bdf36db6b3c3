//! All changes since the import as one patch, from the guest to the CLI's stream.
//!
//! The guest writes the whole patch to a private file of its own first, so that what fails, fails before any data.

use crate::{
    guest::{Guest, STALL, stalled},
    import::until,
    path,
    script::{CLEAN_EXPORT, EXPORT, READ},
};
use bothy_contract::{
    Code, Error, TicketId,
    workspace::{ExportReport, OpenExport},
};
use bothy_pack::MAX_PATCH;
use bothy_tickets::FrameWriter;
use tokio::{io::AsyncWrite, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// Where the guest may put the patch while it is on its way.
pub const SCRATCH: &str = "/var/tmp";

const QUEUED: usize = 4;

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
    let nonce = TicketId::new().reveal();
    let done = until(stop, make_and_send(guest, path, scratch, &nonce, out)).await;
    let cleaned = match guest.run(&CLEAN_EXPORT, &[scratch, &nonce]).await {
        Ok(end) => end.check(&CLEAN_EXPORT, path).map(drop),
        Err(e) => Err(e),
    };
    if let Err(e) = cleaned {
        tracing::warn!(path, error = %e, "an export left its temporary directory; the next one removes it");
    }
    done
}

async fn make_and_send<G: Guest, W: AsyncWrite + Unpin + Send>(
    guest: &G,
    path: &str,
    scratch: &str,
    nonce: &str,
    out: &mut FrameWriter<W>,
) -> Result<ExportReport, Error> {
    let told = guest.run(&EXPORT, &[path, scratch, nonce]).await?.check(&EXPORT, path)?;
    let mut numbers = told.split_ascii_whitespace().map(str::parse::<u64>);
    let (Some(Ok(bytes)), Some(Ok(files)), Some(Ok(commits)), None) =
        (numbers.next(), numbers.next(), numbers.next(), numbers.next())
    else {
        return Err(Error::new(
            Code::Internal,
            format!("the guest's report of the export is not valid: {told:?}"),
        ));
    };
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
    Ok(ExportReport { bytes, files, commits })
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
