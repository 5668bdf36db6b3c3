//! Keeping images.

use bothy_contract::ImageName;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum Keep {
    /// Compute all digests of an image anew and say what is damaged
    ///
    /// The exit status is 1 where something is.
    Verify {
        /// Its name [default: all images]
        image: Option<ImageName>,
    },
    /// Remove images that no machine uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Their names
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<ImageName>,
    },
    /// Remove files that no image and no machine needs
    Prune {
        /// Images that no machine uses, too, but for the default one
        #[arg(long, short)]
        all: bool,
        /// Only say what would go
        #[arg(long)]
        dry_run: bool,
    },
}
