//! The life of a VM.
//!
//! ```text
//!                 create                        start, restart
//!   (no row) ------------> Creating        .------------------ Stopped <--------------.
//!       ^   undone            |            v                     ^  ^                 |
//!       |<--------------------|        Starting ---- undone -----'  |                 | the guest powered
//!       |                     | done    ^  | done                   |                 | itself off
//!       |                     v  restart|  v                        |                 |
//!       |                     '------> Running -- stop, kill --> Stopping             |
//!       |                             |  |  ^  \_ idle: its machine begins the stop   |
//!       |                             |  |  '- set, which moves nothing              |
//!       |                             |  '--------------------------------------------'
//!       |              the VMM died   |
//!       |                             v        (start, restart, set, delete: as from Stopped;
//!       '------ Deleting <--------- Error       a failed undo or delete also ends here)
//!                  ^    delete
//!                  '---------- Stopped or Suspended, or Running or Paused with force
//!
//!   Running -- pause --> Paused -- suspend --> (Stopping) --> Suspended      Paused: as Running to stop, kill, restart
//!     ^  \_______________________ suspend ______^   |  |                     Suspended: kill forgets its memory (Stopped)
//!     |<------------ resume, or a use of it --------'  |
//!     '-- (Starting) <-- resume, or a use of it -------'
//! ```
//! Who moves what: each VM has a **machine** ([`machine`]), one task with a bounded queue. It alone begins operations on its
//! VM, one at a time, if [`state::grant`] says so; it waits for the end of the VMM and notes it; and it stops a VM that nobody
//! uses ([`idle`]). What an **operation** makes of its VM is settled in the transaction that ends it ([`kinds`]). A VMM's exit
//! moves only a VM that is `Running`, for in every other state an operation is at work that sees the exit itself. Beside its
//! state a VM has a [`crate::phase::Phase`]: what there is of it. Each move reads and writes the row in one transaction.
//!
//! A VMM is the child of its holder, not of the agent. So at start [`recover()`] asks every VM's holder whether it lives,
//! adopts those that do, whatever the row says, and reads how the others ended.

mod admission;
pub(crate) mod ask;
pub(crate) mod boot;
pub(crate) mod end;
pub(crate) mod files;
pub(crate) mod guest;
pub(crate) mod idle;
pub(crate) mod kinds;
mod launch;
pub(crate) mod machine;
mod recover;
pub(crate) mod rest;
pub(crate) mod set;
mod stages;
pub(crate) mod state;
pub(crate) mod template;

pub(crate) use recover::recover;

use crate::{
    phase::{Live, Placed},
    store::{self, Vm},
};
use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{
    Code, Error, ImageName, Service, VmId,
    image::{BootSet, ImageRef},
    methods::{ImageResolve, NetNameUnset},
    net::UnnameVm,
    vm::VmState,
};
use bothy_db::Db;
use bothy_vm_agent::host::{cgroup::Cgroups, usage::Sampler};
use bothy_vm_agent::vmm::{
    Choice, Host, choose, clock,
    holder::{self, Holder},
    launching::Quiet,
    wire::{self, HolderHandle},
};
use fs_err as fs;
use idle::Activity;
use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};
use template::Templates;
use tokio::sync::OnceCell;

/// How long a killed VMM may take to be gone.
const KILL: Duration = Duration::from_secs(20);
/// How long a holder may take to end once its VMM has: it writes the exit record.
const HOLDER_END: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;
/// Where it is remembered whether KVM is of use, in the agent's directory.
const ACCEL: &str = "accel.json";

/// What every part of the agent works with. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Agent(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) db: Db,
    pub(crate) bus: Client,
    /// The driver of new VMs, as far as one can tell without an image.
    provisional: Choice,
    /// The same, once an image was there to try KVM with.
    settled: OnceCell<Choice>,
    tsc_khz: Option<u32>,
    /// `bothy-vmm`.
    program: PathBuf,
    /// The tasks of the VMs.
    pub(crate) machines: machine::Machines,
    /// Where each VM's processes are bounded, or why nowhere.
    pub(crate) cgroups: Result<Cgroups, String>,
    /// What the processors do for each VM.
    pub(crate) sampler: Sampler,
    /// When each VM was last used.
    pub(crate) activity: Activity,
    /// What VMs are resumed from.
    pub(crate) templates: Templates,
}

