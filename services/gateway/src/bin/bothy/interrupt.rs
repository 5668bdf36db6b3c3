//! Ctrl-C, counted. Once it is listened for, it ends this process no longer: whoever listens must act on it.

use bothy_contract::Error;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How often the user has pressed Ctrl-C since this was made. Clones count the same.
#[derive(Debug, Clone)]
pub(crate) struct Interrupts(watch::Receiver<u32>);

impl Interrupts {
    /// Listens from now on.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub(crate) fn new() -> Result<Self, Error> {
        let mut signal =
            signal(SignalKind::interrupt()).map_err(|e| Error::internal("cannot listen for Ctrl-C", &e))?;
        let (count, seen) = watch::channel(0);
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                count.send_modify(|n| *n += 1);
            }
        });
        Ok(Self(seen))
    }

    /// Whether there was any.
    pub(crate) fn any(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// Returns once there were `n`.
    pub(crate) async fn at_least(&self, n: u32) {
        if self.0.clone().wait_for(|seen| *seen >= n).await.is_err() {
            // The task that counts lives as long as the runtime.
            std::future::pending::<()>().await;
        }
    }
}
