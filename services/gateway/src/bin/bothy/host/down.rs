//! `host down`: the machines, the network, then the process of `host up`, which stops the services.

use super::owner;
use crate::{Context, Status, cli::HostDown, http::Gateway, progress::Watcher};
use bothy_config::Config;
use bothy_contract::{
    Code, Error,
    net::Done,
    op::Begun,
    vm::{VmList, VmRecord, VmState},
};
use bothy_gateway::api::StopBody;
use http::Method;
use serde_json::json;
use std::{path::PathBuf, time::Duration};

/// How long `host up` may take to stop six children, each within its own time.
const PATIENCE: Duration = Duration::from_secs(150);

pub(crate) async fn main(context: &Context, args: HostDown) -> Result<Status, Error> {
    let printer = context.printer;
    let state = state_dir(args.state)?;
    let owner = owner::find(&state)?.ok_or_else(|| {
        Error::not_found(format!("no `bothy host up` runs on {}", state.display()))
            .hint("name its state directory with `--state`; units of systemd are stopped with `systemctl`")
    })?;
    let handle = owner.handle()?;
    let config = Config::load(&state.join("bothy.toml"))?;
    let gateway = Gateway::new(config.gateway_socket());
    if args.keep_vms {
        printer.note("machines are left alone, and so is their network");
    } else {
        let vms = running(&gateway).await?;
        if !vms.is_empty() && !args.stop_vms {
            let names: Vec<_> = vms.iter().map(|vm| vm.name.as_str()).collect();
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("machines are running: {}", names.join(", ")),
            )
            .hint("`--stop-vms` stops them, `--keep-vms` lets them run on without the services"));
        }
        for vm in &vms {
            printer.note(format!("stopping {}", vm.name));
        }
        // Side by side: each waits for its guest to power off.
        let quiet = crate::printer::Printer { quiet: true, ..printer };
        let watcher = Watcher::new(&gateway, quiet, true)?;
        let stops = vms.iter().map(async |vm: &VmRecord| {
            let path = format!("/v1/vms/{}/stop", vm.id);
            let stop = StopBody::default();
            let begun: Begun = watcher.begin(gateway.change(Method::POST, &path, &stop)).await?;
            watcher
                .watch(begun.op, vm.name.as_str())
                .await
                .map_err(|e| e.context(format!("{} was not stopped", vm.name)))
        });
        for stopped in futures::future::join_all(stops).await {
            stopped?;
        }
        let _: Done = gateway
            .change(Method::POST, "/v1/host/teardown", &json!({}))
            .await
            .map_err(|e| e.context("the network was not taken down, and the services go on running"))?;
    }
    tokio::task::spawn_blocking(move || owner::stop(&handle, PATIENCE))
        .await
        .map_err(|e| Error::internal("waiting for `bothy host up` broke off", &e))??;
    printer.record(&json!({ "stopped": owner.pid }), |_| "the services are stopped".to_owned())?;
    Ok(Status::SUCCESS)
}

fn state_dir(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(dir) = given {
        return Ok(dir);
    }
    match std::env::var_os(bothy_config::PATH_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => Ok(Config::load(path.as_ref())?.state_dir),
        None => Ok("/var/lib/bothy".into()),
    }
}

/// The machines that have a VMM, or will have one in a moment.
async fn running(gateway: &Gateway) -> Result<Vec<VmRecord>, Error> {
    let list: VmList = gateway.get("/v1/vms").await.map_err(|e| {
        e.context("cannot tell whether machines are running")
            .hint("`--keep-vms` stops the services without asking; machines and network stay as they are")
    })?;
    let alive = |vm: &VmRecord| {
        vm.vmm_pid.is_some()
            || matches!(
                vm.state,
                VmState::Running
                    | VmState::Paused
                    | VmState::Creating
                    | VmState::Starting
                    | VmState::Stopping
            )
    };
    Ok(list.vms.into_iter().filter(alive).collect())
}
