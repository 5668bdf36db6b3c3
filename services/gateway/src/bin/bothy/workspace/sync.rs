//! What changed here since, into a machine: the tracked files as they are. What the machine changed too stays as it is there, and is
//! said.

use super::{
    How,
    export::{Wanted, fetch},
    send,
    watch::Watch,
};
use crate::{Context, Status, cli, interrupt::Interrupts, printer::visible, vm};
use bothy_contract::{
    Error,
    vm::VmRecord,
    workspace::{ExportFormat, SyncReport},
};
use bothy_pack::Repository;
use std::time::Duration;

/// The exit status where files were changed on both sides.
const CONFLICTS: Status = Status(1);
/// How often, and after how long, a sync is tried again that a writer in the guest came between.
const TRIES: u32 = 5;
const AGAIN: Duration = Duration::from_secs(1);

pub(crate) async fn main(context: &Context, args: cli::Sync) -> Result<Status, Error> {
    super::check_guest_path(&args.guest_path)?;
    let repository = Repository::open(&args.path)?;
    let vm = vm::show(context, &args.vm).await?;
    if args.watch {
        return watch(context, &vm, &repository, &args).await;
    }
    let (_, report) = once(context, &vm, &repository, &args, None).await?.unwrap_or_default();
    context
        .printer
        .record(&value(&vm, &args, &report), |_| visible(&told(&report, vm.name.as_str(), args.force)))?;
    Ok(if report.conflicts > 0 && !args.force { CONFLICTS } else { Status::SUCCESS })
}

fn value(vm: &VmRecord, args: &cli::Sync, report: &SyncReport) -> serde_json::Value {
    serde_json::json!({ "vm": vm.name, "guest_path": args.guest_path, "sync": report })
}

/// Syncs now and whenever tracked files have changed, until Ctrl-C.
async fn watch(
    context: &Context,
    vm: &VmRecord,
    repository: &Repository,
    args: &cli::Sync,
) -> Result<Status, Error> {
    let interrupts = Interrupts::new()?;
    let mut watch = Watch::new(repository)?;
    let mut last: Option<(String, SyncReport)> = None;
    context.printer.note(format!(
        "{} goes into {} as it changes; Ctrl-C ends that",
        repository.root().display(),
        vm.name
    ));
    loop {
        let synced = last.as_ref().map(|(tree, _)| tree.as_str());
        let done = tokio::select! {
            done = settled(context, vm, repository, args, synced) => done?,
            () = interrupts.at_least(1) => return Ok(Status::SUCCESS),
        };
        if let Some((tree, report)) = done {
            let news = last.as_ref().is_none_or(|(_, before)| before.names != report.names);
            if report.changed > 0 || (report.conflicts > 0 && news) {
                context.printer.record(&value(vm, args, &report), |_| {
                    visible(&told(&report, vm.name.as_str(), args.force))
                })?;
            }
            last = Some((tree, report));
        }
        if watch.renew(repository)? {
            continue;
        }
        tokio::select! {
            () = watch.changed() => {}
            () = interrupts.at_least(1) => return Ok(Status::SUCCESS),
        }
    }
}

/// One sync, tried again where somebody wrote to the same files meanwhile, on either side.
async fn settled(
    context: &Context,
    vm: &VmRecord,
    repository: &Repository,
    args: &cli::Sync,
    synced: Option<&str>,
) -> Result<Option<(String, SyncReport)>, Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        match once(context, vm, repository, args, synced).await {
            Err(e) if e.retryable && tries < TRIES => tokio::time::sleep(AGAIN).await,
            done => return done,
        }
    }
}

/// Brings the tracked files in, unless they are those of the tree `synced`. Their tree, and what became of it: a report of nothing
/// where the machine has them.
async fn once(
    context: &Context,
    vm: &VmRecord,
    repository: &Repository,
    args: &cli::Sync,
    synced: Option<&str>,
) -> Result<Option<(String, SyncReport)>, Error> {
    let files = repository.clone();
    let now = blocking(move || files.tracked()).await?;
    let tree = now.tree().to_owned();
    if synced == Some(tree.as_str()) {
        return Ok(None);
    }
    let (id, guest_path) = (vm.id.to_string(), args.guest_path.as_str());
    let wanted = Wanted { guest_path, format: ExportFormat::Status, base: None };
    let guest = fetch(context, &id, wanted, &std::env::temp_dir()).await?.report.guest;
    let files = repository.clone();
    let pack = blocking(move || files.sync(&now, &guest.base, guest.tracked.as_deref())).await?;
    let Some(pack) = pack else { return Ok(Some((tree, SyncReport::default()))) };
    let how = How { guest_path, force: args.force, readonly: false };
    let (report, _) = send(context, &id, &how, None, move |out| pack.write(out)).await?;
    // A workspace-agent that knows no sync would have refused the pack.
    Ok(Some((tree, report.sync.unwrap_or_default())))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal("reading the repository broke off", &e))?
}

fn told(report: &SyncReport, vm: &str, force: bool) -> String {
    let files = |n: u64| format!("{n} file{}", if n == 1 { "" } else { "s" });
    let mut text = match report.changed {
        0 => format!("nothing to change in {vm}"),
        n => format!("{} changed in {vm}", files(n)),
    };
    if report.conflicts > 0 {
        let names: Vec<_> = report.names.iter().map(|name| format!("\n  {name}")).collect();
        let more = report.conflicts.saturating_sub(names.len() as u64);
        let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
        let (what, next) = if force {
            ("is as it is here now, though changed there too", "")
        } else {
            ("was changed there too, and stays as it is there", "\n`--force` takes what is here")
        };
        text.push_str(&format!("\n{} {what}:{}{more}{next}", files(report.conflicts), names.concat()));
    }
    text
}
