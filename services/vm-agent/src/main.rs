//! `bothy-vm-agent`: VM records, the operations on VMs, and the way to their guests.
//!
//! Started, it first finds out what became of the VMs it knows ([`lifecycle::recover`]), then takes up the operations that
//! an earlier process left, then answers on the bus. VMs live in their holders, so ending this process harms none.

mod channel;
mod lifecycle;
mod logs;
mod service;
mod store;

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service};
use bothy_db::Db;
use bothy_ops::Ops;
use clap::Parser;
use lifecycle::{Agent, kinds::VmKinds};
use std::{path::PathBuf, process::ExitCode, sync::Arc};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// VM lifecycle: records, operations, channels.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The configuration of the host.
    #[arg(long, env = bothy_config::PATH_VARIABLE, default_value = bothy_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let telemetry = bothy_telemetry::init(Service::Vm.binary());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(e) => Err(Error::internal("cannot start the runtime", &e)),
    };
    if let Err(error) = &done {
        tracing::error!(code = %error.code, hint = error.hint.as_deref(), "{error}");
    }
    telemetry.shutdown();
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run(args: Args) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let shutdown = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signal = signal(kind).map_err(|e| Error::internal("cannot wait for signals", &e))?;
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            signal.recv().await;
            shutdown.cancel();
        });
    }
    let dir = config.service_dir(Service::Vm);
    lifecycle::files::private_dir(&dir)?;
    let db = Db::open(dir.join("vm.db"), store::MIGRATIONS)?;
    let client = Client::connect(&config, Service::Vm).await?;
    let agent = Agent::new(config, db.clone(), client.clone()).await?;
    lifecycle::recover(&agent).await?;
    let ops = Ops::new(db, Service::Vm, Arc::new(VmKinds::new(agent.clone())));
    ops.publish_to(Arc::new(client.clone()));
    ops.resume().await?;
    let tickets = channel::tickets(&agent);
    let serving = tokio::spawn(channel::serve(tickets.clone(), shutdown.clone()));
    let ready = || {
        // Without systemd there is nobody to tell.
        drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
        tracing::info!("ready");
    };
    let service = service::run(client.clone(), agent, ops.clone(), tickets, shutdown.clone(), ready);
    // Without either of the two the agent is of no use, so the end of one is that of the other.
    let service = async {
        let done = service.await;
        shutdown.cancel();
        done
    };
    let streams = async {
        let done = serving.await.unwrap_or_else(|e| Err(Error::internal("the ticket server ended", &e)));
        shutdown.cancel();
        done
    };
    let (served, streamed) = tokio::join!(service, streams);
    // Operations stay in the journal as they are; the next process goes on with them.
    ops.shutdown().await;
    client.drain().await;
    served.and(streamed)
}
