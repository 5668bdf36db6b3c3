//! The leak check: what a host of bothy left behind, kind by kind.
//!
//! A [`Scope`] names all that one private host may touch: its network namespace, its state and run directories. A
//! [`Census`] is everything found in that scope; two of them, before and after, differ by what leaked. What is
//! *capacity* rather than leak is left out where it is counted: a warm TAP that no lease names, the files of the bus,
//! images and journals. Nothing here asks bothy: processes come from `/proc`, links and rules from `ip` and `nft`,
//! rows from the database files, so that a wrong answer of bothy cannot hide a leak.

use rusqlite::{Connection, OpenFlags};
use std::{
    collections::BTreeSet,
    fmt,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

/// What one private host may touch.
#[derive(Debug, Clone)]
pub struct Scope {
    /// A path that opens the host's network namespace.
    pub netns: PathBuf,
    /// The host's state directory.
    pub state_dir: PathBuf,
    /// The host's run directory.
    pub run_dir: PathBuf,
    /// The prefix of the pool's TAPs: a free one is capacity.
    pub tap_prefix: String,
}

/// One thing that is there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Thing {
    /// What kind of thing.
    pub kind: Kind,
    /// Which one, for people.
    pub what: String,
}

/// The kinds of things that can leak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process in the namespace, or one that works in the directories.
    Process,
    /// A TAP device.
    Tap,
    /// A bridge, or any other link but `lo`.
    Link,
    /// A table, chain, set element or rule of nftables.
    Nftables,
    /// A mount below the directories.
    Mount,
    /// A loop device whose file is below the directories.
    LoopDevice,
    /// A control group of a VM that this host has ever had.
    Cgroup,
    /// A bound unix socket below the directories.
    Socket,
    /// A file of a VM, or a temporary one.
    File,
    /// A row of a table that does not keep history.
    Row,
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.what)
    }
}

/// Everything in a scope at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census(BTreeSet<Thing>);

/// Tables whose rows are history or memory, not possession.
const HISTORY: [&str; 7] =
    ["op", "op_stage", "op_outbox", "reply", "forwarding", "setting", "sqlite_sequence"];

impl Census {
    /// Counts everything in `scope`.
    ///
    /// # Errors
    /// When a part of the system cannot be read: then nothing is known, and that is not "no leak".
    pub fn take(scope: &Scope) -> Result<Self, CensusError> {
        let mut found = BTreeSet::new();
        processes(scope, &mut found)?;
        let free = links(scope, &mut found)?;
        nftables(scope, &free, &mut found)?;
        mounts(scope, &mut found)?;
        loop_devices(scope, &mut found)?;
        cgroups(scope, &mut found)?;
        for dir in [&scope.state_dir, &scope.run_dir] {
            files(scope, dir, &mut found)?;
        }
        Ok(Self(found))
    }

    /// Only the processes in `scope`.
    ///
    /// # Errors
    /// As for [`Census::take`].
    pub fn of_processes(scope: &Scope) -> Result<Self, CensusError> {
        let mut found = BTreeSet::new();
        processes(scope, &mut found)?;
        Ok(Self(found))
    }

    /// What is in `self` and was not in `before`.
    pub fn since(&self, before: &Census) -> Vec<Thing> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Takes in all of `things`.
    pub fn add(&mut self, things: Vec<Thing>) {
        self.0.extend(things);
    }

    /// Everything of `kinds`.
    pub fn of(&self, kinds: &[Kind]) -> Vec<Thing> {
        self.0.iter().filter(|t| kinds.contains(&t.kind)).cloned().collect()
    }
}

