//! `bothy op`: operations.

use crate::{
    Context, Status, cli,
    printer::{duration, facts, table, word},
    progress::Watcher,
};
use bothy_contract::{Error, op::OpRecord};
use bothy_gateway::api::segment;
use http::Method;
use serde_json::json;

pub(crate) async fn main(context: &Context, command: cli::Op) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        cli::Op::List { limit } => {
            let ops: Vec<OpRecord> = context.gateway.get(&format!("/v1/ops?limit={limit}")).await?;
            printer.record(&ops, |ops| listing(ops))?;
        }
        cli::Op::Show { op, watch } => {
            let mut record = show(context, &op).await?;
            if watch && !record.state.is_final() {
                // How it ended is in the record that follows; only what keeps it from being watched is an error.
                let watched =
                    Watcher::new(&context.gateway, context.printer, false)?.look_on(record.id).await;
                record = show(context, &op).await?;
                if !record.state.is_final() {
                    watched?;
                }
            }
            printer.record(&record, details)?;
        }
        cli::Op::Cancel { op } => {
            let path = format!("/v1/ops/{}/cancel", segment(&op));
            let record: OpRecord = context.gateway.change(Method::POST, &path, &json!({})).await?;
            printer.record(&record, |record| {
                if record.state.is_final() {
                    format!("operation {} is over already: {}", record.id, word(&record.state))
                } else {
                    format!(
                        "operation {} is being cancelled; `bothy op show --watch {}` shows how",
                        record.id, record.id
                    )
                }
            })?;
        }
    }
    Ok(Status::SUCCESS)
}

async fn show(context: &Context, op: &str) -> Result<OpRecord, Error> {
    if op.is_empty() {
        return Err(
            Error::invalid("the id of an operation is empty").hint("`bothy op list` shows the newest ones")
        );
    }
    context.gateway.get(&format!("/v1/ops/{}", segment(op))).await
}

/// From accepted to finished.
fn took(op: &OpRecord) -> String {
    let Some(end) = op.finished else { return "-".to_owned() };
    let us = end.as_microsecond().saturating_sub(op.accepted.as_microsecond());
    duration(u64::try_from(us).unwrap_or(0))
}

fn listing(ops: &[OpRecord]) -> String {
    if ops.is_empty() {
        return "no operations".to_owned();
    }
    table(
        &["ID", "KIND", "SUBJECT", "STATE", "ACCEPTED", "TOOK"],
        &["TOOK"],
        ops.iter().map(|op| {
            vec![
                op.id.to_string(),
                op.kind.clone(),
                op.subject.clone(),
                word(&op.state),
                op.accepted.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                took(op),
            ]
        }),
    )
}

fn details(op: &OpRecord) -> String {
    let facts = facts([
        ("id", op.id.to_string()),
        ("kind", op.kind.clone()),
        ("subject", op.subject.clone()),
        ("service", op.service.binary().to_owned()),
        ("state", word(&op.state)),
        ("error", op.error.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("vm", op.vm.map(|vm| vm.to_string()).unwrap_or_default()),
        ("owner", op.owner.to_string()),
        ("accepted", op.accepted.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("took", took(op)),
    ]);
    let stages = table(
        &["STAGE", "STATE", "BEGAN", "TOOK", "NOTE"],
        &["BEGAN", "TOOK"],
        op.stages.iter().map(|s| {
            vec![
                s.name.clone(),
                word(&s.state),
                format!("+{}", duration(s.started_us)),
                s.took_us.map_or_else(|| "-".to_owned(), duration),
                s.note.clone().unwrap_or_default(),
            ]
        }),
    );
    format!("{facts}\n\n{stages}")
}
