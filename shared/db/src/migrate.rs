//! Schema versions: `PRAGMA user_version` counts the migrations that a file has seen.

use crate::Error;
use rusqlite::{Connection, TransactionBehavior};
use std::path::Path;

const VERSION: &str = "user_version";

/// Runs the migrations that `conn` has not seen, all in one transaction.
pub(crate) fn run(conn: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), Error> {
    let failed = |to: usize| move |source| Error::Migration { path: path.to_owned(), to, source };
    let known = migrations.len();
    // The version is read under the write lock, so that two processes cannot both migrate.
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed(known))?;
    let found: i64 = tx.pragma_query_value(None, VERSION, |row| row.get(0)).map_err(failed(known))?;
    let found = usize::try_from(found)
        .map_err(|_| Error::Value(format!("user_version {found} of {}", path.display())))?;
    if found > known {
        return Err(Error::TooNew { path: path.to_owned(), found, known });
    }
    for (n, sql) in migrations.iter().enumerate().skip(found) {
        tx.execute_batch(sql).map_err(failed(n + 1))?;
    }
    if found < known {
        tx.pragma_update(None, VERSION, known as i64).map_err(failed(known))?;
    }
    tx.commit().map_err(failed(known))
}
