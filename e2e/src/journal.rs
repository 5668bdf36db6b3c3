//! What the vm-agent's journal says of an operation, read from its file: so a stage is seen while the agent itself, the
//! gateway or the bus are stopped or dead.

use bothy_config::Config;
use bothy_contract::Service;
use rusqlite::{Connection, OpenFlags};
use serde_json::Value;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long something may take to show in the journal.
const PATIENCE: Duration = Duration::from_secs(90);

/// The vm-agent's journal.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
}

/// An operation as it is now.
#[derive(Debug, Clone, Default)]
pub struct Now {
    /// Its state's word.
    pub state: String,
    /// Its error's message.
    pub error: Option<String>,
    /// Its stages, in the order of beginning, with their states' words.
    pub stages: Vec<(String, String)>,
}

impl Now {
    /// The state of one stage; `None` where it has not begun.
    pub fn stage(&self, name: &str) -> Option<&str> {
        self.stages.iter().find(|(n, _)| n == name).map(|(_, state)| state.as_str())
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        ["succeeded", "failed", "cancelled"].contains(&self.state.as_str())
    }
}

/// The word of an enum that is kept as JSON.
fn word(json: &str) -> String {
    serde_json::from_str::<String>(json).unwrap_or_else(|_| json.to_owned())
}

impl Journal {
    /// The journal of the host that `config` describes.
    pub fn new(config: &Config) -> Self {
        Self { path: config.service_dir(Service::Vm).join("vm.db") }
    }

    /// Operation `op` as it is now.
    ///
    /// # Errors
    /// The file cannot be read, or has no such operation.
    pub fn now(&self, op: &str) -> Result<Now, String> {
        // Rows have ids without dashes, the gateway's answers have them with.
        self.read(&op.replace('-', ""))
            .map_err(|e| format!("cannot read operation {op} in {}: {e}", self.path.display()))
    }

    fn read(&self, op: &str) -> rusqlite::Result<Now> {
        let db = Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        db.busy_timeout(Duration::from_secs(5))?;
        let (state, error) = db.query_row("SELECT state, error FROM op WHERE id = ?1", [op], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?))
        })?;
        let error = error.and_then(|text| {
            let error: Value = serde_json::from_str(&text).ok()?;
            Some(error["message"].as_str()?.to_owned())
        });
        let mut stages = db.prepare("SELECT name, state FROM op_stage WHERE op = ?1 ORDER BY n")?;
        let stages = stages
            .query_map([op], |row| Ok((row.get(0)?, word(&row.get::<_, String>(1)?))))?
            .collect::<Result<_, _>>()?;
        Ok(Now { state: word(&state), error, stages })
    }

    /// The row of VM `name`, as the leak check names it.
    pub fn row_of(&self, name: &str) -> Option<String> {
        let db = Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
        let n: i64 = db.query_row("SELECT rowid FROM vm WHERE name = ?1", [name], |r| r.get(0)).ok()?;
        Some(format!("vm.db vm {n}"))
    }

    /// Waits until `good` of operation `op`; looks about every two milliseconds, so that what is short is seen.
    ///
    /// # Errors
    /// It is over before, or it takes a minute and a half.
    pub fn wait(&self, op: &str, what: &str, good: impl Fn(&Now) -> bool) -> Result<Now, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.now(op)?;
            if good(&now) {
                return Ok(now);
            }
            if now.is_over() || Instant::now() > deadline {
                return Err(format!("operation {op} does not come to `{what}`: {now:?}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
