//! The faults, and how each strikes an operation that is held in a stage.

use super::{Begun, Cell, Matrix, Then, hold::Held};
use crate::{
    brake::{Hidden, Program, Sign},
    host::QUICK,
    journal::Now,
};
use bothy_contract::Service;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long a killed process may take to be started again.
const RESTART: Duration = Duration::from_secs(60);

/// What happens to an operation in a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `bothy op cancel`.
    Cancel,
    /// A service gets SIGKILL, and is started again.
    Kill(Service),
    /// The bus gets SIGKILL, and is started again.
    DropBus,
    /// The stage fails.
    Break(Break),
}

/// Real reasons for a stage to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    /// The image's manifest is gone.
    NoManifest,
    /// The image's rootfs has the wrong size.
    TornRootfs,
    /// Every address of the subnet is taken.
    SubnetFull,
    /// `ssh-keygen` fails.
    NoKeygen,
    /// The image's seed of system overlays is gone.
    NoSystemSeed,
    /// The image's seed of work disks is gone.
    NoWorkSeed,
    /// The VMM exits at once.
    NoVmm,
    /// The VMM is killed.
    VmmDies,
    /// The VMM's holder is killed.
    HolderDies,
    /// The user's key is not one.
    BadKey,
    /// The image waits for a service that never comes up.
    DeadPort,
    /// The file system that disks are made on is full.
    DiskFull,
    /// The guest does not answer in time.
    TooSlow,
}

impl Break {
    /// Whether a failure of `stage` is this one's, where it was to hit `cell`. Both disks' stages look at the whole image
    /// and at the same file system, and run side by side: either may be the first to fail.
    fn fails(self, cell: &Cell, stage: &str) -> bool {
        let disks = ["prepare_rootfs", "prepare_work_disk"];
        stage == cell.stage || (disks.contains(&cell.stage) && disks.contains(&stage))
    }

    /// What the error says, so that it is known why it failed.
    fn says(self) -> &'static str {
        match self {
            Break::NoManifest | Break::NoSystemSeed | Break::NoWorkSeed => "is missing",
            Break::TornRootfs => "is torn",
            Break::SubnetFull => "are taken",
            Break::NoKeygen => "ssh-keygen",
            Break::NoVmm => "the VMM did not start",
            Break::VmmDies | Break::HolderDies => "",
            Break::BadKey => "an ssh public key is damaged",
            Break::DeadPort => "nobody",
            Break::DiskFull => "No space left",
            Break::TooSlow => "s; its VMM has used",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Cancel => f.write_str("cancel"),
            Fault::Kill(service) => write!(f, "kill {}", service.binary()),
            Fault::DropBus => f.write_str("drop the bus"),
            Fault::Break(what) => write!(f, "fail: {what:?}"),
        }
    }
}

impl Fault {
    /// Whether this fault in that cell may end as it did.
    pub(super) fn expect(self, cell: &Cell, now: &Now) -> Result<(), String> {
        let error = now.error.as_deref().unwrap_or_default();
        let good = match self {
            Fault::Cancel => now.state == "cancelled",
            // A stage that could not go on may fail; one that was the last may end in success before it is cancelled.
            Fault::Kill(_) | Fault::DropBus => cell.then == Then::Undo || now.state == "succeeded",
            Fault::Break(what) => {
                let stage = error.strip_prefix("stage ").and_then(|rest| Some(rest.split_once(" failed")?.0));
                now.state == "failed"
                    && stage.is_some_and(|stage| what.fails(cell, stage))
                    && error.contains(what.says())
            }
        };
        let undone = !error.contains("moreover");
        if good && undone { Ok(()) } else { Err(format!("it should not end like this: {now:?}")) }
    }
}

/// A fault that has struck. What was broken for it is whole again when this is dropped.
#[derive(Debug, Default)]
pub struct Struck {
    /// Whether the operation is to go on.
    pub goes_on: bool,
    hidden: Option<Hidden>,
    sign: Option<Sign>,
    planted: Option<PathBuf>,
    mounted: Option<Mounted>,
    held: Option<Held>,
}

