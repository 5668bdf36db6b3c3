//! The cells of start, stop, delete and undo.
//!
//! A start is held where a create is, but for two stages: its host key is there already, so nothing runs; and what would
//! keep `personalise` from being over before it is seen is that key. Both are the same code as in a create.

use super::{Begun, Cell, Fault, Matrix, Then, hold::Held, spec, spec_of};
use crate::host::QUICK;
use bothy_contract::Service;

/// How many VMs are made at once for cells that end one.
const AT_ONCE: usize = 3;

impl Matrix {
    /// Runs `cells` of the start of VM `name`, which is stopped and stays so; each leaves it as it was.
    pub fn starts(&mut self, cells: &[Cell], name: &str) {
        for cell in cells {
            self.row(format!("start   {:<17} {}", cell.stage, cell.fault), |m| {
                m.start_cell(cell, name).inspect_err(|_| m.sweep_start(name))
            });
        }
    }

    fn start_cell(&self, cell: &Cell, name: &str) -> Result<String, String> {
        let (begun, held) = self.hold(cell.stage, || self.begin_on(name, "start"))?;
        let struck = self.strike(cell.fault, &begun, held)?;
        if cell.then == Then::Undo && struck.goes_on {
            self.gone_on(&begun, cell.stage)?;
            self.cancel(&begun)?;
        }
        let now = self.ended(&begun)?;
        cell.fault.expect(cell, &now)?;
        if now.state == "succeeded" {
            self.works(name)?;
            self.stop(name)?;
        }
        let state = self.state(name)?;
        if state != "stopped" {
            return Err(format!("it is {state} after a start that {}", now.state));
        }
        Ok(told(&now.state, now.error.as_deref()))
    }

    fn sweep_start(&self, name: &str) {
        let _ = self.stop(name);
    }

    /// Runs `cells` of the stop of VM `name`, which is started for each.
    pub fn stops(&mut self, cells: &[Cell], name: &str) {
        for cell in cells {
            self.row(format!("stop    {:<17} {}", cell.stage, cell.fault), |m| {
                m.stop_cell(cell, name).inspect_err(|_| m.sweep_start(name))
            });
        }
    }

    fn stop_cell(&self, cell: &Cell, name: &str) -> Result<String, String> {
        self.run(name)?;
        let (begun, held) = match cell.stage {
            "shut_down_guest" => {
                let held = self.stop_vmm(name)?;
                (self.begin_on(name, "stop")?, held)
            }
            // Its init needs a moment to end all that runs.
            _ => {
                let begun = self.begin_on(name, "stop")?;
                self.in_stage(&begun, cell.stage)?;
                (begun, self.stop_vmm(name)?)
            }
        };
        self.in_stage(&begun, cell.stage)?;
        let now = if cell.fault == Fault::Cancel {
            // A stop does not turn back: the cancel is refused, and it goes on.
            let refused = self.gateway.ask("POST", &format!("/v1/ops/{}/cancel", begun.op), None);
            let refused = refused.map_err(|e| e.to_string())?;
            if refused.status < 400 {
                return Err(format!("a stop takes a cancel: {}", refused.body));
            }
            drop(held);
            self.ended(&begun)?
        } else {
            let struck = self.strike(cell.fault, &begun, Held::Process(held))?;
            let now = self.ended(&begun)?;
            drop(struck);
            now
        };
        let state = self.state(name)?;
        if now.state != "succeeded" || state != "stopped" {
            return Err(format!("it is {state} after: {now:?}"));
        }
        Ok(told(&now.state, now.error.as_deref()))
    }

    /// Runs `cells` of the delete, each on a running VM of its own.
    pub fn deletes(&mut self, cells: &[Cell]) {
        for (n, some) in cells.chunks(AT_ONCE).enumerate() {
            let names: Vec<String> = (0..some.len()).map(|k| format!("d{n}-{k}")).collect();
            let made = self.make(&names, QUICK);
            for (cell, name) in some.iter().zip(&names) {
                // The others are there by right; of this one nothing may be left.
                let gone: Vec<&String> = names.iter().skip_while(|other| *other != name).skip(1).collect();
                let what = format!("delete  {:<17} {}", cell.stage, cell.fault);
                let made = made.clone();
                self.row_beside(&gone, what, |m| {
                    made?;
                    m.delete_cell(cell, name).inspect_err(|_| drop(m.delete(name)))
                });
            }
        }
    }

