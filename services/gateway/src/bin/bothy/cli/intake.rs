//! Bringing images in from elsewhere.

use bothy_contract::{ImageName, KernelName};
use clap::{Args, Subcommand, ValueHint};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum Intake {
    /// Make an image of an archive: of a root file system, or of an OCI image; or of an OCI layout's directory
    Import(Import),
    /// Make an image of one of an OCI registry
    Pull(Pull),
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The image there: `[REGISTRY/]REPOSITORY[:TAG]` or `...@sha256:DIGEST`
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
    /// The image's name here [default: the repository's last part]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<ImageName>,
    /// The kernel of `bothy kernel list` that it boots [default: the newest one, else the default image's]
    #[arg(long, value_name = "KERNEL")]
    pub(crate) kernel: Option<KernelName>,
    /// Ask the registry over plain HTTP; one on this host's loopback is in any case
    #[arg(long)]
    pub(crate) insecure_http: bool,
    /// Take the place of an image of that name
    #[arg(long, short)]
    pub(crate) force: bool,
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
