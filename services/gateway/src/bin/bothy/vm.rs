//! `bothy vm`: machines.

use crate::{
    Context, Status, cli, exec,
    plain::Plain,
    printer::{duration, facts, table, word},
    progress, ssh,
};
use bothy_contract::{
    Error, VmId,
    op::Begun,
    vm::{LogSource, Shape, VmList, VmRecord, VmSpec},
};
use bothy_gateway::api::{self, StartBody, StopBody};
use http::Method;
use http_body_util::BodyExt;
use serde_json::json;
use std::io::IsTerminal;
use tokio::io::AsyncWriteExt;

pub(crate) async fn main(context: &Context, command: cli::Vm) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        cli::Vm::Create { shape } => {
            let (vm, outcome) = create(context, &shape).await?;
            let timings: Vec<_> = outcome
                .stages
                .iter()
                .map(|s| json!({ "stage": s.name, "started_us": s.started_us, "took_us": s.took_us }))
                .collect();
            let all = json!({ "vm": vm, "took_us": outcome.took_us, "timings": timings });
            printer.record(&all, |_| vm.name.to_string())?;
            Ok(Status::SUCCESS)
        }
        cli::Vm::List => {
            let list: VmList = context.gateway.get("/v1/vms").await?;
            printer.record(&list.vms, |vms| listing(vms))?;
            Ok(Status::SUCCESS)
        }
        cli::Vm::Show { vms } => {
            let first = std::cell::Cell::new(true);
            each(context, &vms, async |vm| {
                let record = show(context, vm).await?;
                let gap = if first.replace(false) { "" } else { "\n" };
                printer.record(&record, |record| format!("{gap}{}", details(record)))
            })
            .await
        }
        cli::Vm::Start { vms } => {
            let body = StartBody { identity: ssh::identity(printer) };
            each(context, &vms, async |vm| {
                let begun = begin(context, Method::POST, vm, "/start", &body).await?;
                finish(context, begun, "ready").await
            })
            .await
        }
        cli::Vm::Stop { vms, grace } => {
            let body = StopBody { grace_ms: u64::from(grace) * 1000 };
            each(context, &vms, async |vm| {
                let begun = begin(context, Method::POST, vm, "/stop", &body).await?;
                finish(context, begun, "stopped").await
            })
            .await
        }
        cli::Vm::Delete { vms, force } => {
            each(context, &vms, async |vm| delete(context, vm, force).await).await
        }
        cli::Vm::Exec(args) => {
            let vm = show(context, &args.vm).await?;
            let command = exec::Command::from(args);
            exec::exec(&context.gateway, printer, &vm.id.to_string(), &command).await.map(Status)
        }
        cli::Vm::Ssh { vm, user, args } => {
            let vm = show(context, &vm).await?;
            let mut command = ssh::command(context.gateway.socket(), vm.id, vm.name.as_str(), &user, &args)?;
            // Becomes ssh: its exit status is ours, and the terminal is its own.
            let error = std::os::unix::process::CommandExt::exec(&mut command);
            Err(Error::new(bothy_contract::Code::FailedPrecondition, format!("cannot run `ssh`: {error}"))
                .hint("install it: `apt-get install openssh-client`"))
        }
        cli::Vm::Logs { vm, source, follow } => logs(context, &vm, source.into(), follow).await,
        cli::Vm::Proxy { vm, port } => {
            exec::proxy(&context.gateway, &vm, port).await?;
            Ok(Status::SUCCESS)
        }
    }
}

fn path(vm: &str, rest: &str) -> String {
    format!("/v1/vms/{}{rest}", api::segment(vm))
}

/// The one VM that `vm` names.
pub(crate) async fn show(context: &Context, vm: &str) -> Result<VmRecord, Error> {
    if vm.is_empty() {
        return Err(Error::invalid("the name of a VM is empty").hint("`bothy vm list` shows the VMs"));
    }
    context.gateway.get(&path(vm, "")).await
}

