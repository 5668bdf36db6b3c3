//! One call: request, retries, reply.
//!
//! A call ends with a reply, with the service's error, or at its deadline. Until then it is sent again, under the same
//! request id, where that is safe and may help: nobody listens (a service restarts), the connection was made anew (the
//! reply may have been lost with the old one), and after some time without a word: whoever had the request may have died
//! with it, and the bus does not tell.

use crate::{Client, MAX_TIMEOUT, link::Violation, wire};
use async_nats::{Message, Request, RequestErrorKind};
use bothy_contract::{Code, Error, Method, RequestId, Service, subject};
use bothy_telemetry::ErrorStatusGuard;
use bytes::Bytes;
use std::time::{Duration, SystemTime};
use tokio::{
    sync::broadcast,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tracing::Instrument;

/// How long a call goes on while nobody listens on its subject: what a restart of a service takes.
const NOBODY: Duration = Duration::from_secs(2);
/// How long a call waits for a connection that is down.
const NO_BUS: Duration = Duration::from_secs(5);

/// How long a call waits for a word before it asks again: at most so long where request ids are remembered, and a repeat
/// costs nothing.
const SILENCE: Duration = Duration::from_secs(3);
/// A call that only reads is executed anew by a repeat, so it is repeated only where it may take longer than this.
const LONG: Duration = Duration::from_secs(15);

/// How a call differs from the method's defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallOptions {
    /// How long to wait, at most [`MAX_TIMEOUT`]; the method's own time where there is none.
    pub timeout: Option<Duration>,
    /// The id of an earlier request, to get that one's reply if it was executed; a new one where there is none.
    pub request_id: Option<RequestId>,
}

/// Why an attempt ended without a reply.
enum Failed {
    /// Send it again.
    Again,
    /// Nobody listens.
    Nobody,
    /// Give up.
    For(Error),
}

impl Client {
    /// Calls `M`.
    ///
    /// # Errors
    /// The service's own; or `Unavailable` where the bus is not there or nobody answers `M` (the message says which
    /// service is not running), `PermissionDenied` where the bus refuses the request, `DeadlineExceeded` where no reply
    /// came in time: then whether it was executed is unknown, and the same call with the same `request_id` is safe.
    pub async fn call_with<M: Method>(
        &self,
        request: &M::Request,
        options: CallOptions,
    ) -> Result<M::Reply, Error> {
        let call = Call {
            client: self,
            subject: subject::request::<M>(self.host()),
            service: M::SERVICE,
            what: format!("{}.{}.{}", M::SERVICE.token(), M::NOUN, M::VERB),
            id: options.request_id.unwrap_or_else(RequestId::new),
            payload: wire::encode("request", request)?,
            limit: options.timeout.unwrap_or(M::TIMEOUT).min(MAX_TIMEOUT),
            mutating: M::MUTATING,
        };
        let span = tracing::info_span!(
            "bus.call",
            otel.name = call.what,
            otel.kind = "client",
            rpc.system = "nats",
            rpc.service = M::SERVICE.binary(),
            rpc.method = call.what,
            bothy.request.id = %call.id,
        );
        let guard = ErrorStatusGuard::new(&span);
        let result = async {
            let payload = call.run().await?;
            wire::decode(&format!("reply of {}", call.what), &payload, Code::Internal)
        }
        .instrument(span)
        .await;
        guard.finish(result.as_ref().err().map(|e: &Error| (e.code, &e.message)));
        result
    }
}

struct Call<'a> {
    client: &'a Client,
    subject: String,
    service: Service,
    what: String,
    id: RequestId,
    payload: Bytes,
    limit: Duration,
    mutating: bool,
}

