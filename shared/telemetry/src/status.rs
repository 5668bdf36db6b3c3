//! Whether a span went well. A span that ends without a word counts as well in OpenTelemetry, so failures must be said.

use opentelemetry::trace::Status;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Marks `span` as failed: `code` becomes its `error.type`, `message` its description.
pub fn record_error(span: &Span, code: impl std::fmt::Display, message: impl std::fmt::Display) {
    span.set_attribute("error.type", code.to_string());
    span.set_status(Status::error(message.to_string()));
}

/// Marks a span as failed unless [`ErrorStatusGuard::finish`] is reached: a panic or a dropped future (a caller that
/// went away) then shows in the trace.
#[derive(Debug)]
pub struct ErrorStatusGuard {
    span: Span,
    armed: bool,
}

impl ErrorStatusGuard {
    /// Watches over `span`.
    pub fn new(span: &Span) -> Self {
        Self { span: span.clone(), armed: true }
    }

    /// The work came to its end, good or bad: marks the span as failed where there is an error (its code, its message).
    pub fn finish<C: std::fmt::Display, E: std::fmt::Display>(mut self, error: Option<(C, E)>) {
        self.armed = false;
        if let Some((code, message)) = error {
            record_error(&self.span, code, message);
        }
    }
}

impl Drop for ErrorStatusGuard {
    fn drop(&mut self) {
        if self.armed {
            record_error(&self.span, "aborted", "did not come to its end: panicked or dropped");
        }
    }
}
