//! What PID 1 is to the agent: waiting for the word, handed over to systemd, or our own.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::boot::Order;

const WAITING: u8 = 0;
const SYSTEMD: u8 = 1;
const OURS: u8 = 2;
const FOREIGN: u8 = 3;

/// PID 1, as the agent knows it.
#[derive(Debug)]
pub struct Init {
    state: AtomicU8,
    link: Mutex<Option<UnixStream>>,
}

impl Init {
    /// PID 1 of the initramfs waits at the other end of `link`.
    #[must_use]
    pub fn waiting(link: UnixStream) -> Self {
        Self { state: AtomicU8::new(WAITING), link: Mutex::new(Some(link)) }
    }

    /// A machine that runs already and is not ours to end: for tests of the service on a host.
    #[must_use]
    pub fn foreign() -> Self {
        Self { state: AtomicU8::new(FOREIGN), link: Mutex::new(None) }
    }

    /// Whether the boot is over.
    pub(super) fn started(&self) -> bool {
        self.state.load(Ordering::Acquire) != WAITING
    }

    pub(super) fn is_systemd(&self) -> bool {
        self.state.load(Ordering::Acquire) == SYSTEMD
    }

    /// Tells PID 1 to go on, and waits until it has: its end closes when it becomes systemd; it answers when it stays.
    pub(super) async fn hand_over(&self, systemd: bool) -> io::Result<()> {
        let mut link = self.link.lock().await;
        let stream = link.as_mut().ok_or_else(|| io::Error::other("PID 1 was handed over before"))?;
        let order = if systemd { Order::Systemd } else { Order::Stay };
        stream.write_all(&[order.byte()]).await?;
        let closed = stream.read(&mut [0]).await? == 0;
        if closed != systemd {
            return Err(io::Error::other(
                "PID 1 ended or answered out of turn; the guest's console says why",
            ));
        }
        if systemd {
            *link = None;
        }
        self.state.store(if systemd { SYSTEMD } else { OURS }, Ordering::Release);
        Ok(())
    }

    /// Tells our own PID 1 to end the machine.
    pub(super) async fn end(&self, reboot: bool) -> io::Result<()> {
        let mut link = self.link.lock().await;
        let stream = link.as_mut().ok_or_else(|| io::Error::other("PID 1 of this machine is not ours"))?;
        let order = if reboot { Order::Reboot } else { Order::PowerOff };
        stream.write_all(&[order.byte()]).await
    }
}