impl std::ops::Deref for Agent {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Agent {
    /// Looks at the host: which VMM, the clock.
    pub(crate) async fn new(config: Config, db: Db, bus: Client) -> Result<Self, Error> {
        let failed = |e: std::io::Error| Error::internal("cannot make the holders' directory", &e);
        let holders = config.run_dir.join("vm");
        fs::create_dir_all(&holders).map_err(failed)?;
        // Each VM's user must get through to its own directory, and need not see the others.
        fs::set_permissions(&holders, std::fs::Permissions::from_mode(0o711)).map_err(failed)?;
        let provisional = choose(&host(&config, None)).await?;
        let settled = OnceCell::new_with(provisional.is_settled().then(|| provisional.clone()));
        let tsc_khz = tokio::task::spawn_blocking(clock::tsc_khz)
            .await
            .map_err(|e| Error::internal("cannot measure the clock", &e))?;
        let cgroups = Cgroups::find();
        match &cgroups {
            Ok(groups) => tracing::info!("VMs are bounded by {}", groups.describe()),
            Err(why) => tracing::info!("VMs are not bounded: {why}"),
        }
        Ok(Self(Arc::new(Shared {
            config,
            db,
            bus,
            provisional,
            settled,
            tsc_khz,
            program: holder::program()?,
            machines: machine::Machines::default(),
            cgroups,
            sampler: Sampler::default(),
            activity: Activity::default(),
            templates: Templates::default(),
        })))
    }

    /// The agent's own directory.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.config.service_dir(Service::Vm)
    }

    /// The driver of new VMs and how it runs guests: decided once, with an image at hand to try it on.
    async fn choice(&self, boot: &BootSet) -> Result<&Choice, Error> {
        self.settled.get_or_try_init(|| async { choose(&host(&self.config, Some(boot))).await }).await
    }

    /// Finds out how guests are run here before the first create asks, so that none waits for the trial. Without an image
    /// there is nothing to try it on yet; the first create does it then.
    pub(crate) async fn try_kvm(self) {
        let image = ImageRef { image: ImageName::default_image() };
        let tried = async { self.choice(&self.bus.call::<ImageResolve>(&image).await?).await.cloned() };
        match tried.await {
            Ok(choice) => {
                tracing::info!(driver = choice.driver.name(), reason = choice.reason, "guests can be run")
            }
            Err(error) => tracing::debug!(%error, "not tried yet how guests can be run"),
        }
    }

    /// What is known so far of the driver of new VMs.
    pub(crate) fn known_choice(&self) -> &Choice {
        self.settled.get().unwrap_or(&self.provisional)
    }

    /// The row of `vm`.
    pub(crate) async fn vm(&self, vm: VmId) -> Result<Vm, Error> {
        Ok(self.db.read(move |c| store::get(c, vm)).await?)
    }

