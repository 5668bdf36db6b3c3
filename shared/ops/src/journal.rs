//! The journal: each function is what one transaction writes, with the events that tell of it.

use crate::Op;
use bothy_contract::{
    Error, OpId, Service,
    op::{OpEvent, OpEventKind, OpRecord, OpState, StageRecord, StageState},
};
use bothy_db::{
    Error as DbError,
    rusqlite::{Connection, OptionalExtension, Row, Transaction, params},
};
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

pub(crate) fn json<T: Serialize>(value: &T) -> Result<String, DbError> {
    Ok(serde_json::to_string(value)?)
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, DbError> {
    Ok(serde_json::from_str(text)?)
}

fn id<T: std::str::FromStr>(text: &str) -> Result<T, DbError> {
    text.parse().map_err(|_| DbError::Value(format!("{text:?} is not an id")))
}

fn time(us: i64) -> Result<Timestamp, DbError> {
    Timestamp::from_microsecond(us).map_err(|e| DbError::Value(e.to_string()))
}

/// Puts an event into the outbox, with the operation's next number.
pub(crate) fn event(tx: &Transaction<'_>, op: OpId, at_us: u64, what: OpEventKind) -> Result<(), DbError> {
    let seq: i64 = tx
        .prepare_cached("UPDATE op SET next_seq = next_seq + 1 WHERE id = ?1 RETURNING next_seq - 1")?
        .query_row([op.to_string()], |r| r.get(0))?;
    let event = OpEvent { op, seq: seq.unsigned_abs(), at_us, what };
    tx.prepare_cached("INSERT INTO op_outbox(event) VALUES (?1)")?.execute([json(&event)?])?;
    Ok(())
}

pub(crate) type Trace = (String, Option<String>);

pub(crate) fn insert(
    tx: &Transaction<'_>,
    op: &Op,
    request: Option<&str>,
    trace: Option<&Trace>,
) -> Result<(), DbError> {
    tx.execute(
        "INSERT INTO op(id, request, kind, subject, vm, owner, input, trace, state, accepted)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params![
            op.id.to_string(),
            request,
            op.kind,
            op.subject,
            op.vm.map(|v| v.to_string()),
            op.owner,
            json(&op.input)?,
            trace.map(json).transpose()?,
            json(&OpState::Running)?,
            op.accepted.as_microsecond(),
        ],
    )?;
    let what = OpEventKind::Accepted { kind: op.kind.clone(), subject: op.subject.clone() };
    event(tx, op.id, 0, what)
}

pub(crate) fn by_request(tx: &Transaction<'_>, request: &str) -> Result<Option<Op>, DbError> {
    let mut select = tx.prepare_cached("SELECT * FROM op WHERE request = ?1")?;
    select.query_row([request], |r| Ok(op_of(r))).optional()?.transpose()
}

