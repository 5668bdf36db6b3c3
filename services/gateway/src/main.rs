//! `bothy-gateway`: the HTTP API of one host, on `<run>/gateway.sock`.

use bothy_bus::Client;
use bothy_config::{Config, DEFAULT_PATH, PATH_VARIABLE};
use bothy_contract::{Code, Error, Service};
use bothy_gateway::{api::HostUses, server::Gateway};
use clap::Parser;
use fs_err as fs;
use std::{io, os::unix::fs::PermissionsExt, path::Path, path::PathBuf, process::ExitCode, time::Duration};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// How long requests in flight may take once a stop is asked for. Watchers of long operations come back by themselves.
const DRAIN: Duration = Duration::from_secs(3);

/// The HTTP API of a bothy host
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The host's configuration
    #[arg(long, env = PATH_VARIABLE, default_value = DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    bothy_daemon::main(Service::Gateway, |stop| run(args, stop))
}

async fn run(args: Args, stop: CancellationToken) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let Some(bus) = stop.run_until_cancelled(Client::connect(&config, Service::Gateway)).await else {
        return Ok(());
    };
    let bus = bus?;
    bus.ensure_ops_stream().await?;

    let socket = config.gateway_socket();
    let listener = listen(&socket).await?;
    tracing::info!(socket = %socket.display(), "listening");
    bothy_daemon::ready();

    let gateway = Gateway::new(bus, HostUses::from(&config));
    let mut served = tokio::spawn(gateway.serve(listener, stop.clone().cancelled_owned()));
    let result = match stop.run_until_cancelled(&mut served).await {
        Some(Ok(Ok(()))) => Err(Error::new(Code::Internal, "the gateway ended without being asked to")),
        Some(Ok(Err(e))) => Err(Error::internal("the gateway cannot listen any longer", &e)),
        Some(Err(e)) => Err(Error::internal("the gateway ended", &e)),
        None => {
            if tokio::time::timeout(DRAIN, served).await.is_err() {
                tracing::info!("requests are still in flight; they end now");
            }
            Ok(())
        }
    };
    // Unlinked so that a client says "no gateway" and not "connection refused".
    if let Err(error) = fs::remove_file(&socket) {
        tracing::warn!(%error, "cannot remove the gateway's socket");
    }
    result
}

/// Listens on `path`. A socket there on which nobody answers is a dead gateway's and is replaced; a living one's is not.
async fn listen(path: &Path) -> Result<UnixListener, Error> {
    let refuse = |e: io::Error| Error::internal(format!("cannot listen on {}", path.display()), &e);
    match UnixStream::connect(path).await {
        Ok(_) => {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("another gateway answers on {}", path.display()),
            )
            .hint("stop it first: `bothy host down`"));
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(refuse)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(refuse(e)),
    }
    let listener = UnixListener::bind(path).map_err(refuse)?;
    // Everybody may connect: what they may then do follows from their uid.
    fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(refuse)?;
    Ok(listener)
}