/// Why a census could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum CensusError {
    /// A file or directory.
    #[error("cannot look for leaks")]
    Io(#[from] std::io::Error),
    /// A database.
    #[error("cannot count rows of {path}")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// `ip` or `nft`.
    #[error("`{command}` failed: {stderr}")]
    Tool {
        /// The command line.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// The answer of `ip` or `nft`.
    #[error("unexpected answer of a tool")]
    Answer(#[from] serde_json::Error),
}

fn put(found: &mut BTreeSet<Thing>, kind: Kind, what: impl Into<String>) {
    found.insert(Thing { kind, what: what.into() });
}

fn below(path: &Path, scope: &Scope) -> bool {
    path.starts_with(&scope.state_dir) || path.starts_with(&scope.run_dir)
}

/// A process that went away while it was looked at is no leak, so unreadable entries are passed over.
fn processes(scope: &Scope, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    let netns = fs_err::metadata(&scope.netns)?.ino();
    let me = std::process::id();
    for entry in fs_err::read_dir("/proc")? {
        let dir = entry?.path();
        let Some(pid) = dir.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if pid == me {
            continue;
        }
        let Ok(command_line) = fs_err::read(dir.join("cmdline")) else { continue };
        if command_line.is_empty() {
            continue; // a kernel thread, or a zombie whose parent has not looked yet
        }
        let in_netns = fs_err::metadata(dir.join("ns/net")).is_ok_and(|m| m.ino() == netns);
        let works_there = fs_err::read_link(dir.join("cwd")).is_ok_and(|cwd| below(&cwd, scope));
        let text = String::from_utf8_lossy(&command_line).replace('\0', " ");
        let names_it = text.contains(&*scope.run_dir.to_string_lossy());
        if in_netns || works_there || names_it {
            put(found, Kind::Process, format!("{pid} {}", text.trim_end()));
        }
    }
    Ok(())
}

/// Runs a tool in the scope's namespace and reads the JSON that it prints.
fn tool(scope: &Scope, argv: &[&str]) -> Result<serde_json::Value, CensusError> {
    let output =
        Command::new("nsenter").arg(format!("--net={}", scope.netns.display())).args(argv).output()?;
    if !output.status.success() {
        return Err(CensusError::Tool {
            command: argv.join(" "),
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Returns the names of the TAPs that are warm and free, as JSON has them.
fn links(scope: &Scope, found: &mut BTreeSet<Thing>) -> Result<BTreeSet<String>, CensusError> {
    let mut free = BTreeSet::new();
    let leased = leased_taps(scope)?;
    let links = tool(scope, &["ip", "-j", "-d", "link"])?;
    for link in links.as_array().into_iter().flatten() {
        let name = link["ifname"].as_str().unwrap_or_default();
        match link["linkinfo"]["info_kind"].as_str() {
            _ if name == "lo" => {}
            Some("tun") if name.starts_with(&scope.tap_prefix) && !leased.contains(name) => {
                // Warm and free: capacity. It shows as a leak only once the pool itself should be gone.
                put(found, Kind::Tap, format!("{name} (free)"));
                free.insert(format!("\"{name}\""));
            }
            Some("tun") => put(found, Kind::Tap, name),
            kind => put(found, Kind::Link, format!("{name} ({})", kind.unwrap_or("device"))),
        }
    }
    Ok(free)
}

/// The TAPs that the lease table names.
fn leased_taps(scope: &Scope) -> Result<BTreeSet<String>, CensusError> {
    let path = scope.state_dir.join("net-agent/net.db");
    if !path.exists() {
        return Ok(BTreeSet::new());
    }
    let wrap = |source| CensusError::Database { path: path.clone(), source };
    let db = open(&path)?;
    let mut rows = db.prepare("SELECT slot FROM lease").map_err(wrap)?;
    let slots = rows.query_map([], |row| row.get::<_, u32>(0)).map_err(wrap)?;
    slots.map(|slot| slot.map(|n| format!("{}{n}", scope.tap_prefix)).map_err(wrap)).collect()
}

fn nftables(scope: &Scope, free: &BTreeSet<String>, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    let ruleset = tool(scope, &["nft", "-j", "list", "ruleset"])?;
    for object in ruleset["nftables"].as_array().into_iter().flatten().filter_map(|o| o.as_object()) {
        for (kind, value) in object.iter().filter(|(kind, _)| *kind != "metainfo") {
            let mut value = value.clone();
            if let Some(fields) = value.as_object_mut() {
                fields.remove("handle"); // a rule that was taken away and put back is the same rule
            }
            let elements = value.as_object_mut().and_then(|fields| fields.remove("elem"));
            // Which interfaces lead out of the host, or deeper into it, is the host's and no VM's.
            let of_host = ["uplinks", "uplinks6", "inside"].iter().any(|set| value["name"] == *set);
            for element in elements.as_ref().and_then(|e| e.as_array()).into_iter().flatten() {
                let text = element.to_string();
                // What a warm slot may send is part of the slot.
                let of_free_slot = if free.iter().any(|tap| text.contains(tap)) { " (free)" } else { "" };
                if !of_host {
                    put(found, Kind::Nftables, format!("element of {}: {text}{of_free_slot}", value["name"]));
                }
            }
            put(found, Kind::Nftables, format!("{kind} {value}"));
        }
    }
    Ok(())
}

fn mounts(scope: &Scope, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    // proc_pid_mountinfo(5): the fifth field is the mount point.
    for line in fs_err::read_to_string("/proc/self/mountinfo")?.lines() {
        if let Some(point) = line.split(' ').nth(4).filter(|p| below(Path::new(p), scope)) {
            put(found, Kind::Mount, point);
        }
    }
    Ok(())
}

fn loop_devices(scope: &Scope, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    for entry in fs_err::read_dir("/sys/block")? {
        let dir = entry?.path();
        if let Ok(file) = fs_err::read_to_string(dir.join("loop/backing_file"))
            && below(Path::new(file.trim_end()), scope)
        {
            put(found, Kind::LoopDevice, format!("{} on {}", dir.display(), file.trim_end()));
        }
    }
    Ok(())
}

/// The groups are below this process' own, as the agent's is; those of other hosts are there too.
fn cgroups(scope: &Scope, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    let path = scope.state_dir.join("vm-agent/vm.db");
    let mounts = fs_err::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4));
    let own = fs_err::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let (Some(mount), Some(own), true) = (mount, own, path.exists()) else { return Ok(()) };
    let wrap = |source| CensusError::Database { path: path.clone(), source };
    let db = open(&path)?;
    let mut vms = db.prepare("SELECT DISTINCT vm FROM op WHERE vm IS NOT NULL").map_err(wrap)?;
    for vm in vms.query_map([], |row| row.get::<_, String>(0)).map_err(wrap)? {
        let group = Path::new(mount).join(own).join(format!("bothy-vm-{}", vm.map_err(wrap)?));
        if group.exists() {
            put(found, Kind::Cgroup, group.display().to_string());
        }
    }
    Ok(())
}

/// Whether a file below the directories is there by design, whatever VMs exist.
fn is_furniture(relative: &Path) -> bool {
    let text = relative.to_string_lossy();
    let name = relative.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let store = text.starts_with("image-agent/store/") && !text.contains("/.") && !name.contains("tmp");
    store
        // Blobs of registries, kept for the next pull; what is not whole is no leak either, but gone on with.
        || text.starts_with("image-agent/blobs/")
        || text.starts_with("bus/")
        || text.starts_with("log/")
        || [".db", ".db-wal", ".db-shm"].iter().any(|suffix| name.ends_with(suffix))
        || (text.matches('/').count() <= 1 && (name.ends_with(".json") || name.ends_with(".key")))
        || text == "bothy.toml"
        || name.ends_with(".lock")
        || name == "host.pid"
}

fn files(scope: &Scope, dir: &Path, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    let root = if dir.starts_with(&scope.run_dir) { &scope.run_dir } else { &scope.state_dir };
    let entries = match fs_err::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        let relative = path.strip_prefix(root).unwrap_or(&path);
        if kind.is_dir() {
            if path != scope.run_dir {
                files(scope, &path, found)?;
            }
            let id_length = entry.file_name().len() == 32; // a directory named by a VM's or an operation's id
            if id_length {
                put(found, Kind::File, format!("{}/", path.display()));
            }
        } else if kind.is_socket() {
            put(found, Kind::Socket, path.display().to_string());
        } else if !is_furniture(relative) {
            put(found, Kind::File, path.display().to_string());
        } else if path.extension().is_some_and(|e| e == "db") && !relative.starts_with("bus") {
            rows(&path, found)?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<Connection, CensusError> {
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .map_err(|source| CensusError::Database { path: path.to_owned(), source })
}

fn rows(path: &Path, found: &mut BTreeSet<Thing>) -> Result<(), CensusError> {
    let wrap = |source| CensusError::Database { path: path.to_owned(), source };
    let db = open(path)?;
    let mut names = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table'").map_err(wrap)?;
    let names: Vec<String> =
        names.query_map([], |row| row.get(0)).map_err(wrap)?.collect::<Result<_, _>>().map_err(wrap)?;
    for table in names.iter().filter(|t| !HISTORY.contains(&t.as_str())) {
        let mut ids = db.prepare(&format!("SELECT rowid FROM \"{table}\"")).map_err(wrap)?;
        let ids = ids.query_map([], |row| row.get::<_, i64>(0)).map_err(wrap)?;
        for id in ids {
            put(found, Kind::Row, format!("{} {table} {}", path.display(), id.map_err(wrap)?));
        }
    }
    Ok(())
}
