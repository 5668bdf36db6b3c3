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

/// Reserves the name and makes the row. Nobody but root may have more than `most`: the host's addresses, disk and memory
/// are everybody's.
pub(crate) fn insert(tx: &Transaction<'_>, vm: &Vm, most: u32) -> Result<(), DbError> {
    let name = &vm.record.name;
    let owner = vm.record.owner;
    let have: u32 = tx
        .prepare_cached("SELECT count(*) FROM vm WHERE data ->> '$.record.owner' = ?1")?
        .query_row([owner], |r| r.get(0))?;
    if owner != 0 && have >= most {
        return Err(Error::new(
            Code::ResourceExhausted,
            format!("user {owner} has {have} VMs, which is the most"),
        )
        .hint("remove some with `bothy vm delete`; root can raise `vm.max_per_user` in bothy.toml")
        .into());
    }
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

/// The longest reason, in characters. All records go over the bus in one message, and a guest has a say in reasons.
const MAX_REASON: usize = 600;

/// Puts a VM into `state`.
pub(crate) fn set_state(vm: &mut Vm, state: VmState, reason: Option<String>) {
    vm.record.state = state;
    vm.record.reason = reason.map(|text| {
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
    use bothy_contract::{ImageName, vm::Shape};
    use bothy_db::Db;

    fn vm(name: &str, owner: u32) -> Vm {
        let name = name.parse().unwrap();
        let record = VmRecord::new(VmId::new(), name, owner, ImageName::default_image(), Shape::default());
        Vm { record, machine_id: String::new(), handle: None }
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
        let reason = vm.record.reason.unwrap();
        assert_eq!(reason.chars().count(), MAX_REASON);
        assert!(reason.starts_with("?[2Jä\n?"), "{reason}");
    }
}
