//! What one can type.

mod catalogue;
mod idle;
mod intake;
mod network;
mod values;
mod vm;
mod workspace;

pub(crate) use catalogue::{Init, Keep, Kernel, Register};
pub(crate) use idle::IdlePolicy;
pub(crate) use intake::{Import, Intake, Pull};
pub(crate) use network::{Network, Policy};
pub(crate) use vm::{Delete, Exec, Prune, Refs, Several, Vm};
pub(crate) use workspace::{Export, Form, How, Parts, Prepare, Sync, Workspace};

use bothy_contract::{ImageName, VmName};
use clap::{Args, Parser, Subcommand, ValueHint};
use std::path::PathBuf;
use values::mib;

/// Throw-away virtual machines for your repository
///
/// `bothy run -- CMD` inside a git repository creates a machine, puts the repository into it, runs the command there
/// and brings what it changed back as a patch.
#[derive(Debug, Parser)]
#[command(name = "bothy", version, disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// The gateway's socket [default: below the run_dir of BOTHY_CONFIG, else /run/bothy/gateway.sock]
    #[arg(long, global = true, env = "BOTHY_SOCKET", value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) socket: Option<PathBuf>,
    /// Print JSON: an array from `list`, else one document for each thing named; errors on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, only results and errors
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command on a repository in a machine of its own
    Run(Run),
    /// Machines
    #[command(subcommand)]
    Vm(Vm),
    /// Repositories in and out of machines
    #[command(subcommand)]
    Workspace(Workspace),
    /// Images that machines boot
    #[command(subcommand)]
    Image(Image),
    /// Kernels that images can boot
    #[command(subcommand)]
    Kernel(Kernel),
    /// Operations: creates, builds and the like, running or over
    #[command(subcommand)]
    Op(Op),
    /// The services of this host
    #[command(subcommand)]
    Host(Host),
    /// Check what bothy needs, and say what to do about what is missing
    Doctor,
    /// Show the versions of this program and of the gateway
    Version,
    /// Print completions for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Shape {
    /// The machine's name: 1 to 63 of a-z, 0-9 and `-` [default: one is chosen]
    #[arg(long)]
    pub(crate) name: Option<VmName>,
    /// The image to boot
    #[arg(long, default_value_t = ImageName::default_image())]
    pub(crate) image: ImageName,
    /// Virtual processors
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory: 512M, 2G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    pub(crate) memory: Option<u64>,
    /// Work disk, which holds the home directory: 10G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    pub(crate) disk: Option<u64>,
    /// System disk, which holds what is written elsewhere: 10G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    pub(crate) system_disk: Option<u64>,
    #[command(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    pub(crate) idle: IdlePolicy,
    /// Create it even if the host's memory does not hold it
    #[arg(long)]
    pub(crate) force: bool,
    /// Boot it, even if there is a template that it could be resumed from
    #[arg(long)]
    pub(crate) cold: bool,
    /// Show when each stage of the create began and how long it took
    #[arg(long)]
    pub(crate) timings: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The repository
    #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Delete the machine at the end, unless its work could not be brought back
    #[arg(long)]
    pub(crate) rm: bool,
    /// Keep the machine at the end (the default)
    #[arg(long, conflicts_with = "rm")]
    pub(crate) keep: bool,
    #[command(flatten)]
    pub(crate) parts: Parts,
    /// Where the repository goes in the machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
    pub(crate) guest_path: String,
    /// Lend the command your ssh agent; whoever is root in the machine can use its keys meanwhile
    #[arg(long)]
    pub(crate) ssh_agent: bool,
    /// Where to save the patch [default: $XDG_STATE_HOME/bothy/patches/<repository>-<machine>.patch]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) patch: Option<PathBuf>,
    /// The command and its arguments [default: a shell]
    #[arg(last = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub(crate) command: Vec<String>,
}

/// Where a repository goes where nothing else is said.
pub(crate) const DEFAULT_GUEST_PATH: &str = "/root/repo";

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build an image from a recipe that came with bothy
    Build {
        /// The recipe, and the name of the image
        #[arg(default_value_t = ImageName::default_image())]
        image: ImageName,
        /// Build even if an image of the same recipe is there
        #[arg(long, short)]
        force: bool,
    },
    /// List the images
    #[command(visible_alias = "ls")]
    List,
    /// Show one image
    Show {
        /// Its name
        #[arg(default_value_t = ImageName::default_image())]
        image: ImageName,
    },
    /// Make the template of an image: VMs of that shape are resumed from it instead of booted
    Warm(Warm),
    /// List the templates
    Templates,
    #[command(flatten)]
    Intake(Intake),
    #[command(flatten)]
    Keep(Keep),
}

