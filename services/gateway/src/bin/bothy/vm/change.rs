//! What is done to machines: each is an operation, watched to its end.

use super::{
    many::{self, Targets},
    path,
};
use crate::{
    Context, Status, cli, file_sync,
    printer::{Printer, duration},
    progress::{Outcome, Watcher},
    ssh, terminal,
};
use bothy_contract::{
    Error,
    op::Begun,
    vm::{Shape, VmRecord, VmState},
};
use bothy_gateway::api::{KillBody, RestartBody, ResumeBody, SetBody, StartBody, StopBody};
use http::Method;
use serde::Serialize;
use serde_json::{Value, json};

/// Those that `which` names, or all of the user's own in a state in which it makes sense.
async fn targets(
    context: &Context,
    which: &cli::Several,
    sensible: impl Fn(VmState) -> bool,
) -> Result<Targets, Error> {
    if !which.all {
        return Targets::named(context, &which.vms).await;
    }
    let targets = Targets::own(context, |vm| sensible(vm.state)).await?;
    if targets.vms.is_empty() {
        context.printer.note("there is no machine for which this makes sense");
    }
    Ok(targets)
}

/// Begins an operation on `vm`, waits for it, and says how the machine is then.
async fn run(
    context: &Context,
    watcher: &Watcher<'_>,
    vm: &VmRecord,
    request: (Method, &str, &impl Serialize),
    is: &str,
) -> Result<(), Error> {
    let (begun, outcome) = wait(context, watcher, vm, request).await?;
    let after = if context.printer.json { after(context, vm).await } else { Value::Null };
    let value = json!({ "op": begun.op, "vm": after, "took_us": outcome.took_us });
    let took = duration(outcome.took_us);
    watcher.screen().print(|printer| printer.record(&value, |_| format!("{} is {is} ({took})", vm.name)))
}

async fn wait(
    context: &Context,
    watcher: &Watcher<'_>,
    vm: &VmRecord,
    (method, rest, body): (Method, &str, &impl Serialize),
) -> Result<(Begun, Outcome), Error> {
    let path = path(&vm.id.to_string(), rest);
    let begun: Begun = watcher.begin(context.gateway.change(method, &path, body)).await?;
    let outcome = watcher.watch(begun.op, vm.name.as_str()).await?;
    Ok((begun, outcome))
}

/// The machine's record by now, where it can be had.
async fn after(context: &Context, vm: &VmRecord) -> Value {
    context.gateway.get(&path(&vm.id.to_string(), "")).await.unwrap_or_default()
}

pub(super) async fn start(context: &Context, which: &cli::Several, force: bool) -> Result<Status, Error> {
    let targets = targets(context, which, |s| matches!(s, VmState::Stopped | VmState::Error)).await?;
    let files = file_sync::read(context.printer)?;
    let body = StartBody { identity: ssh::identity(context.printer), force };
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/start", &body), "ready").await?;
        files.send(&context.gateway, context.printer, vm).await
    })
    .await
}

pub(super) async fn stop(context: &Context, which: &cli::Several, grace_ms: u64) -> Result<Status, Error> {
    let targets = targets(context, which, |s| matches!(s, VmState::Running | VmState::Paused)).await?;
    let body = StopBody { grace_ms };
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/stop", &body), "stopped").await
    })
    .await
}

pub(super) async fn pause(context: &Context, which: &cli::Several) -> Result<Status, Error> {
    let targets = targets(context, which, |s| s == VmState::Running).await?;
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/pause", &json!({})), "paused").await
    })
    .await
}

pub(super) async fn suspend(context: &Context, which: &cli::Several) -> Result<Status, Error> {
    let targets = targets(context, which, |s| matches!(s, VmState::Running | VmState::Paused)).await?;
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/suspend", &json!({})), "suspended").await
    })
    .await
}

pub(super) async fn resume(context: &Context, which: &cli::Several, force: bool) -> Result<Status, Error> {
    let targets = targets(context, which, |s| matches!(s, VmState::Paused | VmState::Suspended)).await?;
    let body = ResumeBody { force };
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/resume", &body), "running again").await
    })
    .await
}

pub(super) async fn restart(context: &Context, which: &cli::Several, grace_ms: u64) -> Result<Status, Error> {
    let targets = targets(context, which, |s| s == VmState::Running).await?;
    let files = file_sync::read(context.printer)?;
    let body = RestartBody { grace_ms, identity: ssh::identity(context.printer) };
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/restart", &body), "ready").await?;
        files.send(&context.gateway, context.printer, vm).await
    })
    .await
}

