//! Images of containers as they come: what their documents say ([`documents`]), and which layers an archive holds and where
//! ([`look_into`]). All of it is hostile until it has been looked at: what is read is bounded, and each document is held
//! against the digest that led to it. Layers are only found here; crate `bothy-flatten` reads them.

pub mod documents;
mod layout;

pub use layout::look_into;

use bothy_contract::image::Defaults;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A layer in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerAt {
    /// The file.
    pub file: PathBuf,
    /// Where it begins there.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// The SHA-256 that it must have as it is there.
    pub digest: Option<String>,
    /// The SHA-256 that it must have once decompressed.
    pub diff_id: Option<String>,
}

/// What an archive was found to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The lowest first.
    pub layers: Vec<LayerAt>,
    /// What its processes get where nothing else is said.
    pub defaults: Defaults,
    /// Its digest, where it is an OCI image; else it is a root file system.
    pub digest: Option<String>,
}

impl Contents {
    /// The layers, as they are laid over one another.
    pub fn layers(&self) -> Vec<bothy_flatten::Layer> {
        let layer = |at: &LayerAt| bothy_flatten::Layer {
            file: at.file.clone(),
            offset: at.offset,
            length: Some(at.length),
            digest: at.digest.clone(),
            diff_id: at.diff_id.clone(),
            whiteouts: self.digest.is_some(),
        };
        self.layers.iter().map(layer).collect()
    }
}
