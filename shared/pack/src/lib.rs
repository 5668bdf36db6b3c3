//! A git repository as one stream, and the checks on what comes back.
//!
//! The CLI uses this crate **as the user**: [`Repository::open`] finds the repository, [`Repository::pack`] writes it
//! as one tar stream (format in `docs/workspaces.md`), and [`inspect_patch`] judges a patch from a guest, which is
//! hostile, before anything is written or recommended. The workspace-agent uses only [`Meta`], the first entry of the
//! stream. Nothing here but [`Repository::apply`] ever changes the user's repository: `git` runs without hooks, without optional locks and
//! without the caller's `GIT_*` variables.

mod apply;
mod bundle;
mod entries;
mod git;
mod history;
mod lines;
mod meta;
mod modules;
mod names;
mod pack;
mod packing;
mod patch;
mod pins;
mod repository;
mod standing;
mod tracked;

pub use apply::Applied;
pub use bundle::{BundleSummary, EXPORT_REF};
pub use history::RECENT;
pub use meta::{FORMAT, META_MAX, Meta, Mode, ObjectFormat};
pub use pack::{PackOptions, PackSummary, Packed};
pub use patch::{MAX_FILES, MAX_INFLATED, MAX_PATCH, PatchSummary, inspect_patch};
pub use pins::{PIN_FILES, Pin};
pub use repository::Repository;
pub use standing::Standing;
pub use tracked::{Places, SyncPack, Tracked};

/// Names of the entries of a pack. `META` is first; the others follow in the order of `docs/workspaces.md`.
pub mod entry {
    /// What the pack is: [`crate::Meta`] as JSON.
    pub const META: &str = "meta.json";
    /// The boundary of a shallow clone, as git's own `shallow` file has it; there only for shallow clones.
    pub const SHALLOW: &str = "shallow";
    /// The directory of the history: packs of git's under git's names for them, each with its index behind it.
    pub const HISTORY: &str = "history";
    /// Commands for `git update-ref --stdin`, where other refs than HEAD go.
    pub const REFS: &str = "refs";
    /// From HEAD to the index: what was staged.
    pub const STAGED: &str = "staged.patch";
    /// From HEAD to the tracked files of the working tree.
    pub const TRACKED: &str = "tracked.patch";
    /// The directory of untracked files, where they were asked for.
    pub const UNTRACKED: &str = "untracked";
    /// The directory of all files, where no history goes.
    pub const FILES: &str = "files";
    /// The directory of the submodules, each with its own [`MODULE`], [`HISTORY`] and so on in a directory of it: 1, 2 and so on.
    pub const MODULES: &str = "modules";
    /// What a submodule is, a fact a line: its path, head, object format, branch, `user.name` and `user.email`, the last three of
    /// which may be empty.
    pub const MODULE: &str = "module";
    /// The last entry, empty: without it a pack is not whole.
    pub const END: &str = "end";
}