pub(super) async fn kill(context: &Context, which: &cli::Refs, signal: i32) -> Result<Status, Error> {
    let targets = Targets::named(context, &which.vms).await?;
    let body = KillBody { signal };
    many::change(context, targets, async |watcher, vm| {
        run(context, watcher, vm, (Method::POST, "/kill", &body), "killed").await
    })
    .await
}

/// Makes of each machine what `change` says of it as it is now.
pub(super) async fn set(
    context: &Context,
    vms: &[String],
    change: impl Fn(&VmRecord) -> Result<SetBody, Error>,
) -> Result<Status, Error> {
    let targets = Targets::named(context, vms).await?;
    many::change(context, targets, async |watcher, vm| {
        let change = &change(vm)?;
        // Before anything is begun, and with the sizes in the words in which they were given.
        change.check(vm)?;
        let (begun, outcome) = wait(context, watcher, vm, (Method::PATCH, "", change)).await?;
        let now: VmRecord = context.gateway.get(&path(&vm.id.to_string(), "")).await?;
        let later: Vec<_> = effects(change, &now).into_iter().filter(|e| e.later).map(|e| e.field).collect();
        let value = json!({ "op": begun.op, "vm": now, "at_next_start": later, "took_us": outcome.took_us });
        watcher.screen().print(|printer| printer.record(&value, |_| told(change, &now)))
    })
    .await
}

/// What became of one thing that was to be changed.
struct Effect {
    /// Its name in the contract.
    field: &'static str,
    /// What it is now, for people.
    text: String,
    /// Whether it waits for the next start.
    later: bool,
}

/// What `change` did to the machine that is now `vm`.
fn effects(change: &SetBody, vm: &VmRecord) -> Vec<Effect> {
    let mut effects = Vec::new();
    let mut shape = |asked: bool, field, what: &str, unit: &str, of: fn(&Shape) -> u64| {
        let has = of(&vm.shape);
        // Without a VMM nothing waits: the next start is the first that it can take effect at.
        let booted = vm.booted.as_ref().map(of).filter(|booted| *booted != has);
        if asked {
            let text = match booted {
                Some(booted) => {
                    format!("{what} {has}{unit} from the next start on (it runs with {booted}{unit})")
                }
                None => format!("{what} {has}{unit}"),
            };
            effects.push(Effect { field, text, later: booted.is_some() });
        }
    };
    shape(change.cpus.is_some(), "cpus", "cpus", "", |s| s.cpus.into());
    shape(change.memory_mib.is_some(), "memory_mib", "memory", " MiB", |s| s.memory_mib);
    shape(change.work_mib.is_some(), "work_mib", "work disk", " MiB", |s| s.work_mib);
    shape(change.system_mib.is_some(), "system_mib", "system disk", " MiB", |s| s.system_mib);
    if change.nat.is_some() {
        let text = format!("nat {}", if vm.nat { "on" } else { "off" });
        effects.push(Effect { field: "nat", text, later: false });
    }
    if change.egress.is_some() {
        effects.push(Effect { field: "egress", text: format!("egress {}", vm.egress), later: false });
    }
    if change.idle.is_some() {
        let text = vm.idle.as_ref().map_or_else(String::new, super::show::idle);
        effects.push(Effect { field: "idle", text, later: false });
    }
    if change.publish.is_some() {
        let ports = super::show::published(vm);
        let text =
            if ports.is_empty() { "no published ports".to_owned() } else { format!("publishes {ports}") };
        effects.push(Effect { field: "publish", text, later: false });
    }
    if change.groups.is_some() {
        let groups = super::show::groups(vm);
        let text = if groups.is_empty() { "in no group".to_owned() } else { format!("in group {groups}") };
        effects.push(Effect { field: "groups", text, later: false });
    }
    effects
}

/// What `change` did, as lines.
fn told(change: &SetBody, vm: &VmRecord) -> String {
    let lines: Vec<_> = effects(change, vm)
        .into_iter()
        .map(|effect| {
            let now = if !effect.later && vm.booted.is_some() { " now" } else { "" };
            format!("{}: {}{now}", vm.name, effect.text)
        })
        .collect();
    lines.join("\n")
}

