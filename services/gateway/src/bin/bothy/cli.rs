//! What one can type.

use bothy_contract::{Error, ImageName, VmName, vm::LogSource};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;

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
    /// Let the machine reach the outside through the host
    #[arg(long)]
    pub(crate) nat: bool,
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
    /// Take untracked files along (ignored ones never)
    #[arg(long)]
    pub(crate) include_untracked: bool,
    /// Where the repository goes in the machine
    #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
    pub(crate) guest_path: String,
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
pub(crate) enum Vm {
    /// Create a machine and wait until it is ready
    Create {
        #[command(flatten)]
        shape: Shape,
    },
    /// List your machines
    #[command(visible_alias = "ls")]
    List,
    /// Show machines
    Show {
        /// Names, ids, or unique prefixes of either
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
    },
    /// Start stopped machines
    Start {
        /// Names, ids, or unique prefixes of either
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
    },
    /// Stop machines; their disks stay
    Stop {
        /// Names, ids, or unique prefixes of either
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
        /// How long the guest may take to power off before it is killed, in seconds
        #[arg(long, default_value_t = 20, value_name = "SECONDS")]
        grace: u32,
    },
    /// Delete machines with their disks
    #[command(visible_alias = "rm")]
    Delete {
        /// Names, ids, or unique prefixes of either
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
        /// Even while they run
        #[arg(long, short)]
        force: bool,
    },
    /// Run a command in a machine
    Exec(Exec),
    /// Log in with ssh
    Ssh {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The user to log in as
        #[arg(long, short, default_value = "root")]
        user: String,
        /// What else ssh gets: options, then a command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Show what a guest wrote to its console, or its VMM to its log
    Logs {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// Which log
        #[arg(long, value_enum, default_value_t = Source::Console)]
        source: Source,
        /// Go on as it grows
        #[arg(long, short)]
        follow: bool,
    },
    /// Connect stdin and stdout to a TCP port of a machine
    Proxy {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The port
        #[arg(value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// The guest's serial console
    Console,
    /// The VMM and its holder
    Vmm,
}

impl From<Source> for LogSource {
    fn from(source: Source) -> Self {
        match source {
            Source::Console => Self::Console,
            Source::Vmm => Self::Vmm,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Give the command a terminal (implies -i)
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Pass stdin on to the command
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Set a variable of the command's environment
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) env: Vec<(String, String)>,
    /// The directory to run in [default: the home directory]
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The user to run as
    #[arg(long, short, default_value = "root")]
    pub(crate) user: String,
    /// Name, id, or a unique prefix of either
    pub(crate) vm: String,
    /// The command and its arguments [default: a shell]
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

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
    /// Bring all changes since the repository was put there back as a patch
    Export {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The file to save it to [default: stdout]
        #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
        output: Option<PathBuf>,
        /// Where the repository is in the machine
        #[arg(long, value_name = "PATH", default_value = DEFAULT_GUEST_PATH)]
        guest_path: String,
    },
}

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

/// A size in MiB from `512M`, `2G`, `1T`, `2GiB` or a bare number of MiB.
fn mib(text: &str) -> Result<u64, Error> {
    let wrong = || {
        Error::invalid(format!("{text:?} is not a size"))
            .hint("give a number with M, G or T behind it, such as `2G`")
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits).ok_or_else(wrong)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 1,
        "g" | "gib" => 1 << 10,
        "t" | "tib" => 1 << 20,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)
}

fn key_value(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::invalid(format!("{text:?} is not of the form KEY=VALUE"))),
    }
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
    fn sizes() {
        assert_eq!(mib("512").unwrap(), 512);
        assert_eq!(mib("512M").unwrap(), 512);
        assert_eq!(mib("2g").unwrap(), 2048);
        assert_eq!(mib("1TiB").unwrap(), 1 << 20);
        for bad in ["", "G", "-1", "1.5G", "1K", "2GG", "99999999999999999999", "18446744073709551615T", "é"]
        {
            assert!(mib(bad).is_err(), "{bad}");
        }
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
}
