//! A VM's logs, whole or from their last lines on.
//!
//! A log's stream has no length and, followed, no end. So its last lines are found by reading it once without following,
//! which notes only where lines begin, and then again, leaving out what comes before them. A log that was rotated in
//! between begins with other bytes the second time; then it is read anew.

use super::{ApiError, Gateway, Peer, error::Query, streams::CHUNK};
use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderValue, header::CONTENT_TYPE},
    response::Response,
};
use bothy_contract::{
    Code, Error, VmId,
    methods::VmLogOpen,
    vm::{LogSource, OpenLog},
};
use serde::Deserialize;
use std::{collections::VecDeque, io::Cursor};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::UnixStream,
};
use tokio_util::io::ReaderStream;

/// The most lines that may be asked for: where each begins is kept, in 8 bytes.
const MAX_TAIL: usize = 100_000;
/// How much of a log's beginning tells whether it was rotated, in bytes.
const HEAD: usize = 4096;
/// How often a log that is being rotated is read anew.
const ATTEMPTS: u32 = 3;

#[derive(Deserialize)]
pub(crate) struct LogQuery {
    #[serde(default = "console")]
    source: LogSource,
    #[serde(default)]
    follow: bool,
    tail: Option<usize>,
}

fn console() -> LogSource {
    LogSource::Console
}

pub(crate) async fn logs(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?.id;
    let LogQuery { source, follow, tail } = query;
    let body = match tail {
        None => {
            Body::from_stream(ReaderStream::with_capacity(open(&gateway, vm, source, follow).await?, CHUNK))
        }
        Some(lines) if lines > MAX_TAIL => {
            return Err(Error::invalid(format!("{lines} are too many lines"))
                .hint(format!("ask for at most {MAX_TAIL}, or for the whole log"))
                .into());
        }
        Some(lines) => last(&gateway, vm, source, follow, lines).await?,
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(response)
}

async fn open(gateway: &Gateway, vm: VmId, source: LogSource, follow: bool) -> Result<UnixStream, Error> {
    let ticket = gateway.call::<VmLogOpen>(&OpenLog { vm, source, follow }).await?;
    bothy_tickets::connect(&ticket).await
}

async fn last(
    gateway: &Gateway,
    vm: VmId,
    source: LogSource,
    follow: bool,
    lines: usize,
) -> Result<Body, Error> {
    let failed = |e: std::io::Error| Error::internal("cannot read the log", &e);
    for _ in 0..ATTEMPTS {
        let found = find(open(gateway, vm, source, false).await?, lines).await.map_err(failed)?;
        let mut stream = open(gateway, vm, source, follow).await?;
        if let Some(rest) = skip(&mut stream, &found).await.map_err(failed)? {
            return Ok(Body::from_stream(ReaderStream::with_capacity(
                Cursor::new(rest).chain(stream),
                CHUNK,
            )));
        }
    }
    Err(Error::new(Code::Unavailable, "the log is rotated faster than it can be read"))
}

/// Where the last lines of a log begin.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// How many bytes come before them.
    before: u64,
    /// The log's first bytes, at most [`HEAD`].
    head: Vec<u8>,
}

/// Finds the last `lines` lines. What follows the last line's end is a line, too.
async fn find(mut log: impl AsyncRead + Unpin, lines: usize) -> std::io::Result<Found> {
    let mut found = Found::default();
    // Where the lines begin that may be among the last: one more than is wanted, for the one that may follow the end.
    let mut begins = VecDeque::from([0u64]);
    let (mut at, mut buffer) = (0u64, vec![0; CHUNK]);
    loop {
        let n = log.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        let piece = buffer.get(..n).unwrap_or_default();
        let wanted = HEAD.saturating_sub(found.head.len()).min(n);
        found.head.extend_from_slice(piece.get(..wanted).unwrap_or_default());
        for (offset, _) in piece.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            begins.push_back(at + offset as u64 + 1);
            if begins.len() > lines + 1 {
                begins.pop_front();
            }
        }
        at += n as u64;
    }
    // A line that has no bytes yet is none.
    if begins.back() == Some(&at) {
        begins.pop_back();
    }
    while begins.len() > lines {
        begins.pop_front();
    }
    found.before = begins.front().copied().unwrap_or(at);
    Ok(found)
}

/// Reads what comes before the last lines, and gives what was read of them; none where this is another log by now.
async fn skip(log: &mut (impl AsyncRead + Unpin), found: &Found) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = vec![0; found.head.len()];
    match log.read_exact(&mut head).await {
        Ok(_) if head == found.head => {}
        Ok(_) => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let more = found.before.saturating_sub(head.len() as u64);
    if tokio::io::copy(&mut log.take(more), &mut tokio::io::sink()).await? < more {
        return Ok(None);
    }
    // The last lines may begin within the head.
    let within = usize::try_from(found.before).unwrap_or(usize::MAX).min(head.len());
    Ok(Some(head.split_off(within)))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tail(text: &str, lines: usize) -> String {
        let found = find(text.as_bytes(), lines).await.unwrap();
        let mut log = text.as_bytes();
        let mut rest = skip(&mut log, &found).await.unwrap().unwrap();
        rest.extend_from_slice(log);
        String::from_utf8(rest).unwrap()
    }

    #[tokio::test]
    async fn the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2).await, "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2).await, "b\nc");
        assert_eq!(tail("a\nb\n", 5).await, "a\nb\n");
        assert_eq!(tail("a\nb\n", 0).await, "");
        assert_eq!(tail("a\nb", 0).await, "");
        assert_eq!(tail("", 3).await, "");
        assert_eq!(tail("\n\n\n", 2).await, "\n\n");
        let long: String = (0..50_000).map(|n| format!("line {n}\n")).collect();
        assert_eq!(tail(&long, 2).await, "line 49998\nline 49999\n");
        assert_eq!(tail(&long, 49_999).await, long.strip_prefix("line 0\n").unwrap());
    }

    #[tokio::test]
    async fn a_rotated_log_is_another_one() {
        let found = find(&b"a\nb\nc\n"[..], 1).await.unwrap();
        assert_eq!(skip(&mut &b"b\nc\nd\n"[..], &found).await.unwrap(), None);
        assert_eq!(skip(&mut &b"a\n"[..], &found).await.unwrap(), None);
        assert_eq!(skip(&mut &b"a\nb\nc\nd\n"[..], &found).await.unwrap().unwrap(), b"c\n");
    }
}
