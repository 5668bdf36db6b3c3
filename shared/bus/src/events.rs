//! Events of operations: a JetStream stream in which every operation's history is kept for a while, so that a watcher may
//! come late, or come back.

use crate::{
    Client,
    call::refused,
    link::{State, Violation},
    wire,
};
use async_nats::{
    HeaderMap, HeaderValue,
    jetstream::{
        consumer::{DeliverPolicy, pull},
        context::{CreateStreamErrorKind, PublishErrorKind},
        message::PublishMessage,
        stream,
    },
};
use bothy_contract::{
    Code, Error, OpId,
    error::chain,
    op::{OpEvent, OpEventKind},
    subject,
};
use futures::{Stream, StreamExt, stream::unfold};
use std::time::Duration;
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    time::{Instant, sleep, timeout},
};

/// How long an event is kept.
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How much of them is kept, in bytes; the oldest go first.
const MAX_BYTES: i64 = 64 << 20;
/// How long the server remembers the id of an event, so that one sent twice is kept once.
const DUPLICATES: Duration = Duration::from_secs(30 * 60);
/// How long a watcher goes on while the bus or the stream is away.
const AWAY: Duration = Duration::from_secs(60);
/// How long one request to JetStream may take.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);

impl Client {
    /// Publishes an event of an operation that this service runs, and waits until it is on the bus' disk. The same
    /// event may be published again (after an error, after a crash): it is kept once.
    ///
    /// # Errors
    /// `Unavailable` where the bus or its stream is not there or does not answer (publish it again later),
    /// `PermissionDenied` where this service may not publish events.
    pub async fn publish_op_event(&self, event: &OpEvent) -> Result<(), Error> {
        let what = || format!("cannot publish event {} of operation {}", event.seq, event.op);
        let mut violations = self.link().violations();
        self.wait_up(REQUEST).await.map_err(|e| e.context(what()))?;
        let to = subject::op_event(self.host(), self.service(), event.op, &event.what);
        let mut headers = HeaderMap::new();
        wire::put_trace(&mut headers);
        if let Ok(id) = format!("{}-{}", event.op, event.seq).parse::<HeaderValue>() {
            headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
        }
        let message = PublishMessage::build()
            .payload(wire::encode("event", event)?)
            .headers(headers)
            .expected_stream(subject::OPS_STREAM);
        let sent = async { self.jetstream().send_publish(to.clone(), message).await?.await };
        tokio::select! {
            biased;
            done = sent => done.map(|_| ()).map_err(|e| {
                let code = match e.kind() {
                    PublishErrorKind::MaxPayloadExceeded => Code::ResourceExhausted,
                    _ => Code::Unavailable,
                };
                Error::new(code, format!("{}: {}", what(), chain(&e)))
            }),
            () = refused(&mut violations, &to) => Err(Error::new(
                Code::PermissionDenied,
                format!("{}: the bus does not let {} publish it", what(), self.service().binary()),
            )),
        }
    }

    /// Makes the stream of operation events, or brings one that exists up to date. The gateway calls it at start.
    ///
    /// # Errors
    /// `Unavailable` where the bus does not answer, `Internal` where it refuses.
    pub async fn ensure_ops_stream(&self) -> Result<(), Error> {
        self.wait_up(REQUEST).await.map_err(|e| e.context("cannot make the stream of operation events"))?;
        let config = stream::Config {
            name: subject::OPS_STREAM.to_owned(),
            description: Some("what happened in operations".to_owned()),
            subjects: vec![subject::all_op_events(self.host())],
            max_age: MAX_AGE,
            max_bytes: MAX_BYTES,
            duplicate_window: DUPLICATES,
            storage: stream::StorageType::File,
            discard: stream::DiscardPolicy::Old,
            ..stream::Config::default()
        };
        self.jetstream().create_or_update_stream(config).await.map(|_| ()).map_err(|e| {
            let code = match e.kind() {
                CreateStreamErrorKind::TimedOut | CreateStreamErrorKind::JetStreamUnavailable => {
                    Code::Unavailable
                }
                _ => Code::Internal,
            };
            Error::new(code, format!("cannot make the stream {}: {}", subject::OPS_STREAM, chain(&e)))
        })
    }

    /// All events of `op`, from the first, whenever one begins to watch; ends after [`OpEventKind::Finished`]. Each
    /// event comes once and in order, also over a restart of the bus. An operation that nobody knows is watched without
    /// an end: ask for its status first. Events older than 7 days are gone; a gap in [`OpEvent::seq`] shows it.
    ///
    /// The stream yields an error and ends where the bus is away for longer than a minute; an event that cannot be read
    /// is an error after which it goes on.
    ///
    /// # Errors
    /// `Unavailable` where the bus or its stream is not there; only the gateway may watch.
    pub async fn watch_op(
        &self,
        op: OpId,
    ) -> Result<impl Stream<Item = Result<OpEvent, Error>> + Send + Unpin + use<>, Error> {
        let mut watch = Watch {
            client: self.clone(),
            state: self.link().state(),
            op,
            read_to: 0,
            next_seq: 0,
            messages: None,
            over: false,
        };
        self.wait_up(REQUEST).await.map_err(|e| e.context(cannot_watch(op)))?;
        watch.open().await?;
        Ok(unfold(watch, |mut watch| async move { watch.next().await.map(|item| (item, watch)) }).boxed())
    }
}

