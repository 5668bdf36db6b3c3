//! How far a VM has come, as types: what needs a place on the network takes a [`Placed`], what needs a VMM takes a
//! [`Live`], and so nobody can ask a VM for an address or a guest that it does not have.
//!
//! ```text
//!   Reserved --- place(lease) ---> Placed --- launch(vmm) ---> Live
//!   (a name)                       ^  (address, TAP, uid)       |  (holder and VMM)
//!                                  '----------- end() ----------'
//! ```
//! Operations say what is being done to a VM ([`bothy_contract::vm::VmState`]); its phase says what there is of it. The two
//! move apart: a VM that is `Starting` is first `Placed`, then `Live`.

use crate::lifecycle::guest::Guest;
use bothy_config::Config;
use bothy_contract::{Code, Error, VmId, net::Lease, vm::Shape};
use bothy_vm_agent::vmm::{Driver, driver_of, holder::Holder, wire::HolderHandle};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What there is of a VM.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Phase {
    /// Its name and its row.
    Reserved,
    /// Its place on the network too.
    Placed(Placed),
    /// A VMM too, whose end nobody has noticed yet.
    Live(Live),
}

/// A VM that has a place on the network, and with it the user that its VMM runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) lease: Lease,
}

impl Placed {
    /// The holder of `vm`, whether it lives or not.
    pub(crate) fn holder(&self, config: &Config, vm: VmId) -> Holder {
        Holder::new(config.holder_dir(vm), self.lease.uid)
    }

    /// The same with a VMM.
    pub(crate) fn launched(self, vmm: Vmm) -> Live {
        Live { place: self, vmm }
    }
}

/// A VM that has a VMM.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Live {
    pub(crate) place: Placed,
    pub(crate) vmm: Vmm,
}

impl Live {
    /// The driver that knows the verbs of its VMM, whichever is the one of new VMs by now.
    ///
    /// # Errors
    /// This build has no such driver.
    pub(crate) fn driver(&self) -> Result<Arc<dyn Driver>, Error> {
        driver_of(&self.vmm.name).ok_or_else(|| {
            Error::new(
                Code::Internal,
                format!("this build has no driver for a VMM called {:?}", self.vmm.name),
            )
        })
    }

    /// The way to its guest.
    pub(crate) fn guest(&self, config: &Config, vm: VmId) -> Guest {
        Guest::new(self.place.holder(config, vm), self.vmm.handle)
    }
}

/// What is known of a VMM. A cache: where it is lost or wrong, the holder says it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vmm {
    /// The holder and its VMM.
    pub(crate) handle: HolderHandle,
    /// The driver, its version and how it runs guests: `qemu-microvm 10.0.2 (tcg)`.
    pub(crate) name: String,
    /// The shape that it was started with.
    pub(crate) booted: Shape,
    /// The guest's boot id, once it has answered.
    #[serde(default)]
    pub(crate) boot_id: Option<String>,
}

impl Phase {
    /// The VM's place, if it has one.
    pub(crate) fn placed(&self) -> Option<&Placed> {
        match self {
            Phase::Reserved => None,
            Phase::Placed(placed) | Phase::Live(Live { place: placed, .. }) => Some(placed),
        }
    }

    /// The VM's VMM, if it has one.
    pub(crate) fn live(&self) -> Option<&Live> {
        match self {
            Phase::Live(live) => Some(live),
            Phase::Reserved | Phase::Placed(_) => None,
        }
    }

    /// It has this place from now on.
    pub(crate) fn place(&mut self, lease: Lease) {
        match self {
            Phase::Reserved => *self = Phase::Placed(Placed { lease }),
            Phase::Placed(placed) | Phase::Live(Live { place: placed, .. }) => placed.lease = lease,
        }
    }

    /// It has this VMM from now on.
    ///
    /// # Errors
    /// It has no place yet.
    pub(crate) fn launch(&mut self, vmm: Vmm) -> Result<(), Error> {
        let Some(placed) = self.placed().cloned() else {
            return Err(Error::new(Code::Internal, "a VM without a place on the network has a VMM"));
        };
        *self = Phase::Live(placed.launched(vmm));
        Ok(())
    }

    /// Its guest has told its boot id.
    pub(crate) fn booted(&mut self, boot_id: String) {
        if let Phase::Live(live) = self {
            live.vmm.boot_id = Some(boot_id);
        }
    }

    /// It has no VMM any more.
    pub(crate) fn end(&mut self) {
        if let Phase::Live(live) = self {
            *self = Phase::Placed(live.place.clone());
        }
    }
}
