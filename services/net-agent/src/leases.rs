//! The lease table and what else must outlive the agent, in its SQLite file.

use crate::plan::{Plan, Slot};
use bothy_contract::{Code, Error, VmId};
use bothy_db::{Db, rusqlite::params};
use std::{collections::BTreeMap, path::Path};

/// Address and uid follow from the slot; they are kept to notice a configuration that was changed under the leases.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE lease (
        slot INTEGER PRIMARY KEY,
        vm TEXT NOT NULL UNIQUE,
        nat INTEGER NOT NULL,
        address TEXT NOT NULL,
        uid INTEGER NOT NULL
    ) STRICT;
    -- Links on which we turned forwarding on, to turn it off again.
    CREATE TABLE forwarding (link TEXT PRIMARY KEY) STRICT;
"];

/// A lease as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The slot.
    pub slot: u32,
    /// Whether NAT is on.
    pub nat: bool,
}

/// The tables.
#[derive(Debug, Clone)]
pub struct Leases(Db);

impl Leases {
    /// Opens or makes the file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self(Db::open(path, MIGRATIONS)?))
    }

    /// All leases.
    ///
    /// # Errors
    /// `failed_precondition` where one of them was made under another subnet or user range: its VM would come up at
    /// another address, with disks that are another user's.
    pub async fn load(&self, plan: &Plan) -> Result<BTreeMap<VmId, Held>, Error> {
        let rows = self
            .0
            .read(|conn| {
                let mut query = conn.prepare("SELECT vm, slot, nat, address, uid FROM lease")?;
                let rows = query.query_map([], |row| {
                    Ok((
                        row.get::<_, String>(0)?,
                        row.get::<_, u32>(1)?,
                        row.get::<_, bool>(2)?,
                        row.get::<_, String>(3)?,
                        row.get::<_, u32>(4)?,
                    ))
                })?;
                Ok(rows.collect::<Result<Vec<_>, _>>()?)
            })
            .await?;
        let mut leases = BTreeMap::new();
        for (vm, slot, nat, address, uid) in rows {
            let vm: VmId =
                vm.parse().map_err(|e| Error::internal(format!("lease of slot {slot}: `{vm}`"), &e))?;
            if plan.slot(slot).is_none_or(|s| s.address.to_string() != address || s.uid != uid) {
                return Err(Error::new(
                    Code::FailedPrecondition,
                    format!(
                        "VM {vm} has address {address} and user {uid}, which do not follow from subnet {} and \
                         vm.uid_base {}",
                        plan.cidr(),
                        plan.uid_base
                    ),
                )
                .hint("put net.subnet, net.prefix and vm.uid_base back, delete the VMs, then change them"));
            }
            leases.insert(vm, Held { slot, nat });
        }
        Ok(leases)
    }

    /// Writes a lease down.
    pub async fn insert(&self, vm: VmId, slot: &Slot, nat: bool) -> Result<(), Error> {
        let (number, address, uid) = (slot.number, slot.address.to_string(), slot.uid);
        let insert = move |conn: &bothy_db::rusqlite::Connection| {
            conn.prepare_cached("INSERT INTO lease (slot, vm, nat, address, uid) VALUES (?, ?, ?, ?, ?)")?
                .execute(params![number, vm.to_string(), nat, address, uid])?;
            Ok(())
        };
        Ok(self.0.read(insert).await?)
    }

    /// Strikes a lease out.
    pub async fn delete(&self, vm: VmId) -> Result<(), Error> {
        let delete = move |conn: &bothy_db::rusqlite::Connection| {
            conn.prepare_cached("DELETE FROM lease WHERE vm = ?")?.execute([vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(delete).await?)
    }

    /// Changes a lease's NAT.
    pub async fn set_nat(&self, vm: VmId, nat: bool) -> Result<(), Error> {
        let update = move |conn: &bothy_db::rusqlite::Connection| {
            conn.prepare_cached("UPDATE lease SET nat = ? WHERE vm = ?")?
                .execute(params![nat, vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(update).await?)
    }

    /// The links on which we turned forwarding on.
    pub async fn forwarding(&self) -> Result<Vec<String>, Error> {
        let query = |conn: &bothy_db::rusqlite::Connection| {
            let mut query = conn.prepare_cached("SELECT link FROM forwarding ORDER BY link")?;
            Ok(query.query_map([], |row| row.get(0))?.collect::<Result<Vec<_>, _>>()?)
        };
        Ok(self.0.read(query).await?)
    }

    /// Notes that forwarding of `link` is about to be turned on by us, or is not ours any more.
    pub async fn note_forwarding(&self, link: &str, ours: bool) -> Result<(), Error> {
        let link = link.to_owned();
        let note = move |conn: &bothy_db::rusqlite::Connection| {
            let sql = match ours {
                true => "INSERT OR IGNORE INTO forwarding (link) VALUES (?)",
                false => "DELETE FROM forwarding WHERE link = ?",
            };
            conn.prepare_cached(sql)?.execute([link])?;
            Ok(())
        };
        Ok(self.0.read(note).await?)
    }
}
