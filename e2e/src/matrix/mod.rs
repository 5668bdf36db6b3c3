//! The fault matrix: an operation is held in one of its stages, a fault strikes, the stage goes on; and whatever the fault
//! was, the operation ends done or undone, nothing of it is left, and its name can be used again at once.
//!
//! A [`Cell`] is one stage and one fault, as data. A [`Matrix`] is one host that runs many cells, one after the other, and
//! keeps a row for each; [`Matrix::finish`] shows the rows and fails if any is bad. A bad cell does not spoil the ones that
//! follow: what it left behind is taken for granted from then on.
//!
//! How a stage is held is in [`hold`]; how faults strike in [`strike`].

mod changes;
mod ends;
pub mod hold;
pub mod strike;

use crate::{
    brake::{Gates, Program},
    gateway::{Answer, Gateway},
    host::{Host, QUICK},
    images,
    journal::{Journal, Now},
};
use bothy_config::{Accelerator, Config};
use bothy_contract::Service;
pub use changes::Change;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
pub use strike::{Break, Fault};

/// How long an operation may take to end once its fault is over. Generous: a guest may have to boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long what a fault left may take to be cleared away.
const CLEARED: Duration = Duration::from_secs(15);
/// The image with services to wait for.
pub const WHOLE: &str = "debian";
/// An image whose service never comes up.
pub const DEAF: &str = "deaf";

/// What becomes of an operation once its fault is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It is cancelled as soon as the stage has gone on, unless it is over by then; its name is taken again and given up.
    Undo,
    /// It goes on to its end; or where that is its undo, its name is created anew in full.
    Ready,
}

/// One stage and one fault.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// The stage.
    pub stage: &'static str,
    /// The fault.
    pub fault: Fault,
    /// And then.
    pub then: Then,
}

/// One host and the rows of its cells.
#[derive(Debug)]
pub struct Matrix {
    /// The host.
    pub host: Host,
    /// Its gates.
    pub gates: Gates,
    /// Its gateway.
    pub gateway: Gateway,
    /// Its vm-agent's journal.
    pub journal: Journal,
    rows: Vec<(String, Result<String, String>)>,
}

/// An operation that was accepted.
#[derive(Debug, Clone)]
pub struct Begun {
    /// Its id.
    pub op: String,
    /// The VM's name.
    pub name: String,
}

impl Matrix {
    /// A host with gates, and with `change` applied to its configuration.
    pub fn start(change: impl FnOnce(&mut Config)) -> Self {
        let gates = Gates::new();
        let path = gates.search_path(images::path_with_tools());
        let path = path.to_str().expect("a PATH that is text").to_owned();
        let host = Host::start_with(&[("PATH", &path)], |config| {
            config.vm.qemu = gates.path(Program::Qemu);
            // What is tested is not how it is found out that KVM is of no use here.
            config.vm.accelerator = Accelerator::Tcg;
            images::variant_into(config, QUICK, |manifest| manifest["wait"] = json!([]));
            images::variant_into(config, DEAF, |manifest| {
                manifest["wait"] = json!([{ "name": "nobody", "port": 9, "timeout_s": 1 }]);
            });
            change(config);
        });
        let gateway = Gateway::new(host.config.gateway_socket());
        let journal = Journal::new(&host.config);
        Self { host, gates, gateway, journal, rows: Vec::new() }
    }

