//! Submodules and other repositories inside the one in a machine: what an export takes of them, and what stays there.

use bothy_contract::workspace::{ExportFormat, ExportReport, InnerState};

/// What the user should know of an export of `format`, a line each.
pub(crate) fn notes(report: &ExportReport, format: ExportFormat) -> Vec<String> {
    use InnerState::{Changed, Commits, Gone, Left};
    let by_itself =
        "`--guest-path` and `--repository` of one export it by itself, with `--format bundle` its commits";
    let kinds: [(&str, &[InnerState], Option<&str>); 3] = [
        match format {
            ExportFormat::Bundle => {
                ("submodules with work that this bundle has not", &[Changed, Commits], Some(by_itself))
            }
            _ => (
                "submodules at another commit there, of which the patch has the files",
                &[Commits],
                Some(by_itself),
            ),
        },
        ("warning: submodules that are gone there, which a patch cannot say", &[Gone], None),
        (
            "warning: repositories that were not imported, and stay there",
            &[Left],
            Some("copy what you need: `bothy vm exec MACHINE -- tar -c -C PATH . | tar -x`"),
        ),
    ];
    let mut notes = Vec::new();
    for (what, states, hint) in kinds {
        let of = report.inner.iter().filter(|inner| states.contains(&inner.state));
        let names: Vec<_> = of.map(|inner| inner.path.as_str()).collect();
        if names.is_empty() {
            continue;
        }
        notes.push(format!("{what}: {}", names.join(", ")));
        notes.extend(hint.map(|hint| format!("  hint: {hint}")));
    }
    if more(report) > 0 {
        notes.push(format!(
            "warning: {} more repositories inside it are not as they were imported",
            more(report)
        ));
    }
    notes
}

/// How they stand, as one line; none where all are as they were imported.
pub(crate) fn standing(report: &ExportReport) -> Option<String> {
    let state = |state| match state {
        InnerState::Changed => "changed",
        InnerState::Commits => "at another commit",
        InnerState::Gone => "gone",
        InnerState::Left => "not imported",
    };
    let mut facts: Vec<_> =
        report.inner.iter().map(|inner| format!("{} {}", inner.path, state(inner.state))).collect();
    if more(report) > 0 {
        facts.push(format!("and {} more", more(report)));
    }
    (!facts.is_empty()).then(|| facts.join(", "))
}

/// How many are not named.
fn more(report: &ExportReport) -> u64 {
    report.inner_count.saturating_sub(report.inner.len() as u64)
}