/// One watcher of one operation.
struct Watch {
    client: Client,
    state: watch::Receiver<State>,
    op: OpId,
    /// The position in the stream that has been read; 0 before the first.
    read_to: u64,
    /// The event that is due.
    next_seq: u64,
    messages: Option<pull::Ordered>,
    over: bool,
}

impl Watch {
    /// Asks for the events after the last that was read.
    async fn open(&mut self) -> Result<(), Error> {
        self.messages = None;
        self.state.borrow_and_update();
        self.messages = Some(reader(self.client.clone(), self.op, self.read_to).await?);
        Ok(())
    }

    /// Opens again after trouble, for as long as it makes sense.
    async fn reopen(&mut self) -> Result<(), Error> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let opened = match self.client.wait_up(AWAY.saturating_sub(begun.elapsed())).await {
                Ok(()) => self.open().await,
                Err(e) => Err(e.context(cannot_watch(self.op))),
            };
            match opened {
                Err(e) if e.retryable && begun.elapsed() < AWAY => {
                    tracing::debug!("trying again: {e}");
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                other => return other,
            }
        }
    }

    /// The next event; `None` after the last.
    async fn next(&mut self) -> Option<Result<OpEvent, Error>> {
        while !self.over {
            let Some(messages) = &mut self.messages else {
                if let Err(e) = self.reopen().await {
                    self.over = true;
                    return Some(Err(e));
                }
                continue;
            };
            let epoch = self.state.borrow().epoch;
            let message = tokio::select! {
                message = messages.next() => message,
                // After a restart the bus has forgotten the reader, which nothing would tell for half a minute.
                _ = self.state.wait_for(|s| s.epoch > epoch && s.up) => None,
            };
            match message {
                Some(Ok(message)) => {
                    if let Ok(info) = message.info() {
                        self.read_to = info.stream_sequence;
                    }
                    if let Some(event) = self.take(&message.payload).transpose() {
                        return Some(event);
                    }
                }
                Some(Err(e)) => {
                    tracing::debug!("the reader of operation {} ended: {}", self.op, chain(&e));
                    self.messages = None;
                }
                None => self.messages = None,
            }
        }
        None
    }

    /// The event in `payload`, unless it has been given already.
    fn take(&mut self, payload: &[u8]) -> Result<Option<OpEvent>, Error> {
        let event: OpEvent = wire::decode("event", payload, Code::Internal)?;
        if event.op != self.op || event.seq < self.next_seq {
            return Ok(None);
        }
        self.next_seq = event.seq + 1;
        self.over = matches!(event.what, OpEventKind::Finished { .. });
        Ok(Some(event))
    }
}

fn cannot_watch(op: OpId) -> String {
    format!("cannot watch operation {op}")
}

/// A reader of the events of `op` that come after position `read_to` of the stream.
async fn reader(client: Client, op: OpId, read_to: u64) -> Result<pull::Ordered, Error> {
    let config = pull::OrderedConfig {
        filter_subject: subject::op_events(client.host(), op),
        deliver_policy: match read_to {
            0 => DeliverPolicy::All,
            n => DeliverPolicy::ByStartSequence { start_sequence: n + 1 },
        },
        ..pull::OrderedConfig::default()
    };
    let unavailable = |cause: String| Error::new(Code::Unavailable, format!("{}: {cause}", cannot_watch(op)));
    let mut violations = client.link().violations();
    let opened = async {
        let stream = client.jetstream().get_stream_no_info(subject::OPS_STREAM).await;
        let stream = stream.map_err(|e| unavailable(chain(&e)))?;
        let consumer = stream.create_consumer(config).await.map_err(|e| unavailable(chain(&e)))?;
        consumer.messages().await.map_err(|e| unavailable(chain(&e)))
    };
    let denied = async {
        loop {
            match violations.recv().await {
                Ok(Violation::Publish(subject)) if subject.starts_with("$JS.API.CONSUMER.") => return,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        biased;
        opened = timeout(2 * REQUEST, opened) => opened.map_err(|_| unavailable("no answer".into()))?,
        () = denied => Err(Error::new(
            Code::PermissionDenied,
            format!("{}: the bus does not let {} read events", cannot_watch(op), client.service().binary()),
        )),
    }
}
