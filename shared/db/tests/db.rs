//! Opening, migrating and using a database file.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::Code;
use bothy_db::{Db, Error};
use std::os::unix::fs::PermissionsExt;

const V1: &str = "CREATE TABLE a(x INTEGER PRIMARY KEY) STRICT;";
const V2: &str = "CREATE TABLE b(y INTEGER REFERENCES a(x)) STRICT;";

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/tmp").unwrap()
}

async fn count(db: &Db) -> i64 {
    db.read(|c| Ok(c.query_row("SELECT count(*) FROM a", [], |r| r.get(0))?)).await.unwrap()
}

#[tokio::test]
async fn migrations_run_once_and_rows_survive_a_reopen() {
    let dir = dir();
    let path = dir.path().join("x.db");
    let db = Db::open(&path, &[V1]).unwrap();
    db.write(|tx| Ok(tx.execute("INSERT INTO a VALUES (7)", [])?)).await.unwrap();
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(db);
    let db = Db::open(&path, &[V1, V2]).unwrap();
    assert_eq!(count(&db).await, 1);
    let pragmas = db
        .read(|c| {
            let text = |name: &str| c.pragma_query_value(None, name, |r| r.get::<_, String>(0));
            let number = |name: &str| c.pragma_query_value(None, name, |r| r.get::<_, i64>(0));
            Ok((
                text("journal_mode")?,
                number("synchronous")?,
                number("foreign_keys")?,
                number("user_version")?,
            ))
        })
        .await
        .unwrap();
    assert_eq!(pragmas, ("wal".to_owned(), 1, 1, 2));
    let orphan = db.write(|tx| Ok(tx.execute("INSERT INTO b VALUES (8)", [])?)).await;
    assert!(matches!(orphan, Err(Error::Sql(_))), "foreign keys are checked");
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() {
    let dir = dir();
    let path = dir.path().join("x.db");
    drop(Db::open(&path, &[V1, V2]).unwrap());
    let refused = Db::open(&path, &[V1]).unwrap_err();
    assert!(matches!(refused, Error::TooNew { found: 2, known: 1, .. }));
    let told = bothy_contract::Error::from(refused);
    assert_eq!(told.code, Code::FailedPrecondition);
    assert!(told.message.contains("x.db") && told.hint.is_some());
    assert!(Db::open(&path, &[V1, V2]).is_ok());
}

#[tokio::test]
async fn a_failing_migration_changes_nothing() {
    let dir = dir();
    let path = dir.path().join("x.db");
    let broken = "CREATE TABLE c(z); CREATE TABLE c(z);";
    let failed = Db::open(&path, &[V1, broken]).unwrap_err();
    assert!(matches!(failed, Error::Migration { to: 2, .. }), "{failed:?}");
    let db = Db::open(&path, &[V1]).unwrap();
    assert_eq!(count(&db).await, 0);
}

#[tokio::test]
async fn errors_and_panics_roll_back_and_refusals_pass_through() {
    let dir = dir();
    let db = Db::open(dir.path().join("x.db"), &[V1]).unwrap();
    let refused: Result<(), Error> = db
        .write(|tx| {
            tx.execute("INSERT INTO a VALUES (1)", [])?;
            Err(bothy_contract::Error::new(Code::AlreadyExists, "there is one").into())
        })
        .await;
    let told = bothy_contract::Error::from(refused.unwrap_err());
    assert_eq!((told.code, told.message.as_str()), (Code::AlreadyExists, "there is one"));
    let panicked: Result<(), Error> = db
        .write(|tx| {
            tx.execute("INSERT INTO a VALUES (2)", [])?;
            panic!("on purpose")
        })
        .await;
    assert!(matches!(panicked, Err(Error::Panicked(text)) if text == "on purpose"));
    assert_eq!(count(&db).await, 0);
    db.write(|tx| Ok(tx.execute("INSERT INTO a VALUES (3)", [])?)).await.unwrap();
    assert_eq!(count(&db).await, 1);
}

#[tokio::test]
async fn a_dropped_call_still_runs() {
    let dir = dir();
    let db = Db::open(dir.path().join("x.db"), &[V1]).unwrap();
    let call = db.write(|tx| Ok(tx.execute("INSERT INTO a VALUES (1)", [])?));
    // One poll queues the job; then the caller goes away.
    let mut call = Box::pin(call);
    let first = futures_poll(call.as_mut());
    drop(call);
    assert!(first.is_none() || first == Some(true));
    assert_eq!(count(&db).await, 1);
}

fn futures_poll<F: Future<Output = Result<usize, Error>>>(future: std::pin::Pin<&mut F>) -> Option<bool> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match future.poll(&mut cx) {
        std::task::Poll::Ready(result) => Some(result.is_ok()),
        std::task::Poll::Pending => None,
    }
}

#[test]
fn a_missing_directory_is_named() {
    let failed = Db::open("/tmp/no-such-dir-of-bothy/x.db", &[]).unwrap_err();
    assert!(bothy_contract::Error::from(failed).message.contains("no-such-dir-of-bothy"));
}
