//! The cells of restart, kill and set: of what is done to a VM that runs.

use super::{Begun, Cell, Fault, Matrix, hold::Held};
use crate::brake::Program;
use bothy_contract::Service;
use serde_json::json;

/// What is done to a running VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `vm restart`.
    Restart,
    /// `vm kill --signal TERM`.
    Kill,
    /// `vm set`: more work disk, and NAT the other way round.
    Set,
}

impl Change {
    fn word(self) -> &'static str {
        match self {
            Change::Restart => "restart",
            Change::Kill => "kill",
            Change::Set => "set",
        }
    }
}

impl Matrix {
    /// Runs `cells` of `change` on VM `name`, which is started for each unless it runs.
    pub fn changes(&mut self, change: Change, cells: &[Cell], name: &str) {
        for cell in cells {
            self.row(format!("{:<7} {:<17} {}", change.word(), cell.stage, cell.fault), |m| {
                let done = m.run(name).and_then(|()| m.change_cell(change, cell, name));
                // What is left is compared with what a stopped VM has.
                let stopped = m.stop(name);
                done.and_then(|told| stopped.map(|()| told))
            });
        }
    }

    fn change_cell(&self, change: Change, cell: &Cell, name: &str) -> Result<String, String> {
        let before = self.shown(name)?;
        let (disk, nat) = (before["shape"]["work_mib"].as_u64().unwrap_or(0) + 64, before["nat"] != true);
        let ask = |what: &str, body| {
            let path = format!("/v1/vms/{name}{what}");
            let method = if what.is_empty() { "PATCH" } else { "POST" };
            self.gateway.accepted(method, &path, Some(&body))
        };
        let begin = || {
            let begun = match change {
                Change::Restart => ask("/restart", json!({})),
                Change::Kill => ask("/kill", json!({ "signal": 15 })),
                Change::Set => ask("", json!({ "work_mib": disk, "nat": nat })),
            }?;
            let op = begun["op"].as_str().ok_or("no id of an operation")?.to_owned();
            Ok::<_, String>(Begun { op, name: name.to_owned() })
        };
        let (begun, held) = match cell.stage {
            "shut_down_guest" => {
                let held = self.stop_vmm(name)?;
                (begin()?, Held::Process(held))
            }
            "wait_exit" => {
                let begun = begin()?;
                self.in_stage(&begun, cell.stage)?;
                (begun, Held::Process(self.stop_vmm(name)?))
            }
            "launch_vmm" => {
                let held = self.gates.hold(Program::Qemu);
                (begin()?, Held::Gate(held))
            }
            "signal_vmm" | "resize_vmm" => {
                let held = self.stop_holder(name)?;
                (begin()?, Held::Process(held))
            }
            "grow_disks" => {
                let held = self.stop_service(Service::Image)?;
                (begin()?, Held::Process(held))
            }
            "grow_guest" => {
                let begun = begin()?;
                self.in_stage(&begun, cell.stage)?;
                (begun, Held::Process(self.stop_vmm(name)?))
            }
            "set_egress" => {
                let held = self.stop_service(Service::Net)?;
                (begin()?, Held::Process(held))
            }
            other => return Err(format!("nothing is known that holds stage {other}")),
        };
        self.in_stage(&begun, cell.stage)?;
        let struck = self.strike(cell.fault, &begun, held)?;
        let now = self.ended(&begun)?;
        drop(struck);
        let state = self.state(name)?;
        let after = self.shown(name)?;
        let good = match (change, now.state.as_str()) {
            // Before the power-off it runs as before, after it it is stopped.
            (Change::Restart, "cancelled") => cell.fault == Fault::Cancel && state != "error",
            (Change::Restart | Change::Set, "succeeded") => state == "running",
            (Change::Kill, "succeeded") => state == "stopped",
            _ => false,
        };
        let kept = change != Change::Set || (after["shape"]["work_mib"] == disk && after["nat"] == nat);
        if !good || !kept {
            return Err(format!("it is {state} after: {now:?}\n{after:#}"));
        }
        if state == "running" {
            self.works(name)?;
        }
        if change == Change::Set && nat {
            // Its address in the set of those that may go out would be told as left behind.
            let off =
                self.gateway.accepted("PATCH", &format!("/v1/vms/{name}"), Some(&json!({ "nat": false })))?;
            let op = off["op"].as_str().ok_or("no id of an operation")?.to_owned();
            self.ended(&Begun { op, name: name.to_owned() })?;
        }
        Ok(format!("{}, and the VM is {state}", now.state))
    }

    fn shown(&self, name: &str) -> Result<serde_json::Value, String> {
        Ok(self.answer("GET", &format!("/v1/vms/{name}"))?.body)
    }
}
