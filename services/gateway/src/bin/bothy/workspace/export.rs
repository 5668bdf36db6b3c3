//! What comes out of a machine, which is hostile: it is looked at whole before it gets the name that it is recommended under,
//! or is applied.

use super::inner;
use crate::{
    Context, Status, cli,
    plain::Plain,
    printer::{size, visible},
    vm,
};
use bothy_contract::{
    Code, Error,
    workspace::{ExportFormat, ExportReport},
};
use bothy_gateway::api;
use bothy_pack::{BundleSummary, EXPORT_REF, PatchSummary, Repository};
use fs_err as fs;
use http_body_util::BodyExt;
use std::{
    io::{self, IsTerminal, Seek, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// What is wanted from a machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted<'a> {
    pub(crate) guest_path: &'a str,
    pub(crate) format: ExportFormat,
    pub(crate) base: Option<&'a str>,
}

pub(crate) async fn main(context: &Context, args: cli::Export) -> Result<Status, Error> {
    super::check_guest_path(&args.guest_path)?;
    if let Some(base) = &args.base
        && (base.is_empty() || base.chars().any(char::is_control))
    {
        return Err(Error::invalid(format!("{base:?} is no revision"))
            .hint("give `--base` one that the guest knows, such as `HEAD~2`"));
    }
    // All that can be wrong here is found before a machine works for it.
    let repository = match (args.apply, args.format) {
        (false, cli::Form::Patch) => None,
        _ => Some(Repository::open(&args.repository)?),
    };
    if args.format == cli::Form::Bundle && args.output.is_none() {
        return Err(Error::invalid("a bundle needs a file").hint("name one with `-o work.bundle`"));
    }
    let vm = vm::show(context, &args.vm).await?;
    let dir = args.output.as_deref().map_or_else(|| Ok(std::env::temp_dir()), directory)?;
    let wanted =
        Wanted { guest_path: &args.guest_path, format: args.format.into(), base: args.base.as_deref() };
    let export = fetch(context, &vm.id.to_string(), wanted, &dir).await?;
    export.note_inner(context, wanted.format);
    match (repository, args.output) {
        (Some(repository), Some(output)) => bundle(context, &repository, export, &output)?,
        (Some(repository), None) => return apply(context, &repository, &export, args.three_way),
        (None, Some(output)) if export.report.bytes > 0 => {
            let summary = export.summary();
            let value = serde_json::json!({ "report": export.report, "patch": output });
            export.keep_as(&output)?;
            context.printer.record(&value, |_| format!("{summary} saved to {}", output.display()))?;
        }
        (None, Some(_)) => context
            .printer
            .record(&serde_json::json!({ "report": export.report, "patch": null }), |_| nothing_changed())?,
        (None, None) => {
            if export.report.bytes == 0 {
                context.printer.note(nothing_changed());
            }
            export.print()?;
        }
    }
    Ok(Status::SUCCESS)
}

pub(crate) fn nothing_changed() -> String {
    "nothing changed in the machine, so there is no patch".to_owned()
}

/// Applies a patch to the user's repository. Conflicts are a status of their own.
fn apply(context: &Context, repository: &Repository, export: &Export, merge: bool) -> Result<Status, Error> {
    let root = repository.root().display().to_string();
    // With `--base` the patch may be for any state; git says where it does not fit.
    let standing = repository.standing(&export.report.guest.base, None)?;
    if !standing.known {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("{root} does not have the commit that was imported, {}", export.report.guest.base),
        )
        .hint("name the repository that it came from with `--repository`"));
    }
    if export.report.bytes == 0 {
        context.printer.record(&serde_json::json!({ "report": export.report, "applied": null }), |_| {
            nothing_changed()
        })?;
        return Ok(Status::SUCCESS);
    }
    let mut patch = export.reader()?;
    let applied = repository.apply(&mut patch, merge)?;
    for warning in &applied.warnings {
        context.printer.note(format!("warning: {}", visible(warning)));
    }
    let value = serde_json::json!({
        "report": export.report,
        "applied": repository.root(),
        "conflicts": applied.conflicts,
    });
    let conflicts = applied.conflicts.join(", ");
    context.printer.record(&value, |_| {
        let how = match (merge, applied.conflicts.is_empty()) {
            (false, _) => "applied to",
            (true, true) => "merged into",
            (true, false) => "merged with conflicts into",
        };
        format!("{} {how} {root}", export.summary())
    })?;
    if applied.conflicts.is_empty() {
        return Ok(Status::SUCCESS);
    }
    context.printer.always(format!(
        "conflicts in {}\n  hint: edit them and `git add` them, or take all back with `git checkout HEAD -- FILE`",
        visible(&conflicts)
    ));
    Ok(Status::FOUND)
}

