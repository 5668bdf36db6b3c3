//! The server side of a service: its methods, registered with NATS' service API, so that `$SRV.PING`, `INFO` and
//! `STATS` answer to the stock `nats` tool.
//!
//! ```text
//!  subscriptions -> one loop -> a permit -> a task per request: span, deadline, request id, handler, reply
//! ```
//! A request keeps running when its caller goes away: a method that changes things must come to an end.

use crate::{Client, MemoryReplies, ReplyStore, dedupe::Dedupe, link::Violation, wire};
use async_nats::service::{ServiceExt, endpoint::Endpoint};
use bothy_contract::{Code, Error, Method, MethodInfo, RequestId, Service, methods, subject};
use bothy_telemetry::ErrorStatusGuard;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::select_all};
use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

/// How long a stopping server waits for the requests that are running.
const DRAIN: Duration = Duration::from_secs(20);
/// How long it takes requests that were on their way when it unsubscribed.
const LAST_REQUESTS: Duration = Duration::from_secs(1);
/// Room for a reply's headers within the server's payload limit.
const HEADROOM: usize = 4096;

/// What a handler is told beside the request. The current span is that of the request.
#[derive(Debug, Clone)]
pub struct Context {
    /// The request's id; a new one where the caller gave none.
    pub request_id: RequestId,
    /// Who asks: the owner of the inbox that the reply goes to. The bus has checked that it is one of the method's
    /// callers.
    pub caller: Service,
    /// When the caller stops waiting.
    pub deadline: Option<SystemTime>,
}

impl Context {
    /// How long the caller still waits; zero where it has stopped, `None` where it gave no deadline.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

type Handler = Arc<dyn Fn(Context, Bytes) -> BoxFuture<'static, Result<String, Error>> + Send + Sync>;

#[derive(Clone)]
struct Route {
    info: MethodInfo,
    /// `<service>.<noun>.<verb>`.
    name: String,
    handler: Handler,
}

/// Answers the methods of one service.
pub struct Server {
    client: Client,
    max_concurrent: usize,
    routes: Vec<Route>,
    store: Arc<dyn ReplyStore>,
    on_ready: Option<Box<dyn FnOnce() + Send>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.routes.iter().map(|r| &r.name).collect();
        f.debug_struct("Server")
            .field("client", &self.client)
            .field("methods", &names)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// A server that executes at most `max_concurrent` requests at once; the others wait their turn, and are dropped
    /// when their deadline passes meanwhile.
    pub fn new(client: Client, max_concurrent: usize) -> Self {
        Self {
            client,
            max_concurrent: max_concurrent.max(1),
            routes: Vec::new(),
            store: Arc::new(MemoryReplies::default()),
            on_ready: None,
        }
    }

    /// Answers `M` with `handler`.
    #[must_use]
    pub fn serve<M, F, Fut>(mut self, handler: F) -> Self
    where
        M: Method,
        F: Fn(Context, M::Request) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<M::Reply, Error>> + Send + 'static,
    {
        let name = format!("{}.{}.{}", M::SERVICE.token(), M::NOUN, M::VERB);
        let handler = Arc::new(handler);
        let erased: Handler = {
            let name = name.clone();
            Arc::new(move |context, payload| {
                let (handler, name) = (Arc::clone(&handler), name.clone());
                async move {
                    let request = wire::decode(&format!("request {name}"), &payload, Code::InvalidArgument)?;
                    let reply = handler(context, request).await?;
                    serde_json::to_string(&reply)
                        .map_err(|e| Error::internal(format!("cannot encode the reply of {name}"), &e))
                }
                .boxed()
            })
        };
        self.routes.push(Route { info: M::info(), name, handler: erased });
        self
    }

    /// Keeps replies of mutating requests in `store` instead of in memory.
    #[must_use]
    pub fn reply_store(mut self, store: Arc<dyn ReplyStore>) -> Self {
        self.store = store;
        self
    }

    /// Calls `ready` once all methods are registered: the moment to tell systemd.
    #[must_use]
    pub fn on_ready(mut self, ready: impl FnOnce() + Send + 'static) -> Self {
        self.on_ready = Some(Box::new(ready));
        self
    }

