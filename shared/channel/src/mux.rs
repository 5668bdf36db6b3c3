//! yamux inside one session, with limits.

use crate::session::{Health, Pipe};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};
use yamux::{Connection, Mode};

/// Streams that may be open at once over one port.
pub const MAX_STREAMS: usize = 128;
/// yamux' own limit. It is higher than ours, since yamux counts a dropped stream until it has told the peer, and going
/// beyond it ends the session.
const YAMUX_STREAMS: usize = 2 * MAX_STREAMS;
/// All windows of all streams together: yamux' fixed 256 KiB for each stream, and 16 MiB to grow windows with.
pub(crate) const MAX_WINDOW: usize = YAMUX_STREAMS * yamux::DEFAULT_CREDIT as usize + (16 << 20);
/// Longest payload of one yamux frame: short enough for a ping to get between, long enough for the port's throughput.
const SPLIT: usize = 32 << 10;

/// The yamux connection of one session. It moves only while it is polled.
#[derive(Debug)]
pub(crate) struct Mux {
    connection: Connection<Pipe>,
    health: Arc<Health>,
}

impl Mux {
    pub(crate) fn new(pipe: Pipe, mode: Mode) -> Self {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(YAMUX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_WINDOW));
        config.set_split_send_size(SPLIT);
        let health = pipe.health();
        Self { connection: Connection::new(pipe, config, mode), health }
    }

    pub(crate) fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    /// Whether the wire takes no more at the moment. Streams must not be opened then: they, and what dropped ones leave
    /// behind, would pile up in yamux.
    pub(crate) fn is_blocked(&self) -> bool {
        self.health.blocked.load(Ordering::Relaxed)
    }

    /// Moves the connection; gives the next stream that the peer opened, or the reason for which the session is over.
    pub(crate) fn poll_inbound(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<yamux::Stream>> {
        self.connection.poll_next_inbound(cx).map(|next| match next {
            Some(stream) => stream.map_err(to_io),
            None => Err(io::Error::new(io::ErrorKind::ConnectionReset, "the peer ended the session")),
        })
    }

    /// Opens a stream; call it only after [`Mux::poll_inbound`] was pending.
    pub(crate) fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<yamux::Stream>> {
        self.connection.poll_new_outbound(cx).map_err(to_io)
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        // Before the connection wakes its streams, so that none takes this for its peer's end of file.
        self.health.ended.store(true, Ordering::Release);
    }
}

fn to_io(err: yamux::ConnectionError) -> io::Error {
    match err {
        yamux::ConnectionError::Io(err) => err,
        other => io::Error::other(other),
    }
}