impl Call<'_> {
    /// Sends the request until there is a reply, and gives its payload.
    async fn run(&self) -> Result<Bytes, Error> {
        let begun = Instant::now();
        let end = begun + self.limit;
        let headers = wire::request_headers(self.id, SystemTime::now() + self.limit);
        let mut pause = Duration::from_millis(20);
        let mut alone_since = None;
        // Before the first request, so that no refusal is missed.
        let mut violations = self.client.link().violations();
        loop {
            self.client
                .wait_up(NO_BUS.min(self.limit))
                .await
                .map_err(|e| e.context(format!("cannot call {}", self.what)))?;
            let request = Request::new().headers(headers.clone()).payload(self.payload.clone()).timeout(None);
            match self.attempt(request, end, &mut violations).await {
                Ok(message) => {
                    return match wire::error_of(message.headers.as_ref()) {
                        Some(error) => Err(error),
                        None => Ok(message.payload),
                    };
                }
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::Again) => {
                    alone_since = None;
                    tracing::debug!("sending {} again", self.what);
                }
                Err(Failed::Nobody) => {
                    let since = *alone_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= NOBODY || Instant::now() + pause >= end {
                        return Err(self.nobody());
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(250));
                }
            }
            if Instant::now() >= end {
                return Err(self.too_late());
            }
        }
    }

    /// Sends the request once.
    async fn attempt(
        &self,
        request: Request,
        end: Instant,
        violations: &mut broadcast::Receiver<Violation>,
    ) -> Result<Message, Failed> {
        let mut state = self.client.link().state();
        let epoch = state.borrow_and_update().epoch;
        let again = match self.mutating {
            true => Instant::now() + (self.limit / 3).clamp(Duration::from_secs(1), SILENCE),
            false if self.limit >= LONG => Instant::now() + self.limit / 3,
            false => end,
        };
        tokio::select! {
            biased;
            reply = timeout_at(end, self.client.nats().send_request(self.subject.clone(), request)) => match reply {
                Ok(Ok(message)) => Ok(message),
                Ok(Err(e)) => Err(match e.kind() {
                    RequestErrorKind::NoResponders => Failed::Nobody,
                    RequestErrorKind::MaxPayloadExceeded => Failed::For(
                        Error::new(Code::ResourceExhausted, format!("the request {} is too large for the bus: {e}", self.what)),
                    ),
                    RequestErrorKind::TimedOut => Failed::For(self.too_late()),
                    _ => Failed::For(
                        Error::new(Code::Unavailable, format!("cannot call {}: {}", self.what, bothy_contract::error::chain(&e))),
                    ),
                }),
                Err(_) => Err(Failed::For(self.too_late())),
            },
            () = refused(violations, &self.subject) => Err(Failed::For(self.refused())),
            // A new connection: the old one may have swallowed the request or its reply.
            _ = state.wait_for(|s| s.epoch > epoch && s.up) => Err(Failed::Again),
            () = sleep_until(again), if again < end => Err(Failed::Again),
        }
    }

    fn nobody(&self) -> Error {
        Error::new(
            Code::Unavailable,
            format!("{} is not running: nobody answers {}", self.service.binary(), self.what),
        )
        .hint(format!(
            "start it with `systemctl start {}` or `bothy host up`, or see its log for why it ended",
            self.service.binary()
        ))
    }

    fn refused(&self) -> Error {
        Error::new(
            Code::PermissionDenied,
            format!("the bus does not let {} call {}", self.client.service().binary(), self.what),
        )
        .hint("after an upgrade, run `bothy host bus-setup` and restart the bus")
    }

    fn too_late(&self) -> Error {
        Error::new(
            Code::DeadlineExceeded,
            format!("{} did not answer {} within {:?}", self.service.binary(), self.what, self.limit),
        )
        .hint("whether it was done is unknown; look before trying again")
    }
}

/// Returns once the server has refused a publish to `subject`.
pub(crate) async fn refused(violations: &mut broadcast::Receiver<Violation>, subject: &str) {
    loop {
        match violations.recv().await {
            Ok(Violation::Publish(denied)) if denied == subject => return,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}
