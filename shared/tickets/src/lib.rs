//! Bulk streams between processes: the bus carries a **ticket**, a unix socket carries the bytes.
//!
//! A service makes one [`Tickets`] for its socket, [`issue`](Tickets::issue)s a ticket for something it is ready to give
//! or take (the payload), and [`serve`](Tickets::serve)s. Who got the ticket [`connect`]s and has the stream. A ticket is
//! good once, and until its time is over; whoever holds it may use it, so it is never logged.
//!
//! The socket says nothing before it has seen a ticket, reads no more than one line of a known length, and gives each
//! stranger [`HANDSHAKE_TIMEOUT`]; so a local process that may open the socket but has no ticket can do nothing but hold
//! one of [`MAX_HANDSHAKES`] places for that long.
//!
//! What flows then is either raw, or the frames of [`FrameWriter`] and [`FrameReader`], in which a stream that was cut
//! can be told from one that ended.

mod frames;
mod handshake;
mod serve;
mod table;

pub use frames::{Frame, FrameReader, FrameWriter, MAX_DATA, MAX_REPORT};
pub use handshake::connect;
pub use serve::Redeemed;

use bothy_contract::vm::Ticket;
use std::{path::PathBuf, sync::Arc, time::Duration};
use table::Table;

/// How long a ticket is good for, unless there is a reason for another time.
pub const DEFAULT_TTL: Duration = Duration::from_secs(30);
/// How long a connection may take to present its ticket.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How many connections may be without a ticket at a time; more wait in the socket's backlog.
pub const MAX_HANDSHAKES: usize = 64;
/// How many streams may be open at a time; further tickets are refused.
pub const MAX_STREAMS: usize = 1024;

/// The tickets of one service, and its socket. Clones share both.
#[derive(Debug)]
pub struct Tickets<T> {
    socket: Arc<PathBuf>,
    table: Arc<Table<T>>,
}

impl<T> Clone for Tickets<T> {
    fn clone(&self) -> Self {
        Self { socket: Arc::clone(&self.socket), table: Arc::clone(&self.table) }
    }
}

impl<T: Send + 'static> Tickets<T> {
    /// Tickets that are redeemed at `socket`. Nothing is opened before [`Tickets::serve`].
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: Arc::new(socket.into()), table: Arc::default() }
    }

    /// Issues a ticket for `payload`, good for `ttl`. Where very many are outstanding, the one that would have ended first
    /// makes room.
    pub fn issue(&self, payload: T, ttl: Duration) -> Ticket {
        Ticket { socket: self.socket.as_ref().clone(), ticket: self.table.issue(payload, ttl) }
    }
}
