//! `bothy-workspace-agent`: reads the configuration and answers on the bus until SIGTERM.

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service};
use bothy_workspace_agent::service;
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};
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
    let telemetry = bothy_telemetry::init(Service::Workspace.binary());
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
    let client = Client::connect(&config, Service::Workspace).await?;
    let ready = || {
        // Without systemd there is nobody to tell.
        drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
        tracing::info!("ready");
    };
    let done = service::run(client.clone(), config.ticket_socket(Service::Workspace), shutdown, ready).await;
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    client.drain().await;
    done
}
