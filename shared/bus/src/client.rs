//! A service's connection to the bus.

use crate::{call::CallOptions, link::Link};
use async_nats::{ConnectOptions, jetstream};
use bothy_config::Config;
use bothy_contract::{Code, Error, HostToken, Method, Service, subject};
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;

/// How long [`Client::connect`] waits for a bus that is not there yet.
const FIRST_CONNECT: Duration = Duration::from_secs(30);
/// The longest pause between two attempts to connect again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);
/// How long [`Client::drain`] waits for the last messages to leave.
const DRAIN: Duration = Duration::from_secs(5);

/// A connection under one service's identity. Clones share it.
#[derive(Debug, Clone)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    nats: async_nats::Client,
    jetstream: jetstream::Context,
    link: Arc<Link>,
    host: HostToken,
    me: Service,
    url: String,
}

impl Client {
    /// Connects as `me`, with the seed at `config.bus_seed(me)`. Waits up to 30 s for a bus that is not there yet, so
    /// that services may start before it; a connection that is lost later is made again, for as long as it takes.
    ///
    /// # Errors
    /// `FailedPrecondition` where the identity's file cannot be used, `PermissionDenied` where the bus does not know it,
    /// `Unavailable` where there is no bus.
    pub async fn connect(config: &Config, me: Service) -> Result<Self, Error> {
        let path = config.bus_seed(me);
        let seed = fs_err::read_to_string(&path).map_err(|e| {
            Error::new(Code::FailedPrecondition, format!("cannot read the identity of {}: {e}", me.binary()))
                .hint("`bothy host bus-setup` makes it, and the service must run as the user who owns it")
        })?;
        // async-nats says only at the first connection that a seed is malformed.
        nkeys::KeyPair::from_seed(seed.trim()).map_err(|e| {
            Error::new(Code::FailedPrecondition, format!("{} is not an identity: {e}", path.display()))
                .hint("remove it and run `bothy host bus-setup`")
        })?;
        let link = Link::new();
        let events = Arc::clone(&link);
        let url = config.bus_url();
        let nats = ConnectOptions::new()
            .nkey(seed.trim().to_owned())
            .name(me.binary())
            .custom_inbox_prefix(subject::inbox_prefix(&config.host, me))
            .retry_on_initial_connect()
            .ignore_discovered_servers()
            .reconnect_delay_callback(|n| {
                RECONNECT_PAUSE
                    .min(Duration::from_millis(10).saturating_mul(u32::try_from(n).unwrap_or(u32::MAX)))
            })
            .event_callback(move |event| {
                events.event(&event);
                std::future::ready(())
            })
            .connect(&url)
            .await
            .map_err(|e| Error::internal(format!("cannot connect to the bus at {url}"), &e))?;
        let mut jetstream = jetstream::new(nats.clone());
        jetstream.set_timeout(crate::events::REQUEST);
        let client = Self(Arc::new(Inner { nats, jetstream, link, host: config.host.clone(), me, url }));
        client.wait_up(FIRST_CONNECT).await?;
        Ok(client)
    }

    /// Calls `M` with its own time limit. See [`Client::call_with`].
    ///
    /// # Errors
    /// As [`Client::call_with`].
    pub async fn call<M: Method>(&self, request: &M::Request) -> Result<M::Reply, Error> {
        self.call_with::<M>(request, CallOptions::default()).await
    }

    /// The host's token in every subject.
    pub fn host(&self) -> &HostToken {
        &self.0.host
    }

    /// Who we are on the bus.
    pub fn service(&self) -> Service {
        self.0.me
    }

    /// Sends what is still buffered, ends all subscriptions and closes the connection, for all clones. Takes at most 5 s.
    pub async fn drain(self) {
        let mut state = self.0.link.state();
        if self.0.nats.drain().await.is_ok() {
            let closed = async { state.wait_for(|s| s.closed).await.is_ok() };
            if timeout(DRAIN, closed).await.is_err() {
                tracing::warn!("the bus did not take the last messages within {DRAIN:?}");
            }
        }
    }

    pub(crate) fn nats(&self) -> &async_nats::Client {
        &self.0.nats
    }

    pub(crate) fn jetstream(&self) -> &jetstream::Context {
        &self.0.jetstream
    }

    pub(crate) fn link(&self) -> &Link {
        &self.0.link
    }

    /// Waits until the connection is up, for at most `limit`.
    pub(crate) async fn wait_up(&self, limit: Duration) -> Result<(), Error> {
        let mut state = self.0.link.state();
        let ready = async { state.wait_for(|s| s.up || s.closed || s.refused).await.map(|s| *s).ok() };
        match timeout(limit, ready).await {
            Ok(Some(s)) if s.up => Ok(()),
            Ok(Some(s)) if s.refused => Err(Error::new(
                Code::PermissionDenied,
                format!("the bus at {} does not know the identity of {}", self.0.url, self.0.me.binary()),
            )
            .hint("run `bothy host bus-setup` and restart the bus")),
            Ok(_) => Err(Error::new(Code::Unavailable, "the connection to the bus has been closed")),
            Err(_) => Err(Error::new(
                Code::Unavailable,
                format!("the bus at {} does not answer (waited {limit:?})", self.0.url),
            )
            .hint("start it with `systemctl start bothy-bus` or `bothy host up`")),
        }
    }
}
