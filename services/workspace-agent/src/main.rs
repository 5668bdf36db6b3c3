//! `bothy-workspace-agent`: reads the configuration and answers on the bus until SIGTERM.

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service};
use bothy_workspace_agent::service;
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};
use tokio_util::sync::CancellationToken;

/// Repositories into bothy's VMs, changes out of them, identity.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The configuration of the host.
    #[arg(long, env = bothy_config::PATH_VARIABLE, default_value = bothy_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    bothy_daemon::main(Service::Workspace, |stop| run(args, stop))
}

async fn run(args: Args, stop: CancellationToken) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let client = Client::connect(&config, Service::Workspace).await?;
    let tickets = config.ticket_socket(Service::Workspace);
    let done = service::run(client.clone(), tickets, stop, bothy_daemon::ready).await;
    client.drain().await;
    done
}
