//! The boot, step by step. PID 1 measures the first steps and hands them to the agent, which adds its own.

use std::sync::{Arc, Mutex, PoisonError};

use bothy_guest_proto::v1;
use nix::time::{ClockId, clock_gettime};

/// One step of the boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// `kernel`, `modules`, `mounts`, `channel`, `personalise`, `init`; of a resumed machine the parts of `personalise`.
    pub name: String,
    /// When it began, in microseconds since the kernel started.
    pub started_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

impl Step {
    /// The step that began at `started_us` and ends now.
    #[must_use]
    pub fn ends_now(name: &str, started_us: u64) -> Self {
        Self { name: name.to_owned(), started_us, took_us: now_us().saturating_sub(started_us) }
    }

    /// The step as a line of text, for [`Step::parse`].
    #[must_use]
    pub fn to_line(&self) -> String {
        format!("{} {} {}", self.name, self.started_us, self.took_us)
    }

    /// Reads a line of [`Step::to_line`].
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (name, started, took) = (words.next()?, words.next()?, words.next()?);
        Some(Self { name: name.to_owned(), started_us: started.parse().ok()?, took_us: took.parse().ok()? })
    }
}

/// The steps of one call, as they end; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Steps(Arc<Mutex<Vec<Step>>>);

impl Steps {
    /// Does `work` as a step called `name`.
    pub(crate) fn run<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        let began = now_us();
        let done = work();
        self.add(Step::ends_now(name, began));
        done
    }

    /// The same for what takes its time.
    pub(crate) async fn wait<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let began = now_us();
        let done = work.await;
        self.add(Step::ends_now(name, began));
        done
    }

    fn add(&self, step: Step) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }

    /// All of them so far.
    pub(crate) fn all(&self) -> Vec<Step> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl From<Step> for v1::Step {
    fn from(Step { name, started_us, took_us }: Step) -> Self {
        Self { name, started_us, took_us }
    }
}

/// Microseconds since the kernel started, sleep and snapshots included: CLOCK_BOOTTIME of clock_gettime(2).
#[must_use]
pub fn now_us() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return 0 };
    let (seconds, nanos) = (time.tv_sec().unsigned_abs(), time.tv_nsec().unsigned_abs());
    seconds.saturating_mul(1_000_000).saturating_add(nanos / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_survives_the_link_between_pid_1_and_the_agent() {
        let step = Step { name: "mounts".into(), started_us: 1_600_000, took_us: 90_000 };
        assert_eq!(Step::parse(&step.to_line()), Some(step));
        assert_eq!(Step::parse("mounts x 1"), None);
        assert_eq!(Step::parse("go"), None);
    }
}
