//! `bothy vm egress`: what a machine may reach, has reached and was denied, and what would allow it.

use super::{change, path, show};
use crate::{
    Context, Status, cli,
    printer::{facts, table},
};
use bothy_contract::{
    Error,
    net::{Denied, Egress, EgressReport, checked_name},
    vm::VmRecord,
};
use bothy_gateway::api::SetBody;
use jiff::Timestamp;
use serde_json::json;
use std::{collections::BTreeSet, net::IpAddr, time::Duration};

/// How many names a hint has room for.
const HINTED: usize = 8;

/// How long a command that failed may be held up for a hint.
const HINT: Duration = Duration::from_secs(2);

/// What can allow what was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allows {
    /// A change of the machine.
    Machine,
    /// An option of the next `bothy run`: the machine goes.
    NextRun,
}

pub(super) async fn main(
    context: &Context,
    vm: String,
    policy: Option<cli::Policy>,
) -> Result<Status, Error> {
    if let Some(policy) = policy {
        return change::set(context, &[vm], |vm| {
            Ok(SetBody { egress: Some(policy.of(&vm.egress)?), ..SetBody::default() })
        })
        .await;
    }
    let vm = show(context, &vm).await?;
    let report = report(context, &vm).await?;
    let command = command(&vm, &report.policy, &names(&report.denied), Allows::Machine);
    let EgressReport { policy, allowed, denied } = &report;
    let value = json!({
        "vm": vm.id, "name": vm.name, "policy": policy, "allowed": allowed, "denied": denied, "command": command,
    });
    context.printer.record(&value, |_| text(&report, command.as_deref()))?;
    Ok(Status::SUCCESS)
}

async fn report(context: &Context, vm: &VmRecord) -> Result<EgressReport, Error> {
    context.gateway.get(&path(&vm.id.to_string(), "/egress")).await
}

/// Says in one line what `vm` was denied since `began`, if anything. A failure here must not hide that of the command.
pub(crate) async fn denials(context: &Context, vm: &VmRecord, began: Timestamp, allows: Allows) {
    let Ok(Ok(report)) = tokio::time::timeout(HINT, report(context, vm)).await else { return };
    let denied: Vec<_> = report.denied.into_iter().filter(|denied| denied.last >= began).collect();
    if let Some(hint) = hint(vm, &report.policy, &denied, allows) {
        context.printer.note(crate::printer::visible(&hint));
    }
}

