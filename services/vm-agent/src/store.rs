//! The VMs' rows. Every change of a VM is one transaction that reads its row, decides, and writes it: so all that can
//! happen to a VM (an operation's end, its VMM's exit) has one order, and no lock is held across an await.

use bothy_contract::{
    Code, Error, VmId, VmName,
    vm::{ExitRecord, VmRecord, VmState},
};
use bothy_db::{
    Error as DbError,
    rusqlite::{Connection, OptionalExtension, Transaction, params},
};
use bothy_vm_agent::vmm::wire::HolderHandle;
use serde::{Deserialize, Serialize};

/// The schema: the operations' journal, then the VMs. A row is a [`Vm`] as JSON; id and name stand beside it, since names
/// are unique.
pub(crate) const MIGRATIONS: &[&str] = &[
    bothy_ops::SCHEMA,
    "CREATE TABLE vm(id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, data TEXT NOT NULL) STRICT;",
];

/// All that the agent knows of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Vm {
    /// What others see.
    pub(crate) record: VmRecord,
    /// The guest's machine-id: 32 hex digits, the same from create to delete.
    pub(crate) machine_id: String,
    /// The holder and its VMM, from their start until their end was noticed.
    #[serde(default)]
    pub(crate) handle: Option<HolderHandle>,
}

impl Vm {
    /// The VMM has ended.
    pub(crate) fn ended(&mut self, exit: Option<ExitRecord>) {
        self.handle = None;
        self.record.vmm_pid = None;
        if exit.is_some() {
            self.record.last_exit = exit;
        }
    }

    /// The VMM has started.
    pub(crate) fn launched(&mut self, handle: HolderHandle, vmm: String) {
        self.handle = Some(handle);
        self.record.vmm_pid = Some(handle.vmm.pid);
        self.record.vmm = Some(vmm);
    }
}

/// Reserves the name and makes the row.
pub(crate) fn insert(tx: &Transaction<'_>, vm: &Vm) -> Result<(), DbError> {
    let name = &vm.record.name;
    let inserted = tx.execute(
        "INSERT INTO vm(id, name, data) VALUES (?1, ?2, ?3) ON CONFLICT (name) DO NOTHING",
        params![vm.record.id.to_string(), name.as_str(), serde_json::to_string(vm)?],
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

fn missing(id: VmId) -> Error {
    Error::not_found(format!("there is no VM {id}")).hint("`bothy vm list` shows those there are")
}

/// The row of `id`.
pub(crate) fn get(conn: &Connection, id: VmId) -> Result<Vm, DbError> {
    find(conn, id)?.ok_or_else(|| missing(id).into())
}

/// The row of `id`, if it is there.
pub(crate) fn find(conn: &Connection, id: VmId) -> Result<Option<Vm>, DbError> {
    let data: Option<String> = conn
        .prepare_cached("SELECT data FROM vm WHERE id = ?1")?
        .query_row([id.to_string()], |r| r.get(0))
        .optional()?;
    Ok(data.map(|d| serde_json::from_str(&d)).transpose()?)
}

/// All rows, oldest first: ids sort by time.
pub(crate) fn all(conn: &Connection) -> Result<Vec<Vm>, DbError> {
    let mut select = conn.prepare_cached("SELECT data FROM vm ORDER BY id")?;
    let rows = select.query_map([], |r| r.get::<_, String>(0))?;
    rows.map(|data| Ok(serde_json::from_str(&data?)?)).collect()
}

/// Changes the row of `id`.
pub(crate) fn update<T>(
    tx: &Transaction<'_>,
    id: VmId,
    change: impl FnOnce(&mut Vm) -> Result<T, Error>,
) -> Result<T, DbError> {
    let mut vm = get(tx, id)?;
    let value = change(&mut vm)?;
    tx.prepare_cached("UPDATE vm SET data = ?2 WHERE id = ?1")?
        .execute(params![id.to_string(), serde_json::to_string(&vm)?])?;
    Ok(value)
}

/// Puts a VM into `state`.
pub(crate) fn set_state(vm: &mut Vm, state: VmState, reason: Option<String>) {
    vm.record.state = state;
    vm.record.reason = reason;
}

/// Removes the row.
pub(crate) fn remove(tx: &Transaction<'_>, id: VmId) -> Result<(), DbError> {
    tx.execute("DELETE FROM vm WHERE id = ?1", [id.to_string()])?;
    Ok(())
}
