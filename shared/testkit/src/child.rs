//! Child processes that do not outlive their test.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

/// A child that is killed and reaped on drop. Until it is reaped its pid cannot be anybody else's, so signals by pid
/// reach this child or nobody.
#[derive(Debug)]
pub struct ChildGuard(Child);

impl ChildGuard {
    /// Takes charge of `child`.
    pub fn new(child: Child) -> Self {
        Self(child)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// The child itself, for its pipes.
    pub fn inner(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Sends `signal`, unless the child has been reaped.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            let pid = Pid::from_raw(self.0.id().try_into().expect("a pid fits an i32"));
            kill(pid, signal).expect("a signal to our own child");
        }
    }

    /// Sends `signal` and waits for the end.
    ///
    /// # Panics
    /// Where the child still runs after `patience`; it is killed then.
    pub fn stop(mut self, signal: Signal, patience: Duration) -> ExitStatus {
        self.signal(signal);
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.0.try_wait().expect("wait for our own child") {
                return status;
            }
            assert!(Instant::now() < deadline, "pid {} ignored {signal} for {patience:?}", self.0.id());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        // Both fail only where the child is reaped already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_ends_with_its_guard_or_by_signal() {
        let guard = ChildGuard::new(Command::new("sleep").arg("600").spawn().unwrap());
        let pid = Pid::from_raw(guard.pid() as i32);
        drop(guard);
        assert!(kill(pid, None).is_err(), "reaped");

        let mut guard = ChildGuard::new(Command::new("sleep").arg("600").spawn().unwrap());
        assert!(guard.is_running());
        assert!(!guard.stop(Signal::SIGTERM, Duration::from_secs(10)).success());
    }
}
