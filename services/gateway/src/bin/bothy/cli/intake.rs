//! Bringing images in from elsewhere.

use bothy_contract::{ImageName, KernelName};
use clap::{Args, Subcommand, ValueHint};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum Intake {
    /// Make an image of an archive: of a root file system, or of an OCI image; or of an OCI layout's directory
    Import(Import),
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The image's name
    pub(crate) image: ImageName,
    /// A tar (as it is, or compressed with gzip or zstd), the directory of an OCI layout, or `-` for standard input
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// The kernel of `bothy kernel list` that it boots [default: the newest one, else the default image's]
    #[arg(long, value_name = "KERNEL")]
    pub(crate) kernel: Option<KernelName>,
    /// Take the place of an image of that name
    #[arg(long, short)]
    pub(crate) force: bool,
}
