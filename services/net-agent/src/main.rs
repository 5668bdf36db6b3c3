//! `bothy-net-agent`: reads the configuration, brings the network up, and answers on the bus until SIGTERM.

use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, Service, methods::VmTouch, net::NameServer, vm::VmRef};
use bothy_net_agent::{dns::server::Dns, network::Network, resolved::HostResolver, service};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode, sync::Arc};
use tokio_util::sync::CancellationToken;

/// The network of bothy's VMs: bridge, TAPs, addresses, NAT, names.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The configuration of the host.
    #[arg(long, env = bothy_config::PATH_VARIABLE, default_value = bothy_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    bothy_daemon::main(Service::Net, |stop| run(args, stop))
}

async fn run(args: Args, stop: CancellationToken) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let network = Network::start(&config).await?;
    let dns = Arc::new(Dns::start(network.clone(), config.net.resolv_conf.clone()).await);
    let resolver = HostResolver::start(&config.net, network.clone(), Arc::clone(&dns));
    let client = Client::connect(&config, Service::Net).await?;
    tokio::spawn(tell_of_unreached(client.clone(), network.clone()));
    let state = resolver.state();
    let status = move || NameServer { resolved: Some(state.get()), ..dns.status() };
    let done = service::run(client, network, status, stop, bothy_daemon::ready).await;
    // While names are still answered.
    resolver.stop().await;
    done
}

/// Tells the vm-agent of guests that somebody waits for: one that rests goes on then.
async fn tell_of_unreached(bus: Client, network: Network) {
    let Some(mut unreached) = network.unreached() else { return };
    while let Some(guest) = unreached.recv().await {
        let Some(vm) = network.vm_at(guest) else { continue };
        if let Err(error) = bus.call::<VmTouch>(&VmRef { vm }).await {
            tracing::debug!(bothy.vm.id = %vm, %error, "a guest that somebody waits for stays as it is");
        }
    }
}
