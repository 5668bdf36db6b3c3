//! The VMs' rows. Every change of a VM is one transaction that reads its row, decides, and writes it: so all that can
//! happen to a VM (an operation's end, its VMM's exit) has one order, and no lock is held across an await.
//!
//! What is known of a VMM is a column of its own: a cache that may be lost or damaged without the VM being so.

use crate::phase::{Phase, Placed, Vmm};
use bothy_contract::{
    Code, Error, GroupName, ImageName, OpId, VmId, VmName,
    net::{Egress, Lease, Publish},
    vm::{ExitRecord, Idle, Shape, VmRecord, VmState},
};
use bothy_db::{
    Error as DbError,
    rusqlite::{Connection, OptionalExtension, Row, Transaction, params},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The schema: the operations' journal, then the VMs. `data` is a [`Facts`] and the lease as JSON, `vmm` a [`Vmm`]; id and
/// name stand beside them, since names are unique.
pub(crate) const MIGRATIONS: &[&str] = &[
    bothy_ops::SCHEMA,
    "CREATE TABLE vm(id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, data TEXT NOT NULL, vmm TEXT) STRICT;",
    crate::lifecycle::template::store::SCHEMA,
];

/// All that the agent knows of a VM.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Vm {
    /// What it is and where it stands.
    pub(crate) facts: Facts,
    /// What there is of it.
    pub(crate) phase: Phase,
}

/// What a VM is, whatever there is of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) id: VmId,
    pub(crate) name: VmName,
    pub(crate) owner: u32,
    pub(crate) image: ImageName,
    pub(crate) shape: Shape,
    /// What the guest may reach.
    #[serde(default)]
    pub(crate) egress: Egress,
    /// Ports of the guest that the host answers for.
    #[serde(default)]
    pub(crate) publish: Vec<Publish>,
    /// The groups whose members it reaches.
    #[serde(default)]
    pub(crate) groups: BTreeSet<GroupName>,
    /// The guest's machine-id: 32 hex digits, the same from create to delete.
    pub(crate) machine_id: String,
    pub(crate) created: Timestamp,
    pub(crate) state: VmState,
    pub(crate) reason: Option<String>,
    /// The operation that is at work on it. Nobody else may begin one.
    pub(crate) busy: Option<OpId>,
    /// Whether that one puts it to rest, or has it go on: whoever wants to use it waits for the end of it.
    #[serde(default)]
    pub(crate) resting: bool,
    pub(crate) last_exit: Option<ExitRecord>,
    pub(crate) started: Option<Timestamp>,
    /// What happens when nobody uses it, where that was said.
    #[serde(default)]
    pub(crate) idle: Option<Idle>,
    /// Its memory on disk, where it is suspended.
    #[serde(default)]
    pub(crate) asleep: Option<Asleep>,
    /// The key of the template that it is to become: then it is nobody's VM, and no list shows it.
    #[serde(default)]
    pub(crate) template: Option<String>,
}

/// A guest's memory on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asleep {
    /// The shape that the guest has, whatever its VM is to have at its next boot.
    pub(crate) shape: Shape,
    /// The VMM that it was saved by.
    pub(crate) vmm: String,
    /// What it takes, in bytes.
    pub(crate) bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct Data {
    #[serde(flatten)]
    facts: Facts,
    lease: Option<Lease>,
}

impl Facts {
    /// A VM that is about to be created.
    pub(crate) fn new(id: VmId, name: VmName, owner: u32, image: ImageName, shape: Shape) -> Self {
        Self {
            id,
            name,
            owner,
            image,
            shape,
            egress: Egress::None,
            publish: Vec::new(),
            groups: BTreeSet::new(),
            machine_id: uuid::Uuid::new_v4().as_simple().to_string(),
            created: Timestamp::now(),
            state: VmState::Creating,
            reason: None,
            busy: None,
            resting: false,
            last_exit: None,
            started: None,
            idle: None,
            asleep: None,
            template: None,
        }
    }
}

impl Vm {
    /// The VMM has ended.
    pub(crate) fn ended(&mut self, exit: Option<ExitRecord>) {
        self.phase.end();
        if exit.is_some() {
            self.facts.last_exit = exit;
        }
    }

