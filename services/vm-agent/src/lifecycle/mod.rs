//! The life of a VM.
//!
//! ```text
//!                 create                   start
//!   (no row) ------------> Creating   .-------------- Stopped <----------.
//!       ^   undone            |       v                  ^  ^            |
//!       |<--------------------|    Starting -- undone ---'  |            | the guest powered
//!       |                     | done  | done                |            | itself off
//!       |                     v       v                     |            |
//!       |                     '--> Running -- stop --> Stopping          |
//!       |                             |  |                               |
//!       |                             |  '-------------------------------'
//!       |              the VMM died   |
//!       |                             v        (start, delete: as from Stopped;
//!       '------ Deleting <--------- Error       a failed undo, stop or delete also ends here)
//!                  ^    delete
//!                  '---------- Stopped, or Running with force
//! ```
//! Operations move a VM at both of their ends, each time in the transaction that begins or ends the operation
//! ([`kinds`]); the **watcher** of a VMM ([`watch`]) notes its exit, and moves only a VM that is `Running`, for in every
//! other state an operation is at work that will see the exit itself. Each move reads and writes the row in one
//! transaction, and those have one order: no two operations can have the same VM, and nothing waits with a lock held.
//!
//! A VMM is the child of its holder, not of the agent. So at start [`recover`] asks every VM's holder whether it lives,
//! adopts those that do, and reads how the others ended.

pub(crate) mod boot;
pub(crate) mod end;
pub(crate) mod files;
mod guest;
pub(crate) mod kinds;
pub(crate) mod state;
mod watch;

pub(crate) use watch::recover;

use crate::store::{self, Vm};
use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{
    Code, Error, ImageName, Service, VmId,
    image::{BootSet, ImageRef},
    methods::ImageResolve,
    net::Lease,
};
use bothy_db::Db;
use bothy_vm_agent::vmm::{
    Driver, QemuMicrovm,
    accel::{self, Finding, Trial},
    clock,
    holder::{self, Holder},
    launching::Quiet,
    wire::HolderHandle,
};
use fs_err as fs;
use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};
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
    pub(crate) driver: QemuMicrovm,
    tsc_khz: Option<u32>,
    /// How guests are run here, once that was found out.
    accel: OnceCell<Finding>,
    /// `bothy-vmm`.
    program: PathBuf,
}

impl std::ops::Deref for Agent {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Agent {
    /// Looks at the host: QEMU's version, the clock.
    pub(crate) async fn new(config: Config, db: Db, bus: Client) -> Result<Self, Error> {
        let failed = |e: std::io::Error| Error::internal("cannot make the holders' directory", &e);
        let holders = config.run_dir.join("vm");
        fs::create_dir_all(&holders).map_err(failed)?;
        // Each VM's user must get through to its own directory, and need not see the others.
        fs::set_permissions(&holders, std::fs::Permissions::from_mode(0o711)).map_err(failed)?;
        let driver = QemuMicrovm::find(&config.vm.qemu).await?;
        let tsc_khz = tokio::task::spawn_blocking(clock::tsc_khz)
            .await
            .map_err(|e| Error::internal("cannot measure the clock", &e))?;
        let program = holder::program()?;
        let memory = config.service_dir(Service::Vm).join(ACCEL);
        let accel = OnceCell::new_with(accel::known(config.vm.accelerator, driver.version(), &memory));
        Ok(Self(Arc::new(Shared { config, db, bus, driver, tsc_khz, accel, program })))
    }

    /// The agent's own directory.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.config.service_dir(Service::Vm)
    }

    /// How guests are run here: decided once, with an image at hand to try it on.
    async fn accel(&self, boot: &BootSet) -> Result<&Finding, Error> {
        self.accel
            .get_or_try_init(|| async {
                let trial = Trial {
                    qemu: self.driver.program(),
                    version: self.driver.version(),
                    kernel: &boot.kernel,
                    initrd: &boot.initrd,
                    memory: self.state_dir().join(ACCEL),
                };
                accel::decide(self.config.vm.accelerator, &trial).await
            })
            .await
    }

