//! Repositories in and out of machines. The repository is read here, as the user, never by a daemon; what comes back is
//! from a guest, which is hostile: a patch is looked at whole before it gets the name that it is recommended under.

mod export;
mod inner;
mod sending;
mod status;
mod sync;
mod watch;

pub(crate) use export::{Wanted, default_patch, directory, fetch, nothing_changed, quoted};

use crate::{
    Context, Status, bootstrap, cli,
    http::Body,
    printer::{size, table, visible},
    vm,
};
use bothy_contract::{Error, workspace::ImportReport};
use bothy_gateway::api;
use bothy_pack::{PackOptions, PackSummary, Repository};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use sending::{Gone, drawn};
use std::io::{self, Write};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How many pieces of a pack may wait, of at most [`PIECE`] bytes each.
const QUEUE: usize = 4;
const PIECE: usize = 64 << 10;

pub(crate) async fn main(context: &Context, command: cli::Workspace) -> Result<Status, Error> {
    match command {
        cli::Workspace::Prepare(args) => prepare(context, args).await?,
        cli::Workspace::Export(args) => return export::main(context, args).await,
        cli::Workspace::Sync(args) => return sync::main(context, args).await,
        cli::Workspace::Status { vm, path, guest_path } => {
            return status::main(context, &vm, &path, &guest_path).await;
        }
    }
    Ok(Status::SUCCESS)
}

async fn prepare(context: &Context, args: cli::Prepare) -> Result<(), Error> {
    check_guest_path(&args.guest_path)?;
    let repository = Repository::open(&args.path)?;
    if args.dry_run {
        // Also without a host that runs.
        return plan(context, &repository, &args.parts);
    }
    let vm = vm::show(context, &args.vm).await?;
    if args.parts.bootstrap {
        let mend = format!("`bothy vm egress {0} open`, or `bothy vm egress {0} allow NAME...`", vm.name);
        bootstrap::check(&vm.egress, &mend)?;
    }
    let pins = bootstrap::pins(context, &repository);
    let report =
        import(context, &vm.id.to_string(), repository, &args.guest_path, &args.parts, args.force).await?;
    bootstrap::after_import(context, &vm, &args.guest_path, &pins, args.parts.bootstrap).await?;
    context.printer.record(&report, |report| {
        let what =
            if args.parts.mode == cli::How::Copy { "a copy of the files".into() } else { head(report) };
        format!("{what} is in {} at {}", vm.name, visible(&report.guest_path))
    })
}

/// Says what would go, from a pack that nobody gets: so the sizes are true.
fn plan(context: &Context, repository: &Repository, parts: &cli::Parts) -> Result<(), Error> {
    let summary = repository.pack(&PackOptions { list: true, ..parts.options() }, io::sink())?;
    remarks(context, &summary);
    let value = serde_json::json!({
        "head": summary.head,
        "branch": summary.branch,
        "commits": summary.commits,
        "history_bytes": summary.history_bytes,
        "files": summary.files,
        "bytes": summary.bytes,
        "warnings": summary.warnings,
        "untracked_out": summary.untracked_out,
    });
    context.printer.record(&value, |_| {
        let mut rows = Vec::new();
        if summary.history_bytes > 0 {
            let commits =
                format!("{} commit{}", summary.commits, if summary.commits == 1 { "" } else { "s" });
            rows.push(vec!["history".to_owned(), size(summary.history_bytes), commits]);
        }
        for file in &summary.files {
            rows.push(vec![file.kind.to_owned(), size(file.bytes), file.name.clone()]);
        }
        rows.push(vec!["in all".to_owned(), size(summary.bytes), String::new()]);
        table(&["WHAT", "SIZE", "NAME"], &["SIZE"], rows)
    })
}

/// Refuses early what the workspace-agent would refuse.
pub(crate) fn check_guest_path(path: &str) -> Result<(), Error> {
    if path.starts_with('/') && path.len() > 1 && !path.contains('\0') {
        return Ok(());
    }
    Err(Error::invalid(format!("{path:?} is not an absolute path"))
        .hint("give `--guest-path` one such as `/root/repo`"))
}