async fn begin(
    context: &Context,
    method: Method,
    vm: &str,
    rest: &str,
    body: &impl serde::Serialize,
) -> Result<Begun, Error> {
    let vm = show(context, vm).await?;
    context.gateway.change(method, &path(&vm.id.to_string(), rest), body).await
}

/// Does `what` for each of `vms`. A failure is told and does not keep the others from being done.
async fn each(
    context: &Context,
    vms: &[String],
    what: impl AsyncFn(&str) -> Result<(), Error>,
) -> Result<Status, Error> {
    let mut last = None;
    for vm in vms {
        if let Err(e) = what(vm).await {
            // One of several is named where the error itself does not.
            let named = vms.len() == 1 || vm.is_empty() || e.message.contains(vm.as_str());
            if let Some(earlier) = last.replace(if named { e } else { e.context(vm) }) {
                context.printer.error(&earlier);
            }
        }
    }
    last.map_or(Ok(Status::SUCCESS), Err)
}

/// Waits for an operation on a VM and says how the VM is then.
async fn finish(context: &Context, begun: Begun, done: &str) -> Result<(), Error> {
    let printer = context.printer;
    let outcome = progress::watch(&context.gateway, printer, begun.op).await?;
    let vm: Option<VmRecord> = match begun.vm {
        Some(id) => context.gateway.get(&path(&id.to_string(), "")).await.ok(),
        None => None,
    };
    let name = vm.as_ref().map_or_else(|| "the machine".to_owned(), |vm| vm.name.to_string());
    let value = json!({ "op": begun.op, "vm": vm, "took_us": outcome.took_us });
    printer.record(&value, |_| format!("{name} is {done} ({})", duration(outcome.took_us)))
}

/// Deletes `vm`, waits until it is gone, and says so.
async fn delete(context: &Context, vm: &str, force: bool) -> Result<(), Error> {
    let vm = show(context, vm).await?;
    let (begun, outcome) = delete_and_wait(context, &vm, force).await?;
    let value = json!({ "op": begun.op, "deleted": vm.id, "name": vm.name, "took_us": outcome.took_us });
    context.printer.record(&value, |_| format!("{} is deleted ({})", vm.name, duration(outcome.took_us)))
}

/// Deletes `vm`, running or not, and prints no result.
pub(crate) async fn delete_quietly(context: &Context, vm: &VmRecord) -> Result<(), Error> {
    delete_and_wait(context, vm, true).await.map(drop)
}

async fn delete_and_wait(
    context: &Context,
    vm: &VmRecord,
    force: bool,
) -> Result<(Begun, progress::Outcome), Error> {
    let rest = format!("?force={force}");
    let begun: Begun =
        context.gateway.change(Method::DELETE, &path(&vm.id.to_string(), &rest), &json!({})).await?;
    let outcome = progress::watch(&context.gateway, context.printer, begun.op).await?;
    ssh::forget(vm.id);
    Ok((begun, outcome))
}

/// Creates a VM and waits until it is ready.
pub(crate) async fn create(
    context: &Context,
    args: &cli::Shape,
) -> Result<(VmRecord, progress::Outcome), Error> {
    let default = Shape::default();
    let shape = Shape {
        cpus: args.cpus.unwrap_or(default.cpus),
        memory_mib: args.memory.unwrap_or(default.memory_mib),
        work_mib: args.disk.unwrap_or(default.work_mib),
        ..default
    };
    shape.check()?;
    let spec = VmSpec {
        name: args.name.clone(),
        image: args.image.clone(),
        shape,
        nat: args.nat,
        identity: ssh::identity(context.printer),
    };
    let begun: Begun = context.gateway.change(Method::POST, "/v1/vms", &spec).await?;
    let outcome = progress::watch(&context.gateway, context.printer, begun.op).await.map_err(|e| {
        if e.code == bothy_contract::Code::Cancelled { e } else { e.context("the machine was not created") }
    })?;
    let id: VmId = begun.vm.ok_or_else(|| {
        Error::new(bothy_contract::Code::Internal, "the gateway did not say which VM it created")
    })?;
    let vm = show(context, &id.to_string()).await?;
    let printer = context.printer;
    printer.note(format!("{} is ready ({})", vm.name, duration(outcome.took_us)));
    if args.timings {
        printer.note(outcome.table());
    }
    Ok((vm, outcome))
}

