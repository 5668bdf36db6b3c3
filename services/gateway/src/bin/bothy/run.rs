//! `bothy run`: a machine, the repository in it, the command, and the work back as a patch.
//!
//! What can be wrong with the input is found before anything is created. Work is never thrown away: a machine whose
//! work could not be brought back is kept, also with `--rm`, and it is said how to get at it.

use crate::{
    Context, Status, bootstrap, cli, exec, interrupt::Interrupts, printer::visible, ssh_agent, terminal, vm,
    workspace,
};
use bothy_contract::{Code, Error, net::Egress, vm::VmRecord};
use bothy_pack::Repository;
use std::path::{Path, PathBuf};

pub(crate) async fn main(context: &Context, args: cli::Run) -> Result<Status, Error> {
    workspace::check_guest_path(&args.guest_path)?;
    if args.parts.mode == cli::How::Copy {
        return Err(Error::invalid("`run` brings the work back, and a copy without git has no way back")
            .hint("use `--mode shallow`, or `bothy vm create` and `bothy workspace prepare --mode copy`"));
    }
    if args.ssh_agent {
        ssh_agent::check()?;
    }
    if args.parts.bootstrap {
        let egress = args.shape.network.egress()?.unwrap_or(Egress::None);
        bootstrap::check(&egress, "add `--nat`, or `--allow NAME` for each that they come from")?;
    }
    let repository = Repository::open(&args.path)?;
    let root = repository.root().to_owned();
    if let Some(patch) = &args.patch {
        workspace::directory(patch)?;
    } else {
        // That the default directory can be made and written to, before a VM is made.
        workspace::directory(&workspace::default_patch(&root, "vm")?)?;
    }
    let pins = bootstrap::pins(context, &repository);
    let (vm, _) = vm::create(context, &args.shape, args.rm).await?;
    let id = vm.id.to_string();
    // The create has caught Ctrl-C, so it would not end this by itself.
    let interrupts = Interrupts::new()?;
    let imported = tokio::select! {
        imported =
            workspace::import(context, &id, repository, &args.guest_path, &args.parts, false) => imported,
        () = interrupts.at_least(1) => Err(Error::new(
            Code::Cancelled,
            format!("interrupted while the repository went into {}", vm.name),
        )),
    };
    match imported {
        Ok(report) => context.printer.note(format!(
            "{} is in {} at {}",
            workspace::head(&report),
            vm.name,
            visible(&report.guest_path)
        )),
        Err(e) => {
            // Nothing of the user's was ever in it.
            if args.rm {
                vm::delete_after(context, &vm).await;
            }
            return Err(e);
        }
    }
    if let Err(e) = bootstrap::after_import(context, &vm, &args.guest_path, &pins, args.parts.bootstrap).await
    {
        if args.rm {
            vm::delete_after(context, &vm).await;
        }
        return Err(e.context("the command did not run"));
    }
    let shell = args.command.is_empty();
    let mut command = exec::Command {
        argv: args.command.clone(),
        workdir: args.guest_path.clone(),
        user: "root".to_owned(),
        tty: terminal::is_interactive(),
        stdin: true,
        env: Vec::new(),
    };
    if shell && !command.tty {
        context.printer.note("no command was given, so a shell reads stdin");
    }
    // Until the command has ended.
    let lent = match args.ssh_agent {
        true => match ssh_agent::lend(context.gateway.socket(), &vm, &command.user).await {
            Ok(lent) => Some(lent),
            Err(e) => {
                if args.rm {
                    vm::delete_after(context, &vm).await;
                }
                return Err(e.context("the command did not run"));
            }
        },
        false => None,
    };
    command.env.extend(lent.iter().map(|lent| (ssh_agent::VARIABLE.to_owned(), lent.socket.clone())));
    let began = jiff::Timestamp::now();
    let ended = exec::exec(&context.gateway, context.printer, &vm, &command).await;
    drop(lent);
    if matches!(ended, Ok(status) if status != 0) {
        let allows = if args.rm { vm::Allows::NextRun } else { vm::Allows::Machine };
        vm::denials(context, &vm, began, allows).await;
    }
    // Whatever became of the command, what it changed is wanted.
    let saved = save(context, &vm, &args, &root).await;
    match (ended, saved) {
        (Ok(status), Ok(())) => {
            if args.rm {
                vm::delete_after(context, &vm).await;
            } else {
                context.printer.note(format!(
                    "{} goes on running; `bothy vm delete --force {}` deletes it",
                    vm.name, vm.name
                ));
            }
            Ok(Status(status))
        }
        (ended, Err(e)) => {
            if let Err(ended) = ended {
                context.printer.error(&ended);
            }
            Err(e.context(format!("the work is still in {}", vm.name)).hint(format!(
                "the machine is kept; bring its work back with `bothy workspace export {} --guest-path {} -o work.patch`",
                vm.name, args.guest_path
            )))
        }
        // The patch is there, but the command may still be at work.
        (Err(e), Ok(())) => Err(e),
    }
}

async fn save(context: &Context, vm: &VmRecord, args: &cli::Run, root: &Path) -> Result<(), Error> {
    let wanted: PathBuf = match &args.patch {
        Some(patch) => patch.clone(),
        None => workspace::default_patch(root, vm.name.as_str())?,
    };
    let dir = workspace::directory(&wanted)?;
    let what = workspace::Wanted { guest_path: &args.guest_path, ..workspace::Wanted::default() };
    let export = workspace::fetch(context, &vm.id.to_string(), what, &dir).await?;
    export.note_inner(context, what.format);
    if export.report.bytes == 0 {
        context.printer.note(workspace::nothing_changed());
        return Ok(());
    }
    let summary = export.summary();
    let file = if args.patch.is_some() {
        export.keep_as(&wanted)?;
        wanted
    } else {
        export.keep_beside(&wanted)?
    };
    let shown = std::path::absolute(&file).unwrap_or(file);
    if context.printer.json {
        context.printer.always(serde_json::json!({ "patch": shown, "vm": vm.name }).to_string());
    } else {
        context.printer.always(format!("patch: {} ({summary})", shown.display()));
        context.printer.always(format!(
            "  apply it: git -C {} apply {}",
            workspace::quoted(root),
            workspace::quoted(&shown)
        ));
    }
    Ok(())
}
