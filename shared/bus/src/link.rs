//! What the connection tells about itself.
//!
//! A forbidden publish looks like a plain timeout to who waits for a reply: the server says so only in an asynchronous
//! error on the connection. Here these errors are logged and passed on at once to the calls that they concern.

use async_nats::{ClientError, Event, ServerError};
use std::sync::Arc;
use tokio::sync::{broadcast, watch};

/// Where the connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct State {
    /// How often it has been made; 0 means never yet.
    pub(crate) epoch: u64,
    /// Whether it is up.
    pub(crate) up: bool,
    /// Whether it has been closed for good.
    pub(crate) closed: bool,
    /// Whether the server has refused our identity since it was last up.
    pub(crate) refused: bool,
}

/// A subject that the server refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Violation {
    Publish(String),
    Subscribe(String),
}

impl Violation {
    /// Reads the server's text: `Permissions Violation for Publish to "subject"`, or `... Subscription to "subject"
    /// using queue "q"`.
    fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        let subject = text.split('"').nth(1)?.to_owned();
        if lower.contains("permissions violation for publish") {
            Some(Self::Publish(subject))
        } else if lower.contains("permissions violation for subscription") {
            Some(Self::Subscribe(subject))
        } else {
            None
        }
    }
}

/// The receiving end of a connection's events.
#[derive(Debug)]
pub(crate) struct Link {
    state: watch::Sender<State>,
    violations: broadcast::Sender<Violation>,
}

impl Link {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: watch::Sender::default(), violations: broadcast::channel(64).0 })
    }

    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub(crate) fn violations(&self) -> broadcast::Receiver<Violation> {
        self.violations.subscribe()
    }

    /// Takes an event of the connection.
    pub(crate) fn event(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.state.send_modify(|s| (s.epoch, s.up, s.refused) = (s.epoch + 1, true, false));
                tracing::debug!("connected to the bus");
            }
            Event::Disconnected => {
                self.state.send_modify(|s| s.up = false);
                tracing::warn!("lost the bus, connecting again");
            }
            Event::Closed => self.state.send_modify(|s| (s.up, s.closed) = (false, true)),
            Event::SlowConsumer(id) => tracing::error!("subscription {id} is too slow: messages were lost"),
            Event::ServerError(error) => self.server_error(error),
            Event::ClientError(ClientError::Other(text)) => self.client_error(text),
            Event::ClientError(error) => tracing::error!("bus client: {error}"),
            Event::LameDuckMode | Event::Draining => tracing::debug!("bus: {event}"),
        }
    }

    fn server_error(&self, error: &ServerError) {
        let ServerError::Other(text) = error else {
            self.state.send_modify(|s| s.refused |= *error == ServerError::AuthorizationViolation);
            tracing::error!("bus server: {error}");
            return;
        };
        tracing::error!("bus server: {text}");
        if let Some(violation) = Violation::parse(text) {
            // Nobody may be waiting.
            let _ = self.violations.send(violation);
        }
    }

    fn client_error(&self, text: &str) {
        // The only form in which a refused connection attempt is told.
        if text.to_ascii_lowercase().contains("authorization violation") {
            self.state.send_modify(|s| s.refused = true);
            tracing::error!("bus client: {text}");
        } else {
            tracing::debug!("bus client: {text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_are_read_from_the_servers_text() {
        let of = Violation::parse;
        assert_eq!(
            of(r#"Permissions Violation for Publish to "a.b""#),
            Some(Violation::Publish("a.b".into()))
        );
        let sub = r#"Permissions Violation for Subscription to "a.>" using queue "q""#;
        assert_eq!(of(sub), Some(Violation::Subscribe("a.>".into())));
        assert_eq!(of("Stale Connection"), None);
        assert_eq!(of(r#"something "quoted""#), None);
    }
}
