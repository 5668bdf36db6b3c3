//! `image verify`: all digests of one image or of all, computed anew, as an operation.

use crate::{agent::Agent, fault::blocking, kinds};
use bothy_bus::Context;
use bothy_contract::{Error, catalogue::VerifyImages};
use bothy_ops::{Begun, Graph, New, Op, Ops};

/// The kind of these operations.
pub(crate) const KIND: &str = "image.verify";

/// Begins to verify.
pub(crate) async fn begin(
    ops: &Ops,
    agent: &Agent,
    context: Context,
    ask: VerifyImages,
) -> Result<Begun, Error> {
    if let Some(name) = ask.image.clone() {
        let agent = agent.clone();
        blocking(move || agent.store.show(&name)).await?;
    }
    let new = New {
        kind: KIND,
        subject: ask.image.as_ref().map_or_else(|| "all images".to_owned(), ToString::to_string),
        vm: None,
        owner: ask.owner,
        request: Some(context.request_id),
        input: serde_json::to_value(&ask)
            .map_err(|e| Error::internal("cannot write down what to verify", &e))?,
    };
    ops.begin(new, |_, _| Ok(())).await
}

/// The one stage of it. What it finds is its result: a damaged file is no failure of the operation.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let ask: VerifyImages = op.input()?;
    let agent = agent.clone();
    let mut graph = Graph::new();
    let found = graph.stage("verify", (), move |cx, ()| async move {
        let with = kinds::stage(&cx);
        let found = blocking(move || {
            let images = match ask.image {
                Some(name) => vec![agent.store.show(&name)?],
                None => agent.store.list()?,
            };
            let total = images.iter().flat_map(|i| i.artifacts.values()).map(|a| a.size).sum();
            let beat = with.bytes(total);
            images.iter().map(|i| agent.store.verify(&i.name, &beat)).collect::<Result<Vec<_>, _>>()
        })
        .await?;
        let damaged = found.iter().filter(|v| !v.is_whole()).count();
        cx.note(format!("{} images, {damaged} damaged", found.len()));
        Ok(found)
    });
    graph.result(found);
    Ok(graph)
}
