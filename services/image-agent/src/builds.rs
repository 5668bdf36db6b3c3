//! Builds as operations: journaled, watched, cancelled and undone like every other.
//!
//! A build that a crash cut off is undone, not gone on with: half a tree of packages is worth nothing. One image is
//! built by one operation at a time; a row says which, and goes in the transaction that ends the operation.

use crate::{agent::Agent, build};
use bothy_bus::Context;
use bothy_contract::{Code, Error, ImageName, image::BuildImage};
use bothy_db::rusqlite::{OptionalExtension as _, Transaction};
use bothy_ops::{Begun, End, Graph, Kinds, New, Op, Ops, Output, Resume};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// The kind of these operations.
pub(crate) const KIND: &str = "image.build";
/// The migrations of the image-agent's database.
pub(crate) const MIGRATIONS: [&str; 2] =
    [bothy_ops::SCHEMA, "CREATE TABLE building (image TEXT PRIMARY KEY, op TEXT NOT NULL) STRICT"];

/// All that a build's graph is made from.
#[derive(Debug, Serialize, Deserialize)]
struct Input {
    recipe: ImageName,
    /// An image of the same recipe is there: nothing is to be built.
    current: bool,
}

/// The image-agent's kinds of operation: one.
#[derive(Debug)]
pub(crate) struct Builds {
    /// What is built with.
    pub(crate) agent: Agent,
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
    ops.begin(new, move |tx, op| reserve(tx, &ask.recipe, op)).await
}

fn reserve(tx: &Transaction<'_>, image: &ImageName, op: &Op) -> Result<(), bothy_db::Error> {
    let other: Option<String> = tx
        .query_row("SELECT op FROM building WHERE image = ?1", [image.as_str()], |row| row.get(0))
        .optional()?;
    if let Some(other) = other {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("image {image} is being built by operation {other}"),
        )
        .hint(format!("wait for it, or stop it with `bothy op cancel {other}`"))
        .into());
    }
    tx.execute("INSERT INTO building (image, op) VALUES (?1, ?2)", [image.as_str(), &op.id.to_string()])?;
    Ok(())
}

impl Kinds for Builds {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        let input: Input = op.input()?;
        let (build, _) = self.agent.build(&input.recipe, op.id)?;
        let build = Arc::new(build);
        let mut graph = Graph::new();
        if input.current {
            let agent = self.agent.clone();
            let found = graph.stage("check", (), move |cx, ()| async move {
                cx.note("an image of this recipe is there");
                manifest(&agent, &input.recipe)
            });
            graph.result(found);
            return Ok(graph);
        }
        let mut last: Option<Output<Value>> = None;
        for stage in build::STAGES {
            let (of, agent) = (Arc::clone(&build), self.agent.clone());
            let run = move |cx: bothy_ops::StageCx| async move {
                let told = cx.clone();
                let progress: build::Progress =
                    Arc::new(move |done, total, note: &str| told.progress(done, total, note));
                let with = build::Stage { cancel: cx.stop().clone(), progress };
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

    fn resume(&self, _: &Op) -> Resume {
        Resume::Undo
    }

    fn settle(&self, tx: &Transaction<'_>, op: &Op, _: &mut End) -> Result<(), bothy_db::Error> {
        tx.execute("DELETE FROM building WHERE op = ?1", [op.id.to_string()])?;
        Ok(())
    }
}

fn manifest(agent: &Agent, name: &ImageName) -> Result<Value, Error> {
    serde_json::to_value(agent.store.open(name)?.manifest)
        .map_err(|e| Error::internal("cannot show the manifest", &e))
}
