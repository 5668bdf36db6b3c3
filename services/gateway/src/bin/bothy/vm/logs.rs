//! `bothy vm logs`.

use super::{path, show};
use crate::{Context, Status, plain::Plain, printer::word};
use bothy_contract::{Error, vm::LogSource};
use http_body_util::BodyExt;
use std::{fmt::Write as _, io::IsTerminal};
use tokio::io::AsyncWriteExt;

/// Copies a log to stdout.
pub(super) async fn main(
    context: &Context,
    vm: &str,
    source: LogSource,
    follow: bool,
    tail: Option<u32>,
) -> Result<Status, Error> {
    let vm = show(context, vm).await?;
    let mut rest = format!("/logs?source={}&follow={follow}", word(&source));
    if let Some(lines) = tail {
        // Writing to a String cannot fail.
        let _ = write!(rest, "&tail={lines}");
    }
    let mut body = context.gateway.stream(&path(&vm.id.to_string(), &rest)).await?;
    let mut out = tokio::io::stdout();
    // A file or a pipe gets it as it is.
    let mut plain = std::io::stdout().is_terminal().then(Plain::default);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::internal("the log broke off", &e))?;
        let Some(data) = frame.data_ref() else { continue };
        let filtered = plain.as_mut().map(|plain| plain.filter(data));
        let data = filtered.as_deref().unwrap_or(data);
        let done = async {
            out.write_all(data).await?;
            out.flush().await
        };
        match done.await {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
            done => done.map_err(|e| Error::internal("cannot write the log", &e))?,
        }
    }
    Ok(Status::SUCCESS)
}
