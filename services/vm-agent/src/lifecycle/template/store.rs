//! The templates' rows. A template is there once its row is: the files come first, and those without a row are swept.

use bothy_contract::{VmId, vm::TemplateRecord};
use bothy_db::{
    Error as DbError,
    rusqlite::{Connection, OptionalExtension, Row, Transaction, params},
};
use jiff::Timestamp;

/// The table. `key` is a [`super::key::key`], `data` a [`TemplateRecord`]: one template for each key, the last that was made.
pub(crate) const SCHEMA: &str =
    "CREATE TABLE template(key TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, data TEXT NOT NULL) STRICT;";

/// The template of `key`, set aside or not.
pub(crate) fn find(conn: &Connection, key: &str) -> Result<Option<TemplateRecord>, DbError> {
    conn.prepare_cached("SELECT data FROM template WHERE key = ?1")?
        .query_row([key], |row| Ok(read(row)))
        .optional()?
        .transpose()
}

/// All templates with their keys, the last used first.
pub(crate) fn all(conn: &Connection) -> Result<Vec<(String, TemplateRecord)>, DbError> {
    let mut select = conn.prepare_cached("SELECT key, data FROM template")?;
    let rows = select.query_map([], |row| Ok((row.get("key")?, read(row))))?;
    let mut all = rows
        .map(|row| row.map_err(DbError::from).and_then(|(key, record)| Ok((key, record?))))
        .collect::<Result<Vec<(String, TemplateRecord)>, DbError>>()?;
    all.sort_by_key(|(_, record)| std::cmp::Reverse(record.used.unwrap_or(record.created)));
    Ok(all)
}

fn read(row: &Row<'_>) -> Result<TemplateRecord, DbError> {
    Ok(serde_json::from_str(&row.get::<_, String>("data")?)?)
}

/// Adds a template, in the place of an earlier one of its key.
pub(crate) fn put(tx: &Transaction<'_>, key: &str, record: &TemplateRecord) -> Result<(), DbError> {
    tx.prepare_cached("INSERT OR REPLACE INTO template(key, id, data) VALUES (?1, ?2, ?3)")?
        .execute(params![key, record.id.to_string(), serde_json::to_string(record)?])?;
    Ok(())
}

/// Changes the template `id`, if it is still there.
fn update(tx: &Transaction<'_>, id: VmId, change: impl FnOnce(&mut TemplateRecord)) -> Result<(), DbError> {
    let found = tx
        .prepare_cached("SELECT data FROM template WHERE id = ?1")?
        .query_row([id.to_string()], |row| Ok(read(row)))
        .optional()?;
    if let Some(record) = found {
        let mut record = record?;
        change(&mut record);
        tx.prepare_cached("UPDATE template SET data = ?2 WHERE id = ?1")?
            .execute(params![id.to_string(), serde_json::to_string(&record)?])?;
    }
    Ok(())
}

/// A VM was resumed from it.
pub(crate) fn used(tx: &Transaction<'_>, id: VmId) -> Result<(), DbError> {
    update(tx, id, |record| {
        record.used = Some(Timestamp::now());
        record.uses += 1;
    })
}

/// It is not to be used any more.
pub(crate) fn set_aside(tx: &Transaction<'_>, id: VmId, why: String) -> Result<(), DbError> {
    update(tx, id, |record| {
        record.set_aside = Some(why);
        record.bytes = 0;
    })
}

/// Removes its row, if it is there.
pub(crate) fn remove(tx: &Transaction<'_>, id: VmId) -> Result<(), DbError> {
    tx.execute("DELETE FROM template WHERE id = ?1", [id.to_string()])?;
    Ok(())
}

/// The templates that have to go, the least recently used first, so that at most `max` of at most `max_bytes` together
/// remain. Those that were set aside take no room.
pub(crate) fn surplus(all: &[(String, TemplateRecord)], max: u32, max_bytes: u64) -> Vec<VmId> {
    let (mut count, mut bytes) = (0, 0_u64);
    let good = all.iter().filter(|(_, record)| record.set_aside.is_none());
    good.filter(|(_, record)| {
        count += 1;
        bytes = bytes.saturating_add(record.bytes);
        count > max || bytes > max_bytes
    })
    .map(|(_, record)| record.id)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, vm::Shape};
    use bothy_db::Db;

    fn template(second: i64, bytes: u64) -> TemplateRecord {
        TemplateRecord {
            id: VmId::new(),
            image: ImageName::default_image(),
            shape: Shape::default(),
            vmm: "x".into(),
            created: Timestamp::from_second(second).unwrap(),
            used: None,
            uses: 0,
            bytes,
            set_aside: None,
        }
    }

    #[tokio::test]
    async fn a_template_is_found_by_its_key_used_and_set_aside() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let db = Db::open(dir.path().join("t.db"), &[SCHEMA]).unwrap();
        let (first, second) = (template(1, 10), template(2, 20));
        let (f, s, id) = (first.clone(), second.clone(), second.id);
        db.write(move |tx| {
            put(tx, "a", &f)?;
            put(tx, "a", &s)?;
            put(tx, "b", &template(3, 1))
        })
        .await
        .unwrap();
        let of = async |key: &'static str| db.read(move |c| find(c, key)).await.unwrap();
        assert_eq!(of("a").await, Some(second));
        assert_eq!(of("c").await, None);
        db.write(move |tx| used(tx, id)).await.unwrap();
        db.write(|tx| used(tx, VmId::new())).await.unwrap();
        let order: Vec<_> = db.read(all).await.unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(order, ["a", "b"], "the last used first");
        db.write(move |tx| set_aside(tx, id, "it broke".into())).await.unwrap();
        let aside = of("a").await.unwrap();
        assert_eq!((aside.uses, aside.set_aside.as_deref(), aside.bytes), (1, Some("it broke"), 0));
        db.write(move |tx| remove(tx, id)).await.unwrap();
        assert_eq!(of("a").await, None);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let mut all: Vec<_> = (0..4).rev().map(|n| (n.to_string(), template(n, 100))).collect();
        let ids = |at: &[usize]| at.iter().map(|n| all[*n].1.id).collect::<Vec<_>>();
        assert_eq!(surplus(&all, 8, 1000), []);
        assert_eq!(surplus(&all, 3, 1000), ids(&[3]));
        assert_eq!(surplus(&all, 8, 250), ids(&[2, 3]));
        assert_eq!(surplus(&all, 0, 1000), ids(&[0, 1, 2, 3]));
        all[0].1.set_aside = Some("x".into());
        assert_eq!(surplus(&all, 3, 1000), []);
    }
}
