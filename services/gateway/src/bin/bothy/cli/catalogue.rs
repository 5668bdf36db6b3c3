//! Keeping images and kernels.

use bothy_contract::{ImageName, KernelName, image::WaitService};
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;

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
    /// Register a root file system of this host as an image, where it is
    Register(Register),
    /// Make the files of a registered image bothy's own, by copying them
    Promote {
        /// Its name
        image: ImageName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Register {
    /// The image's name
    pub(crate) image: ImageName,
    /// An ext4 file system in a file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) rootfs: PathBuf,
    /// Its kernel: one of `bothy kernel list`, or a file (a path with a `/`): a bzImage or a vmlinux
    #[arg(long, value_name = "KERNEL", required_unless_present = "kernel_from_rootfs")]
    pub(crate) kernel: Option<String>,
    /// Boot the kernel that the root file system has in /boot, with its modules
    #[arg(long, conflicts_with_all = ["kernel", "modules"])]
    pub(crate) kernel_from_rootfs: bool,
    /// The modules of a kernel in a file: .../lib/modules/<release>
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// An archive that the kernel unpacks before bothy's own initramfs
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) initrd: Option<PathBuf>,
    /// What is PID 1 in the guest [default: its own /sbin/init where it has one, else bothy's agent]
    #[arg(long, value_enum)]
    pub(crate) init: Option<Init>,
    /// What must answer before a machine is ready: NAME=PORT, or NAME=PORT:SECONDS
    #[arg(long, value_name = "WAIT", value_parser = wait)]
    pub(crate) wait: Vec<WaitService>,
    /// Take the place of an image of that name
    #[arg(long, short)]
    pub(crate) force: bool,
}

/// What is PID 1 in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Init {
    /// The image's own /sbin/init.
    Systemd,
    /// bothy's agent.
    Agent,
}

/// How long a service may take where nothing else is said, in seconds.
const WAIT_S: u32 = 120;

fn wait(text: &str) -> Result<WaitService, String> {
    let wrong = || format!("{text:?} is not NAME=PORT or NAME=PORT:SECONDS");
    let (name, rest) = text.split_once('=').ok_or_else(wrong)?;
    let (port, seconds) = rest.split_once(':').map_or((rest, None), |(port, s)| (port, Some(s)));
    let port = port.parse().ok().filter(|p| *p > 0).ok_or_else(wrong)?;
    let timeout_s = seconds.map_or(Ok(WAIT_S), str::parse).ok().filter(|s| *s > 0).ok_or_else(wrong)?;
    if name.is_empty() {
        return Err(wrong());
    }
    Ok(WaitService { name: name.to_owned(), port: Some(port), unit: None, timeout_s })
}

#[derive(Debug, Subcommand)]
pub(crate) enum Kernel {
    /// Import a kernel from a Debian package, or from a file with its modules
    Import {
        /// A .deb, a bzImage or a vmlinux
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Its modules, where it is no package: .../lib/modules/<release> [default: it has all built in]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        modules: Option<PathBuf>,
        /// What to call it [default: its release]
        #[arg(long)]
        name: Option<KernelName>,
    },
    /// List the kernels
    #[command(visible_alias = "ls")]
    List,
    /// Show one kernel
    Show {
        /// Its name
        kernel: KernelName,
    },
    /// Remove kernels that no image boots
    #[command(visible_alias = "remove")]
    Rm {
        /// Their names
        #[arg(required = true, value_name = "KERNEL")]
        kernels: Vec<KernelName>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_said_in_one_way() {
        let good = wait("web=8080:5").unwrap();
        assert_eq!((good.name.as_str(), good.port, good.timeout_s), ("web", Some(8080), 5));
        assert_eq!(wait("ssh=22").unwrap().timeout_s, WAIT_S);
        for bad in ["", "web", "web=", "=80", "web=0", "web=80:0", "web=80:x", "web=70000"] {
            assert!(wait(bad).is_err(), "{bad}");
        }
    }
}