pub(crate) fn head(report: &ImportReport) -> String {
    let short: String = report.head.chars().take(12).collect();
    match &report.branch {
        Some(branch) => visible(&format!("{branch} ({short})")),
        None => visible(&short),
    }
}

/// Packs `repository` and puts it into `vm`.
pub(crate) async fn import(
    context: &Context,
    vm: &str,
    repository: Repository,
    guest_path: &str,
    parts: &cli::Parts,
    force: bool,
) -> Result<ImportReport, Error> {
    let options = parts.options();
    let files = repository.tracked_count().ok();
    let how = How { guest_path, force, readonly: parts.readonly };
    let (report, summary) = send(context, vm, &how, files, move |out| repository.pack(&options, out))
        .await
        .map_err(|e| e.context("the repository was not put into the machine"))?;
    remarks(context, &summary);
    Ok(report)
}

/// Where a pack goes, and what it may do there.
struct How<'a> {
    guest_path: &'a str,
    force: bool,
    readonly: bool,
}

/// Sends what `pack` writes into `vm`, while it writes it.
async fn send<S: Send + 'static>(
    context: &Context,
    vm: &str,
    how: &How<'_>,
    files: Option<u64>,
    pack: impl FnOnce(&mut dyn Write) -> Result<S, Error> + Send + 'static,
) -> Result<(ImportReport, S), Error> {
    let (send, receive) = mpsc::channel::<Result<Bytes, Error>>(QUEUE);
    let gone = Gone::default();
    let counted = gone.clone();
    let packing = tokio::task::spawn_blocking(move || {
        let mut out = io::BufWriter::with_capacity(PIECE, Pieces(send.clone(), counted.clone()));
        let packed = pack(&mut out).and_then(|summary| {
            out.flush().map(|()| summary).map_err(|e| Error::internal("cannot send the pack", &e))
        });
        // What is still in the buffer of a pack that failed must not follow.
        let (_, _) = out.into_parts();
        if let Err(e) = &packed {
            // The body must not look whole. Nobody listening means that the request has failed already.
            let _ = send.blocking_send(Err(e.clone()));
        }
        counted.all();
        packed
    });
    let body: Body =
        BodyExt::boxed(StreamBody::new(ReceiverStream::new(receive).map(|piece| piece.map(Frame::data))));
    let path = format!(
        "/v1/vms/{}/workspace?guest_path={}&force={}&readonly={}",
        api::segment(vm),
        api::segment(how.guest_path),
        how.force,
        how.readonly
    );
    let upload = context.gateway.upload::<ImportReport>(&path, body);
    let sent = drawn(context.printer, files, &gone, upload).await;
    let packed = packing.await.map_err(|e| Error::internal("packing the repository broke off", &e))?;
    match (sent, packed) {
        (Ok(report), Ok(summary)) => Ok((report, summary)),
        // A pack that failed of itself is the reason; one that could not be sent is not.
        (Err(e), Err(p)) if p.message.contains(GONE) => Err(e),
        (_, Err(p)) => Err(p),
        (Err(e), Ok(_)) => Err(e),
    }
}

fn remarks(context: &Context, summary: &PackSummary) {
    for warning in &summary.warnings {
        context.printer.note(format!("warning: {}", visible(warning)));
    }
    if summary.untracked_out > 0 {
        context.printer.note(format!(
            "{} untracked file{} stayed here ({}); `--include-untracked` takes them along",
            summary.untracked_out,
            if summary.untracked_out == 1 { "" } else { "s" },
            visible(&summary.untracked_names.join(", ")).replace('\n', "\\n"),
        ));
    }
}

/// What a pack that nobody takes any longer fails with.
const GONE: &str = "the gateway takes no more of the pack";

/// The writer's end of a queue of pieces.
struct Pieces(mpsc::Sender<Result<Bytes, Error>>, Gone);

impl Write for Pieces {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0
            .blocking_send(Ok(Bytes::copy_from_slice(data)))
            .map(|()| self.1.add(data.len()))
            .map(|()| data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, GONE))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
