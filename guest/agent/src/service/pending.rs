//! What a call left to be done after its reply: things that nobody has to wait for before the first command.

use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{Notify, watch};

/// Things to do: who does them says so, who needs them waits.
#[derive(Debug, Default)]
pub(super) struct Pending {
    state: watch::Sender<State>,
    hurry: Notify,
}

#[derive(Debug, Default, Clone)]
struct State {
    left: Vec<Task>,
    failed: Vec<String>,
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Those that stood still go on.
    Processes,
    /// They come before nobody's commands any more, nor after.
    Rank,
    /// The work disk's file system gets its disk's size.
    Grow,
    /// What is synced in the home is on the host's disk.
    Barriers,
    /// Services that must know the new identity are restarted.
    Services,
    /// Timers that stood still are started.
    Timers,
    /// The journal is kept under the new machine id.
    Journal,
}

impl Task {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::Rank => "rank",
            Self::Grow => "grow",
            Self::Barriers => "barriers",
            Self::Services => "services",
            Self::Timers => "timers",
            Self::Journal => "journal",
        }
    }

    /// Whether a machine that is said to be ready must have it behind it.
    fn is_waited_for(self) -> bool {
        matches!(self, Self::Processes | Self::Grow | Self::Services)
    }
}

impl Pending {
    /// Begins anew with `tasks`.
    pub(super) fn begin(&self, tasks: &[Task]) {
        self.hurry.notified().now_or_never();
        self.state.send_replace(State { left: tasks.to_vec(), failed: Vec::new() });
    }

    /// One of them is done, or has failed.
    pub(super) fn end(&self, task: Task, result: Result<(), String>) {
        self.state.send_modify(|state| {
            state.left.retain(|left| *left != task);
            if let Err(error) = result {
                state.failed.push(error);
            }
        });
    }

    /// The names of those that are left.
    pub(super) fn names(&self) -> Vec<String> {
        self.state.borrow().left.iter().map(|task| task.name().to_owned()).collect()
    }

    /// Ends when somebody waits for what is left.
    pub(super) async fn hurried(&self) {
        self.hurry.notified().await;
        // For the next one, too.
        self.hurry.notify_one();
    }

    /// Waits for those that a ready machine must have behind it.
    ///
    /// # Errors
    /// Says what failed, or what is left when the time is over.
    pub(super) async fn wait(&self, limit: Duration) -> Result<(), String> {
        self.hurry.notify_one();
        let mut state = self.state.subscribe();
        let done = state.wait_for(|state| !state.left.iter().any(|task| task.is_waited_for()));
        let state = match tokio::time::timeout(limit, done).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => State::default(),
            Err(_) => return Err(format!("not done yet: {}", self.names().join(", "))),
        };
        if state.failed.is_empty() { Ok(()) } else { Err(state.failed.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_a_ready_machine_needs_is_waited_for_and_failures_are_told() {
        let pending = Pending::default();
        let limit = Duration::from_secs(5);
        pending.wait(limit).await.unwrap();
        pending.begin(&[Task::Grow, Task::Journal]);
        assert_eq!(pending.names(), ["grow", "journal"]);
        assert!(pending.wait(limit).await.unwrap_err().contains("grow"));
        let (waited, ()) = tokio::join!(pending.wait(limit), async {
            // Whoever waits has it begin at once.
            pending.hurried().await;
            pending.hurried().await;
            pending.end(Task::Grow, Ok(()));
        });
        waited.unwrap();
        assert_eq!(pending.names(), ["journal"]);
        pending.end(Task::Journal, Err("no room".into()));
        assert_eq!(pending.wait(limit).await.unwrap_err(), "no room");
        pending.begin(&[]);
        let hurried = tokio::time::timeout(limit, pending.hurried()).await;
        assert!(hurried.is_err(), "the hurry of before is over");
        pending.wait(limit).await.unwrap();
    }
}
