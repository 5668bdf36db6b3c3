//! The exporter of spans: OTLP over HTTP or gRPC, in batches.
//!
//! The SDK's batch processor exports from a thread of its own, outside any runtime, while both transports need one. So
//! the exporter has a small runtime to itself: it then works in programs without one, and a shut-down never waits for a
//! runtime that is itself waiting for the shut-down.

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, hyper::HyperClient};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};
use std::{pin::Pin, sync::mpsc, time::Duration};
use tokio::runtime::{Builder, Handle, Runtime};
use tracing_subscriber::filter::{LevelFilter, Targets};

/// How long one export over HTTP may take.
const EXPORT: Duration = Duration::from_secs(10);

/// The name under which all spans of bothy are made.
pub(crate) const SCOPE: &str = "bothy";

/// What is exported: spans of level `INFO` and above, but none of the crates that the exporter itself or the bus runs
/// on, or each export would be traced and exported in turn.
pub(crate) fn spans_of_ours() -> Targets {
    ["h2", "tonic", "hyper", "hyper_util", "tower", "async_nats", "opentelemetry", "opentelemetry_sdk"]
        .iter()
        .chain(&["opentelemetry_otlp", "opentelemetry_http", "rustls", "tokio_util", "yamux"])
        .fold(Targets::new().with_default(LevelFilter::INFO), |targets, noisy| {
            targets.with_target(*noisy, LevelFilter::OFF)
        })
}

/// The provider of spans with the runtime it exports on.
#[derive(Debug)]
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    runtime: Runtime,
}

impl Exporter {
    /// The exporter that the environment asks for, or none.
    pub(crate) fn from_env(service: &'static str, host: Option<&str>) -> Result<Option<Self>, String> {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        if set("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"))
            || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
                .or_else(|| set("OTEL_EXPORTER_OTLP_ENDPOINT"))
                .is_none()
        {
            return Ok(None);
        }
        let protocol =
            set("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL").or_else(|| set("OTEL_EXPORTER_OTLP_PROTOCOL"));
        Self::new(service, host, protocol.as_deref()).map(Some)
    }

    fn new(service: &'static str, host: Option<&str>, protocol: Option<&str>) -> Result<Self, String> {
        // Two workers: one that blocks must not hold up the other's connection.
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("otlp")
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start the exporter's threads: {e}"))?;
        let inside = runtime.enter();
        let exporter = match protocol {
            Some("grpc") => SpanExporter::builder().with_tonic().build(),
            None | Some("http/protobuf") => {
                let client = HyperClient::with_default_connector(EXPORT, None);
                SpanExporter::builder()
                    .with_http()
                    .with_http_client(OnRuntime { client, runtime: runtime.handle().clone() })
                    .build()
            }
            Some(other) => {
                return Err(format!(
                    "OTEL_EXPORTER_OTLP_PROTOCOL is {other:?}; use `http/protobuf` or `grpc`"
                ));
            }
        }
        .map_err(|e| e.to_string())?;
        drop(inside);
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attributes(host.map(|h| KeyValue::new(crate::field::HOST, h.to_owned())))
            .build();
        // The processor logs how many spans it had to drop (target `opentelemetry_sdk`), which our logs show.
        let provider =
            SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
        Ok(Self { provider, runtime })
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer(SCOPE)
    }

    /// Makes the provider the one that [`crate::past_span`] uses.
    pub(crate) fn make_global(&self) {
        opentelemetry::global::set_tracer_provider(self.provider.clone());
    }

    /// Exports what is left, for at most `limit`.
    pub(crate) fn shutdown(self, limit: Duration) {
        let (done, wait) = mpsc::channel();
        let provider = self.provider;
        // A thread, since the provider's own limit does not bound every step of an export.
        let thread = std::thread::Builder::new().name("otlp-shutdown".into()).spawn(move || {
            let result = provider.shutdown_with_timeout(limit);
            let _ = done.send(result);
        });
        if thread.is_ok() {
            match wait.recv_timeout(limit) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::warn!("the last spans may not have been exported: {e}"),
                Err(_) => tracing::warn!("the last spans were not exported within {limit:?}"),
            }
        }
        self.runtime.shutdown_background();
    }
}

/// An HTTP client whose requests run on the exporter's runtime, wherever they are polled.
#[derive(Debug)]
struct OnRuntime {
    client: HyperClient,
    runtime: Handle,
}

type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for OnRuntime {
    fn send_bytes<'life0, 'async_trait>(&'life0 self, request: Request<Bytes>) -> Sending<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        let client = self.client.clone();
        let sent = self.runtime.spawn(async move { client.send_bytes(request).await });
        Box::pin(async move { sent.await.map_err(|e| Box::new(e) as HttpError)? })
    }
}
