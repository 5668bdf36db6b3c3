//! The gateway's HTTP API as a test uses it: one request, one answer, on a connection of its own. The command line waits
//! until an operation is over; here it is begun and its id is known at once, which is what a fault needs.

use serde_json::Value;
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

/// How long an answer may take: longer than the gateway waits for any service.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host's gateway, by its socket.
#[derive(Debug, Clone)]
pub struct Gateway {
    socket: PathBuf,
}

/// What it said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; null where there is none.
    pub body: Value,
}

impl Gateway {
    /// The gateway that listens on `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Sends one request.
    ///
    /// # Errors
    /// Nobody listens, the connection broke, or the answer is not HTTP with JSON.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: bothy\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let odd = || io::Error::new(io::ErrorKind::InvalidData, format!("not an answer: {text:?}"));
        let (head, body) = text.split_once("\r\n\r\n").ok_or_else(odd)?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(odd)?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body)? };
        Ok(Answer { status, body })
    }

    /// The same, if it was accepted.
    ///
    /// # Errors
    /// In words: no answer, or a refusal.
    pub fn accepted(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        match self.ask(method, path, body) {
            Ok(Answer { status: 200..=299, body }) => Ok(body),
            Ok(Answer { status, body }) => Err(format!("{method} {path}: {status} {body}")),
            Err(e) => Err(format!("{method} {path}: {e}")),
        }
    }
}
