//! HTTP over the gateway's unix socket: JSON requests, streams, upgraded channels.
//!
//! A connection per request: connecting to a unix socket costs microseconds, and nothing has to be kept alive.

use bothy_contract::{Code, Error, RequestId};
use bothy_gateway::api;
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{CONNECTION, CONTENT_TYPE, HOST, TE, UPGRADE},
};
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http1, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::UnixStream;

/// The body of a request.
pub(crate) type Body = BoxBody<Bytes, Error>;

/// How long a JSON request may take, its retries not counted. The longest bus call behind one takes 30 s.
const TIMEOUT: Duration = Duration::from_secs(40);
/// How often a request that may safely be repeated is sent, and how long the first pause is.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(100);
/// The largest JSON reply, in bytes.
const MAX_REPLY: usize = 64 << 20;

/// A host's gateway.
#[derive(Debug, Clone)]
pub(crate) struct Gateway {
    socket: PathBuf,
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

impl Gateway {
    /// The gateway on `socket`. Nothing is connected yet.
    pub(crate) fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    async fn connect(&self) -> Result<UnixStream, Error> {
        let socket = self.socket.display();
        UnixStream::connect(&self.socket).await.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Error::new(Code::Unavailable, format!("no gateway answers on {socket}: {e}"))
                    .hint("start the services with `bothy host up`, or name the socket with `--socket`")
            }
            io::ErrorKind::PermissionDenied => {
                Error::new(Code::PermissionDenied, format!("cannot connect to the gateway on {socket}: {e}"))
            }
            _ => Error::internal(format!("cannot connect to the gateway on {socket}"), &e),
        })
    }

    /// Sends one request. An answer that is an error is returned as that.
    async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, Error> {
        let lost = |e: hyper::Error| {
            let mut error = Error::internal("the gateway broke off", &e);
            error.code = Code::Unavailable;
            error.retryable = true;
            error
        };
        request.headers_mut().insert(HOST, HeaderValue::from_static("bothy"));
        bothy_telemetry::inject(&mut |name, value| {
            if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), HeaderValue::try_from(value)) {
                request.headers_mut().insert(name, value);
            }
        });
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(self.connect().await?)).await.map_err(lost)?;
        tokio::spawn(connection.with_upgrades());
        let response =
            sender.send_request(request).await.map_err(|e| body_error(&e).unwrap_or_else(|| lost(e)))?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_REPLY).collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        Err(serde_json::from_slice(&body).unwrap_or_else(|_| {
            Error::new(
                Code::Internal,
                format!("{} answered {status} without saying why", self.socket.display()),
            )
            .hint("is this really the socket of a bothy gateway?")
        }))
    }

    async fn once<T: DeserializeOwned>(&self, request: Request<Body>) -> Result<T, Error> {
        let whole = async {
            let response = self.send(request).await?;
            let body = Limited::new(response.into_body(), MAX_REPLY).collect().await.map_err(|e| {
                let mut error = Error::new(Code::Unavailable, format!("the gateway broke off: {e}"));
                error.retryable = true;
                error
            })?;
            serde_json::from_slice(&body.to_bytes()).map_err(|e| {
                Error::internal("the gateway's answer makes no sense", &e)
                    .hint("are `bothy` and the gateway of the same version? `bothy version` shows both")
            })
        };
        tokio::time::timeout(TIMEOUT, whole).await.unwrap_or_else(|_| {
            Err(Error::new(
                Code::DeadlineExceeded,
                format!(
                    "the gateway on {} has not answered for {} s",
                    self.socket.display(),
                    TIMEOUT.as_secs()
                ),
            ))
        })
    }

    /// Sends the request that `make` makes until it is answered, as long as the errors say that this is safe.
    async fn json<T: DeserializeOwned>(
        &self,
        make: impl Fn() -> Result<Request<Body>, Error>,
    ) -> Result<T, Error> {
        let mut attempt = 1;
        loop {
            let error = match self.once(make()?).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            // Without a socket there is nobody to wait for.
            if attempt >= ATTEMPTS || !error.retryable || !self.socket.exists() {
                return Err(error);
            }
            tokio::time::sleep(PAUSE * (1 << attempt)).await;
            attempt += 1;
        }
    }

    /// Asks for something.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.json(|| request(Method::GET, path).body(full("")).map_err(bad_request)).await
    }

    /// Changes something. All attempts bear one request id, so that it happens once.
    pub(crate) async fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let id = RequestId::new().to_string();
        let body = serde_json::to_vec(body).map_err(|e| Error::internal("cannot write the request", &e))?;
        let body = Bytes::from(body);
        self.json(|| {
            request(method.clone(), path)
                .header(api::REQUEST_ID, &id)
                .header(CONTENT_TYPE, "application/json")
                .body(full(body.clone()))
                .map_err(bad_request)
        })
        .await
    }

    /// Asks for a stream. Trailers are welcome.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming, Error> {
        let request =
            request(Method::GET, path).header(TE, "trailers").body(full("")).map_err(bad_request)?;
        Ok(self.send(request).await?.into_body())
    }

    /// Sends a stream and reads the JSON that comes back.
    pub(crate) async fn upload<T: DeserializeOwned>(&self, path: &str, body: Body) -> Result<T, Error> {
        let request = request(Method::PUT, path)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(body)
            .map_err(bad_request)?;
        let response = self.send(request).await?;
        let body = Limited::new(response.into_body(), MAX_REPLY)
            .collect()
            .await
            .map_err(|e| Error::new(Code::Unavailable, format!("the gateway broke off: {e}")))?;
        serde_json::from_slice(&body.to_bytes())
            .map_err(|e| Error::internal("the gateway's answer makes no sense", &e))
    }

    /// A raw stream to a port of a guest.
    pub(crate) async fn channel(&self, vm: &str, port: u32) -> Result<TokioIo<Upgraded>, Error> {
        let request = request(Method::GET, &format!("/v1/vms/{}/channel/{port}", api::segment(vm)))
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, api::CHANNEL_PROTOCOL)
            .body(full(""))
            .map_err(bad_request)?;
        let response = self.send(request).await?;
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|e| Error::internal("the gateway did not open the channel", &e))?;
        Ok(TokioIo::new(upgraded))
    }
}

fn request(method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path)
}

fn bad_request(e: http::Error) -> Error {
    Error::internal("cannot make the request", &e)
}

/// The error of our own that ended the sending of a body, where that is what happened.
fn body_error(e: &hyper::Error) -> Option<Error> {
    let mut next = std::error::Error::source(e);
    while let Some(cause) = next {
        if let Some(ours) = cause.downcast_ref::<Error>() {
            return Some(ours.clone());
        }
        next = cause.source();
    }
    None
}
