//! How an operation is held in a stage. A stage that another service serves stands while that service is stopped; one that
//! runs a program stands at that program's gate; one that talks to the guest stands while the VMM is stopped. The journal
//! says when the stage runs.
//!
//! `prepare_rootfs` and `prepare_work_disk` are begun by the same answer and served by the same service, so what holds one
//! holds the other. `remove_files` of a delete is the agent's own and takes microseconds; it runs beside `release_disks` and
//! `release_network`, and there is no way to hold it that would not be a hook in the product.

use super::{Begun, Matrix};
use crate::brake::{Program, Sign, Stopped};
use bothy_contract::Service;

/// What holds a stage; it goes on when this is dropped.
#[derive(Debug)]
pub enum Held {
    /// A stopped process.
    Process(Stopped),
    /// A closed gate.
    Gate(Sign),
}

impl Matrix {
    /// Stops a service.
    ///
    /// # Errors
    /// It does not run.
    pub fn stop_service(&self, service: Service) -> Result<Stopped, String> {
        let pid = self.host.pids_of(service.binary()).first().copied();
        Stopped::new(pid.ok_or_else(|| format!("{} does not run", service.binary()))?)
    }

    /// Stops the VMM of VM `name`.
    ///
    /// # Errors
    /// It has none.
    pub fn stop_vmm(&self, name: &str) -> Result<Stopped, String> {
        let (_, vmm) = self.host.vmm_of(name).ok_or_else(|| format!("VM {name} has no VMM"))?;
        Stopped::new(vmm)
    }

    /// Stops the holder of VM `name`.
    ///
    /// # Errors
    /// It has none.
    pub fn stop_holder(&self, name: &str) -> Result<Stopped, String> {
        let (holder, _) = self.host.vmm_of(name).ok_or_else(|| format!("VM {name} has no holder"))?;
        Stopped::new(holder)
    }

    /// Waits until `stage` of an operation runs.
    ///
    /// # Errors
    /// It is over, or never begins.
    pub fn in_stage(&self, begun: &Begun, stage: &str) -> Result<(), String> {
        let now = self.journal.wait(&begun.op, stage, |now| now.stage(stage).is_some())?;
        match now.stage(stage) {
            Some("running") => Ok(()),
            _ => Err(format!("stage {stage} was over before it was seen: {now:?}")),
        }
    }

    /// Waits until `stage` of an operation is done.
    ///
    /// # Errors
    /// The operation is over before.
    pub fn past_stage(&self, begun: &Begun, stage: &str) -> Result<(), String> {
        self.journal.wait(&begun.op, stage, |now| now.stage(stage) == Some("done")).map(drop)
    }

    /// Begins a create or a start with `begin`, and holds it in `stage`.
    ///
    /// # Errors
    /// It does not come there.
    pub fn hold(
        &self,
        stage: &str,
        begin: impl FnOnce() -> Result<Begun, String>,
    ) -> Result<(Begun, Held), String> {
        let (begun, held) = match stage {
            "resolve_image" => {
                let held = self.stop_service(Service::Image)?;
                (begin()?, Held::Process(held))
            }
            "acquire_network" => {
                let held = self.stop_service(Service::Net)?;
                (begin()?, Held::Process(held))
            }
            "host_key" => {
                let held = self.gates.hold(Program::SshKeygen);
                (begin()?, Held::Gate(held))
            }
            "prepare_rootfs" | "prepare_work_disk" => {
                // The image-agent has answered for the image by the time that the network is asked for.
                let net = self.stop_service(Service::Net)?;
                let begun = begin()?;
                self.in_stage(&begun, "acquire_network")?;
                let held = self.stop_service(Service::Image)?;
                drop(net);
                (begun, Held::Process(held))
            }
            // Of a create that has a template: there the VMM is started by this stage.
            "launch_vmm" | "resume" => {
                let held = self.gates.hold(Program::Qemu);
                (begin()?, Held::Gate(held))
            }
            "wait_guest" => {
                let begun = begin()?;
                // The guest needs a second at least to boot.
                self.in_stage(&begun, stage)?;
                let held = self.stop_vmm(&begun.name)?;
                (begun, Held::Process(held))
            }
            "personalise" => {
                // It needs the host key, and so does not begin before the guest stands.
                let gate = self.gates.hold(Program::SshKeygen);
                let begun = begin()?;
                self.past_stage(&begun, "wait_guest")?;
                let held = self.stop_vmm(&begun.name)?;
                drop(gate);
                (begun, Held::Process(held))
            }
            "publish_dns" => {
                let begun = begin()?;
                // Its network is there, and its guest needs a second at least to boot.
                self.in_stage(&begun, "wait_guest")?;
                let held = self.stop_service(Service::Net)?;
                (begun, Held::Process(held))
            }
            "sync_identity" => {
                let held = self.stop_service(Service::Workspace)?;
                (begin()?, Held::Process(held))
            }
            "wait_services" => {
                let begun = begin()?;
                // The guest's init needs seconds from here to its sshd.
                self.in_stage(&begun, stage)?;
                let held = self.stop_vmm(&begun.name)?;
                (begun, Held::Process(held))
            }
            other => return Err(format!("nothing is known that holds stage {other}")),
        };
        self.in_stage(&begun, stage)?;
        Ok((begun, held))
    }
}