#[derive(Debug, Args)]
pub(crate) struct Warm {
    /// The image
    #[arg(default_value_t = ImageName::default_image())]
    pub(crate) image: ImageName,
    /// Virtual processors
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory: 512M, 2G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    pub(crate) memory: Option<u64>,
    /// The smallest system disk that VMs of it may have: 10G; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    pub(crate) system_disk: Option<u64>,
    /// Make it anew, even if it is there
    #[arg(long, short)]
    pub(crate) force: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Op {
    /// List the newest operations
    #[command(visible_alias = "ls")]
    List {
        /// How many
        #[arg(long, short = 'n', default_value_t = 20)]
        limit: u32,
    },
    /// Show one operation with its stages
    Show {
        /// Its id
        op: String,
        /// Watch it until it is over
        #[arg(long, short)]
        watch: bool,
    },
    /// Stop an operation and undo what it did
    Cancel {
        /// Its id
        op: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Host {
    /// Start the bus and the services, and stay with them until Ctrl-C
    Up(HostUp),
    /// Stop what `host up` started
    Down(HostDown),
    /// Show how the services stand
    Status,
    /// Write the bus' identities and configuration, for the systemd units
    #[command(hide = true)]
    BusSetup {
        /// The host's configuration
        #[arg(long, env = "BOTHY_CONFIG", default_value = bothy_config::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Become a program that ends when its parent does
    #[command(hide = true)]
    Child {
        /// Who must be the parent
        #[arg(long)]
        parent: u32,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        argv: Vec<std::ffi::OsString>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct HostUp {
    /// What survives a reboot: configuration, databases, images, disks
    #[arg(long, value_name = "DIR", default_value = "/var/lib/bothy", value_hint = ValueHint::DirPath)]
    pub(crate) state: PathBuf,
    /// What does not: sockets [default: what bothy.toml says, else /run/bothy]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) run_dir: Option<PathBuf>,
    /// Stay in the foreground (the default, and the only way)
    #[arg(long)]
    pub(crate) foreground: bool,
    /// The directory of image recipes, for a new bothy.toml
    #[arg(long, value_name = "DIR", env = "BOTHY_RECIPES", value_hint = ValueHint::DirPath)]
    pub(crate) recipes: Option<PathBuf>,
    /// The static bothy-guest, for a new bothy.toml
    #[arg(long, value_name = "FILE", env = "BOTHY_GUEST", value_hint = ValueHint::FilePath)]
    pub(crate) guest: Option<PathBuf>,
    /// The nats-server program, for a new bothy.toml
    #[arg(long, value_name = "FILE", env = "BOTHY_NATS_SERVER", value_hint = ValueHint::FilePath)]
    pub(crate) bus_server: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct HostDown {
    /// The state directory of the host [default: that of BOTHY_CONFIG, else /var/lib/bothy]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state: Option<PathBuf>,
    /// Stop the machines that run
    #[arg(long)]
    pub(crate) stop_vms: bool,
    /// Leave the machines that run alone: the next `host up` finds them again
    #[arg(long, conflicts_with = "stop_vms")]
    pub(crate) keep_vms: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_keep_their_own_flags() {
        let cli = Cli::try_parse_from(["bothy", "run", ".", "--rm", "--", "ls", "--json", "-q"]).unwrap();
        assert!(!cli.json && !cli.quiet);
        let Command::Run(run) = cli.command else { panic!() };
        assert_eq!(run.command, ["ls", "--json", "-q"]);
        let cli = Cli::try_parse_from(["bothy", "vm", "ssh", "web", "-L", "1:h:2", "uptime"]).unwrap();
        let Command::Vm(Vm::Ssh { vm, args, .. }) = cli.command else { panic!() };
        assert_eq!((vm.as_str(), args.len()), ("web", 3));
        assert!(Cli::try_parse_from(["bothy", "run", "--rm", "--keep"]).is_err());
        assert!(Cli::try_parse_from(["bothy", "vm", "proxy", "web", "0"]).is_err());
    }

    #[test]
    fn machines_are_named_or_all_of_them_are_meant() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        for verb in ["start", "stop", "restart", "delete"] {
            assert!(parse(&format!("bothy vm {verb} a b")) && parse(&format!("bothy vm {verb} --all")));
            assert!(!parse(&format!("bothy vm {verb}")) && !parse(&format!("bothy vm {verb} a --all")));
        }
        assert!(
            !parse("bothy vm kill --all") && !parse("bothy vm set web") && !parse("bothy vm set --nat on")
        );
        assert!(parse("bothy vm set web db --nat on --memory 2G") && parse("bothy vm stats"));
    }

    #[test]
    fn what_a_machine_reaches_is_said_in_one_way() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        for command in ["vm create", "run"] {
            let parse = |options: &str| parse(&format!("bothy {command} {options}"));
            assert!(parse("--nat") && parse("--egress none") && parse("--allow a.b,*.c.d --allow e.f"));
            assert!(parse("--publish 8080:80 --publish [::1]:8081:80"));
            for bad in ["--nat --egress open", "--nat --allow a.b", "--egress open --allow a.b"] {
                assert!(!parse(bad), "{bad}");
            }
            for bad in ["--allow *", "--allow 10.0.0.1", "--egress allow", "--publish 80", "--publish 0:80"] {
                assert!(!parse(bad), "{bad}");
            }
        }
        assert!(parse("bothy vm set web --publish 1:1 --unpublish 2 --egress open"));
        assert!(
            !parse("bothy vm set web --egress open --nat on") && !parse("bothy vm set web --unpublish x")
        );
        assert!(parse("bothy vm egress web") && parse("bothy vm egress web allow a.b c.d --only"));
        assert!(!parse("bothy vm egress web allow") && !parse("bothy vm egress web maybe"));
    }
}
