//! Words about repositories.

use super::DEFAULT_GUEST_PATH;
use bothy_contract::workspace::ExportFormat;
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum Workspace {
    /// Put a repository into a machine
    Prepare {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The repository
        #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
        path: PathBuf,
        /// Take untracked files along (ignored ones never)
        #[arg(long)]
        include_untracked: bool,
        /// Where it goes in the machine
        #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
        guest_path: String,
    },
    /// Bring what was done since the repository was put there back
    Export(Export),
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
