//! Submodules and other repositories inside the one in a machine: what an export takes of them, and what stays there.

use bothy_contract::workspace::{ExportFormat, ExportReport, InnerState};

/// What the user should know of an export of `format`, a line each.
pub(crate) fn notes(report: &ExportReport, format: ExportFormat) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |state, one: &str, many: &str, what: &str| {
        let names = names(report, state);
        if let Some((first, rest)) = names.split_first() {
            let subject = if rest.is_empty() {
                format!("{one} {first} is")
            } else {
                format!("{many} {} are", names.join(", "))
            };
            notes.push(format!("{subject} {what}"));
        }
    };
    match format {
        ExportFormat::Bundle => {
            let what = "not as imported, and a bundle has nothing of that; a patch has the files";
            note(InnerState::Changed, "the submodule", "the submodules", what);
            note(InnerState::Commits, "the submodule", "the submodules", what);
        }
        _ => {
            let what =
                "at another commit in the machine: a patch has the files as they are there, the commits stay";
            note(InnerState::Commits, "the submodule", "the submodules", &format!("now {what}"));
        }
    }
    let what = "gone from the machine, which a patch cannot say";
    note(InnerState::Gone, "warning: the submodule", "warning: the submodules", what);
    let what = "not imported, and what is in there stays in the machine";
    note(InnerState::Left, "warning: the repository", "warning: the repositories", what);
    let more = report.inner_count.saturating_sub(report.inner.len() as u64);
    if more > 0 {
        notes.push(format!("warning: {more} more repositories inside it are not as they were imported"));
    }
    notes
}

fn names(report: &ExportReport, state: InnerState) -> Vec<&str> {
    report.inner.iter().filter(|inner| inner.state == state).map(|inner| inner.path.as_str()).collect()
}

/// How they stand, as one line; none where all are as they were imported.
pub(crate) fn standing(report: &ExportReport) -> Option<String> {
    let mut facts: Vec<_> = report
        .inner
        .iter()
        .map(|inner| {
            let state = match inner.state {
                InnerState::Changed => "changed",
                InnerState::Commits => "at another commit",
                InnerState::Gone => "gone",
                InnerState::Left => "not imported",
            };
            format!("{} {state}", inner.path)
        })
        .collect();
    let more = report.inner_count.saturating_sub(report.inner.len() as u64);
    if more > 0 {
        facts.push(format!("and {more} more"));
    }
    (!facts.is_empty()).then(|| facts.join(", "))
}