    /// Finds out how guests are run here before the first create asks, so that none waits for the trial. Without an image
    /// there is nothing to try it on yet; the first create does it then.
    pub(crate) async fn try_kvm(self) {
        let image = ImageRef { image: ImageName::default_image() };
        let tried = async { self.accel(&self.bus.call::<ImageResolve>(&image).await?).await.cloned() };
        match tried.await {
            Ok(finding) => tracing::info!(accelerator = %finding.accel, "guests can be run"),
            Err(error) => tracing::debug!(%error, "not tried yet how guests can be run"),
        }
    }

    /// What was found out about KVM so far.
    pub(crate) fn known_accel(&self) -> Option<&Finding> {
        self.accel.get()
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

    /// The holder of `vm`, if it has a place on the network and so a user to run as.
    pub(crate) fn holder(&self, vm: VmId, lease: &Lease) -> Holder {
        Holder::new(self.config.holder_dir(vm), lease.uid)
    }

    /// Kills the VMM of `vm`, if there is one, and waits until it and its holder are gone.
    async fn kill(&self, vm: VmId) -> Result<(), Error> {
        self.quieten(vm).await.map(drop)
    }

    /// Kills the VMM of `vm`, if there is one, and removes the holder's directory and lock file.
    async fn remove_holder(&self, vm: VmId) -> Result<(), Error> {
        // Kept to the end: nothing may move in between the look and the removal.
        let quiet = self.quieten(vm).await?;
        files::remove_tree(&self.config.holder_dir(vm))?;
        quiet.map_or(Ok(()), Quiet::remove)
    }

    /// Kills the VMM of `vm`, if there is one, waits until it and its holder are gone, and lets no launch begin while the
    /// result lives. First by the handle in the row, then by what answers on the socket once no launch is under way: a
    /// crash may have come between the launch and the row.
    async fn quieten(&self, vm: VmId) -> Result<Option<Quiet>, Error> {
        let row = self.vm(vm).await?;
        // Without a lease nothing was ever launched.
        let Some(lease) = row.record.lease.as_ref() else { return Ok(None) };
        let holder = self.holder(vm, lease);
        if let Some(handle) = row.handle {
            self.kill_vmm(vm, &holder, handle).await?;
        }
        let quiet = holder.quiet().await?;
        if let Ok(status) = holder.status().await
            && row.handle != Some(status.handle)
        {
            self.kill_vmm(vm, &holder, status.handle).await?;
        }
        Ok(quiet)
    }

    async fn kill_vmm(&self, vm: VmId, holder: &Holder, handle: HolderHandle) -> Result<(), Error> {
        if handle.vmm.is_alive() {
            // It may end between the look and the signal.
            if let Err(e) = holder.kill(SIGKILL).await
                && handle.vmm.is_alive()
            {
                return Err(e.context("cannot kill the VMM"));
            }
        }
        self.await_end(vm, handle, KILL).await?;
        Ok(())
    }

    /// Waits until a VMM and its holder are gone, for at most `limit`, and puts the exit into the row. Whether they are.
    async fn await_end(&self, vm: VmId, handle: HolderHandle, limit: Duration) -> Result<bool, Error> {
        if tokio::time::timeout(limit, Holder::gone(handle.vmm)).await.is_err() {
            return Ok(false);
        }
        // A holder that hangs is no reason not to go on: the exit is then without a record.
        drop(tokio::time::timeout(HOLDER_END, Holder::gone(handle.holder)).await);
        watch::note_exit(self, vm, handle).await?;
        Ok(true)
    }
}

/// A VM's operation always has its VM.
fn vm_of(vm: Option<VmId>) -> Result<VmId, Error> {
    vm.ok_or_else(|| Error::new(Code::Internal, "an operation on a VM has no VM"))
}
