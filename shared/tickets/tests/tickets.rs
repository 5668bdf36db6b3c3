//! Tickets over real sockets, with clients that keep the rules and clients that do not.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::{Code, Error, TicketId, vm::Ticket};
use bothy_tickets::{DEFAULT_TTL, FrameReader, FrameWriter, MAX_HANDSHAKES, Tickets, connect};
use std::{os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

struct Server {
    tickets: Tickets<&'static str>,
    socket: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
    _dir: tempfile::TempDir,
}

/// A server whose streams say the payload, then echo.
async fn server() -> Server {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let socket = dir.path().join("t.sock");
    let (tickets, stop) = (Tickets::new(&socket), CancellationToken::new());
    let task = tokio::spawn({
        let (tickets, stop) = (tickets.clone(), stop.clone());
        async move {
            tickets
                .serve(
                    |payload: &'static str, mut stream: UnixStream| async move {
                        let (mut from, mut to) = stream.split();
                        if to.write_all(payload.as_bytes()).await.is_ok() {
                            drop(tokio::io::copy(&mut from, &mut to).await);
                        }
                    },
                    stop,
                )
                .await
        }
    });
    while !socket.exists() {
        tokio::task::yield_now().await;
    }
    Server { tickets, socket, stop, task, _dir: dir }
}

async fn answer_to(server: &Server, sent: &[u8]) -> String {
    let mut stream = UnixStream::connect(&server.socket).await.unwrap();
    stream.write_all(sent).await.unwrap();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_ticket_opens_its_stream_once() {
    let server = server().await;
    assert_eq!(server.socket.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    let ticket = server.tickets.issue("hello", DEFAULT_TTL);
    let mut stream = connect(&ticket).await.unwrap();
    stream.write_all(b" world").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    assert_eq!(all, "hello world");
    let again = connect(&ticket).await.unwrap_err();
    assert_eq!(again.code, Code::PermissionDenied);
    assert!(again.hint.is_some());
}

#[tokio::test]
async fn wrong_expired_and_malformed_tickets_are_refused() {
    let server = server().await;
    let invented = Ticket { socket: server.socket.clone(), ticket: TicketId::new() };
    assert_eq!(connect(&invented).await.unwrap_err().code, Code::PermissionDenied);
    let expired = server.tickets.issue("x", Duration::ZERO);
    assert_eq!(connect(&expired).await.unwrap_err().code, Code::PermissionDenied);
    let good = server.tickets.issue("x", DEFAULT_TTL).ticket.reveal();
    let long = format!("TICKET {good}{}\n", "0".repeat(1 << 16));
    let short = format!("TICKET {}\n", &good[1..]);
    let braces = format!("TICKET {{{}}}\n", &good[2..]);
    for line in ["\n", "GET / HTTP/1.1\r\n\r\n", &long, &short, &braces, &good.to_uppercase()] {
        let answer = answer_to(&server, line.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("ERR {"), "{line:?} was answered {answer:?}");
    }
    // None of that used the good one up, and bytes right behind the line belong to the stream.
    let mut stream = UnixStream::connect(&server.socket).await.unwrap();
    stream.write_all(format!("TICKET {good}\nmore").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    assert_eq!(all, "OK\nxmore");
}

#[tokio::test]
async fn strangers_who_say_nothing_do_not_keep_others_out() {
    let server = server().await;
    let mut strangers = Vec::new();
    for _ in 0..MAX_HANDSHAKES + 8 {
        let mut stream = UnixStream::connect(&server.socket).await.unwrap();
        stream.write_all(b"T").await.unwrap();
        strangers.push(stream);
    }
    let ticket = server.tickets.issue("hi", DEFAULT_TTL);
    let mut stream = connect(&ticket).await.unwrap();
    let mut said = [0; 2];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"hi");
    // The first strangers were hung up on without a word.
    let mut nothing = Vec::new();
    drop(strangers[0].read_to_end(&mut nothing).await);
    assert!(nothing.is_empty());
}

#[tokio::test]
async fn a_live_socket_is_not_taken_over_and_a_dead_one_is() {
    let first = server().await;
    let second: Tickets<&'static str> = Tickets::new(&first.socket);
    let refused = second.serve(|_, _| async {}, CancellationToken::new()).await.unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
    first.stop.cancel();
    first.task.await.unwrap().unwrap();
    assert!(!first.socket.exists());
    assert_eq!(connect(&first.tickets.issue("x", DEFAULT_TTL)).await.unwrap_err().code, Code::Unavailable);
    // What a killed process leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&first.socket).unwrap());
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (second, stop) = (second.clone(), stop.clone());
        async move { second.serve(|_, _| async {}, stop).await }
    });
    while connect(&second.issue("x", DEFAULT_TTL)).await.is_err() {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    serving.await.unwrap().unwrap();
    tokio::fs::write(&first.socket, "precious").await.unwrap();
    let refused = second.serve(|_, _| async {}, CancellationToken::new()).await.unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
}

#[tokio::test]
async fn a_handler_can_refuse_with_a_reason() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let tickets = Tickets::new(dir.path().join("t.sock"));
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (tickets, stop) = (tickets.clone(), stop.clone());
        async move {
            let why = || Error::not_found("no such VM").hint("see `bothy vm list`");
            tickets.serve_redeemed(move |(), r| async move { r.refuse(&why()).await }, stop).await
        }
    });
    let refused = loop {
        match connect(&tickets.issue((), DEFAULT_TTL)).await.unwrap_err() {
            e if e.code == Code::Unavailable => tokio::task::yield_now().await,
            e => break e,
        }
    };
    assert_eq!(refused, Error::not_found("no such VM").hint("see `bothy vm list`"));
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn frames_go_through_a_ticket_both_ways() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let tickets = Tickets::new(dir.path().join("t.sock"));
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (tickets, stop) = (tickets.clone(), stop.clone());
        async move {
            tickets
                .serve(
                    |(), stream: UnixStream| async move {
                        let (from, to) = stream.into_split();
                        let mut reader = FrameReader::new(from);
                        let bytes = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await.unwrap();
                        let told: String = reader.report().await.unwrap();
                        FrameWriter::new(to).end(&(bytes, told)).await.unwrap();
                    },
                    stop,
                )
                .await
        }
    });
    while !dir.path().join("t.sock").exists() {
        tokio::task::yield_now().await;
    }
    let (from, to) = connect(&tickets.issue((), DEFAULT_TTL)).await.unwrap().into_split();
    let mut writer = FrameWriter::new(to);
    let sent = writer.copy_from(&mut tokio::io::repeat(7).take(3_000_001)).await.unwrap();
    writer.end(&"done").await.unwrap();
    let report: (u64, String) = FrameReader::new(from).report().await.unwrap();
    assert_eq!((sent, report), (3_000_001, (3_000_001, "done".to_owned())));
    stop.cancel();
    serving.await.unwrap().unwrap();
}
