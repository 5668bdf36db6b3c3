//! The lease table and what else must outlive the agent, in its SQLite file.

use crate::{
    firewall::Granted,
    plan::{Plan, Slot},
};
use bothy_contract::{
    Code, Error, VmId, VmName,
    net::{Egress, Publish},
    net_group::Membership,
};
use bothy_db::{
    Db,
    rusqlite::{Connection, OptionalExtension, params},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

/// Address and uid follow from the slot; they are kept to notice a configuration that was changed under the leases.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE lease (
        slot INTEGER PRIMARY KEY,
        vm TEXT NOT NULL UNIQUE,
        nat INTEGER NOT NULL,
        address TEXT NOT NULL,
        uid INTEGER NOT NULL
    ) STRICT;
    -- Links on which we turned forwarding on, to turn it off again.
    CREATE TABLE forwarding (link TEXT PRIMARY KEY) STRICT;
",
    r#"
    ALTER TABLE lease ADD COLUMN egress TEXT NOT NULL DEFAULT '{"policy":"none"}';
    UPDATE lease SET egress = '{"policy":"open"}' WHERE nat;
    ALTER TABLE lease ADD COLUMN publish TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE lease ADD COLUMN name TEXT;
    -- What was chosen once for this host and stays.
    CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    -- Settings below /proc/sys/net other than IPv4 forwarding that we changed, and what they were.
    CREATE TABLE setting (path TEXT PRIMARY KEY, was TEXT NOT NULL, ours TEXT NOT NULL) STRICT;
"#,
    "
    -- The names that a slot's addresses were handed out for. Which of them it may reach still, the kernel says.
    CREATE TABLE granted (
        slot INTEGER NOT NULL,
        address TEXT NOT NULL,
        name TEXT NOT NULL,
        PRIMARY KEY (slot, address, name)
    ) STRICT;
",
    r#"
    ALTER TABLE lease ADD COLUMN membership TEXT NOT NULL DEFAULT '{"owner":0,"names":[]}';
"#,
];

/// A lease as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The slot.
    pub slot: u32,
    /// What the VM may reach.
    pub egress: Egress,
    /// Its published ports.
    pub publish: Vec<Publish>,
    /// The groups it is in.
    pub groups: Membership,
    /// The name it is known by.
    pub name: Option<VmName>,
}

impl Held {
    /// A lease that is nothing but its slot.
    pub fn new(slot: u32) -> Self {
        Self { slot, egress: Egress::None, publish: Vec::new(), groups: Membership::default(), name: None }
    }
}