    fn delete_cell(&self, cell: &Cell, name: &str) -> Result<String, String> {
        let held = match cell.stage {
            "kill_vmm" => self.stop_holder(name)?,
            "release_disks" => self.stop_service(Service::Image)?,
            "release_network" => self.stop_service(Service::Net)?,
            other => return Err(format!("nothing is known that holds stage {other}")),
        };
        let begun = self.begin_on(name, "delete")?;
        self.in_stage(&begun, cell.stage)?;
        let struck = self.strike(cell.fault, &begun, Held::Process(held))?;
        let now = self.ended(&begun)?;
        drop(struck);
        if now.state != "succeeded" {
            return Err(format!("the delete: {now:?}"));
        }
        self.is_gone(name)?;
        self.again(&spec_of(name), false)?;
        Ok(told(&now.state, now.error.as_deref()))
    }

    /// Runs `cells` of the undo of a create: `stage` is the one whose undo is held.
    pub fn undos(&mut self, cells: &[Cell]) {
        for (n, cell) in cells.iter().enumerate() {
            let name = format!("u{n}");
            self.row(format!("undo    {:<17} {}", cell.stage, cell.fault), |m| {
                m.undo_cell(cell, &name).inspect_err(|_| m.sweep(&name))
            });
        }
    }

    fn undo_cell(&self, cell: &Cell, name: &str) -> Result<String, String> {
        // A VMM runs, so every stage has something to undo.
        let (begun, guest) = self.hold("wait_guest", || self.begin(&spec_of(name)))?;
        let held = match cell.stage {
            "launch_vmm" => self.stop_holder(name)?,
            "prepare_rootfs" => self.stop_service(Service::Image)?,
            "acquire_network" => self.stop_service(Service::Net)?,
            other => return Err(format!("nothing is known that holds the undo of {other}")),
        };
        self.cancel(&begun)?;
        // Undos run in reverse: the one that began right after it is undone, or it is the next.
        self.journal.wait(&begun.op, "undoing", |now| now.state == "undoing")?;
        if cell.stage != "launch_vmm" {
            self.journal
                .wait(&begun.op, "launch_vmm undone", |now| now.stage("launch_vmm") == Some("undone"))?;
        }
        if let Some("undone") = self.journal.now(&begun.op)?.stage(cell.stage) {
            return Err(format!("{} was undone before it was held", cell.stage));
        }
        drop(guest);
        let struck = self.strike(cell.fault, &begun, Held::Process(held))?;
        let now = self.ended(&begun)?;
        drop(struck);
        let error = now.error.clone().unwrap_or_default();
        if now.state != "cancelled" || error.contains("moreover") {
            return Err(format!("it should not end like this: {now:?}"));
        }
        self.is_gone(name)?;
        self.again(&spec_of(name), cell.then == Then::Ready)?;
        Ok(told(&now.state, now.error.as_deref()))
    }

    /// Creates VMs of `image` side by side, and waits until all run.
    ///
    /// # Errors
    /// One of them does not.
    pub fn make(&self, names: &[String], image: &str) -> Result<(), String> {
        let begun: Vec<Begun> =
            names.iter().map(|name| self.begin(&spec(name, image, false))).collect::<Result<_, _>>()?;
        for one in &begun {
            let now = self.ended(one)?;
            if now.state != "succeeded" {
                return Err(format!("the create of {}: {now:?}", one.name));
            }
        }
        Ok(())
    }

    /// Starts VM `name` unless it runs.
    ///
    /// # Errors
    /// The start did not succeed.
    pub fn run(&self, name: &str) -> Result<(), String> {
        if self.state(name)? == "running" {
            return Ok(());
        }
        let now = self.ended(&self.begin_on(name, "start")?)?;
        if now.state == "succeeded" { Ok(()) } else { Err(format!("the start: {now:?}")) }
    }

    /// Stops VM `name` unless it is stopped.
    ///
    /// # Errors
    /// The stop did not succeed.
    pub fn stop(&self, name: &str) -> Result<(), String> {
        if self.state(name)? == "stopped" {
            return Ok(());
        }
        let now = self.ended(&self.begin_on(name, "stop")?)?;
        if now.state == "succeeded" { Ok(()) } else { Err(format!("the stop: {now:?}")) }
    }

    /// The word of a VM's state.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn state(&self, name: &str) -> Result<String, String> {
        let shown = self.answer("GET", &format!("/v1/vms/{name}"))?;
        shown.body["state"].as_str().map(str::to_owned).ok_or(format!("VM {name}: {}", shown.body))
    }
}

fn told(state: &str, error: Option<&str>) -> String {
    match error.and_then(|e| e.lines().next()) {
        Some(error) => format!("{state} ({error})"),
        None => state.to_owned(),
    }
}
