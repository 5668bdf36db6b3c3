//! What the main functions of all services have in common: telemetry from the first line to the last, a small runtime,
//! an end in order on SIGTERM or SIGINT, the word to systemd, and errors that say what to do.

use bothy_contract::{Error, Service};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Threads of a service's runtime. Services wait more than they work; databases and tools have threads of their own.
const WORKERS: usize = 2;

/// Runs `service` to its end. `run` gets the token that is cancelled when the process is asked to stop; what it returns is
/// the exit status, and an error is logged with its code and hint.
pub fn main<F, Fut>(service: Service, run: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), Error>>,
{
    let telemetry = bothy_telemetry::init(service.binary());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(async {
                let stop = stop_on_signals()?;
                run(stop).await
            });
            // What still blocks a thread (a peer that says nothing) does not hold up the end.
            runtime.shutdown_background();
            done
        }
        Err(e) => Err(Error::internal("cannot start the runtime", &e)),
    };
    if let Err(error) = &done {
        tracing::error!(code = %error.code, hint = error.hint.as_deref(), "{error}");
    }
    telemetry.shutdown();
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A token that SIGTERM and SIGINT cancel.
fn stop_on_signals() -> Result<CancellationToken, Error> {
    let stop = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(|e| Error::internal("cannot wait for signals", &e))?;
        let stop = stop.clone();
        tokio::spawn(async move {
            if signals.recv().await.is_some() {
                tell(sd_notify::NotifyState::Stopping);
                tracing::info!("stopping");
                stop.cancel();
            }
        });
    }
    Ok(stop)
}

/// Says that the service answers from now on, to systemd and in the log.
pub fn ready() {
    tell(sd_notify::NotifyState::Ready);
    tracing::info!("ready");
}

/// Without systemd there is nobody to tell, and no harm in that.
fn tell(state: sd_notify::NotifyState<'_>) {
    let _ = sd_notify::notify(&[state]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_ends_it_in_order_and_an_error_is_a_failure() {
        let stopped = main(Service::Net, |stop| async move {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
            stop.cancelled().await;
            Ok(())
        });
        assert_eq!(stopped, ExitCode::SUCCESS);
        let failed = main(Service::Net, |_| async { Err(Error::invalid("no such thing")) });
        assert_eq!(failed, ExitCode::FAILURE);
    }
}
