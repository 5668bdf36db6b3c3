//! `bothy-gateway`: the HTTP API of one host, on `<run>/gateway.sock`.

use bothy_bus::Client;
use bothy_config::{Config, DEFAULT_PATH, PATH_VARIABLE};
use bothy_contract::{Code, Error, Service};
use bothy_gateway::{api::HostUses, server::Gateway};
use clap::Parser;
use fs_err as fs;
use std::{io, os::unix::fs::PermissionsExt, path::Path, path::PathBuf, process::ExitCode, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
};

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
    let telemetry = bothy_telemetry::init("bothy-gateway");
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .map_err(|e| Error::internal("cannot start the runtime", &e))
        .and_then(|runtime| {
            let done = runtime.block_on(run(&args.config));
            runtime.shutdown_background();
            done
        });
    let code = match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!(code = %e.code, hint = e.hint.as_deref(), "{e}");
            ExitCode::FAILURE
        }
    };
    telemetry.shutdown();
    code
}

async fn run(config: &Path) -> Result<(), Error> {
    let config = Config::load(config)?;
    let internal = |what: &'static str| move |e: io::Error| Error::internal(what, &e);
    let mut term = signal(SignalKind::terminate()).map_err(internal("cannot watch for SIGTERM"))?;
    let mut int = signal(SignalKind::interrupt()).map_err(internal("cannot watch for SIGINT"))?;

    let bus = tokio::select! {
        bus = Client::connect(&config, Service::Gateway) => bus?,
        _ = term.recv() => return Ok(()),
        _ = int.recv() => return Ok(()),
    };
    bus.ensure_ops_stream().await?;

    let socket = config.gateway_socket();
    let listener = listen(&socket).await?;
    tracing::info!(socket = %socket.display(), "ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut served =
        tokio::spawn(Gateway::new(bus.clone(), HostUses::from(&config)).serve(listener, async move {
            // An error means that the sender went, which is a stop too.
            let _ = stopped.await;
        }));
    let ended = tokio::select! {
        ended = &mut served => Some(ended),
        _ = term.recv() => None,
        _ = int.recv() => None,
    };
    let result = match ended {
        Some(Ok(Ok(()))) => Err(Error::new(Code::Internal, "the gateway ended without being asked to")),
        Some(Ok(Err(e))) => Err(Error::internal("the gateway cannot listen any longer", &e)),
        Some(Err(e)) => Err(Error::internal("the gateway ended", &e)),
        None => {
            tracing::info!("stopping");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            let _ = stop.send(());
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