/// A small file system over a directory.
#[derive(Debug)]
struct Mounted(PathBuf);

impl Mounted {
    /// One that a few blocks fill.
    fn new(place: PathBuf) -> Result<Self, String> {
        let tmpfs = Some("tmpfs");
        // The mode of the directory below: VMMs pass through it.
        mount(tmpfs, &place, tmpfs, MsFlags::empty(), Some("size=64k,mode=711"))
            .map_err(|e| format!("cannot mount a tmpfs on {}: {e}", place.display()))?;
        Ok(Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

impl Drop for Struck {
    fn drop(&mut self) {
        if let Some(planted) = &self.planted {
            let _ = fs_err::remove_file(planted);
        }
        // In this order: the file comes back to a free place.
        drop(self.hidden.take());
        drop(self.sign.take());
    }
}

impl Matrix {
    /// Lets `fault` strike while `held` holds the stage, then lets the stage go on.
    ///
    /// # Errors
    /// The fault cannot strike: that is the test's failure, not the product's.
    pub fn strike(&self, fault: Fault, begun: &Begun, held: Held) -> Result<Struck, String> {
        let mut struck = Struck::default();
        match fault {
            Fault::Cancel => self.cancel(begun)?,
            Fault::Kill(service) => self.kill_and_await(service.binary())?,
            Fault::DropBus => self.kill_and_await("nats-server")?,
            Fault::Break(what) => self.break_stage(what, begun, &mut struck)?,
        }
        struck.goes_on = matches!(fault, Fault::Kill(_) | Fault::DropBus);
        match fault {
            Fault::Break(Break::TooSlow) => struck.held = Some(held),
            _ => drop(held),
        }
        Ok(struck)
    }

    fn break_stage(&self, what: Break, begun: &Begun, struck: &mut Struck) -> Result<(), String> {
        let image = self.host.config.service_dir(Service::Image).join("store/images").join(QUICK);
        let signal = |pid| kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|e| e.to_string());
        let handle = || self.host.vmm_of(&begun.name).ok_or("it has no VMM");
        match what {
            Break::NoManifest => struck.hidden = Some(Hidden::new(&image.join("manifest.json"))?),
            Break::NoSystemSeed => struck.hidden = Some(Hidden::new(&image.join("system-seed.ext4"))?),
            Break::NoWorkSeed => struck.hidden = Some(Hidden::new(&image.join("work-seed.ext4"))?),
            Break::TornRootfs => {
                let rootfs = image.join("rootfs.ext4");
                struck.hidden = Some(Hidden::new(&rootfs)?);
                fs_err::write(&rootfs, "torn").map_err(|e| e.to_string())?;
                struck.planted = Some(rootfs);
            }
            Break::NoKeygen => struck.sign = Some(self.gates.fail(Program::SshKeygen)),
            Break::NoVmm => struck.sign = Some(self.gates.fail(Program::Qemu)),
            Break::VmmDies => signal(handle()?.1)?,
            Break::HolderDies => signal(handle()?.0)?,
            Break::DiskFull => {
                let disks = self.host.config.service_dir(Service::Image).join("disks");
                struck.mounted = Some(Mounted::new(disks)?);
            }
            // In what was asked for, or in how long the stage is held.
            Break::BadKey | Break::DeadPort | Break::SubnetFull | Break::TooSlow => {}
        }
        Ok(())
    }

    /// Kills the process of `program` and waits until there is another.
    ///
    /// # Errors
    /// There is none, or it does not come back.
    pub fn kill_and_await(&self, program: &str) -> Result<(), String> {
        let pid = *self.host.pids_of(program).first().ok_or_else(|| format!("{program} does not run"))?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|e| format!("cannot kill {program}: {e}"))?;
        let deadline = Instant::now() + RESTART;
        while !self.host.pids_of(program).iter().any(|new| *new != pid) {
            if Instant::now() > deadline {
                return Err(format!("{program} was not started again"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
