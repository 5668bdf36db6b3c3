//! Images from elsewhere: archives that a user sends, and images of OCI registries.

use crate::{ImageName, KernelName};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Asks for a ticket. Its stream (framed) brings what the source says; the last frame that comes back is the operation that was
/// begun with it ([`Begun`](crate::op::Begun)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenIntake {
    /// The image's name.
    pub image: ImageName,
    /// What it is made of.
    pub source: IntakeSource,
    /// The kernel of the catalogue that it shall boot; the newest one where nothing is said, else the default image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    /// Take the place of an image of that name.
    #[serde(default)]
    pub force: bool,
    /// The user who asks.
    pub owner: u32,
}

/// What an image is made of, and what the ticket's stream brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntakeSource {
    /// The stream brings an archive: of a root file system, or of an OCI layout.
    Archive {
        /// What it was called where it comes from, for people.
        name: String,
    },
    /// An image of an OCI registry, that the image-agent fetches. The stream brings the [`Credentials`] for it, or nothing.
    Registry {
        /// Its reference: `[registry/]repository[:tag][@digest]`.
        reference: String,
        /// Ask the registry over plain HTTP. One on the host's own loopback is in any case.
        #[serde(default)]
        insecure_http: bool,
    },
}

/// Who asks a registry. Only ever on a stream between processes of one host: not on the bus, in a log or in an operation's record.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The user's name there.
    pub username: String,
    /// The password, or a token in its place.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// The most that a stream brings for [`IntakeSource::Registry`], in bytes.
pub const MAX_CREDENTIALS: usize = 64 << 10;
