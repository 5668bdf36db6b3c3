//! The image-agent's kinds of operation, each in a module of its own.
//!
//! One that a crash cut off is undone, not gone on with: half an image is worth nothing. One image is worked on by one
//! operation at a time; a row says which, and goes in the transaction that ends the operation.

use crate::{
    agent::Agent,
    build, builds,
    fault::{self, blocking},
    kernels, oci, promote, register, verify,
};
use bothy_contract::{Code, Error, ImageName};
use bothy_db::rusqlite::{OptionalExtension as _, Transaction};
use bothy_ops::{End, Graph, Kinds, Op, Output, Resume, StageCx};
use serde::Serialize;
use serde_json::Value;
use std::{os::unix::fs::DirBuilderExt as _, path::PathBuf, sync::Arc};

/// The migrations of the image-agent's database.
pub(crate) const MIGRATIONS: [&str; 2] =
    [bothy_ops::SCHEMA, "CREATE TABLE building (image TEXT PRIMARY KEY, op TEXT NOT NULL) STRICT"];

/// What the image-agent's operations work with.
#[derive(Debug)]
pub(crate) struct Works {
    /// The images, kernels and disks.
    pub(crate) agent: Agent,
}

/// Keeps `image` for the operation `op`, which is about to begin, until it has ended.
pub(crate) fn reserve(tx: &Transaction<'_>, image: &ImageName, op: &Op) -> Result<(), bothy_db::Error> {
    let other: Option<String> = tx
        .query_row("SELECT op FROM building WHERE image = ?1", [image.as_str()], |row| row.get(0))
        .optional()?;
    if let Some(other) = other {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("image {image} is being made by operation {other}"),
        )
        .hint(format!("wait for it, or stop it with `bothy op cancel {other}`"))
        .into());
    }
    tx.execute("INSERT INTO building (image, op) VALUES (?1, ?2)", [image.as_str(), &op.id.to_string()])?;
    Ok(())
}

/// What a stage of an operation gives to work that can be stopped and tells how far it is.
pub(crate) fn stage(cx: &StageCx) -> build::Stage {
    let told = cx.clone();
    let progress: build::Progress = Arc::new(move |done, total, note: &str| told.progress(done, total, note));
    build::Stage { cancel: cx.stop().clone(), progress }
}

/// What a stage came to.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// A word on it, for people.
    pub(crate) note: String,
    /// For the last stage: the operation's result.
    pub(crate) result: Value,
}

impl Step {
    /// A step that is not the last one.
    pub(crate) fn note(note: impl Into<String>) -> Self {
        Self { note: note.into(), result: Value::Null }
    }

    /// The last one, with the operation's result.
    pub(crate) fn last(note: impl Into<String>, result: &impl Serialize) -> Result<Self, Error> {
        let result =
            serde_json::to_value(result).map_err(|e| Error::internal("cannot keep the result", &e))?;
        Ok(Self { note: note.into(), result })
    }
}

/// Work in stages, one after another, in a directory of its own: undoing it is removing that.
pub(crate) trait Work: Send + Sync + 'static {
    /// The stages, by the names that operations show.
    const STAGES: &'static [&'static str];
    /// The directory.
    fn dir(&self) -> PathBuf;
    /// Runs one of the stages.
    fn run(
        &self,
        stage: &'static str,
        with: build::Stage,
    ) -> impl Future<Output = Result<Step, Error>> + Send;
}

/// The stages of `work`, the first of which makes its directory.
pub(crate) fn sequence<W: Work>(work: W) -> Graph {
    let work = Arc::new(work);
    let mut graph = Graph::new();
    let mut last: Option<Output<Value>> = None;
    for stage_name in W::STAGES {
        let of = Arc::clone(&work);
        let run = move |cx: StageCx| async move {
            let step = of.run(stage_name, stage(&cx)).await?;
            cx.note(step.note);
            Ok(step.result)
        };
        let undo = Arc::clone(&work);
        last = Some(match last {
            Some(before) => graph.stage(stage_name, before, move |cx, _: Value| run(cx)),
            None => graph.undoable(
                stage_name,
                (),
                move |cx, ()| {
                    let dir = undo.dir();
                    async move {
                        blocking(move || {
                            std::fs::DirBuilder::new()
                                .mode(0o700)
                                .create(&dir)
                                .map_err(|e| fault::io(format!("cannot make {}", dir.display()), &e))
                        })
                        .await?;
                        run(cx).await
                    }
                },
                {
                    let of = Arc::clone(&work);
                    move |_| {
                        let dir = of.dir();
                        blocking(move || build::remove(&dir))
                    }
                },
            ),
        });
    }
    if let Some(last) = last {
        graph.result(last);
    }
    graph
}

impl Kinds for Works {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        match op.kind.as_str() {
            builds::KIND => builds::graph(&self.agent, op),
            verify::KIND => verify::graph(&self.agent, op),
            kernels::KIND => kernels::graph(&self.agent, op),
            register::KIND => register::graph(&self.agent, op),
            promote::KIND => promote::graph(&self.agent, op),
            oci::IMPORT | oci::PULL => oci::graph(&self.agent, op),
            other => Err(Error::new(
                Code::FailedPrecondition,
                format!("{other} is no kind of operation of this image-agent"),
            )),
        }
    }

    fn resume(&self, _: &Op) -> Resume {
        Resume::Undo
    }

    fn settle(&self, tx: &Transaction<'_>, op: &Op, _: &mut End) -> Result<(), bothy_db::Error> {
        tx.execute("DELETE FROM building WHERE op = ?1", [op.id.to_string()])?;
        Ok(())
    }
}
