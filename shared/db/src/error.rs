//! What can go wrong with a database.

use bothy_contract::{Code, error::chain};
use std::path::PathBuf;

/// An error of a database, or a refusal by the closure that ran on it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be made or given its mode.
    #[error("cannot prepare the database file")]
    Io(#[source] std::io::Error),
    /// SQLite cannot open the file.
    #[error("cannot open the database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// A newer build made the file's schema.
    #[error("the database {} has schema version {found}, and this build knows only {known}", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// The newest that this build knows.
        known: usize,
    },
    /// A migration failed; the file is as it was.
    #[error("cannot migrate the database {} to schema version {to}", path.display())]
    Migration {
        /// The file.
        path: PathBuf,
        /// The version that could not be reached.
        to: usize,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// A statement failed.
    #[error("a database statement failed")]
    Sql(#[from] rusqlite::Error),
    /// A value in a column is not what the code wrote there.
    #[error("the database holds a value that this build cannot read: {0}")]
    Value(String),
    /// The closure refused; its error passes through unchanged.
    #[error(transparent)]
    Refused(#[from] Box<bothy_contract::Error>),
    /// The closure panicked; its transaction was rolled back.
    #[error("a database call panicked: {0}")]
    Panicked(String),
    /// The connection's thread has ended.
    #[error("the database connection is closed")]
    Closed,
}

impl From<bothy_contract::Error> for Error {
    fn from(e: bothy_contract::Error) -> Self {
        Self::Refused(Box::new(e))
    }
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Self {
        Self::Value(e.to_string())
    }
}

impl From<Error> for bothy_contract::Error {
    fn from(e: Error) -> Self {
        let text = chain(&e);
        match e {
            Error::Refused(inner) => *inner,
            Error::TooNew { .. } => Self::new(Code::FailedPrecondition, text)
                .hint("run the newer build again, or move the file away to start empty"),
            Error::Sql(rusqlite::Error::SqliteFailure(f, _)) if f.code == rusqlite::ErrorCode::DiskFull => {
                Self::new(Code::ResourceExhausted, text).hint("free some disk space")
            }
            _ => Self::new(Code::Internal, text),
        }
    }
}
