//! One trace over process boundaries: W3C Trace Context (<https://www.w3.org/TR/trace-context/>) in and out of the
//! current span.

use crate::otlp::SCOPE;
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{Span as _, TraceContextExt, Tracer},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use std::time::SystemTime;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The header that names trace and span. Lower case: NATS headers are case-sensitive.
pub const TRACEPARENT: &str = "traceparent";
/// The header with what vendors add to a trace.
pub const TRACESTATE: &str = "tracestate";

/// A span's place in its trace, as text that can be kept or sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceContext {
    /// `00-<trace id>-<span id>-<flags>`.
    pub traceparent: String,
    /// Vendors' additions, where there are any.
    pub tracestate: Option<String>,
}

struct Put<'a>(&'a mut dyn FnMut(&str, String));

impl Injector for Put<'_> {
    fn set(&mut self, key: &str, value: String) {
        if !value.is_empty() {
            (self.0)(key, value);
        }
    }
}

struct Headers<'a> {
    traceparent: &'a str,
    tracestate: Option<&'a str>,
}

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            TRACEPARENT => Some(self.traceparent),
            TRACESTATE => self.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

/// Hands the headers of the current span to `put`, name and value: `traceparent`, and `tracestate` where it is not
/// empty. Calls it not at all where nothing is traced.
pub fn inject(put: &mut dyn FnMut(&str, String)) {
    let context = Span::current().context();
    if context.span().span_context().is_valid() {
        TraceContextPropagator::new().inject_context(&context, &mut Put(put));
    }
}

/// The current span's place in its trace; `None` where nothing is traced.
pub fn current() -> Option<TraceContext> {
    let mut out = TraceContext::default();
    inject(&mut |name, value| match name {
        TRACEPARENT => out.traceparent = value,
        _ => out.tracestate = Some(value),
    });
    (!out.traceparent.is_empty()).then_some(out)
}

/// Makes `span` a child of the span that the headers name. To be called *before* the span is entered for the first
/// time, since it is begun then. Headers that are missing or malformed leave the span as it is, as the specification
/// wants: a trace is never a reason to refuse a request.
pub fn set_parent(span: &Span, traceparent: Option<&str>, tracestate: Option<&str>) {
    let Some(traceparent) = traceparent else { return };
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &Headers { traceparent, tracestate });
    if context.span().span_context().is_valid() {
        // Fails where nothing is exported, and then there is nothing to do.
        let _ = span.set_parent(context);
    }
}

/// Adds a span that is over already, as a child of `parent`: a step of a guest's boot, told by the guest afterwards.
/// Does nothing where nothing is traced. An end before the start is taken as the start.
pub fn past_span(
    parent: &Span,
    name: &'static str,
    start: SystemTime,
    end: SystemTime,
    attributes: impl IntoIterator<Item = (&'static str, String)>,
) {
    let context = parent.context();
    if !context.span().span_context().is_valid() {
        return;
    }
    let tracer = opentelemetry::global::tracer(SCOPE);
    let mut span = tracer
        .span_builder(name)
        .with_start_time(start)
        .with_attributes(attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)))
        .start_with_context(&tracer, &context);
    span.end_with_timestamp(end.max(start));
}