    /// Answers requests until `shutdown`; then takes no more, lets those that run finish (for up to 20 s) and sends
    /// what is left.
    ///
    /// # Errors
    /// Where the methods cannot be registered: the bus is not there, or refuses a subscription.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        self.check()?;
        let me = self.client.service();
        let failed = |e: async_nats::Error| {
            Error::internal(format!("cannot register {} on the bus", me.binary()), &*e)
        };
        let mut violations = self.client.link().violations();
        let service = self
            .client
            .nats()
            .service_builder()
            .description(format!("bothy {} service of host {}", me.token(), self.client.host()))
            .start(me.binary(), env!("CARGO_PKG_VERSION"))
            .await
            .map_err(failed)?;
        let mut endpoints = Vec::new();
        for route in &self.routes {
            let to = subject::of(self.client.host(), me, route.info.noun, route.info.verb);
            let name = format!("{}-{}", route.info.noun, route.info.verb);
            let endpoint = service.endpoint_builder().name(name).add(to).await.map_err(failed)?;
            endpoints.push(requests(endpoint, route.clone()).boxed());
        }
        self.client.nats().flush().await.map_err(|e| {
            Error::new(Code::Unavailable, format!("cannot register {} on the bus: {e}", me.binary()))
        })?;
        if let Some(ready) = self.on_ready.take() {
            ready();
        }

        let worker = Arc::new(Worker { client: self.client.clone(), dedupe: Dedupe::new(self.store) });
        let permits = Arc::new(Semaphore::new(self.max_concurrent));
        let tasks = TaskTracker::new();
        let mut requests = select_all(endpoints);
        let stopped = loop {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => break Ok(()),
                subject = refused_subscription(&mut violations) => break Err(Error::new(
                    Code::PermissionDenied,
                    format!("the bus does not let {} listen on `{subject}`", me.binary()),
                ).hint("after an upgrade, run `bothy host bus-setup` and restart the bus")),
                next = requests.next() => next,
            };
            let Some((route, request)) = next else {
                break Err(Error::new(Code::Unavailable, "the connection to the bus has been closed"));
            };
            // A server that is told to stop while it is full must not wait for a place first.
            let permit = tokio::select! {
                permit = Arc::clone(&permits).acquire_owned() => permit.ok(),
                () = shutdown.cancelled() => None,
            };
            let worker = Arc::clone(&worker);
            tasks.spawn(async move {
                worker.answer(&route, &request).await;
                drop(permit);
            });
        };

        if let Err(e) = service.stop().await {
            tracing::warn!("cannot take the service off the bus: {e}");
        }
        // What the bus had sent before it saw the end of the subscriptions is still answered.
        let last = async {
            while let Some((route, request)) = requests.next().await {
                let worker = Arc::clone(&worker);
                tasks.spawn(async move { worker.answer(&route, &request).await });
            }
        };
        let _ = timeout(LAST_REQUESTS, last).await;
        tasks.close();
        if timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::warn!("{} requests were still running after {DRAIN:?} and are left", tasks.len());
        }
        if let Err(e) = self.client.nats().flush().await {
            tracing::warn!("the last replies may not have been sent: {e}");
        }
        stopped
    }

    /// Refuses methods of others and methods given twice, and tells about those that are missing.
    fn check(&self) -> Result<(), Error> {
        let me = self.client.service();
        for (n, route) in self.routes.iter().enumerate() {
            if route.info.service != me {
                return Err(Error::new(
                    Code::Internal,
                    format!("{} cannot serve {}", me.binary(), route.name),
                ));
            }
            if self.routes.iter().take(n).any(|other| other.info == route.info) {
                return Err(Error::new(Code::Internal, format!("{} is served twice", route.name)));
            }
        }
        for missing in methods::table() {
            if missing.service == me && !self.routes.iter().any(|r| r.info == missing) {
                tracing::warn!("nobody serves {}.{}.{}", me.token(), missing.noun, missing.verb);
            }
        }
        Ok(())
    }
}

/// The requests of an endpoint, each with its route.
fn requests(
    endpoint: Endpoint,
    route: Route,
) -> impl futures::Stream<Item = (Route, async_nats::service::Request)> + Send {
    endpoint.map(move |request| (route.clone(), request))
}

/// Returns the subject of the next subscription that the server refuses.
async fn refused_subscription(violations: &mut tokio::sync::broadcast::Receiver<Violation>) -> String {
    loop {
        match violations.recv().await {
            Ok(Violation::Subscribe(subject)) => return subject,
            Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
            Err(_) => std::future::pending().await,
        }
    }
}

struct Worker {
    client: Client,
    dedupe: Dedupe,
}