    /// What others see of it.
    pub(crate) fn record(&self) -> VmRecord {
        let f = self.facts.clone();
        let vmm = self.phase.live().map(|live| live.vmm.clone());
        VmRecord {
            state: f.state,
            reason: f.reason,
            nat: f.egress == Egress::Open,
            egress: f.egress,
            publish: f.publish,
            groups: f.groups,
            idle: f.idle,
            lease: self.phase.placed().map(|placed| placed.lease.clone()),
            booted: vmm.as_ref().map(|vmm| vmm.booted.clone()),
            vmm_pid: vmm.as_ref().map(|vmm| vmm.handle.vmm.pid),
            boot_id: vmm.as_ref().and_then(|vmm| vmm.boot_id.clone()),
            vmm: vmm.map(|vmm| vmm.name),
            last_exit: f.last_exit,
            created: f.created,
            started: f.started,
            ..VmRecord::new(f.id, f.name, f.owner, f.image, f.shape)
        }
    }

    fn read(row: &Row<'_>) -> Result<Self, DbError> {
        let (data, vmm): (String, Option<String>) = (row.get("data")?, row.get("vmm")?);
        let Data { facts, lease } = serde_json::from_str(&data)?;
        let phase = match lease.map(|lease| Placed { lease }) {
            None => Phase::Reserved,
            Some(placed) => match vmm.as_deref().map(serde_json::from_str::<Vmm>) {
                None => Phase::Placed(placed),
                Some(Ok(vmm)) => Phase::Live(placed.launched(vmm)),
                Some(Err(error)) => {
                    tracing::warn!(bothy.vm.id = %facts.id, %error, "what was known of a VMM is damaged");
                    Phase::Placed(placed)
                }
            },
        };
        Ok(Self { facts, phase })
    }

    /// The columns `data` and `vmm`.
    fn columns(&self) -> Result<(String, Option<String>), DbError> {
        let lease = self.phase.placed().map(|placed| placed.lease.clone());
        let data = serde_json::to_string(&Data { facts: self.facts.clone(), lease })?;
        let vmm = self.phase.live().map(|live| serde_json::to_string(&live.vmm)).transpose()?;
        Ok((data, vmm))
    }
}

/// Reserves the name and makes the row. Nobody but root may have more than `most`: the host's addresses, disk and memory
/// are everybody's.
pub(crate) fn insert(tx: &Transaction<'_>, vm: &Vm, most: u32) -> Result<(), DbError> {
    let Facts { id, name, owner, .. } = &vm.facts;
    let have: u32 = tx
        .prepare_cached("SELECT count(*) FROM vm WHERE data ->> '$.owner' = ?1")?
        .query_row([owner], |r| r.get(0))?;
    if *owner != 0 && have >= most {
        return Err(Error::new(
            Code::ResourceExhausted,
            format!("user {owner} has {have} VMs, which is the most"),
        )
        .hint("remove some with `bothy vm delete`; root can raise `vm.max_per_user` in bothy.toml")
        .into());
    }
    let (data, vmm) = vm.columns()?;
    let inserted = tx.execute(
        "INSERT INTO vm(id, name, data, vmm) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (name) DO NOTHING",
        params![id.to_string(), name.as_str(), data, vmm],
    )?;
    if inserted == 0 {
        return Err(taken(name).into());
    }
    Ok(())
}

fn taken(name: &VmName) -> Error {
    Error::new(Code::AlreadyExists, format!("a VM named {name} exists already"))
        .hint(format!("choose another name, or remove that one with `bothy vm delete {name}`"))
}

/// The error of a VM that is not there.
pub(crate) fn missing(id: VmId) -> Error {
    Error::not_found(format!("there is no VM {id}")).hint("`bothy vm list` shows those there are")
}

/// The row of `id`.
pub(crate) fn get(conn: &Connection, id: VmId) -> Result<Vm, DbError> {
    find(conn, id)?.ok_or_else(|| missing(id).into())
}

/// The row of `id`, if it is there.
pub(crate) fn find(conn: &Connection, id: VmId) -> Result<Option<Vm>, DbError> {
    conn.prepare_cached("SELECT data, vmm FROM vm WHERE id = ?1")?
        .query_row([id.to_string()], |row| Ok(Vm::read(row)))
        .optional()?
        .transpose()
}

/// All rows, oldest first: ids sort by time.
pub(crate) fn all(conn: &Connection) -> Result<Vec<Vm>, DbError> {
    let mut select = conn.prepare_cached("SELECT data, vmm FROM vm ORDER BY id")?;
    let rows = select.query_map([], |row| Ok(Vm::read(row)))?;
    rows.map(|vm| vm?).collect()
}

