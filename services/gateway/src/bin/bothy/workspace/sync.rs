//! What changed here since, into a machine: the tracked files as they are. What the machine changed too stays as it is there, and is
//! said.

use super::{
    How,
    export::{Wanted, fetch},
    send,
};
use crate::{Context, Status, cli, printer::visible, vm};
use bothy_contract::{
    Error,
    workspace::{ExportFormat, SyncReport},
};
use bothy_pack::Repository;

/// The exit status where files were changed on both sides.
const CONFLICTS: Status = Status(1);

pub(crate) async fn main(context: &Context, args: cli::Sync) -> Result<Status, Error> {
    super::check_guest_path(&args.guest_path)?;
    let repository = Repository::open(&args.path)?;
    let vm = vm::show(context, &args.vm).await?;
    let report = once(context, &vm.id.to_string(), repository, &args.guest_path, args.force).await?;
    let value = serde_json::json!({ "vm": vm.name, "guest_path": args.guest_path, "sync": report });
    context.printer.record(&value, |_| visible(&told(&report, vm.name.as_str(), args.force)))?;
    Ok(if report.conflicts > 0 && !args.force { CONFLICTS } else { Status::SUCCESS })
}

/// Brings it in; a report of nothing where nothing has changed here.
async fn once(
    context: &Context,
    vm: &str,
    repository: Repository,
    guest_path: &str,
    force: bool,
) -> Result<SyncReport, Error> {
    let wanted = Wanted { guest_path, format: ExportFormat::Status, base: None };
    let guest = fetch(context, vm, wanted, &std::env::temp_dir()).await?.report.guest;
    let pack = tokio::task::spawn_blocking(move || repository.sync(&guest.base, guest.tracked.as_deref()))
        .await
        .map_err(|e| Error::internal("packing the changes broke off", &e))??;
    let Some(pack) = pack else { return Ok(SyncReport::default()) };
    let how = How { guest_path, force, readonly: false };
    let (report, _) = send(context, vm, &how, move |out| pack.write(out)).await?;
    // A workspace-agent that knows no sync would have refused the pack.
    Ok(report.sync.unwrap_or_default())
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
