//! A service's SQLite file: one file, one process, one connection on a thread of its own.
//!
//! [`Db::open`] makes or migrates the file; [`Db::read`] and [`Db::write`] run a closure on the connection's thread and
//! await its result, so no async task ever blocks on a disk, and all statements of a service have one order. A round
//! trip costs tens of microseconds.
//!
//! **Durability.** The journal is a write-ahead log with `synchronous=NORMAL`: a commit is in the operating system's
//! hands before `write` returns, so it survives the death of the process at any instant. It is not flushed to the medium
//! at each commit; after a power loss the newest commits may be missing, never half there (sqlite.org/wal.html). The VMs
//! that those rows spoke of are gone then too, and every service checks what it finds at start anyway.

mod error;
mod migrate;
mod worker;

pub use error::Error;
pub use rusqlite;

use fs_err::os::unix::fs::OpenOptionsExt;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use worker::Worker;

/// How long a statement waits for a lock that another process holds (someone with the `sqlite3` shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A handle of an open database. Clones share the connection; it is closed when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Db {
    worker: Arc<Worker>,
    path: Arc<PathBuf>,
}

impl Db {
    /// Opens the database at `path`, makes it (mode 0600) if it is not there, and brings it to the schema that
    /// `migrations` describes.
    ///
    /// Migration `n` takes a database from version `n` to `n + 1`; a migration that has shipped is never edited, a new one
    /// is appended. Those that are missing run in one transaction: the file has the old schema or the new one.
    ///
    /// # Errors
    /// [`Error::TooNew`] where a newer build has migrated the file further than this one knows; nothing is changed then.
    /// [`Error::Migration`] where a migration fails; [`Error::Open`] and [`Error::Io`] where the file cannot be opened.
    pub fn open(path: impl AsRef<Path>, migrations: &[&str]) -> Result<Self, Error> {
        let path = path.as_ref();
        restrict(path)?;
        let open = |source| Error::Open { path: path.to_owned(), source };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut conn = Connection::open_with_flags(path, flags).map_err(open)?;
        configure(&conn).map_err(open)?;
        migrate::run(&mut conn, path, migrations)?;
        let worker = Worker::start(conn).map_err(Error::Io)?;
        Ok(Self { worker: Arc::new(worker), path: Arc::new(path.to_owned()) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` on the connection. For reads, and for single statements.
    ///
    /// The call is not cancelled by dropping the future: `f` runs to its end all the same.
    ///
    /// # Errors
    /// What `f` returns; [`Error::Panicked`] where it panicked; [`Error::Closed`] where the connection's thread is gone.
    pub async fn read<T, F>(&self, f: F) -> Result<T, Error>
    where
        F: FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
        T: Send + 'static,
    {
        self.worker.run(move |conn| f(conn)).await
    }

    /// Runs `f` in a transaction that has the write lock from the start. `Ok` commits, `Err` and a panic roll back.
    ///
    /// `f` may refuse with a [`bothy_contract::Error`] (`?` converts it): it comes out again unchanged when the caller
    /// turns the result into one.
    ///
    /// # Errors
    /// As for [`Db::read`], and those of the commit.
    pub async fn write<T, F>(&self, f: F) -> Result<T, Error>
    where
        F: FnOnce(&Transaction<'_>) -> Result<T, Error> + Send + 'static,
        T: Send + 'static,
    {
        self.worker
            .run(move |conn| {
                let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
                let value = f(&tx)?;
                tx.commit()?;
                Ok(value)
            })
            .await
    }
}

/// Makes the file with mode 0600 before SQLite opens it; its log and index files get the same mode from SQLite.
fn restrict(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let file = fs_err::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::Io)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(Error::Io)
}

fn configure(conn: &Connection) -> rusqlite::Result<()> {
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.pragma_update(None, "journal_mode", "WAL")?;
    conn.pragma_update(None, "synchronous", "NORMAL")?;
    conn.pragma_update(None, "foreign_keys", true)?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(())
}
