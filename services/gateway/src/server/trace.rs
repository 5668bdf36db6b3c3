//! One span per request, a child of the caller's where they sent a `traceparent`.

use super::Peer;
use axum::{
    extract::{ConnectInfo, MatchedPath, Request},
    http::HeaderMap,
    middleware::Next,
    response::Response,
};
use bothy_telemetry::{TRACEPARENT, TRACESTATE, set_parent};
use tracing::{Instrument, field::Empty};

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

pub(crate) async fn span(request: Request, next: Next) -> Response {
    // Names from the OpenTelemetry semantic conventions for HTTP servers.
    let span = tracing::info_span!(
        "http.request",
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str),
        http.response.status_code = Empty,
        bothy.uid = request.extensions().get::<ConnectInfo<Peer>>().map(|info| info.0.uid),
    );
    set_parent(&span, text(request.headers(), TRACEPARENT), text(request.headers(), TRACESTATE));
    let response = next.run(request).instrument(span.clone()).await;
    span.record("http.response.status_code", response.status().as_u16());
    response
}