/// A setting of the kernel that we changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its file, below `/proc/sys/net`.
    pub path: String,
    /// What it was.
    pub was: String,
    /// What we made it.
    pub ours: String,
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
                let mut query = conn
                    .prepare("SELECT vm, slot, address, uid, egress, publish, name, membership FROM lease")?;
                let rows = query.query_map([], |row| {
                    let kept: (String, String, Option<String>, String) =
                        (row.get(4)?, row.get(5)?, row.get(6)?, row.get(7)?);
                    let place: (String, u32, String, u32) =
                        (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
                    Ok((place, kept))
                })?;
                Ok(rows.collect::<Result<Vec<_>, _>>()?)
            })
            .await?;
        let mut leases = BTreeMap::new();
        for ((vm, slot, address, uid), (egress, publish, name, groups)) in rows {
            let bad = || format!("lease of slot {slot}, VM `{vm}`");
            let id: VmId = vm.parse().map_err(|e| Error::internal(bad(), &e))?;
            let egress = serde_json::from_str(&egress).map_err(|e| Error::internal(bad(), &e))?;
            let publish = serde_json::from_str(&publish).map_err(|e| Error::internal(bad(), &e))?;
            let groups = serde_json::from_str(&groups).map_err(|e| Error::internal(bad(), &e))?;
            let name = name.map(|n| n.parse()).transpose().map_err(|e| Error::internal(bad(), &e))?;
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
            leases.insert(id, Held { slot, egress, publish, groups, name });
        }
        Ok(leases)
    }

    /// Writes a lease down.
    pub async fn insert(&self, vm: VmId, slot: &Slot) -> Result<(), Error> {
        let (number, address, uid) = (slot.number, slot.address.to_string(), slot.uid);
        let insert = move |conn: &Connection| {
            conn.prepare_cached("INSERT INTO lease (slot, vm, nat, address, uid) VALUES (?, ?, 0, ?, ?)")?
                .execute(params![number, vm.to_string(), address, uid])?;
            Ok(())
        };
        Ok(self.0.read(insert).await?)
    }

    /// Strikes a lease out.
    pub async fn delete(&self, vm: VmId) -> Result<(), Error> {
        let delete = move |conn: &Connection| {
            conn.prepare_cached("DELETE FROM lease WHERE vm = ?")?.execute([vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(delete).await?)
    }

    /// Changes what a lease's VM may reach. `nat` stays right for an agent that knows no more.
    pub async fn set_egress(&self, vm: VmId, egress: &Egress) -> Result<(), Error> {
        let text = json(egress)?;
        let nat = *egress == Egress::Open;
        let update =
            move |conn: &Connection| {
                conn.prepare_cached("UPDATE lease SET egress = ?, nat = ? WHERE vm = ?")?
                    .execute(params![text, nat, vm.to_string()])?;
                Ok(())
            };
        Ok(self.0.read(update).await?)
    }

    /// Changes a lease's published ports.
    pub async fn set_publish(&self, vm: VmId, publish: &[Publish]) -> Result<(), Error> {
        let text = json(&publish)?;
        let update = move |conn: &Connection| {
            conn.prepare_cached("UPDATE lease SET publish = ? WHERE vm = ?")?
                .execute(params![text, vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(update).await?)
    }

    /// Changes the groups that a lease's VM is in.
    pub async fn set_groups(&self, vm: VmId, groups: &Membership) -> Result<(), Error> {
        let text = json(groups)?;
        let update = move |conn: &Connection| {
            conn.prepare_cached("UPDATE lease SET membership = ? WHERE vm = ?")?
                .execute(params![text, vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(update).await?)
    }

    /// Changes the name that a lease's VM is known by.
    pub async fn set_name(&self, vm: VmId, name: Option<VmName>) -> Result<(), Error> {
        let update = move |conn: &Connection| {
            conn.prepare_cached("UPDATE lease SET name = ? WHERE vm = ?")?
                .execute(params![name.map(|n| n.to_string()), vm.to_string()])?;
            Ok(())
        };
        Ok(self.0.read(update).await?)
    }

    /// The names that addresses were handed out for.
    pub async fn granted(&self) -> Result<Granted, Error> {
        let rows = self
            .0
            .read(|conn| {
                let mut query = conn.prepare("SELECT slot, address, name FROM granted")?;
                let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
                Ok(rows.collect::<Result<Vec<(u32, String, String)>, _>>()?)
            })
            .await?;
        let mut granted = Granted::new();
        for (slot, address, name) in rows {
            if let Ok(address) = address.parse() {
                granted.entry(slot).or_default().entry(address).or_default().insert(name);
            }
        }
        Ok(granted)
    }

    /// Notes that addresses are about to be handed out to a slot for `name`. Returns how many such notes it has.
    pub async fn note_granted(&self, slot: u32, name: &str, addresses: Vec<IpAddr>) -> Result<usize, Error> {
        let name = name.to_owned();
        let insert = move |conn: &Connection| {
            let mut insert =
                conn.prepare_cached("INSERT OR IGNORE INTO granted (slot, address, name) VALUES (?, ?, ?)")?;
            for address in addresses {
                insert.execute(params![slot, address.to_string(), name])?;
            }
            let mut count = conn.prepare_cached("SELECT count(*) FROM granted WHERE slot = ?")?;
            Ok(count.query_row([slot], |row| row.get::<_, u32>(0))?)
        };
        Ok(usize::try_from(self.0.read(insert).await?).unwrap_or(usize::MAX))
    }

    /// Forgets all such notes of a slot but `names`.
    pub async fn keep_granted(
        &self,
        slot: u32,
        names: BTreeMap<String, BTreeSet<IpAddr>>,
    ) -> Result<(), Error> {
        let replace = move |conn: &Connection| {
            let change = conn.unchecked_transaction()?;
            change.execute("DELETE FROM granted WHERE slot = ?", [slot])?;
            for (name, addresses) in names {
                for address in addresses {
                    change
                        .prepare_cached("INSERT INTO granted (slot, address, name) VALUES (?, ?, ?)")?
                        .execute(params![slot, address.to_string(), name])?;
                }
            }
            Ok(change.commit()?)
        };
        Ok(self.0.read(replace).await?)
    }

    /// Something that was chosen once for this host.
    pub async fn fact(&self, key: &'static str) -> Result<Option<String>, Error> {
        let query = move |conn: &Connection| {
            let mut query = conn.prepare_cached("SELECT value FROM fact WHERE key = ?")?;
            Ok(query.query_row([key], |row| row.get(0)).optional()?)
        };
        Ok(self.0.read(query).await?)
    }

    /// Keeps what was chosen.
    pub async fn keep_fact(&self, key: &'static str, value: String) -> Result<(), Error> {
        let insert = move |conn: &Connection| {
            conn.execute("INSERT OR REPLACE INTO fact (key, value) VALUES (?, ?)", params![key, value])?;
            Ok(())
        };
        Ok(self.0.read(insert).await?)
    }

    /// The settings that we changed.
    pub async fn settings(&self) -> Result<Vec<Setting>, Error> {
        let query = |conn: &Connection| {
            let mut query = conn.prepare_cached("SELECT path, was, ours FROM setting ORDER BY path")?;
            let rows = query.query_map([], |row| {
                Ok(Setting { path: row.get(0)?, was: row.get(1)?, ours: row.get(2)? })
            })?;
            Ok(rows.collect::<Result<Vec<_>, _>>()?)
        };
        Ok(self.0.read(query).await?)
    }

    /// Notes a setting before it is changed.
    pub async fn note_setting(&self, setting: Setting) -> Result<(), Error> {
        let insert = move |conn: &Connection| {
            conn.execute(
                "INSERT OR IGNORE INTO setting (path, was, ours) VALUES (?, ?, ?)",
                params![setting.path, setting.was, setting.ours],
            )?;
            Ok(())
        };
        Ok(self.0.read(insert).await?)
    }

    /// Forgets one that is put back.
    pub async fn forget_setting(&self, path: String) -> Result<(), Error> {
        let delete = move |conn: &Connection| {
            conn.execute("DELETE FROM setting WHERE path = ?", [path])?;
            Ok(())
        };
        Ok(self.0.read(delete).await?)
    }

    /// The links on which we turned forwarding on.
    pub async fn forwarding(&self) -> Result<Vec<String>, Error> {
        let query = |conn: &Connection| {
            let mut query = conn.prepare_cached("SELECT link FROM forwarding ORDER BY link")?;
            Ok(query.query_map([], |row| row.get(0))?.collect::<Result<Vec<_>, _>>()?)
        };
        Ok(self.0.read(query).await?)
    }

    /// Notes that forwarding of `link` is about to be turned on by us, or is not ours any more.
    pub async fn note_forwarding(&self, link: &str, ours: bool) -> Result<(), Error> {
        let link = link.to_owned();
        let note = move |conn: &Connection| {
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

fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| Error::internal("cannot write a lease down", &e))
}