    /// Makes the template of what the cells create, so that they are resumed. The host must make templates.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn warm(&mut self) {
        self.host.bothy(["image", "warm", QUICK, "--cpus", "1", "--memory", "256M"]).ok();
        self.host.take_for_granted();
    }

    /// Runs `cells` of the create, one after the other.
    pub fn creates(&mut self, cells: &[Cell]) {
        for (n, cell) in cells.iter().enumerate() {
            let name = format!("m{n}");
            self.row(format!("create  {:<17} {}", cell.stage, cell.fault), |m| {
                m.create(cell, &name).inspect_err(|_| m.sweep(&name))
            });
        }
    }

    /// Runs one cell and keeps its row; then looks for what is left.
    pub fn row(&mut self, what: String, cell: impl FnOnce(&Self) -> Result<String, String>) {
        self.row_beside(&[], what, cell);
    }

    /// The same while VMs `others` are there.
    #[expect(clippy::print_stdout, reason = "the test runner keeps it and shows it where a test fails")]
    fn row_beside(
        &mut self,
        others: &[&String],
        what: String,
        cell: impl FnOnce(&Self) -> Result<String, String>,
    ) {
        let begun = Instant::now();
        let mut result = cell(self);
        let others = others.iter().filter_map(|name| self.marks_of(name)).flatten().collect::<Vec<_>>();
        let left = self.host.left_beside(&others, CLEARED);
        if !left.is_empty() {
            let list: Vec<String> = left.iter().map(ToString::to_string).collect();
            let so_far = result.clone().unwrap_or_else(|e| e);
            result = Err(format!("{so_far}; left behind:\n      {}", list.join("\n      ")));
            self.host.take_for_granted();
        }
        let (mark, text) = match &result {
            Ok(text) => ("ok ", text),
            Err(text) => ("BAD", text),
        };
        println!("{mark} {what:<46} {:>6} ms  {text}", begun.elapsed().as_millis());
        if result.is_err() {
            println!("{}", self.host.logs());
        }
        self.rows.push((what, result));
    }

    /// What is in the words of all that belongs to VM `name` while it runs.
    fn marks_of(&self, name: &str) -> Option<Vec<String>> {
        let shown = self.answer("GET", &format!("/v1/vms/{name}")).ok()?.body;
        let lease = &shown["lease"];
        let (holder, _) = self.host.vmm_of(name)?;
        Some(vec![
            shown["id"].as_str()?.replace('-', ""),
            lease["tap"].as_str()?.to_owned(),
            lease["address"].as_str()?.to_owned(),
            format!("net.db lease {}", lease["slot"]),
            format!("{holder} bothy-vmm"),
            self.journal.row_of(name)?,
        ])
    }

    /// One cell of the create.
    fn create(&self, cell: &Cell, name: &str) -> Result<String, String> {
        // What is ready sooner serves as well, but where services are what is waited for.
        let image = match (cell.fault, cell.stage) {
            (Fault::Break(Break::DeadPort), _) => DEAF,
            (_, "wait_services") => WHOLE,
            _ => QUICK,
        };
        let spec = spec(name, image, cell.fault == Fault::Break(Break::BadKey));
        if cell.fault == Fault::Break(Break::SubnetFull) {
            return self.fill_the_subnet(&spec);
        }
        let (begun, held) = self.hold(cell.stage, || self.begin(&spec))?;
        let struck = self.strike(cell.fault, &begun, held)?;
        if cell.then == Then::Undo && struck.goes_on {
            self.gone_on(&begun, cell.stage)?;
            self.cancel(&begun)?;
        }
        let now = self.ended(&begun)?;
        drop(struck);
        let mut told = now.state.clone();
        match now.state.as_str() {
            "succeeded" => {
                self.works(name)?;
                self.delete(name)?;
                told.push_str(", worked, deleted");
            }
            _ => self.is_gone(name)?,
        }
        cell.fault.expect(cell, &now)?;
        if let Some(error) = &now.error {
            told.push_str(&format!(" ({})", error.lines().next().unwrap_or_default()));
        }
        self.again(&spec_of(name), cell.then == Then::Ready && now.state != "succeeded")?;
        Ok(told)
    }

    /// Ends what a bad cell may have left running, so that the next one has the machine.
    fn sweep(&self, name: &str) {
        let ops = self.answer("GET", "/v1/ops?limit=100").map(|answer| answer.body).unwrap_or_default();
        for op in ops.as_array().into_iter().flatten().filter(|op| op["subject"] == name) {
            let begun = Begun { op: op["id"].as_str().unwrap_or_default().to_owned(), name: name.to_owned() };
            let _ = self.cancel(&begun);
            let _ = self.ended(&begun);
        }
        let _ = self.delete(name);
    }

    /// Begins a create.
    ///
    /// # Errors
    /// It was refused.
    pub fn begin(&self, spec: &Value) -> Result<Begun, String> {
        let begun = self.gateway.accepted("POST", "/v1/vms", Some(spec))?;
        let name = spec["name"].as_str().unwrap_or_default().to_owned();
        Ok(Begun { op: begun["op"].as_str().ok_or("no id of an operation")?.to_owned(), name })
    }

    /// Begins a start, a stop or a delete of VM `name`.
    ///
    /// # Errors
    /// It was refused.
    pub fn begin_on(&self, name: &str, what: &str) -> Result<Begun, String> {
        let begun = match what {
            "start" => self.gateway.accepted("POST", &format!("/v1/vms/{name}/start"), Some(&identity())),
            "delete" => self.gateway.accepted("DELETE", &format!("/v1/vms/{name}?force=true"), None),
            what => self.gateway.accepted("POST", &format!("/v1/vms/{name}/{what}"), Some(&json!({}))),
        }?;
        let op = begun["op"].as_str().ok_or("no id of an operation")?.to_owned();
        Ok(Begun { op, name: name.to_owned() })
    }

    /// The same name is accepted at once; `full`: and becomes a VM that works, else it is cancelled.
    fn again(&self, spec: &Value, full: bool) -> Result<(), String> {
        let name = spec["name"].as_str().unwrap_or_default();
        let begun = self.begin(spec).map_err(|e| format!("the name is not free: {e}"))?;
        if full {
            let now = self.ended(&begun)?;
            if now.state != "succeeded" {
                return Err(format!("the create after it: {now:?}"));
            }
            self.works(name)?;
            return self.delete(name);
        }
        self.cancel(&begun)?;
        let now = self.ended(&begun)?;
        if now.state != "cancelled" {
            return Err(format!("the create after it was cancelled and is: {now:?}"));
        }
        self.is_gone(name)
    }

    /// Asks the gateway until it answers at all: after a fault it may be on its way back.
    fn answer(&self, method: &str, path: &str) -> Result<Answer, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = match self.gateway.ask(method, path, None) {
                Ok(answer) if ![503, 504].contains(&answer.status) => return Ok(answer),
                Ok(answer) => answer.body.to_string(),
                Err(e) => e.to_string(),
            };
            if Instant::now() > deadline {
                return Err(format!("{method} {path} is not answered: {said}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Has the operation cancelled.
    ///
    /// # Errors
    /// It is not accepted.
    pub fn cancel(&self, begun: &Begun) -> Result<(), String> {
        let answer = self.answer("POST", &format!("/v1/ops/{}/cancel", begun.op))?;
        if answer.status == 200 { Ok(()) } else { Err(format!("the cancel is refused: {}", answer.body)) }
    }

    /// Waits until the stage that was held is over, or the operation is.
    fn gone_on(&self, begun: &Begun, stage: &str) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.journal.now(&begun.op)?;
            if now.is_over() || now.stage(stage) != Some("running") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("stage {stage} does not go on: {now:?}"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the operation is over, in the journal and as the gateway tells it.
    ///
    /// # Errors
    /// It does not end, the two differ, or a stage is not over.
    pub fn ended(&self, begun: &Begun) -> Result<Now, String> {
        let deadline = Instant::now() + PATIENCE;
        let now = loop {
            let now = self.journal.now(&begun.op)?;
            if now.is_over() {
                break now;
            }
            if Instant::now() > deadline {
                return Err(format!("the operation does not end: {now:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let told = self.answer("GET", &format!("/v1/ops/{}", begun.op))?;
        if told.body["state"] != now.state.as_str() {
            return Err(format!("the gateway tells {} of {now:?}", told.body));
        }
        if now.stages.iter().any(|(_, state)| state == "running") {
            return Err(format!("it is over, and a stage still runs: {now:?}"));
        }
        Ok(now)
    }

    /// Whether a VM runs and commands in it do.
    ///
    /// # Errors
    /// What does not.
    pub fn works(&self, name: &str) -> Result<(), String> {
        let shown = self.answer("GET", &format!("/v1/vms/{name}"))?;
        if shown.body["state"] != "running" {
            return Err(format!("its create succeeded, and it is {}", shown.body));
        }
        let ran = self.host.sh(name, "echo works");
        if ran.status == 0 && ran.stdout == "works\n" { Ok(()) } else { Err(format!("exec: {ran:?}")) }
    }

    /// Deletes a VM, running or not.
    ///
    /// # Errors
    /// The delete did not succeed.
    pub fn delete(&self, name: &str) -> Result<(), String> {
        let now = self.ended(&self.begin_on(name, "delete")?)?;
        if now.state == "succeeded" { self.is_gone(name) } else { Err(format!("the delete: {now:?}")) }
    }

    fn is_gone(&self, name: &str) -> Result<(), String> {
        let shown = self.answer("GET", &format!("/v1/vms/{name}"))?;
        if shown.status == 404 { Ok(()) } else { Err(format!("the VM is still there: {}", shown.body)) }
    }

    /// Every address is taken: of as many creates as there are addresses, and one, exactly one fails, for that reason.
    fn fill_the_subnet(&self, spec: &Value) -> Result<String, String> {
        let report = self.gateway.accepted("GET", "/v1/host", None)?;
        let capacity = report["net"]["capacity"].as_u64().ok_or("no capacity")?;
        let base = spec["name"].as_str().unwrap_or_default();
        let net = self.stop_service(Service::Net)?;
        let mut all = Vec::new();
        for n in 0..=capacity {
            let mut spec = spec.clone();
            spec["name"] = format!("{base}-{n}").into();
            let begun = self.begin(&spec)?;
            self.in_stage(&begun, "acquire_network")?;
            all.push(begun);
        }
        // They wait for their disks, each with its address.
        let image = self.stop_service(Service::Image)?;
        drop(net);
        let deadline = Instant::now() + PATIENCE;
        let refused = loop {
            let mut over = Vec::new();
            for begun in &all {
                let now = self.journal.now(&begun.op)?;
                if now.is_over() {
                    over.push(now);
                }
            }
            if let Some(now) = over.pop() {
                break now;
            }
            if Instant::now() > deadline {
                return Err("none of them is refused".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        drop(image);
        let error = refused.error.clone().unwrap_or_default();
        if refused.state != "failed" || !error.contains("stage acquire_network failed") {
            return Err(format!("it ended otherwise: {refused:?}"));
        }
        let mut left = 0;
        for begun in &all {
            self.cancel(begun)?;
            left += u64::from(self.ended(begun)?.state == "cancelled");
            self.is_gone(&begun.name)?;
        }
        if left != capacity {
            return Err(format!("{left} of {capacity} had an address"));
        }
        self.again(spec, false)?;
        Ok(format!("failed ({error})"))
    }

    /// Shows all rows, takes the host down and looks for what is left of it.
    ///
    /// # Panics
    /// If any row is bad, with all of them.
    pub fn finish(self) {
        let bad = self.rows.iter().filter(|(_, result)| result.is_err()).count();
        let all = self.rows.len();
        let rows = self.rows.into_iter().map(|(what, result)| match result {
            Ok(text) => format!("ok  {what} {text}"),
            Err(text) => format!("BAD {what} {text}"),
        });
        let table = rows.collect::<Vec<_>>().join("\n");
        assert_eq!(bad, 0, "{bad} of {all} cells are bad\n{table}");
        self.host.finish();
    }
}

/// The body of a start, with something for `sync_identity` to do.
fn identity() -> Value {
    json!({ "identity": { "ssh_public_keys": [], "git_name": "A Tester", "git_email": "tester@example.org" } })
}

/// What a create of `name` asks for.
pub fn spec_of(name: &str) -> Value {
    spec(name, QUICK, false)
}

fn spec(name: &str, image: &str, bad_key: bool) -> Value {
    // The first word is a key's type, the second is damaged.
    let keys = if bad_key { json!(["ssh-ed25519 AAAA"]) } else { json!([]) };
    json!({
        "name": name,
        "image": image,
        // The least that boots: two cores have to do for two hosts at once.
        "shape": { "cpus": 1, "memory_mib": 256, "work_mib": 10240, "system_mib": 10240 },
        "identity": { "ssh_public_keys": keys, "git_name": "A Tester", "git_email": "tester@example.org" },
    })
}
