//! Requests over Firecracker's socket: HTTP/1.1, one connection per request, no retries.

use super::api::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::path::Path;
use tokio::net::UnixStream;

/// The longest answer that is read, in bytes. The longest there is, a machine's whole configuration, has a few thousand.
const MAX_ANSWER: usize = 1 << 20;

/// Why a request was not carried out, or that nobody knows whether it was.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody listens on the socket.
    #[error("cannot connect to Firecracker's socket")]
    Connect(#[source] std::io::Error),
    /// The connection broke, or what came back is not HTTP.
    #[error("{request}: the connection to Firecracker broke, and whether it was carried out is not known")]
    Broken {
        /// What was asked.
        request: String,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer came.
    #[error("{request}: Firecracker did not answer within {seconds} s")]
    Slow {
        /// What was asked.
        request: String,
        /// How long that was waited for.
        seconds: u64,
    },
    /// Firecracker said no.
    #[error("{request}: Firecracker refused with status {status}: {fault}")]
    Refused {
        /// What was asked.
        request: String,
        /// The HTTP status.
        status: u16,
        /// Why, in its own words.
        fault: String,
    },
    /// What came back is not what was asked for.
    #[error("{request}: Firecracker's answer is not JSON: `{answer}`")]
    Odd {
        /// What was asked.
        request: String,
        /// The beginning of what came back.
        answer: String,
    },
}

/// The error with all its causes, for people.
pub fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Sends `request` to the Firecracker that listens on `socket`, and gives its answer: `null` where that has no body.
///
/// # Errors
/// Firecracker's own, or that it cannot be reached. Where [`ApiError::Broken`] or [`ApiError::Slow`] comes back, the request
/// may have been carried out.
pub async fn call(socket: &Path, request: &Request) -> Result<Value, ApiError> {
    let patience = request.patience();
    tokio::time::timeout(patience, exchange(socket, request))
        .await
        .unwrap_or_else(|_| Err(ApiError::Slow { request: request.to_string(), seconds: patience.as_secs() }))
}

async fn exchange(socket: &Path, request: &Request) -> Result<Value, ApiError> {
    let stream = UnixStream::connect(socket).await.map_err(ApiError::Connect)?;
    let broken = |source: Box<dyn std::error::Error + Send + Sync>| ApiError::Broken {
        request: request.to_string(),
        source,
    };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(e.into()))?;
    let body = request.body.as_ref().map(Value::to_string).unwrap_or_default();
    let method = match request.method {
        Method::Get => hyper::Method::GET,
        Method::Put => hyper::Method::PUT,
        Method::Patch => hyper::Method::PATCH,
    };
    let message = hyper::Request::builder()
        .method(method)
        .uri(&request.path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| broken(e.into()))?;
    let answer = async {
        let response = sender.send_request(message).await.map_err(|e| broken(e.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(broken)?;
        read(request, status, &body.to_bytes())
    };
    // The connection moves only while it is polled; it ends by itself only where Firecracker closes it.
    tokio::pin!(connection);
    tokio::select! {
        answer = answer => answer,
        ended = &mut connection => Err(broken(match ended {
            Ok(()) => "it ended before the answer".into(),
            Err(e) => e.into(),
        })),
    }
}

/// What an answer says: 200 has a body, 204 has none, and all else is a fault.
fn read(request: &Request, status: StatusCode, body: &[u8]) -> Result<Value, ApiError> {
    let text = || String::from_utf8_lossy(body).chars().take(500).collect::<String>();
    match status {
        StatusCode::NO_CONTENT => Ok(Value::Null),
        StatusCode::OK => serde_json::from_slice(body)
            .map_err(|_| ApiError::Odd { request: request.to_string(), answer: text() }),
        _ => {
            let fault = serde_json::from_slice::<Value>(body).ok().and_then(|body| {
                body.get("fault_message").and_then(Value::as_str).map(|fault| fault.trim().to_owned())
            });
            Err(ApiError::Refused {
                request: request.to_string(),
                status: status.as_u16(),
                fault: fault.unwrap_or_else(|| format!("it gave no reason: `{}`", text())),
            })
        }
    }
}