    /// Changes the row of `vm`.
    async fn update<T: Send + 'static>(
        &self,
        vm: VmId,
        change: impl FnOnce(&mut Vm) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        Ok(self.db.write(move |tx| store::update(tx, vm, change)).await?)
    }

    /// Puts what the guest of `vm` told into its row.
    async fn note_boot_id(&self, vm: VmId, boot_id: String) -> Result<(), Error> {
        self.update(vm, move |row| {
            row.phase.booted(boot_id);
            Ok(())
        })
        .await
    }

    /// The name of `vm` leads nowhere from now on.
    async fn unpublish_dns(&self, vm: VmId) -> Result<(), Error> {
        self.bus.call::<NetNameUnset>(&UnnameVm { vm }).await?;
        Ok(())
    }

    /// The VM's place on the network, where it has one.
    async fn placed(&self, vm: VmId) -> Result<Option<Placed>, Error> {
        Ok(self.vm(vm).await?.phase.placed().cloned())
    }

    /// The VM with its VMM, where it has one that lives.
    async fn living(&self, vm: VmId) -> Result<Option<Live>, Error> {
        Ok(self.vm(vm).await?.phase.live().filter(|live| live.vmm.handle.vmm.is_alive()).cloned())
    }

    /// The VM with its VMM, whose guest's processors run.
    ///
    /// # Errors
    /// It has none, or is paused.
    pub(crate) async fn running(&self, vm: VmId) -> Result<Live, Error> {
        let row = self.vm(vm).await?;
        if let (VmState::Paused | VmState::Suspended, name) = (row.facts.state, &row.facts.name) {
            let rests = format!("VM {name} is {}", state::word(row.facts.state));
            return Err(Error::new(Code::FailedPrecondition, rests)
                .hint(format!("`bothy vm resume {name}` lets it go on; so does any use of it")));
        }
        self.live(vm).await
    }

    /// The VM with its VMM.
    ///
    /// # Errors
    /// It has none.
    async fn live(&self, vm: VmId) -> Result<Live, Error> {
        let row = self.vm(vm).await?;
        row.phase.live().cloned().ok_or_else(|| {
            let name = &row.facts.name;
            Error::new(Code::FailedPrecondition, format!("VM {name} is not running"))
                .hint(format!("start it with `bothy vm start {name}`"))
        })
    }

    /// Kills the VMM of `vm`, if there is one, and waits until it and its holder are gone.
    async fn kill(&self, vm: VmId) -> Result<(), Error> {
        self.quieten(vm).await.map(drop)
    }

    /// Kills the VMM of `vm`, if there is one, and removes the holder's directory and lock file.
    async fn remove_holder(&self, vm: VmId) -> Result<(), Error> {
        // Kept to the end: nothing may move in between the look and the removal.
        let quiet = self.quieten(vm).await?;
        self.remove_cgroup(vm).await?;
        files::remove_tree(&self.config.holder_dir(vm))?;
        quiet.map_or(Ok(()), Quiet::remove)
    }

    /// Kills the VMM of `vm`, if there is one, waits until it and its holder are gone, and lets no launch begin while the
    /// result lives. First by the handle in the row, then by what answers on the socket once no launch is under way: a
    /// crash may have come between the launch and the row.
    async fn quieten(&self, vm: VmId) -> Result<Option<Quiet>, Error> {
        let row = self.vm(vm).await?;
        // Without a place nothing was ever launched.
        let Some(placed) = row.phase.placed() else { return Ok(None) };
        let holder = placed.holder(&self.config, vm);
        let known = row.phase.live().map(|live| live.vmm.handle);
        if let Some(handle) = known {
            self.kill_vmm(vm, &holder, handle).await?;
        }
        let quiet = holder.quiet().await?;
        if let Ok(status) = holder.status().await
            && known != Some(status.handle)
        {
            self.kill_vmm(vm, &holder, status.handle).await?;
        }
        Ok(quiet)
    }

    async fn kill_vmm(&self, vm: VmId, holder: &Holder, handle: HolderHandle) -> Result<(), Error> {
        if handle.vmm.is_alive() {
            // It may end between the look and the signal.
            if let Err(e) = holder.kill_vmm(&handle, SIGKILL).await
                && handle.vmm.is_alive()
            {
                return Err(e.context("cannot kill the VMM"));
            }
        }
        self.await_end(vm, handle, KILL).await?;
        Ok(())
    }

    /// Removes the control group of `vm`, whose VMM has ended, with all that is in it: whoever broke out of the VMM, and runs
    /// as its user, ends here too, for the next VM may have the same user. Nobody may be launching it meanwhile.
    async fn remove_cgroup(&self, vm: VmId) -> Result<(), Error> {
        match &self.cgroups {
            Ok(cgroups) => cgroups.remove(vm).await,
            Err(_) => Ok(()),
        }
    }

    /// The same for a VM that stays: what cannot be removed now is tried again when it is deleted.
    async fn try_remove_cgroup(&self, vm: VmId) {
        if let Err(error) = self.remove_cgroup(vm).await {
            tracing::warn!(bothy.vm.id = %vm, %error, "something of a VM that has ended lives");
        }
    }

    /// Waits until a VMM and its holder are gone, for at most `limit`, and puts the exit into the row. Whether they are.
    async fn await_end(&self, vm: VmId, handle: HolderHandle, limit: Duration) -> Result<bool, Error> {
        if tokio::time::timeout(limit, Holder::gone(handle.vmm)).await.is_err() {
            return Ok(false);
        }
        // A holder that hangs is no reason not to go on: the exit is then without a record.
        drop(tokio::time::timeout(HOLDER_END, Holder::gone(handle.holder)).await);
        self.note_exit(vm, handle).await?;
        self.try_remove_cgroup(vm).await;
        Ok(true)
    }

    /// Puts the end of a VMM into its VM's row, once; a row that is gone or has another VMM by now stays as it is.
    async fn note_exit(&self, vm: VmId, handle: HolderHandle) -> Result<(), Error> {
        let Some(row) = self.db.read(move |c| store::find(c, vm)).await? else { return Ok(()) };
        let exit = match row.phase.placed().map(|placed| placed.holder(&self.config, vm).exit()) {
            Some(Ok(exit)) => exit,
            Some(Err(e)) => {
                tracing::warn!(bothy.vm.id = %vm, error = %e, "the exit record is of no use");
                None
            }
            None => None,
        };
        // A holder that was killed could not do it.
        if !handle.holder.is_alive() {
            wire::remove_sockets(&self.config.holder_dir(vm));
        }
        self.db
            .write(move |tx| {
                if store::find(tx, vm)?.is_none() {
                    return Ok(());
                }
                store::update(tx, vm, |row| {
                    // Without a VMM in the row the launch was cut off: the end is noted all the same.
                    if row.phase.live().is_some_and(|live| live.vmm.handle != handle) {
                        return Ok(());
                    }
                    if let Some((to, reason)) = state::after_exit(row.facts.state, exit.as_ref()) {
                        tracing::info!(bothy.vm.id = %vm, name = %row.facts.name, state = ?to, reason, "a VMM has ended");
                        store::set_state(row, to, Some(reason));
                    }
                    row.ended(exit);
                    Ok(())
                })
            })
            .await?;
        Ok(())
    }
}

/// What a driver is chosen from.
fn host<'a>(config: &'a Config, boot: Option<&'a BootSet>) -> Host<'a> {
    Host {
        config: &config.vm,
        memory: config.service_dir(Service::Vm).join(ACCEL),
        boot: boot.map(|boot| (boot.kernel.as_path(), boot.initrd.as_path())),
    }
}

/// A VM's operation always has its VM.
fn vm_of(vm: Option<VmId>) -> Result<VmId, Error> {
    vm.ok_or_else(|| Error::new(Code::Internal, "an operation on a VM has no VM"))
}