impl Worker {
    /// Answers one request, whatever happens.
    async fn answer(&self, route: &Route, request: &async_nats::service::Request) {
        let headers = request.message.headers.as_ref();
        let Some(caller) = self.caller(route, request.message.reply.as_deref()) else { return };
        let span = tracing::info_span!(
            "bus.serve",
            otel.name = route.name,
            otel.kind = "server",
            rpc.system = "nats",
            rpc.service = route.info.service.binary(),
            rpc.method = route.name,
            bothy.caller = caller.binary(),
            bothy.request.id = tracing::field::Empty,
        );
        wire::set_parent(&span, headers);
        let guard = ErrorStatusGuard::new(&span);
        async {
            let Some(result) = self.execute(route, request, caller).await else {
                tracing::debug!("dropped {}: its deadline has passed", route.name);
                guard.finish(Some((Code::DeadlineExceeded, "dropped, its deadline had passed")));
                return;
            };
            let result = result.and_then(|reply| self.fits(route, reply));
            if let Err(e) = &result {
                let level_is_error = e.code == Code::Internal;
                if level_is_error {
                    tracing::error!(code = %e.code, "{} failed: {e}", route.name);
                } else if e.code == Code::NotFound && !route.info.mutating {
                    // A question that was answered: the gateway asks each service whose an operation is.
                    tracing::debug!(code = %e.code, "{}: {e}", route.name);
                } else {
                    tracing::info!(code = %e.code, "{} refused: {e}", route.name);
                }
            }
            let sent = match &result {
                Ok(reply) => {
                    let mut headers = async_nats::HeaderMap::new();
                    wire::put_trace(&mut headers);
                    request.respond_with_headers(Ok(reply.clone()), headers).await
                }
                Err(error) => {
                    let (error, mut headers) = wire::error_reply(error);
                    wire::put_trace(&mut headers);
                    request.respond_with_headers(Err(error), headers).await
                }
            };
            if let Err(e) = sent {
                tracing::error!("cannot send the reply of {}: {e}", route.name);
            }
            guard.finish(result.err().map(|e| (e.code, e.message)));
        }
        .instrument(span.clone())
        .await;
    }

    /// Executes a request; `None` where its deadline has passed.
    async fn execute(
        &self,
        route: &Route,
        request: &async_nats::service::Request,
        caller: Service,
    ) -> Option<Result<String, Error>> {
        let headers = request.message.headers.as_ref();
        let (given, deadline) = match (wire::request_id(headers), wire::deadline(headers)) {
            (Ok(id), Ok(deadline)) => (id, deadline),
            (Err(e), _) | (_, Err(e)) => return Some(Err(e)),
        };
        if deadline.is_some_and(|at| at <= SystemTime::now()) {
            return None;
        }
        let request_id = given.unwrap_or_else(RequestId::new);
        tracing::Span::current()
            .record(bothy_telemetry::field::REQUEST_ID, tracing::field::display(request_id));
        let context = Context { request_id, caller, deadline };
        let work = self.guarded(route, context, request.message.payload.clone());
        Some(if route.info.mutating && given.is_some() {
            self.dedupe.once(request_id, &route.name, Some(caller), work).await
        } else {
            work.await
        })
    }

    /// The handler's result; a panic is an error like others.
    async fn guarded(&self, route: &Route, context: Context, payload: Bytes) -> Result<String, Error> {
        let work = AssertUnwindSafe(async { (route.handler)(context, payload).await });
        work.catch_unwind().await.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(Error::new(Code::Internal, format!("{} panicked: {text}", route.name))
                .hint(format!("this is a defect; the log of {} has more", route.info.service.binary())))
        })
    }

    /// Who asks, by the inbox that the reply goes to. A request without one of a declared caller is dropped: our right
    /// to answer must not be lent for publishing elsewhere.
    fn caller(&self, route: &Route, reply: Option<&str>) -> Option<Service> {
        let owner = reply.and_then(|reply| {
            route.info.callers.iter().copied().find(|caller| {
                reply
                    .strip_prefix(subject::inbox_prefix(self.client.host(), *caller).as_str())
                    .is_some_and(|rest| rest.starts_with('.'))
            })
        });
        if owner.is_none() {
            tracing::warn!(
                "dropped {}: its reply is to go to {reply:?}, which is no caller's inbox",
                route.name
            );
        }
        owner
    }

    fn fits(&self, route: &Route, reply: String) -> Result<Bytes, Error> {
        let limit = self.client.nats().max_payload();
        if reply.len() + HEADROOM > limit {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "the reply of {} has {} bytes, more than the bus carries ({limit})",
                    route.name,
                    reply.len()
                ),
            ));
        }
        Ok(reply.into())
    }
}
