//! `bothy vm`: machines. [`many`] is how a command does something with several at once.

mod change;
mod egress;
mod logs;
mod many;
pub(crate) mod ports;
mod prune;
mod show;
mod stats;

pub(crate) use change::delete_quietly;
pub(crate) use egress::{Allows, denials};
pub(crate) use many::Failure;

use crate::{Context, Status, cli, exec, file_sync, printer::duration, progress, ssh};
use bothy_contract::{
    Error, VmId,
    net::Publish,
    net_group::check_groups,
    op::Begun,
    vm::{Shape, VmList, VmRecord, VmSpec},
};
use bothy_gateway::api::{self, CreateBody};
use http::Method;
use jiff::Timestamp;
use many::{Failures, Targets};
use progress::Watcher;
use serde_json::json;

pub(crate) async fn main(context: &Context, command: cli::Vm) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        cli::Vm::Create { shape } => {
            let (vm, outcome) = create(context, &shape, false).await?;
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
            printer.record(&list.vms, |vms| show::listing(vms))?;
            Ok(Status::SUCCESS)
        }
        cli::Vm::Show(which) => {
            let targets = Targets::named(context, &which.vms).await?;
            for (n, vm) in targets.vms.iter().enumerate() {
                let gap = if n == 0 { "" } else { "\n" };
                printer.record(vm, |vm| format!("{gap}{}", show::details(vm)))?;
            }
            Failures::of(&targets, |failure| printer.failure(failure)).end()
        }
        cli::Vm::Start { which, force } => change::start(context, &which, force).await,
        cli::Vm::Stop { which, grace } => change::stop(context, &which, grace.ms()).await,
        cli::Vm::Pause(which) => change::pause(context, &which).await,
        cli::Vm::Suspend(which) => change::suspend(context, &which).await,
        cli::Vm::Resume { which, force } => change::resume(context, &which, force).await,
        cli::Vm::Restart { which, grace } => change::restart(context, &which, grace.ms()).await,
        cli::Vm::Kill { which, signal } => change::kill(context, &which, signal).await,
        cli::Vm::Set { which, change } => change::set(context, &which.vms, |vm| change.of(vm)).await,
        cli::Vm::Egress { vm, policy } => egress::main(context, vm, policy).await,
        cli::Vm::Delete(args) => change::delete(context, &args).await,
        cli::Vm::Prune(args) => prune::main(context, &args).await,
        cli::Vm::Stats { vms, watch } => stats::main(context, &vms, watch).await,
        cli::Vm::Ports(which) => ports::main(context, &which.vms).await,
        cli::Vm::Exec(args) => {
            let vm = show(context, &args.vm).await?;
            let command = exec::Command::from(args);
            let began = Timestamp::now();
            let status = exec::exec(&context.gateway, printer, &vm, &command).await?;
            if status != 0 {
                denials(context, &vm, began, Allows::Machine).await;
            }
            Ok(Status(status))
        }
        cli::Vm::Shell { vm, user, workdir } => {
            let vm = show(context, &vm).await?;
            let command = exec::Command::shell(user, workdir);
            exec::exec(&context.gateway, printer, &vm, &command).await.map(Status)
        }
        cli::Vm::Ssh { vm, user, ssh_agent, mut args } => {
            if ssh_agent {
                crate::ssh_agent::check()?;
                args.insert(0, "-A".to_owned());
            }
            let vm = show(context, &vm).await?;
            let mut command = ssh::command(context.gateway.socket(), vm.id, vm.name.as_str(), &user, &args)?;
            // Becomes ssh: its exit status is ours, and the terminal is its own.
            let error = std::os::unix::process::CommandExt::exec(&mut command);
            Err(Error::new(bothy_contract::Code::FailedPrecondition, format!("cannot run `ssh`: {error}"))
                .hint("install it: `apt-get install openssh-client`"))
        }
        cli::Vm::Logs { vm, source, follow, tail } => {
            logs::main(context, &vm, source.into(), follow, tail).await
        }
        cli::Vm::Proxy { vm, port } => {
            exec::proxy(&context.gateway, &vm, port).await?;
            Ok(Status::SUCCESS)
        }
    }
}

/// Deletes a machine that is of no use any longer. A failure is told; what went before stays the result.
pub(crate) async fn delete_after(context: &Context, vm: &VmRecord) {
    let quiet = Context {
        printer: crate::printer::Printer { json: false, quiet: true },
        gateway: context.gateway.clone(),
    };
    match delete_quietly(&quiet, vm).await {
        Ok(()) => context.printer.note(format!("{} is deleted", vm.name)),
        Err(e) => context.printer.error(
            &e.context(format!("{} was not deleted", vm.name))
                .hint(format!("try `bothy vm delete --force {}`", vm.name)),
        ),
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

/// Creates a VM and waits until it is ready.
pub(crate) async fn create(
    context: &Context,
    args: &cli::Shape,
    rm: bool,
) -> Result<(VmRecord, progress::Outcome), Error> {
    let default = Shape::default();
    let shape = Shape {
        cpus: args.cpus.unwrap_or(default.cpus),
        memory_mib: args.memory.unwrap_or(default.memory_mib),
        work_mib: args.disk.unwrap_or(default.work_mib),
        system_mib: args.system_disk.unwrap_or(default.system_mib),
    };
    shape.check()?;
    Publish::check(&args.network.publish)?;
    let groups = args.network.groups.iter().cloned().collect();
    check_groups(&groups)?;
    let spec = VmSpec {
        name: args.name.clone(),
        image: args.image.clone(),
        shape,
        nat: args.network.nat,
        egress: args.network.egress()?,
        publish: args.network.publish.clone(),
        groups,
        identity: ssh::identity(context.printer),
        idle: args.idle.policy()?,
    };
    // Before anything is begun: what cannot be read is not found out by a machine that lacks it.
    let files = file_sync::read(context.printer)?;
    let body = CreateBody { spec, force: args.force, cold: args.cold };
    let watcher = Watcher::new(&context.gateway, context.printer, false)?;
    let begun: Begun = watcher.begin(context.gateway.change(Method::POST, "/v1/vms", &body)).await?;
    let id: VmId = begun.vm.ok_or_else(|| {
        Error::new(bothy_contract::Code::Internal, "the gateway did not say which VM it creates")
    })?;
    let outcome = watcher.watch(begun.op, "").await.map_err(|e| {
        if e.code == bothy_contract::Code::Cancelled { e } else { e.context("the machine was not created") }
    })?;
    let vm = show(context, &id.to_string()).await?;
    let printer = context.printer;
    if let Err(e) = files.send(&context.gateway, printer, &vm).await {
        if rm {
            delete_after(context, &vm).await;
        }
        return Err(e);
    }
    printer.note(format!("{} is ready ({})", vm.name, duration(outcome.took_us)));
    if args.timings {
        printer.note(outcome.table());
    }
    Ok((vm, outcome))
}