/// Stages begin: from here on each has something to undo.
pub(crate) fn stages_begin(
    tx: &Transaction<'_>,
    op: OpId,
    names: &[&'static str],
    at_us: u64,
) -> Result<(), DbError> {
    for name in names {
        // A stage that a crash cut off begins again in its old place.
        tx.prepare_cached(
            "INSERT INTO op_stage(op, n, name, state, started)
             VALUES (?1, (SELECT count(*) FROM op_stage WHERE op = ?1), ?2, ?3, ?4)
             ON CONFLICT (op, name) DO UPDATE SET state = excluded.state, started = excluded.started",
        )?
        .execute(params![op.to_string(), name, json(&StageState::Running)?, at_us as i64])?;
        event(tx, op, at_us, OpEventKind::StageStarted { stage: (*name).to_owned() })?;
    }
    Ok(())
}

/// How the `run` of a stage ended.
pub(crate) struct Ran {
    pub(crate) stage: &'static str,
    pub(crate) at_us: u64,
    pub(crate) took_us: u64,
    pub(crate) note: Option<String>,
    pub(crate) outcome: Result<Value, Error>,
}

/// A stage's `run` ended. Its failure is the operation's, unless the operation has one already.
pub(crate) fn stage_ran(tx: &Transaction<'_>, op: OpId, ran: &Ran) -> Result<(), DbError> {
    let state = if ran.outcome.is_ok() { StageState::Done } else { StageState::Failed };
    tx.prepare_cached(
        "UPDATE op_stage SET state = ?3, took = ?4, note = ?5, output = ?6 WHERE op = ?1 AND name = ?2",
    )?
    .execute(params![
        op.to_string(),
        ran.stage,
        json(&state)?,
        ran.took_us as i64,
        ran.note,
        ran.outcome.as_ref().ok().map(json).transpose()?,
    ])?;
    let (stage, took_us) = (ran.stage.to_owned(), ran.took_us);
    let what = match &ran.outcome {
        Ok(_) => OpEventKind::StageDone { stage, took_us, note: ran.note.clone() },
        Err(error) => OpEventKind::StageFailed { stage, took_us, error: error.clone() },
    };
    event(tx, op, ran.at_us, what)
}

/// The operation turns to its undos, for `why`; the first reason stands.
pub(crate) fn undoing(tx: &Transaction<'_>, op: OpId, why: &Error) -> Result<(), DbError> {
    tx.execute(
        "UPDATE op SET state = ?2, error = coalesce(error, ?3) WHERE id = ?1 AND finished IS NULL",
        params![op.to_string(), json(&OpState::Undoing)?, json(why)?],
    )?;
    Ok(())
}

pub(crate) fn stage_undone(
    tx: &Transaction<'_>,
    op: OpId,
    stage: &str,
    tell: bool,
    at_us: u64,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE op_stage SET state = ?3 WHERE op = ?1 AND name = ?2",
        params![op.to_string(), stage, json(&StageState::Undone)?],
    )?;
    if tell {
        event(tx, op, at_us, OpEventKind::StageUndone { stage: stage.to_owned() })?;
    }
    Ok(())
}

/// Records that a cancel was asked for, once.
pub(crate) fn cancel(tx: &Transaction<'_>, op: OpId, now: Timestamp) -> Result<(), DbError> {
    let accepted: Option<i64> = tx
        .query_row(
            "UPDATE op SET cancel = 1 WHERE id = ?1 AND cancel = 0 AND finished IS NULL RETURNING accepted",
            [op.to_string()],
            |r| r.get(0),
        )
        .optional()?;
    match accepted {
        Some(us) => {
            let at = now.as_microsecond().saturating_sub(us).max(0);
            event(tx, op, at.unsigned_abs(), OpEventKind::CancelRequested)
        }
        None => Ok(()),
    }
}

/// The operation's last row and event; then the oldest finished operations beyond `keep` are forgotten.
pub(crate) fn finish(
    tx: &Transaction<'_>,
    op: OpId,
    end: &crate::End,
    now: Timestamp,
    at_us: u64,
    keep: u32,
) -> Result<(), DbError> {
    tx.execute(
        "UPDATE op SET state = ?2, error = ?3, result = ?4, finished = ?5 WHERE id = ?1",
        params![
            op.to_string(),
            json(&end.state)?,
            end.error.as_ref().map(json).transpose()?,
            end.result.as_ref().map(json).transpose()?,
            now.as_microsecond(),
        ],
    )?;
    let what =
        OpEventKind::Finished { state: end.state, error: end.error.clone(), result: end.result.clone() };
    event(tx, op, at_us, what)?;
    tx.execute(
        "DELETE FROM op WHERE finished IS NOT NULL AND id NOT IN
         (SELECT id FROM op WHERE finished IS NOT NULL ORDER BY id DESC LIMIT ?1)",
        [keep],
    )?;
    Ok(())
}

/// An unfinished operation, as a start of the service finds it.
pub(crate) struct Unfinished {
    pub(crate) op: Op,
    pub(crate) trace: Option<Trace>,
    pub(crate) cancelled: bool,
    pub(crate) state: OpState,
    pub(crate) error: Option<Error>,
    /// In the order of beginning: name, state, output.
    pub(crate) stages: Vec<(String, StageState, Option<Value>)>,
}

