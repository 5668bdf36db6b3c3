//! The stages of an operation and what they pass on.
//!
//! Adding a stage gives an [`Output`]: a typed handle of what it will return. A later stage names the outputs it needs,
//! and its `run` is given their values; so a stage that needs a lease cannot be put before the one that gets it, and
//! "depends on" is said once. Values are kept in the journal as JSON, which is how they survive a crash.

use crate::{StageCx, UndoCx};
use bothy_contract::Error;
use futures::{FutureExt, future::BoxFuture};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{marker::PhantomData, sync::Arc};

pub(crate) type Run = Box<dyn FnOnce(StageCx) -> BoxFuture<'static, Result<Value, Error>> + Send>;
type Prepare = Box<dyn FnOnce(&Values) -> Result<Run, Error> + Send>;
pub(crate) type Undo = Arc<dyn Fn(UndoCx) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// The outputs of finished stages, by position in the graph.
#[derive(Debug, Default)]
pub struct Values(pub(crate) Vec<Option<Value>>);

/// What a stage returns, before it has run. Good only in the graph that gave it.
#[derive(Debug)]
pub struct Output<T> {
    index: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Output<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Output<T> {}

/// The outputs that a stage needs: none `()`, one, or a tuple of several.
pub trait Inputs: Send + 'static {
    /// Their values.
    type Values: Send + 'static;
    /// The positions of the stages that give them.
    fn stages(&self) -> Vec<usize>;
    /// The values, once all those stages are done.
    ///
    /// # Errors
    /// Where the journal holds something else under that stage: it was written by another build.
    fn values(&self, all: &Values) -> Result<Self::Values, Error>;
}

impl<T: DeserializeOwned + Send + 'static> Inputs for Output<T> {
    type Values = T;

    fn stages(&self) -> Vec<usize> {
        vec![self.index]
    }

    fn values(&self, all: &Values) -> Result<T, Error> {
        let value = all.0.get(self.index).and_then(Option::as_ref).unwrap_or(&Value::Null);
        T::deserialize(value)
            .map_err(|e| Error::internal("the output of an earlier stage is not readable", &e))
    }
}

macro_rules! tuples {
    ($($name:ident),*) => {
        impl<$($name: Inputs),*> Inputs for ($($name,)*) {
            type Values = ($($name::Values,)*);

            fn stages(&self) -> Vec<usize> {
                #[expect(non_snake_case, reason = "one name for type and value")]
                let ($($name,)*) = self;
                [$($name.stages()),*].concat()
            }

            fn values(&self, all: &Values) -> Result<Self::Values, Error> {
                #[expect(non_snake_case, reason = "one name for type and value")]
                let ($($name,)*) = self;
                Ok(($($name.values(all)?,)*))
            }
        }
    };
}
tuples!(A, B);
tuples!(A, B, C);
tuples!(A, B, C, D);
tuples!(A, B, C, D, E);

impl Inputs for () {
    type Values = ();

    fn stages(&self) -> Vec<usize> {
        Vec::new()
    }

    fn values(&self, _: &Values) -> Result<(), Error> {
        Ok(())
    }
}

pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) needs: Vec<usize>,
    pub(crate) prepare: Option<Prepare>,
    pub(crate) undo: Option<Undo>,
}

/// The stages of one operation. Built anew, from the operation's input alone, whenever it is run or resumed.
pub struct Graph {
    pub(crate) nodes: Vec<Node>,
    pub(crate) result: Option<usize>,
    pub(crate) cancellable: bool,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.nodes.iter().map(|n| n.name)).finish()
    }
}

impl Default for Graph {
    fn default() -> Self {
        Self::new()
    }
}

impl Graph {
    /// A graph without stages.
    pub fn new() -> Self {
        Self { nodes: Vec::new(), result: None, cancellable: true }
    }

    /// Adds a stage that leaves nothing behind: there is nothing to undo. `name` is fixed words, unique in the graph. `run`
    /// begins once the stages behind `inputs` are done, and is given what they returned.
    pub fn stage<I, T, F, R>(&mut self, name: &'static str, inputs: I, run: F) -> Output<T>
    where
        I: Inputs,
        T: Serialize + Send + 'static,
        F: FnOnce(StageCx, I::Values) -> R + Send + 'static,
        R: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let index = self.nodes.len();
        let needs = inputs.stages();
        let prepare: Prepare = Box::new(move |all| {
            let values = inputs.values(all)?;
            let run: Run = Box::new(move |cx| {
                async move {
                    let output = run(cx, values).await?;
                    serde_json::to_value(output)
                        .map_err(|e| Error::internal("cannot keep a stage's output", &e))
                }
                .boxed()
            });
            Ok(run)
        });
        self.nodes.push(Node { name, needs, prepare: Some(prepare), undo: None });
        Output { index, of: PhantomData }
    }

    /// Adds a stage with its undo. The undo also runs where `run` failed, was cut off by a crash, or did nothing at all, and
    /// may run more than once: it removes what it finds.
    pub fn undoable<I, T, F, R, U, V>(&mut self, name: &'static str, inputs: I, run: F, undo: U) -> Output<T>
    where
        I: Inputs,
        T: Serialize + Send + 'static,
        F: FnOnce(StageCx, I::Values) -> R + Send + 'static,
        R: Future<Output = Result<T, Error>> + Send + 'static,
        U: Fn(UndoCx) -> V + Send + Sync + 'static,
        V: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let output = self.stage(name, inputs, run);
        if let Some(node) = self.nodes.last_mut() {
            node.undo = Some(Arc::new(move |cx| undo(cx).boxed()));
        }
        output
    }

    /// What `output`'s stage returns is the operation's result.
    pub fn result<T>(&mut self, output: Output<T>) {
        self.result = Some(output.index);
    }

    /// A cancel of this operation is refused: half of it would be worse than all of it.
    pub fn not_cancellable(&mut self) {
        self.cancellable = false;
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|n| n.name == name)
    }
}
