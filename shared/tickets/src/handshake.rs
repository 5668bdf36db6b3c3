//! The two lines at the start of a stream: `TICKET <32 hex>\n`, then `OK\n` or `ERR <json>\n`. Neither side reads a byte
//! beyond its line, since the stream itself begins there.

use bothy_contract::{Code, Error, TicketId, vm::Ticket};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

const VERB: &str = "TICKET ";
/// The length of the only line that a server reads: verb, 32 hex digits, newline.
const LINE: usize = VERB.len() + 33;
/// The longest error that a client reads.
const MAX_ERROR: u64 = 64 << 10;
/// How long a client waits for the answer: the issuer may have to reach a booting guest first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Redeems `ticket`: connects to its socket and presents it.
///
/// # Errors
/// [`Code::Unavailable`] where the service is not there or goes away, [`Code::PermissionDenied`] where the socket may not
/// be opened, [`Code::DeadlineExceeded`] where no answer comes, else the error that the service answers.
pub async fn connect(ticket: &Ticket) -> Result<UnixStream, Error> {
    let place = ticket.socket.display().to_string();
    let failed = |e: io::Error| {
        let code = match e.kind() {
            io::ErrorKind::PermissionDenied => Code::PermissionDenied,
            _ => Code::Unavailable,
        };
        Error::new(code, format!("cannot open a stream at {place}: {e}"))
    };
    timeout(ANSWER_TIMEOUT, async {
        let mut stream = UnixStream::connect(&ticket.socket).await.map_err(failed)?;
        stream.write_all(format!("{VERB}{}\n", ticket.ticket.reveal()).as_bytes()).await.map_err(failed)?;
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).await.map_err(failed)?;
        match &answer {
            b"OK\n" => Ok(stream),
            b"ERR" => {
                let mut text = Vec::new();
                BufReader::new(stream).take(MAX_ERROR).read_until(b'\n', &mut text).await.map_err(failed)?;
                Err(serde_json::from_slice(&text).unwrap_or_else(|_| garbled(&place)))
            }
            _ => Err(garbled(&place)),
        }
    })
    .await
    .unwrap_or_else(|_| {
        Err(Error::new(
            Code::DeadlineExceeded,
            format!("no answer to a ticket at {place} within {} s", ANSWER_TIMEOUT.as_secs()),
        ))
    })
}

fn garbled(place: &str) -> Error {
    Error::new(Code::Internal, format!("the answer to a ticket at {place} is not one"))
}

/// Reads the ticket that a connection presents.
pub(crate) async fn read_ticket(stream: &mut UnixStream) -> Result<TicketId, Error> {
    let malformed = || Error::invalid("the first line is not a ticket");
    let mut line = [0; LINE];
    let mut filled = 0;
    // A newline before its place ends the wait at once; nothing behind it is ever read.
    while filled < LINE {
        let (seen, rest) = line.split_at_mut(filled);
        if seen.contains(&b'\n') {
            return Err(malformed());
        }
        match stream.read(rest).await {
            Ok(0) => return Err(malformed()),
            Ok(n) => filled += n,
            Err(e) => return Err(Error::new(Code::Unavailable, format!("cannot read a ticket: {e}"))),
        }
    }
    line.strip_prefix(VERB.as_bytes())
        .and_then(|rest| rest.strip_suffix(b"\n"))
        .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
        .and_then(|hex| std::str::from_utf8(hex).ok())
        .and_then(|hex| TicketId::parse(hex).ok())
        .ok_or_else(malformed)
}

/// Lets a stream begin.
pub(crate) async fn accept(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(b"OK\n").await
}

/// Answers with `error`; whether that still arrives is the peer's concern.
pub(crate) async fn refuse(mut stream: UnixStream, error: &Error) {
    let json = serde_json::to_string(error).unwrap_or_default();
    let line = format!("ERR {json}\n");
    drop(timeout(crate::HANDSHAKE_TIMEOUT, stream.write_all(line.as_bytes())).await);
    // Unread input at close becomes ECONNRESET behind the answer; take what is there.
    let mut rest = [0; 1024];
    drop(stream.try_read(&mut rest));
}