pub(super) async fn delete(context: &Context, args: &cli::Delete) -> Result<Status, Error> {
    let targets = targets(context, &args.which, |s| s != VmState::Deleting).await?;
    let mut force = args.force;
    if args.which.all && !force && !targets.vms.is_empty() {
        let running = targets.vms.iter().filter(|vm| vm.state != VmState::Stopped).count();
        let running = if running > 0 { format!(", {running} of them not stopped") } else { String::new() };
        let question = format!("delete {} with their disks{running}?", count(targets.vms.len()));
        confirm(context.printer, &targets, &question, "--force")?;
        // That they run was part of the question.
        force = true;
    }
    many::change(context, targets, async |watcher, vm| delete_one(context, watcher, vm, force).await).await
}

/// So many machines.
pub(super) fn count(n: usize) -> String {
    format!("{n} machine{}", if n == 1 { "" } else { "s" })
}

/// Asks before `targets` are deleted.
///
/// # Errors
/// When the user says no, or cannot be asked: then `option` says yes.
pub(super) fn confirm(
    printer: Printer,
    targets: &Targets,
    question: &str,
    option: &str,
) -> Result<(), Error> {
    printer.always(super::show::listing(&targets.vms));
    if terminal::confirm(printer, question, option)? {
        return Ok(());
    }
    Err(Error::new(bothy_contract::Code::Cancelled, "nothing is deleted"))
}

/// Deletes `vm`, waits until it is gone, and says so.
pub(super) async fn delete_one(
    context: &Context,
    watcher: &Watcher<'_>,
    vm: &VmRecord,
    force: bool,
) -> Result<(), Error> {
    let (begun, outcome) = delete_and_wait(context, watcher, vm, force).await?;
    let value = json!({ "op": begun.op, "deleted": vm.id, "name": vm.name, "took_us": outcome.took_us });
    let took = duration(outcome.took_us);
    watcher.screen().print(|printer| printer.record(&value, |_| format!("{} is deleted ({took})", vm.name)))
}

/// Deletes `vm`, running or not, and prints no result.
pub(crate) async fn delete_quietly(context: &Context, vm: &VmRecord) -> Result<(), Error> {
    delete_and_wait(context, &Watcher::new(&context.gateway, context.printer, false)?, vm, true)
        .await
        .map(drop)
}

async fn delete_and_wait(
    context: &Context,
    watcher: &Watcher<'_>,
    vm: &VmRecord,
    force: bool,
) -> Result<(Begun, Outcome), Error> {
    let rest = format!("?force={force}");
    let done = wait(context, watcher, vm, (Method::DELETE, &rest, &json!({}))).await?;
    ssh::forget(vm.id);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, VmId};

    #[test]
    fn what_waits_for_the_next_start_is_said() {
        let shape = Shape { cpus: 4, memory_mib: 2048, work_mib: 20_480, system_mib: 10_240 };
        let name = "web".parse().unwrap();
        let mut vm = VmRecord::new(VmId::new(), name, 0, ImageName::default_image(), shape);
        vm.nat = true;
        let change = SetBody {
            cpus: Some(4),
            memory_mib: Some(2048),
            work_mib: Some(20_480),
            system_mib: None,
            nat: Some(true),
            egress: Some(bothy_contract::net::Egress::Open),
            publish: Some(Vec::new()),
            groups: Some(Default::default()),
            idle: None,
        };
        vm.egress = bothy_contract::net::Egress::Open;
        insta::assert_snapshot!(told(&change, &vm), @r"
        web: cpus 4
        web: memory 2048 MiB
        web: work disk 20480 MiB
        web: nat on
        web: egress open
        web: no published ports
        web: in no group
        ");
        vm.publish = vec!["8080:80".parse().unwrap()];
        vm.groups = ["web", "back"].map(|name| name.parse().unwrap()).into();
        vm.booted = Some(Shape { cpus: 2, memory_mib: 1024, ..vm.shape.clone() });
        insta::assert_snapshot!(told(&change, &vm), @r"
        web: cpus 4 from the next start on (it runs with 2)
        web: memory 2048 MiB from the next start on (it runs with 1024 MiB)
        web: work disk 20480 MiB now
        web: nat on now
        web: egress open now
        web: publishes 127.0.0.1:8080 -> 80 now
        web: in group back, web now
        ");
    }
}
