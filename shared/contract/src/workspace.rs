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

/// Asks for the files of an identity in a home that has none yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityFiles {
    /// The guest's home.
    pub home: String,
    /// Who.
    pub identity: Identity,
}

/// Files for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFiles {
    /// In any order.
    pub files: Vec<GuestFile>,
}

/// One of them, with nothing secret in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    /// Where, absolute.
    pub path: String,
    /// What.
    pub content: String,
    /// Its permission bits.
    pub mode: u32,
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
    /// Replace an import that is there even if work in it is lost; in a sync, files that both sides changed.
    #[serde(default)]
    pub force: bool,
    /// Nobody in the guest may write to it, until the VM starts again.
    #[serde(default)]
    pub readonly: bool,
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
    /// What changed, where it was a sync.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<SyncReport>,
}

/// What a sync did in the guest's working tree, as the guest tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncReport {
    /// Files that were written or removed.
    pub changed: u64,
    /// Files that both sides had changed; they stay as they were, unless the sync was forced.
    pub conflicts: u64,
    /// The first few of those.
    #[serde(default)]
    pub names: Vec<String>,
}

/// In which form work comes out of a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// One patch of all changes, committed or not.
    #[default]
    Patch,
    /// A git bundle of the commits.
    Bundle,
    /// Nothing but the report, with how the repository stands.
    Status,
}

/// Opens a stream that gives what was done since the import.
///
/// The stream carries `bothy-tickets` frames: the patch or bundle, then one [`ExportReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenExport {
    /// The VM.
    pub vm: VmId,
    /// Where the repository is in the guest.
    pub guest_path: String,
    /// In which form.
    #[serde(default)]
    pub format: ExportFormat,
    /// The revision, in the guest's repository, since which; the import where there is none.
    #[serde(default)]
    pub base: Option<String>,
}

/// What an export found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// Bytes of the patch or bundle; 0 where nothing changed.
    pub bytes: u64,
    /// Files that the patch touches.
    pub files: u64,
    /// Commits made in the guest since the import, or since the base that was asked for.
    pub commits: u64,
    /// How the repository in the guest stands.
    #[serde(default)]
    pub guest: GuestStanding,
    /// The first few submodules and other repositories inside it that are not as they were imported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inner: Vec<Inner>,
    /// How many those are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub inner_count: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A repository inside a repository of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inner {
    /// Below the repository, made fit for people; the end of a long one is cut.
    pub path: String,
    /// What became of it.
    pub state: InnerState,
}

/// What became of a repository inside a repository of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InnerState {
    /// Its files changed: a patch has that.
    Changed,
    /// It has another commit checked out than was imported: a patch has what that means for its files, but not the commit.
    Commits,
    /// It was imported, and there is no repository any longer. No patch says that.
    Gone,
    /// It was not imported: nothing of it comes out.
    Left,
}

/// How a repository in a guest stands, as the guest tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStanding {
    /// The commit that was imported.
    #[serde(default)]
    pub base: String,
    /// The tree of the tracked files that were imported.
    #[serde(default)]
    pub tracked: Option<String>,
    /// The commit that is checked out; none where there is none any longer.
    #[serde(default)]
    pub head: Option<String>,
    /// Its branch, unless the head is detached.
    #[serde(default)]
    pub branch: Option<String>,
    /// Commits of the import that the head has not any longer.
    #[serde(default)]
    pub behind: u64,
    /// Files that are staged. This and the next two are not counted for a patch, which has them all.
    #[serde(default)]
    pub staged: u64,
    /// Tracked files with changes that are not staged.
    #[serde(default)]
    pub unstaged: u64,
    /// New files that are not tracked.
    #[serde(default)]
    pub untracked: u64,
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
