//! What one can type behind `bothy vm`.

use super::{
    Policy, Shape,
    idle::Rest,
    network::Reach,
    values::{age, key_value, mib, signal},
};
use bothy_contract::{
    Error, GroupName,
    net::Publish,
    net_group::check_groups,
    vm::{LogSource, VmRecord},
};
use bothy_gateway::api::SetBody;
use clap::{Args, Subcommand, ValueEnum};
use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

/// Machines that are named.
#[derive(Debug, Args)]
pub(crate) struct Refs {
    /// Names, ids, or unique prefixes of either
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
}

/// Machines that are named, or all that it makes sense for.
#[derive(Debug, Args)]
pub(crate) struct Several {
    /// Names, ids, or unique prefixes of either
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "VM")]
    pub(crate) vms: Vec<String>,
    /// All of your machines for which it makes sense (root: root's own)
    #[arg(long)]
    pub(crate) all: bool,
}

/// The grace of a stop.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Grace {
    /// How long the guest may take to power off before it is killed, in seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    grace: u32,
}

impl Grace {
    /// In milliseconds.
    pub(crate) fn ms(self) -> u64 {
        u64::from(self.grace) * 1000
    }
}

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
    Show(Refs),
    /// Start stopped machines
    Start {
        #[command(flatten)]
        which: Several,
        /// Start them even if the host's memory does not hold them
        #[arg(long)]
        force: bool,
    },
    /// Stop machines; their disks stay
    Stop {
        #[command(flatten)]
        which: Several,
        #[command(flatten)]
        grace: Grace,
    },
    /// Stop machines and start them again, on the same disks
    Restart {
        #[command(flatten)]
        which: Several,
        #[command(flatten)]
        grace: Grace,
    },
    /// Have machines stand still; their memory stays, and the next use lets them go on
    Pause(Several),
    /// Put machines' memory on disk; the next use brings them back
    Suspend(Several),
    /// Let paused and suspended machines go on
    Resume {
        #[command(flatten)]
        which: Several,
        /// Bring them back even if the host's memory does not hold them
        #[arg(long)]
        force: bool,
    },
    /// End machines at once: their VMM gets a signal, their guest is not asked; disks stay
    Kill {
        #[command(flatten)]
        which: Refs,
        /// The signal: a name or a number of one that ends a process
        #[arg(long, short, default_value = "KILL", value_parser = signal, allow_hyphen_values = true)]
        signal: i32,
    },
    /// Change machines: more disk, another size, what they reach, published ports
    Set {
        #[command(flatten)]
        which: Refs,
        #[command(flatten)]
        change: Change,
    },
    /// Show what a machine may reach and what it was denied, or change what it may reach, at once
    Egress {
        /// Name, id, or a unique prefix of either
        vm: String,
        #[command(subcommand)]
        policy: Option<Policy>,
    },
    /// Delete machines with their disks
    #[command(visible_alias = "rm")]
    Delete(Delete),
    /// Delete stopped and failed machines of yours (root: root's own)
    Prune(Prune),
    /// Show how much machines use
    Stats {
        /// Names, ids, or unique prefixes of either [default: all that run]
        #[arg(value_name = "VM")]
        vms: Vec<String>,
        /// Show it anew every two seconds, until Ctrl-C
        #[arg(long, short)]
        watch: bool,
    },
    /// Show on which ports machines listen, and how to get at them
    Ports(Refs),
    /// Run a command in a machine
    Exec(Exec),
    /// Open a shell in a machine, through its channel: no network, no ssh needed
    Shell {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The user whose login shell it is
        #[arg(long, short, default_value = "root")]
        user: String,
        /// The directory to begin in [default: the home directory]
        #[arg(long, short, value_name = "DIR")]
        workdir: Option<String>,
    },
    /// Log in with ssh
    Ssh {
        /// Name, id, or a unique prefix of either
        vm: String,
        /// The user to log in as
        #[arg(long, short, default_value = "root")]
        user: String,
        /// Lend it your ssh agent (ssh's own -A)
        #[arg(long)]
        ssh_agent: bool,
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
        /// Begin with the last lines, that many [default: all that is kept]
        #[arg(long, short = 'n', value_name = "N")]
        tail: Option<u32>,
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

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Change {
    /// Virtual processors; from the next start on
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory: 512M, 2G; a bare number is MiB; from the next start on
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    memory: Option<u64>,
    /// Work disk, which holds the home directory; it only grows
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    disk: Option<u64>,
    /// System disk, which holds what is written elsewhere; it only grows
    #[arg(long, value_name = "SIZE", value_parser = mib)]
    system_disk: Option<u64>,
    /// Whether the machine may reach the outside through the host: short for `--egress open` or `none`
    #[arg(long, value_enum, value_name = "WHETHER", conflicts_with = "egress")]
    nat: Option<Switch>,
    /// What the machine may reach outside; at once
    #[arg(long, value_enum, value_name = "POLICY")]
    egress: Option<Reach>,
    /// Answer on a TCP port of this host for one of the machine, besides those published already; at once
    #[arg(long, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    publish: Vec<Publish>,
    /// Do not answer on a port of this host any more
    #[arg(long, value_name = "[ADDR:]HOSTPORT", value_parser = Publish::parse_listen)]
    unpublish: Vec<SocketAddr>,
    /// Join a group, besides those it is in: your machines that share one reach each other; at once
    #[arg(long = "group", value_name = "NAME")]
    groups: Vec<GroupName>,
    /// Leave a group; connections to machines that share no other one with it end
    #[arg(long = "no-group", value_name = "NAME")]
    no_groups: Vec<GroupName>,
    /// What to do with it when nobody uses it: no exec, no ssh, no traffic
    #[arg(long, value_name = "WHAT")]
    idle: Option<Rest>,
    /// After how long: 10m, 2h, 1d
    #[arg(long, value_name = "TIME", value_parser = age, requires = "idle")]
    after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl Change {
    /// What is to be made of `vm`.
    ///
    /// # Errors
    /// When a port is to be published twice, one that is not published is to go, or a group is to be left that it is not in.
    pub(crate) fn of(&self, vm: &VmRecord) -> Result<SetBody, Error> {
        let groups = !self.groups.is_empty() || !self.no_groups.is_empty();
        let ports = !self.publish.is_empty() || !self.unpublish.is_empty();
        Ok(SetBody {
            cpus: self.cpus,
            memory_mib: self.memory,
            work_mib: self.disk,
            system_mib: self.system_disk,
            nat: self.nat.map(|nat| nat == Switch::On),
            egress: self.egress.map(Into::into),
            publish: if ports { Some(self.ports(vm)?) } else { None },
            groups: if groups { Some(self.groups(vm)?) } else { None },
            idle: Rest::policy(self.idle, self.after)?,
        })
    }

    /// The groups that `vm` is in then.
    fn groups(&self, vm: &VmRecord) -> Result<BTreeSet<GroupName>, Error> {
        let mut groups = vm.groups.clone();
        for name in &self.no_groups {
            if !groups.remove(name) {
                return Err(Error::not_found(format!("{} is not in a group {name}", vm.name))
                    .hint(format!("`bothy vm show {}` shows its groups", vm.name)));
            }
        }
        groups.extend(self.groups.iter().cloned());
        check_groups(&groups)?;
        Ok(groups)
    }

    /// The ports that `vm` publishes then.
    fn ports(&self, vm: &VmRecord) -> Result<Vec<Publish>, Error> {
        let mut ports = vm.publish.clone();
        for listen in &self.unpublish {
            let before = ports.len();
            ports.retain(|port| port.listen != *listen);
            if ports.len() == before {
                return Err(Error::not_found(format!("{} publishes nothing at {listen}", vm.name))
                    .hint(format!("`bothy vm show {}` shows its published ports", vm.name)));
            }
        }
        for port in &self.publish {
            // Said once more is no change.
            if !ports.contains(port) {
                ports.push(*port);
            }
        }
        Publish::check(&ports)?;
        Ok(ports)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    #[command(flatten)]
    pub(crate) which: Several,
    /// Even while they run; with --all, without asking
    #[arg(long, short)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Only those that have been so for longer than this: 30m, 12h, 7d, 2w
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub(crate) older_than: Option<Duration>,
    /// Only list them
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
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
    /// The directory to run in [default: the image's, else the home directory]
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The user to run as [default: the image's, else root]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Name, id, or a unique prefix of either
    pub(crate) vm: String,
    /// The command and its arguments [default: a shell]
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}