/// Checks a bundle against the user's repository, and saves it.
fn bundle(context: &Context, repository: &Repository, export: Export, output: &Path) -> Result<(), Error> {
    let guest = &export.report.guest;
    let left = guest.staged + guest.unstaged + guest.untracked;
    if left > 0 {
        context.printer.note(format!(
            "{left} file{} with changes that are not committed stay in the machine; a patch has them, too",
            if left == 1 { "" } else { "s" }
        ));
    }
    if export.report.bytes == 0 {
        return context
            .printer
            .record(&serde_json::json!({ "report": export.report, "bundle": null }), |_| {
                "no commit was made in the machine, so there is no bundle".to_owned()
            });
    }
    let BundleSummary { head, commits, patch } = repository.check_bundle(&mut export.reader()?)?;
    let shown = std::path::absolute(output).unwrap_or_else(|_| output.to_owned());
    let value = serde_json::json!({
        "report": export.report, "bundle": shown, "head": head, "commits": commits, "ref": EXPORT_REF,
    });
    let bytes = size(export.report.bytes);
    export.keep_as(output)?;
    let plural = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    context.printer.record(&value, |_| {
        format!(
            "{} that change {}, {bytes}, saved to {}\n  fetch them: git -C {} fetch {} {EXPORT_REF}:refs/heads/from-bothy",
            plural(commits, "commit"),
            plural(patch.files, "file"),
            output.display(),
            quoted(repository.root()),
            quoted(&shown),
        )
    })
}

/// The path as a word of a shell command line.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    if text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+:@".contains(&b)) {
        text
    } else {
        format!("'{}'", visible(&text).replace('\'', r"'\''"))
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

    /// Says what of repositories inside the repository it has not.
    pub(crate) fn note_inner(&self, context: &Context, format: ExportFormat) {
        for note in inner::notes(&self.report, format) {
            context.printer.note(visible(&note));
        }
    }

    /// The content, from its beginning.
    fn reader(&self) -> Result<fs::File, Error> {
        let failed = |e: io::Error| Error::internal("cannot read it again", &e);
        let mut file =
            fs::File::from_parts(self.file.as_file().try_clone().map_err(failed)?, self.file.path());
        file.rewind().map_err(failed)?;
        Ok(file)
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

fn path(vm: &str, wanted: Wanted<'_>) -> String {
    let format = match wanted.format {
        ExportFormat::Patch => "patch",
        ExportFormat::Bundle => "bundle",
        ExportFormat::Status => "status",
    };
    let base = wanted.base.map(|base| format!("&base={}", api::segment(base))).unwrap_or_default();
    let guest_path = api::segment(wanted.guest_path);
    format!("/v1/vms/{}/workspace?guest_path={guest_path}&format={format}{base}", api::segment(vm))
}

/// Fetches what is wanted into a file in `dir`, and looks at it.
pub(crate) async fn fetch(
    context: &Context,
    vm: &str,
    wanted: Wanted<'_>,
    dir: &Path,
) -> Result<Export, Error> {
    let path = path(vm, wanted);
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
    // A bundle needs the repository that it is for to be looked at: its taker does that.
    let bundle = wanted.format == ExportFormat::Bundle;
    let (file, patch) = tokio::task::spawn_blocking(move || {
        let patch = if bytes == 0 || bundle {
            Ok(PatchSummary::default())
        } else {
            bothy_pack::inspect_patch(file.as_file())
        };
        patch.map(|patch| (file, patch))
    })
    .await
    .map_err(|e| Error::internal("looking at the patch broke off", &e))??;
    Ok(Export { report, patch, file })
}