pub(crate) fn unfinished(conn: &Connection) -> Result<Vec<Unfinished>, DbError> {
    let mut select = conn.prepare("SELECT * FROM op WHERE finished IS NULL ORDER BY id")?;
    let mut rows = select.query([])?;
    let mut all = Vec::new();
    while let Some(row) = rows.next()? {
        let op = op_of(row)?;
        let mut of =
            conn.prepare_cached("SELECT name, state, output FROM op_stage WHERE op = ?1 ORDER BY n")?;
        let mut stages = Vec::new();
        let mut stage_rows = of.query([op.id.to_string()])?;
        while let Some(r) = stage_rows.next()? {
            let output: Option<String> = r.get(2)?;
            let output = output.map(|o| parse(&o)).transpose()?;
            stages.push((r.get(0)?, parse(&r.get::<_, String>(1)?)?, output));
        }
        all.push(Unfinished {
            trace: row.get::<_, Option<String>>("trace")?.map(|t| parse(&t)).transpose()?,
            cancelled: row.get("cancel")?,
            state: parse(&row.get::<_, String>("state")?)?,
            error: row.get::<_, Option<String>>("error")?.map(|e| parse(&e)).transpose()?,
            op,
            stages,
        });
    }
    Ok(all)
}

/// The newest operations, or the one of `only`.
pub(crate) fn records(
    conn: &Connection,
    service: Service,
    only: Option<OpId>,
    limit: u32,
) -> Result<Vec<OpRecord>, DbError> {
    let mut select =
        conn.prepare_cached("SELECT * FROM op WHERE ?1 IS NULL OR id = ?1 ORDER BY id DESC LIMIT ?2")?;
    let mut rows = select.query(params![only.map(|o| o.to_string()), limit])?;
    let mut all = Vec::new();
    while let Some(row) = rows.next()? {
        let op = op_of(row)?;
        all.push(OpRecord {
            id: op.id,
            service,
            state: parse(&row.get::<_, String>("state")?)?,
            cancel_requested: row.get("cancel")?,
            finished: row.get::<_, Option<i64>>("finished")?.map(time).transpose()?,
            stages: stage_records(conn, op.id)?,
            error: row.get::<_, Option<String>>("error")?.map(|e| parse(&e)).transpose()?,
            result: row.get::<_, Option<String>>("result")?.map(|r| parse(&r)).transpose()?,
            kind: op.kind,
            subject: op.subject,
            vm: op.vm,
            owner: op.owner,
            accepted: op.accepted,
        });
    }
    Ok(all)
}

fn stage_records(conn: &Connection, op: OpId) -> Result<Vec<StageRecord>, DbError> {
    let mut select = conn
        .prepare_cached("SELECT name, state, started, took, note FROM op_stage WHERE op = ?1 ORDER BY n")?;
    let mut rows = select.query([op.to_string()])?;
    let mut all = Vec::new();
    while let Some(r) = rows.next()? {
        all.push(StageRecord {
            name: r.get(0)?,
            state: parse(&r.get::<_, String>(1)?)?,
            started_us: r.get::<_, i64>(2)?.unsigned_abs(),
            took_us: r.get::<_, Option<i64>>(3)?.map(i64::unsigned_abs),
            note: r.get(4)?,
        });
    }
    Ok(all)
}

fn op_of(row: &Row<'_>) -> Result<Op, DbError> {
    Ok(Op {
        id: id(&row.get::<_, String>("id")?)?,
        kind: row.get("kind")?,
        subject: row.get("subject")?,
        vm: row.get::<_, Option<String>>("vm")?.map(|v| id(&v)).transpose()?,
        owner: row.get("owner")?,
        input: parse(&row.get::<_, String>("input")?)?,
        accepted: time(row.get("accepted")?)?,
    })
}
