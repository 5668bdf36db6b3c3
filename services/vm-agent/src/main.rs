//! `bothy-vm-agent`: VM records, the operations on VMs, and the way to their guests.
//!
//! Started, it first finds out what became of the VMs it knows ([`lifecycle::recover`]), then takes up the operations that
//! an earlier process left, gives each VM its machine, then answers on the bus. VMs live in their holders, so ending this process harms none.

mod channel;
mod lifecycle;
mod logs;
mod phase;
mod service;
mod stats;
mod store;

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service};
use bothy_db::Db;
use bothy_ops::Ops;
use clap::Parser;
use lifecycle::{Agent, kinds::VmKinds};
use std::{path::PathBuf, process::ExitCode, sync::Arc};
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
    bothy_daemon::main(Service::Vm, |stop| run(args, stop))
}

async fn run(args: Args, shutdown: CancellationToken) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let dir = config.service_dir(Service::Vm);
    lifecycle::files::private_dir(&dir)?;
    let db = Db::open(dir.join("vm.db"), store::MIGRATIONS)?;
    let client = Client::connect(&config, Service::Vm).await?;
    let agent = Agent::new(config, db.clone(), client.clone()).await?;
    lifecycle::recover(&agent).await?;
    let ops = Ops::new(db, Service::Vm, Arc::new(VmKinds::new(agent.clone())));
    ops.publish_to(Arc::new(client.clone()));
    ops.resume().await?;
    lifecycle::machine::start_all(&agent, &ops).await?;
    tokio::spawn(agent.clone().try_kvm());
    tokio::spawn(lifecycle::template::run(agent.clone(), ops.clone()));
    let tickets = channel::tickets(&agent);
    let serving = tokio::spawn(channel::serve(tickets.clone(), shutdown.clone()));
    let service =
        service::run(client.clone(), agent, ops.clone(), tickets, shutdown.clone(), bothy_daemon::ready);
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
