//! `bothy-net-agent`: reads the configuration, brings the network up, and answers on the bus until SIGTERM.

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service};
use bothy_net_agent::{network::Network, service};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The network of bothy's VMs: bridge, TAPs, addresses, NAT.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The configuration of the host.
    #[arg(long, env = bothy_config::PATH_VARIABLE, default_value = bothy_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let telemetry = bothy_telemetry::init(Service::Net.binary());
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
    let mut signals = Vec::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        signals.push(signal(kind).map_err(|e| Error::internal("cannot wait for signals", &e))?);
    }
    for mut signal in signals {
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            signal.recv().await;
            shutdown.cancel();
        });
    }
    let network = Network::start(&config).await?;
    let client = Client::connect(&config, Service::Net).await?;
    let ready = || {
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!("ready");
    };
    service::run(client, network, shutdown, ready).await
}
