//! Identity, and repositories in and out of guests.

use crate::VmId;
use serde::{Deserialize, Serialize};

/// The public part of who the user is. No secret ever rides the bus, so none has a field here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Lines for `authorized_keys`.
    #[serde(default)]
    pub ssh_public_keys: Vec<String>,
    /// `user.name` of git.
    #[serde(default)]
    pub git_name: Option<String>,
    /// `user.email` of git.
    #[serde(default)]
    pub git_email: Option<String>,
}

/// Puts an identity into a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncIdentity {
    /// The VM.
    pub vm: VmId,
    /// The guest's home.
    pub home: String,
    /// Who.
    pub identity: Identity,
}

/// Opens a stream that takes a packed repository and puts it into a guest.
///
/// The stream carries `bothy-tickets` frames: the pack (see `docs/workspaces.md`) towards the agent, then one
/// [`ImportReport`] back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenImport {
    /// The VM.
    pub vm: VmId,
    /// Where it goes: an absolute path in the guest.
    pub guest_path: String,
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportReport {
    /// Where it went.
    pub guest_path: String,
    /// The commit that is checked out.
    pub head: String,
    /// The branch, unless the head is detached.
    #[serde(default)]
    pub branch: Option<String>,
    /// Bytes taken from the host.
    pub bytes: u64,
}

/// Opens a stream that gives all changes since the import as one patch.
///
/// The stream carries `bothy-tickets` frames: the patch, then one [`ExportReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenExport {
    /// The VM.
    pub vm: VmId,
    /// Where the repository is in the guest.
    pub guest_path: String,
}

/// What an export found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// Bytes of the patch; 0 where nothing changed.
    pub bytes: u64,
    /// Files that the patch touches.
    pub files: u64,
    /// Commits made in the guest since the import.
    pub commits: u64,
}

/// Asks how the workspace-agent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetWorkspaceHost {}

/// How the workspace-agent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceHost {
    /// VMs that an import or an export is at work on.
    pub busy: u32,
}
