//! Builds as operations: journaled, watched, cancelled and undone like every other.

use crate::{agent::Agent, build, kinds};
use bothy_bus::Context;
use bothy_contract::{Error, ImageName, image::BuildImage};
use bothy_ops::{Begun, Graph, New, Op, Ops, Output};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// The kind of these operations.
pub(crate) const KIND: &str = "image.build";
/// All that a build's graph is made from.
#[derive(Debug, Serialize, Deserialize)]
struct Input {
    recipe: ImageName,
    /// An image of the same recipe is there: nothing is to be built.
    current: bool,
}

/// Begins a build, or an operation that only finds that the image is there.
pub(crate) async fn begin(
    ops: &Ops,
    agent: &Agent,
    context: Context,
    ask: BuildImage,
) -> Result<Begun, Error> {
    let (found, name) = (agent.clone(), ask.recipe.clone());
    // A recipe that is missing or wrong is refused before there is an operation.
    let current = crate::fault::blocking(move || Ok(found.build(&name, "none")?.1.is_some())).await?;
    let input = Input { recipe: ask.recipe.clone(), current: current && !ask.force };
    let input =
        serde_json::to_value(input).map_err(|e| Error::internal("cannot write down a build's input", &e))?;
    let new = New {
        kind: KIND,
        subject: ask.recipe.to_string(),
        vm: None,
        owner: ask.owner,
        request: Some(context.request_id),
        input,
    };
    ops.begin(new, move |tx, op| kinds::reserve(tx, &ask.recipe, op)).await
}

/// The stages of a build.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let input: Input = op.input()?;
    let (build, _) = agent.build(&input.recipe, op.id)?;
    let build = Arc::new(build);
    let mut graph = Graph::new();
    if input.current {
        let agent = agent.clone();
        let found = graph.stage("check", (), move |cx, ()| async move {
            // One that was built before stamps were kept gets them here, so that no create has to compute digests.
            let (of, name) = (agent.clone(), input.recipe.clone());
            crate::fault::blocking(move || of.store.open(&name)).await?;
            cx.note("an image of this recipe is there");
            manifest(&agent, &input.recipe)
        });
        graph.result(found);
        return Ok(graph);
    }
    let mut last: Option<Output<Value>> = None;
    for stage in build::STAGES {
        let (of, agent) = (Arc::clone(&build), agent.clone());
        let run = move |cx: bothy_ops::StageCx| async move {
            let with = kinds::stage(&cx);
            cx.note(of.run(stage, &with).await?);
            if stage != "finish" {
                return Ok(Value::Null);
            }
            let (name, made) = (of.name.clone(), agent.clone());
            let made = crate::fault::blocking(move || made.resolve(&name)).await;
            if let Err(e) = made {
                // The next resolve tries again, and says so to whoever wants to boot it.
                tracing::warn!(error = %e, "the image is there, its initramfs is not yet");
            }
            manifest(&agent, &of.name)
        };
        last = Some(match last {
            Some(before) => graph.stage(stage, before, move |cx, _: Value| run(cx)),
            None => {
                let of = Arc::clone(&build);
                // Undone last, when no stage runs any more: it removes what all of them made.
                graph.undoable(
                    stage,
                    (),
                    move |cx, ()| run(cx),
                    move |_| {
                        let of = Arc::clone(&of);
                        async move { of.undo().await }
                    },
                )
            }
        });
    }
    if let Some(last) = last {
        graph.result(last);
    }
    Ok(graph)
}

fn manifest(agent: &Agent, name: &ImageName) -> Result<Value, Error> {
    serde_json::to_value(agent.store.open(name)?.manifest)
        .map_err(|e| Error::internal("cannot show the manifest", &e))
}