/// Changes the row of `id`.
pub(crate) fn update<T>(
    tx: &Transaction<'_>,
    id: VmId,
    change: impl FnOnce(&mut Vm) -> Result<T, Error>,
) -> Result<T, DbError> {
    let mut vm = get(tx, id)?;
    let value = change(&mut vm)?;
    let (data, vmm) = vm.columns()?;
    tx.prepare_cached("UPDATE vm SET data = ?2, vmm = ?3 WHERE id = ?1")?.execute(params![
        id.to_string(),
        data,
        vmm
    ])?;
    Ok(value)
}

/// The longest reason, in characters. All records go over the bus in one message, and a guest has a say in reasons.
const MAX_REASON: usize = 600;

/// Puts a VM into `state`.
pub(crate) fn set_state(vm: &mut Vm, state: VmState, reason: Option<String>) {
    vm.facts.state = state;
    vm.facts.reason = reason.map(|text| {
        // A control character is six bytes of JSON.
        text.chars().take(MAX_REASON).map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
    });
}

/// Removes the row.
pub(crate) fn remove(tx: &Transaction<'_>, id: VmId) -> Result<(), DbError> {
    tx.execute("DELETE FROM vm WHERE id = ?1", [id.to_string()])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_db::Db;
    use bothy_vm_agent::vmm::wire::{HolderHandle, Process};

    fn vm(name: &str, owner: u32) -> Vm {
        let (image, name) = (ImageName::default_image(), name.parse().unwrap());
        let facts = Facts::new(VmId::new(), name, owner, image, Shape::default());
        Vm { facts, phase: Phase::Reserved }
    }

    fn lease() -> Lease {
        serde_json::from_value(serde_json::json!({
            "slot": 0, "tap": "t0", "uid": 780_000, "address": "10.77.0.2", "prefix": 24, "gateway": "10.77.0.1",
            "mac": "52:54:00:00:00:02", "dns": [],
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn a_vm_comes_back_as_it_was_and_a_damaged_vmm_costs_only_itself() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let db = Db::open(dir.path().join("vm.db"), MIGRATIONS).unwrap();
        let mut row = vm("a", 1000);
        let id = row.facts.id;
        let process = Process { pid: 1, start_time: 1 };
        let vmm = Vmm {
            handle: HolderHandle { holder: process, vmm: process },
            name: "x".into(),
            booted: Shape::default(),
            boot_id: None,
        };
        assert!(row.phase.launch(vmm.clone()).is_err(), "nothing is launched without a place");
        row.phase.place(lease());
        row.phase.launch(vmm).unwrap();
        let written = row.clone();
        db.write(move |tx| insert(tx, &written, 9)).await.unwrap();
        assert_eq!(db.read(move |c| get(c, id)).await.unwrap(), row);
        assert_eq!(db.read(all).await.unwrap(), [row.clone()]);
        db.write(move |tx| Ok(tx.execute("UPDATE vm SET vmm = '{\"handle\": 7'", [])?)).await.unwrap();
        row.phase.end();
        assert_eq!(db.read(move |c| get(c, id)).await.unwrap(), row);
        assert_eq!(row.record().lease, Some(lease()));
        assert_eq!(row.record().vmm_pid, None);
    }

    #[tokio::test]
    async fn one_user_cannot_have_what_is_everybodys() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let db = Db::open(dir.path().join("vm.db"), MIGRATIONS).unwrap();
        let insert = async |name: &str, owner| -> Result<(), Error> {
            let vm = vm(name, owner);
            Ok(db.write(move |tx| super::insert(tx, &vm, 2)).await?)
        };
        for (name, owner) in [("a", 1000), ("b", 1000), ("c", 1001)] {
            insert(name, owner).await.unwrap();
        }
        assert_eq!(insert("d", 1000).await.unwrap_err().code, Code::ResourceExhausted);
        insert("d", 1001).await.unwrap();
        for name in ["r1", "r2", "r3"] {
            insert(name, 0).await.unwrap();
        }
        assert_eq!(insert("a", 0).await.unwrap_err().code, Code::AlreadyExists);
    }

    #[test]
    fn reasons_are_short_and_harmless() {
        let mut vm = vm("a", 1000);
        set_state(&mut vm, VmState::Error, Some("\u{1b}[2Jä\n".repeat(1000)));
        let reason = vm.facts.reason.unwrap();
        assert_eq!(reason.chars().count(), MAX_REASON);
        assert!(reason.starts_with("?[2Jä\n?"), "{reason}");
    }
}