/// The line for what was denied while a command ran that failed.
fn hint(vm: &VmRecord, policy: &Egress, denied: &[Denied], allows: Allows) -> Option<String> {
    let all = names(denied);
    let shown: BTreeSet<_> = all.iter().take(HINTED).cloned().collect();
    let what: Vec<_> = if shown.is_empty() {
        denied.iter().take(HINTED).map(|d| d.name.clone()).collect()
    } else {
        shown.iter().cloned().collect()
    };
    if what.is_empty() {
        return None;
    }
    let more = if shown.is_empty() { denied.len() } else { all.len() }.saturating_sub(what.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let command = match command(vm, policy, &shown, allows) {
        Some(command) => format!("; `{command}` allows it"),
        None => String::new(),
    };
    Some(format!("{} was denied {}{more}{command}", vm.name, what.join(", ")))
}

/// What was denied by a name that can be allowed. What a guest asks for is its own choice: only what is a name gets into
/// a command that people will paste.
fn names(denied: &[Denied]) -> BTreeSet<String> {
    denied.iter().filter_map(|denied| checked_name(&denied.name).ok()).collect()
}

/// The command that allows `names`, where there are any. What is denied under [`Egress::Open`] nothing allows.
fn command(vm: &VmRecord, policy: &Egress, names: &BTreeSet<String>, allows: Allows) -> Option<String> {
    let mut names = names.clone();
    let nothing = names.is_empty();
    if let (Egress::Allow { names: before }, Allows::NextRun) = (policy, allows) {
        // Another machine begins without what this one was allowed.
        names.extend(before.iter().cloned());
    }
    let joined = |by: &str| names.iter().cloned().collect::<Vec<_>>().join(by);
    match (policy, allows, nothing) {
        (Egress::Open, ..) | (_, _, true) => None,
        (_, Allows::Machine, false) => Some(format!("bothy vm egress {} allow {}", vm.name, joined(" "))),
        (_, Allows::NextRun, false) => Some(format!("bothy run --allow {}", joined(","))),
    }
}

fn text(report: &EgressReport, command: Option<&str>) -> String {
    let mut parts = vec![facts([("policy", report.policy.to_string())])];
    if !report.allowed.is_empty() {
        parts.push(table(
            &["ALLOWED", "ADDRESSES"],
            &[],
            report.allowed.iter().map(|allowed| {
                let addresses: Vec<_> = allowed.addresses.iter().map(IpAddr::to_string).collect();
                vec![allowed.name.clone(), addresses.join(", ")]
            }),
        ));
    }
    if report.denied.is_empty() {
        parts.push("nothing was denied".to_owned());
    } else {
        parts.push(table(
            &["DENIED", "COUNT", "LAST"],
            &["COUNT"],
            report.denied.iter().map(|denied| {
                let last = denied.last.strftime("%Y-%m-%d %H:%M:%SZ").to_string();
                vec![denied.name.clone(), denied.count.to_string(), last]
            }),
        ));
    }
    match command {
        Some(command) => parts.push(format!("to allow them: `{command}`")),
        None if !report.denied.is_empty() && report.policy != Egress::Open => {
            parts.push(
                "an address alone cannot be allowed: the machine must ask for a name that is, or be `open`"
                    .to_owned(),
            );
        }
        None => {}
    }
    parts.join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, VmId, net::Allowed, vm::Shape};

    fn vm() -> VmRecord {
        let (name, shape) = ("web".parse().unwrap(), Shape::default());
        VmRecord::new(VmId::new(), name, 0, ImageName::default_image(), shape)
    }

    fn denied(name: &str, count: u64) -> Denied {
        Denied { name: name.to_owned(), count, last: "2026-01-02T03:04:05Z".parse().unwrap() }
    }

    #[test]
    fn a_report_names_what_was_denied_and_the_command() {
        let names_of =
            |names: &[&str]| Egress::Allow { names: names.iter().map(|&n| n.to_owned()).collect() };
        let report = EgressReport {
            policy: names_of(&["*.crates.io"]),
            allowed: vec![Allowed {
                name: "static.crates.io".to_owned(),
                addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            }],
            denied: vec![denied("evil.com", 12), denied("1.1.1.1", 1), denied("$(reboot)\u{1b}", 3)],
        };
        let command = command(&vm(), &report.policy, &names(&report.denied), Allows::Machine);
        insta::assert_snapshot!(text(&report, command.as_deref()), @r"
        policy  allow *.crates.io

        ALLOWED           ADDRESSES
        static.crates.io  192.0.2.1, 2001:db8::1

        DENIED           COUNT  LAST
        evil.com            12  2026-01-02 03:04:05Z
        1.1.1.1              1  2026-01-02 03:04:05Z
        $(reboot)\u{1b}      3  2026-01-02 03:04:05Z

        to allow them: `bothy vm egress web allow evil.com`
        ");
    }

    #[test]
    fn a_hint_is_one_line_with_the_command() {
        let (vm, denied) = (vm(), [denied("b.c", 1), denied("1.1.1.1", 9), denied("a.b", 2)]);
        let hint = |policy, denied, allows| hint(&vm, &policy, denied, allows).unwrap_or_default();
        insta::assert_snapshot!(hint(Egress::None, &denied, Allows::Machine),
            @"web was denied a.b, b.c; `bothy vm egress web allow a.b b.c` allows it");
        insta::assert_snapshot!(hint(Egress::None, &denied, Allows::NextRun),
            @"web was denied a.b, b.c; `bothy run --allow a.b,b.c` allows it");
        insta::assert_snapshot!(hint(Egress::None, &denied[1..2], Allows::Machine), @"web was denied 1.1.1.1");
        assert_eq!(hint(Egress::None, &[], Allows::Machine), "");
    }
}
