//! How a repository in a machine stands, and whether the one here has moved on since.

use super::{
    export::{Wanted, fetch},
    inner,
};
use crate::{Context, Status, bootstrap, printer::visible, vm};
use bothy_contract::{
    Error,
    workspace::{ExportFormat, ExportReport},
};
use bothy_pack::{Repository, Standing};
use std::path::Path;

pub(crate) async fn main(
    context: &Context,
    vm: &str,
    path: &Path,
    guest_path: &str,
) -> Result<Status, Error> {
    super::check_guest_path(guest_path)?;
    let vm = vm::show(context, vm).await?;
    let wanted = Wanted { guest_path, format: ExportFormat::Status, base: None };
    let report = fetch(context, &vm.id.to_string(), wanted, &std::env::temp_dir()).await?.report;
    // What is asked of the machine has an answer outside of a repository, too.
    let host = match Repository::open(path) {
        Ok(repository) => Ok(repository.standing(&report.guest.base, report.guest.tracked.as_deref())?),
        Err(e) => Err(e),
    };
    let tools = bootstrap::standing(context, &vm).await;
    let value = serde_json::json!({
        "vm": vm.name,
        "guest_path": guest_path,
        "commits": report.commits,
        "guest": report.guest,
        "inner": report.inner,
        "inner_count": report.inner_count,
        "host": host.as_ref().ok(),
        "bootstrap": tools,
    });
    context.printer.record(&value, |_| {
        let here = match &host {
            Ok(standing) => here(standing, path),
            Err(e) => format!("here:   {} (name the repository that it came from)", e.message),
        };
        let tools = tools.as_deref().map(|tools| format!("\n{}", bootstrap::told(tools))).unwrap_or_default();
        visible(&format!("{}\n{here}{tools}", guest(&report, vm.name.as_str(), guest_path)))
    })?;
    Ok(Status::SUCCESS)
}

fn plural(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

fn guest(report: &ExportReport, name: &str, guest_path: &str) -> String {
    let guest = &report.guest;
    let head = guest.head.as_deref().map_or("no commit", short);
    let branch = guest.branch.as_deref().unwrap_or("detached");
    let mut text = format!("{name}: {guest_path}, {branch} at {head}, imported at {}\n", short(&guest.base));
    let mut facts = Vec::new();
    if report.commits > 0 {
        facts.push(format!("{} ahead of the import", plural(report.commits, "commit")));
    }
    if guest.behind > 0 {
        facts.push(format!("{} behind it", plural(guest.behind, "commit")));
    }
    for (n, what) in
        [(guest.staged, "staged"), (guest.unstaged, "not staged"), (guest.untracked, "untracked")]
    {
        if n > 0 {
            facts.push(format!("{} {what}", plural(n, "file")));
        }
    }
    text.push_str("guest:  ");
    text.push_str(&if facts.is_empty() {
        "no commits since, and a clean tree".to_owned()
    } else {
        facts.join(", ")
    });
    if let Some(inner) = inner::standing(report) {
        text.push_str(&format!("\ninside: {inner}"));
    }
    text
}

fn here(standing: &Standing, path: &Path) -> String {
    if !standing.known {
        return format!("here:   {} does not have the commit that was imported", path.display());
    }
    let mut facts = Vec::new();
    if standing.ahead > 0 {
        facts.push(format!("{} since the import", plural(standing.ahead, "commit")));
    }
    if standing.behind > 0 {
        facts.push(format!("without {} of it", plural(standing.behind, "commit")));
    }
    match standing.files_differ {
        Some(true) => facts.push("tracked files are others than the imported ones".to_owned()),
        Some(false) => facts.push("tracked files as they were imported".to_owned()),
        None => {}
    }
    let moved = standing.ahead > 0 || standing.behind > 0 || standing.files_differ == Some(true);
    format!("here:   {} ({})", if moved { "has moved on" } else { "has not moved on" }, facts.join(", "))
}