async fn logs(context: &Context, vm: &str, source: LogSource, follow: bool) -> Result<Status, Error> {
    let vm = show(context, vm).await?;
    let rest = format!("/logs?source={}&follow={follow}", word(&source));
    let mut body = context.gateway.stream(&path(&vm.id.to_string(), &rest)).await?;
    let mut out = tokio::io::stdout();
    // A file or a pipe gets it as it is.
    let mut plain = std::io::stdout().is_terminal().then(Plain::default);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::internal("the log broke off", &e))?;
        let Some(data) = frame.data_ref() else { continue };
        let filtered = plain.as_mut().map(|plain| plain.filter(data));
        let data = filtered.as_deref().unwrap_or(data);
        let done = async {
            out.write_all(data).await?;
            out.flush().await
        };
        match done.await {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
            done => done.map_err(|e| Error::internal("cannot write the log", &e))?,
        }
    }
    Ok(Status::SUCCESS)
}

fn listing(vms: &[VmRecord]) -> String {
    if vms.is_empty() {
        return "no machines; `bothy vm create` makes one".to_owned();
    }
    table(
        &["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "ADDRESS", "CREATED", "ID"],
        &["CPUS", "MEMORY"],
        vms.iter().map(|vm| {
            vec![
                vm.name.to_string(),
                word(&vm.state),
                vm.image.to_string(),
                vm.shape.cpus.to_string(),
                format!("{} MiB", vm.shape.memory_mib),
                vm.lease.as_ref().map_or_else(|| "-".to_owned(), |l| l.address.to_string()),
                vm.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                vm.id.to_string(),
            ]
        }),
    )
}

fn details(vm: &VmRecord) -> String {
    let lease = vm.lease.as_ref();
    let exit = vm.last_exit.as_ref().map(|exit| {
        let how = match (exit.status, exit.signal) {
            (_, Some(signal)) => format!("signal {signal}"),
            (Some(status), None) => format!("status {status}"),
            (None, None) => "unknown".to_owned(),
        };
        format!("{how} at {}", exit.at.strftime("%Y-%m-%d %H:%M:%SZ"))
    });
    facts([
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("state", word(&vm.state)),
        ("reason", vm.reason.clone().unwrap_or_default()),
        ("owner", vm.owner.to_string()),
        ("image", vm.image.to_string()),
        ("cpus", vm.shape.cpus.to_string()),
        ("memory", format!("{} MiB", vm.shape.memory_mib)),
        ("work disk", format!("{} MiB", vm.shape.work_mib)),
        ("system disk", format!("{} MiB", vm.shape.system_mib)),
        ("address", lease.map(|l| format!("{}/{}", l.address, l.prefix)).unwrap_or_default()),
        ("mac", lease.map(|l| l.mac.clone()).unwrap_or_default()),
        ("tap", lease.map(|l| l.tap.clone()).unwrap_or_default()),
        ("nat", if vm.nat { "on" } else { "off" }.to_owned()),
        ("vmm", vm.vmm.clone().unwrap_or_default()),
        ("vmm pid", vm.vmm_pid.map(|pid| pid.to_string()).unwrap_or_default()),
        ("boot id", vm.boot_id.clone().unwrap_or_default()),
        ("last exit", exit.unwrap_or_default()),
        ("created", vm.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("started", vm.started.map(|t| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string()).unwrap_or_default()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_says_what_to_do() {
        assert!(listing(&[]).contains("bothy vm create"));
    }
}
