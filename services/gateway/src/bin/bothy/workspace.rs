//! Repositories in and out of machines. The repository is read here, as the user, never by a daemon; what comes back is
//! from a guest, which is hostile: a patch is looked at whole before it gets the name that it is recommended under.

use crate::{
    Context, Status, cli,
    http::Body,
    plain::Plain,
    printer::{size, visible},
    vm,
};
use bothy_contract::{
    Code, Error,
    workspace::{ExportReport, ImportReport},
};
use bothy_gateway::api;
use bothy_pack::{PackOptions, PackSummary, PatchSummary, Repository};
use bytes::Bytes;
use fs_err as fs;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use std::{
    io::{self, IsTerminal, Seek, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How many pieces of a pack may wait, of at most [`PIECE`] bytes each.
const QUEUE: usize = 4;
const PIECE: usize = 64 << 10;

pub(crate) async fn main(context: &Context, command: cli::Workspace) -> Result<Status, Error> {
    match command {
        cli::Workspace::Prepare { vm, path, include_untracked, guest_path } => {
            check_guest_path(&guest_path)?;
            let repository = Repository::open(&path)?;
            let vm = vm::show(context, &vm).await?;
            let report =
                import(context, &vm.id.to_string(), repository, &guest_path, include_untracked).await?;
            context.printer.record(&report, |report| {
                format!("{} is in {} at {}", head(report), vm.name, visible(&report.guest_path))
            })?;
        }
        cli::Workspace::Export { vm, output, guest_path } => {
            check_guest_path(&guest_path)?;
            let vm = vm::show(context, &vm).await?;
            let dir = output.as_deref().map_or_else(|| Ok(std::env::temp_dir()), directory)?;
            let export = fetch(context, &vm.id.to_string(), &guest_path, &dir).await?;
            match output {
                Some(output) if export.report.bytes > 0 => {
                    let summary = export.summary();
                    let value = serde_json::json!({ "report": export.report, "patch": output });
                    export.keep_as(&output)?;
                    context.printer.record(&value, |_| format!("{summary} saved to {}", output.display()))?;
                }
                Some(_) => context
                    .printer
                    .record(&serde_json::json!({ "report": export.report, "patch": null }), |_| {
                        nothing_changed()
                    })?,
                None => {
                    if export.report.bytes == 0 {
                        context.printer.note(nothing_changed());
                    }
                    export.print()?;
                }
            }
        }
    }
    Ok(Status::SUCCESS)
}

pub(crate) fn nothing_changed() -> String {
    "nothing changed in the machine, so there is no patch".to_owned()
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
    include_untracked: bool,
) -> Result<ImportReport, Error> {
    let (send, receive) = mpsc::channel::<Result<Bytes, Error>>(QUEUE);
    let packing = tokio::task::spawn_blocking(move || {
        let mut out = io::BufWriter::with_capacity(PIECE, Pieces(send.clone()));
        let packed = repository.pack(PackOptions { include_untracked }, &mut out).and_then(|summary| {
            out.flush().map(|()| summary).map_err(|e| Error::internal("cannot send the pack", &e))
        });
        // What is still in the buffer of a pack that failed must not follow.
        let (_, _) = out.into_parts();
        if let Err(e) = &packed {
            // The body must not look whole. Nobody listening means that the request has failed already.
            let _ = send.blocking_send(Err(e.clone()));
        }
        packed
    });
    let body: Body =
        BodyExt::boxed(StreamBody::new(ReceiverStream::new(receive).map(|piece| piece.map(Frame::data))));
    let path = format!("/v1/vms/{}/workspace?guest_path={}", api::segment(vm), api::segment(guest_path));
    let sent = context.gateway.upload::<ImportReport>(&path, body).await;
    let packed = packing.await.map_err(|e| Error::internal("packing the repository broke off", &e))?;
    match (sent, packed) {
        (Ok(report), Ok(summary)) => {
            remarks(context, &summary);
            Ok(report)
        }
        // A pack that failed of itself is the reason; one that could not be sent is not.
        (Err(e), Ok(_)) => Err(e.context("the repository was not put into the machine")),
        (Err(e), Err(p)) => {
            let e = if p.message.contains(GONE) { e } else { p };
            Err(e.context("the repository was not put into the machine"))
        }
        (Ok(_), Err(p)) => Err(p.context("the repository was not packed")),
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
struct Pieces(mpsc::Sender<Result<Bytes, Error>>);

impl Write for Pieces {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0
            .blocking_send(Ok(Bytes::copy_from_slice(data)))
            .map(|()| data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, GONE))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A patch that came whole and was looked at, in a file without a name of its own yet.
pub(crate) struct Export {
    pub(crate) report: ExportReport,
    patch: PatchSummary,
    file: NamedTempFile,
}

impl Export {
    /// How much it is, for people.
    pub(crate) fn summary(&self) -> String {
        let plural = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut text = format!("{}, {}", plural(self.patch.files, "file"), size(self.report.bytes));
        if self.report.commits > 0 {
            text.push_str(&format!(", {} made in the machine", plural(self.report.commits, "commit")));
        }
        text
    }

    /// Gives it the name `path`, replacing what was there.
    pub(crate) fn keep_as(self, path: &Path) -> Result<(), Error> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::new(Code::Internal, format!("cannot save the patch as {}: {e}", path.display()))
        };
        self.file.as_file().sync_all().map_err(|e| failed(&e))?;
        self.file.persist(path).map(drop).map_err(|e| failed(&e.error))
    }

    /// Gives it the name `path`, or one like it if that is taken. Returns the name.
    pub(crate) fn keep_beside(mut self, path: &Path) -> Result<PathBuf, Error> {
        self.file.as_file().sync_all().map_err(|e| Error::internal("cannot save the patch", &e))?;
        let stem = path.with_extension("");
        for n in 1..1000 {
            let candidate =
                if n == 1 { path.to_owned() } else { PathBuf::from(format!("{}-{n}.patch", stem.display())) };
            match self.file.persist_noclobber(&candidate) {
                Ok(_) => return Ok(candidate),
                Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => self.file = e.file,
                Err(e) => {
                    return Err(Error::internal(
                        format!("cannot save the patch as {}", candidate.display()),
                        &e.error,
                    ));
                }
            }
        }
        Err(Error::new(
            Code::ResourceExhausted,
            format!("there are too many patches like {}", path.display()),
        )
        .hint("remove some, or name a file with `--patch`"))
    }

    fn print(mut self) -> Result<(), Error> {
        let failed = |e: io::Error| Error::internal("cannot print the patch", &e);
        self.file.as_file_mut().rewind().map_err(failed)?;
        let mut out = io::stdout().lock();
        // A file or a pipe gets it as it is.
        let printed = if out.is_terminal() {
            io::copy(self.file.as_file_mut(), &mut PlainWriter(&mut out, Plain::default())).map(drop)
        } else {
            io::copy(self.file.as_file_mut(), &mut out).map(drop)
        };
        match printed {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(failed(e)),
            _ => Ok(()),
        }
    }
}

/// Writes what is harmless to a terminal.
struct PlainWriter<W>(W, Plain);

impl<W: Write> Write for PlainWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_all(&self.1.filter(data)).map(|()| data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The directory that `file` would be in, which must be there.
pub(crate) fn directory(file: &Path) -> Result<PathBuf, Error> {
    let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if file.is_dir() || file.file_name().is_none() {
        return Err(
            Error::invalid(format!("{} is a directory", file.display())).hint("name a file for the patch")
        );
    }
    // Tried, since only that says whether one may: a file system may be read-only, or full.
    match NamedTempFile::new_in(parent) {
        Ok(_) => Ok(parent.to_owned()),
        Err(e) => {
            Err(Error::new(Code::FailedPrecondition, format!("cannot write to {}: {e}", parent.display()))
                .hint("make the directory, or name another file for the patch"))
        }
    }
}

/// The name under which the patch of `repository` from the VM `name` is saved, its directory made.
pub(crate) fn default_patch(repository: &Path, name: &str) -> Result<PathBuf, Error> {
    let dir = crate::dirs::state()?.join("patches");
    fs::create_dir_all(&dir).map_err(|e| Error::internal("cannot make the directory of patches", &e))?;
    let repo: String = repository
        .file_name()
        .map_or_else(|| "repository".into(), |n| n.to_string_lossy())
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' })
        .take(100)
        .collect();
    Ok(dir.join(format!("{repo}-{name}.patch")))
}

/// Fetches all changes since the import into a file in `dir`, and looks at them.
pub(crate) async fn fetch(
    context: &Context,
    vm: &str,
    guest_path: &str,
    dir: &Path,
) -> Result<Export, Error> {
    let path = format!("/v1/vms/{}/workspace?guest_path={}", api::segment(vm), api::segment(guest_path));
    let mut body = context.gateway.stream(&path).await?;
    let mut file = tempfile::Builder::new()
        .prefix(".bothy-")
        .tempfile_in(dir)
        .map_err(|e| Error::internal(format!("cannot write to {}", dir.display()), &e))?;
    let (mut report, mut bytes) = (None, 0u64);
    let cut = |why: String| {
        Error::new(Code::Unavailable, format!("the patch was cut short{why}; nothing was saved"))
            .hint(format!("try again: `bothy workspace export {vm}`"))
    };
    while let Some(frame) = body.frame().await {
        match frame.map_err(|e| cut(format!(": {}", bothy_contract::error::chain(&e))))?.into_data() {
            Ok(data) => {
                bytes = bytes.saturating_add(data.len() as u64);
                if bytes > bothy_pack::MAX_PATCH {
                    return Err(Error::new(
                        Code::ResourceExhausted,
                        format!("the patch is larger than {}", size(bothy_pack::MAX_PATCH)),
                    ));
                }
                file.write_all(&data).map_err(|e| {
                    Error::new(
                        Code::ResourceExhausted,
                        format!("cannot save the patch in {}: {e}", dir.display()),
                    )
                })?;
            }
            Err(frame) => {
                let text = frame
                    .trailers_ref()
                    .and_then(|t| t.get(api::REPORT_TRAILER))
                    .map(|v| v.as_bytes().to_vec());
                report = text.and_then(|text| serde_json::from_slice::<ExportReport>(&text).ok());
            }
        }
    }
    let report = report.ok_or_else(|| cut(" before its report".to_owned()))?;
    if report.bytes != bytes {
        return Err(cut(format!(": {bytes} of {} bytes came", report.bytes)));
    }
    file.rewind().map_err(|e| Error::internal("cannot read the patch again", &e))?;
    let (file, patch) = tokio::task::spawn_blocking(move || {
        let patch =
            if bytes == 0 { Ok(PatchSummary::default()) } else { bothy_pack::inspect_patch(file.as_file()) };
        patch.map(|patch| (file, patch))
    })
    .await
    .map_err(|e| Error::internal("looking at the patch broke off", &e))??;
    Ok(Export { report, patch, file })
}
