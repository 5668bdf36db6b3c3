//! Words about repositories.

use super::DEFAULT_GUEST_PATH;
use bothy_contract::workspace::ExportFormat;
use bothy_pack::{Mode, PackOptions};
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum Workspace {
    /// Put a repository into a machine
    Prepare(Prepare),
    /// Bring what was done since the repository was put there back
    Export(Export),
    /// Bring what has changed here since into the machine: tracked files, not commits
    Sync(Sync),
    /// Show how the repository in the machine stands, and whether this one has moved on
    Status {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The repository that it came from
        #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
        path: PathBuf,
        /// Where the repository is in the machine
        #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
        guest_path: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    /// Name, id, or a unique prefix of either
    pub(crate) vm: String,
    /// The repository
    #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) parts: Parts,
    /// Where it goes in the machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
    pub(crate) guest_path: String,
    /// Replace a repository that was put there before, even if work in it is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// List what would go, with sizes, and send nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Which parts of a repository go.
#[derive(Debug, Clone, Args)]
pub(crate) struct Parts {
    /// How much of it
    #[arg(long, value_enum, default_value_t = How::Shallow, value_name = "MODE")]
    pub(crate) mode: How,
    /// Make a branch of this name in the machine only
    #[arg(long, value_name = "NAME")]
    pub(crate) branch: Option<String>,
    /// Where that branch begins [default: HEAD, with the changes of the working tree]
    #[arg(long, value_name = "REV", requires = "branch")]
    pub(crate) from: Option<String>,
    /// Take untracked files along (not ignored ones)
    #[arg(long)]
    pub(crate) include_untracked: bool,
    /// Take ignored files along whose path from the top matches; `**` is any directories
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Let nobody in the machine write to it, until the machine starts again
    #[arg(long)]
    pub(crate) readonly: bool,
    /// Install the tools that it pins, in the background; the machine must reach the outside
    #[arg(long)]
    pub(crate) bootstrap: bool,
}

impl Parts {
    /// What that means to a pack.
    pub(crate) fn options(&self) -> PackOptions {
        PackOptions {
            mode: match self.mode {
                How::Shallow => Mode::Shallow,
                How::Full => Mode::Full,
                How::Copy => Mode::Copy,
            },
            include_untracked: self.include_untracked,
            include: self.include.clone(),
            branch: self.branch.clone(),
            from: self.from.clone(),
            list: false,
            part: None,
        }
    }
}

/// How much of a repository goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum How {
    /// Recent history of the branch, and the tracked files as they are
    Shallow,
    /// All history with all branches and tags, and the tracked files as they are
    Full,
    /// The files without git; nothing can be exported again
    Copy,
}

#[derive(Debug, Args)]
pub(crate) struct Sync {
    /// Name, id, or a unique prefix of either
    pub(crate) vm: String,
    /// The repository that it came from
    #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
    pub(crate) path: PathBuf,
    /// Take files from here that were changed on both sides
    #[arg(long)]
    pub(crate) force: bool,
    /// Go on with whatever changes, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
    /// Where the repository is in the machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
    pub(crate) guest_path: String,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Name, id, or a unique prefix of either
    pub(crate) vm: String,
    /// The file to save it to [default: stdout for a patch]
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// One patch of all changes, or a git bundle of the commits
    #[arg(long, value_enum, default_value_t = Form::Patch, value_name = "FORM")]
    pub(crate) format: Form,
    /// Apply it to a repository here, whose tracked files must have no changes
    #[arg(long, conflicts_with_all = ["output", "format"])]
    pub(crate) apply: bool,
    /// With --apply: merge it, also into files with changes of their own; what cannot be merged is left as conflicts
    #[arg(long = "3way", requires = "apply")]
    pub(crate) three_way: bool,
    /// The repository here, to apply to or to check a bundle against
    #[arg(long, value_name = "DIR", default_value = ".", value_hint = ValueHint::DirPath)]
    pub(crate) repository: PathBuf,
    /// What changed since this revision of the guest's, instead of since the import
    #[arg(long, value_name = "REV")]
    pub(crate) base: Option<String>,
    /// Where the repository is in the machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
    pub(crate) guest_path: String,
}

/// In which form work comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    Patch,
    Bundle,
}

impl From<Form> for ExportFormat {
    fn from(form: Form) -> Self {
        match form {
            Form::Patch => Self::Patch,
            Form::Bundle => Self::Bundle,
        }
    }
}
