//! Logs and traces of every process.
//!
//! A process calls [`init`] first and keeps the [`Guard`] to its end. Logs go to stderr. Spans leave the process as
//! OTLP where the standard variable `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` names a
//! receiver; where neither does, no exporter, no thread and no span context exists at all.
//!
//! The rest carries one trace over process boundaries: [`inject`] gives the W3C headers of the current span,
//! [`set_parent`] takes them at the other side, [`past_span`] adds what happened elsewhere (in a guest, before its agent
//! could talk) with the times it happened at.
//!
//! # Names
//! A span's name is fixed words (`disk.clone`), so that traces can be grouped by it; what it works on is an attribute,
//! named as in [`field`]. Requests are spans of kind `client` and `server` (`otel.kind`).

mod context;
mod logs;
mod otlp;
mod status;

pub use context::{TRACEPARENT, TRACESTATE, TraceContext, current, inject, past_span, set_parent};
pub use status::{ErrorStatusGuard, record_error};

use std::time::Duration;
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt, util::SubscriberInitExt};

/// The names of the attributes that bothy's spans and log lines share. In the macros of `tracing` they are written
/// out: `info_span!("vm.launch", bothy.vm.id = %id)`.
pub mod field {
    /// The VM that is worked on.
    pub const VM_ID: &str = "bothy.vm.id";
    /// The operation that this belongs to.
    pub const OP_ID: &str = "bothy.op.id";
    /// The request on the bus.
    pub const REQUEST_ID: &str = "bothy.request.id";
    /// The host's token.
    pub const HOST: &str = "bothy.host";
}

/// How long [`Guard`] waits for the last spans to be sent.
const SHUTDOWN: Duration = Duration::from_secs(3);

/// Keeps telemetry running; sends what is left when it is dropped, for at most 3 seconds.
#[must_use = "telemetry ends when the guard is dropped"]
#[derive(Debug)]
pub struct Guard {
    exporter: Option<otlp::Exporter>,
}

impl Guard {
    /// Sends the spans that are left and stops. Blocks the calling thread for at most 3 seconds; what could not be
    /// sent by then is lost, since a receiver that is away must not keep a service from stopping.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        if let Some(exporter) = self.exporter.take() {
            exporter.shutdown(SHUTDOWN);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts logs and, where an endpoint is configured, traces for the process `service` (`bothy-vm-agent`).
///
/// - `BOTHY_LOG` filters the logs (`info` by default; the syntax of `tracing_subscriber::EnvFilter`).
/// - `BOTHY_LOG_FORMAT` is `human`, `compact` or `json`; by default `human` on a terminal, else `compact`.
/// - `OTEL_*`: as the OpenTelemetry specification says; `OTEL_EXPORTER_OTLP_PROTOCOL` is `http/protobuf` (default) or
///   `grpc`, both without TLS.
///
/// A setting that cannot be used is reported in the log and never keeps a process from starting. A second call in one
/// process (tests) changes nothing.
pub fn init(service: &'static str) -> Guard {
    init_on(service, None)
}

/// The same as [`init`], with the host's token as attribute `bothy.host` of every span.
pub fn init_on(service: &'static str, host: Option<&str>) -> Guard {
    let (exporter, failure) = match otlp::Exporter::from_env(service, host) {
        Ok(exporter) => (exporter, None),
        Err(failure) => (None, Some(failure)),
    };
    let (logs, bad_filter) = logs::layer();
    let traces = exporter.as_ref().map(|e| {
        tracing_opentelemetry::layer()
            .with_tracer(e.tracer())
            .with_location(false)
            .with_threads(false)
            .with_filter(otlp::spans_of_ours())
    });
    let layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> =
        std::iter::once(logs).chain(traces.map(Layer::boxed)).collect();
    if tracing_subscriber::registry().with(layers).try_init().is_err() {
        return Guard { exporter: None };
    }
    if let Some(exporter) = &exporter {
        exporter.make_global();
    }
    if let Some(bad) = bad_filter {
        tracing::warn!("BOTHY_LOG is not a valid filter, so `info` is used: {bad}");
    }
    if let Some(failure) = failure {
        tracing::warn!("traces are not exported: {failure}");
    }
    Guard { exporter }
}
