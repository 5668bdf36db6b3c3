//! The image-agent's kinds of operation, each in a module of its own.
//!
//! One that a crash cut off is undone, not gone on with: half an image is worth nothing. One image is worked on by one
//! operation at a time; a row says which, and goes in the transaction that ends the operation.

use crate::{agent::Agent, build, builds, verify};
use bothy_contract::{Code, Error, ImageName};
use bothy_db::rusqlite::{OptionalExtension as _, Transaction};
use bothy_ops::{End, Graph, Kinds, Op, Resume, StageCx};
use std::sync::Arc;

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

impl Kinds for Works {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        match op.kind.as_str() {
            builds::KIND => builds::graph(&self.agent, op),
            verify::KIND => verify::graph(&self.agent, op),
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
