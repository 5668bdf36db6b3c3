//! What the kernel says about our sets, read from libnftables' JSON (libnftables-json(5)). Pure. What cannot be read is
//! left out: these lists inform, and nothing is let through for something that is not in them.

use serde_json::Value;
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

/// Packets of one guest to one destination that the policy refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedPackets {
    /// The guest's address.
    pub guest: IpAddr,
    /// Where they were for.
    pub to: IpAddr,
    /// How many.
    pub packets: u64,
    /// How long ago the last one was.
    pub ago: Duration,
}

/// How many tables of that name there are.
pub fn tables_named(text: &str, name: &str) -> usize {
    let of = |object: &Value| Some(object.get("table")?.get("name")?.as_str()? == name);
    objects(text).iter().filter_map(of).filter(|ours| *ours).count()
}

/// The addresses of slots under `allow` and how long each may still be connected to; none for those with which only open
/// connections go on.
pub fn addresses(text: &str) -> BTreeMap<u32, BTreeMap<IpAddr, Option<Duration>>> {
    let mut all: BTreeMap<u32, BTreeMap<IpAddr, Option<Duration>>> = BTreeMap::new();
    for (name, element) in elements(text) {
        let Some((kind, slot)) = name.split_once('_').and_then(|(k, n)| Some((k, n.parse().ok()?))) else {
            continue;
        };
        let Some(address) = element.get("val").and_then(Value::as_str).and_then(|a| a.parse().ok()) else {
            continue;
        };
        let left = element.get("expires").and_then(Value::as_u64).map(Duration::from_secs);
        let known = all.entry(slot).or_default().entry(address).or_default();
        if matches!(kind, "a4" | "a6") {
            *known = left;
        }
    }
    all
}

/// What was denied.
pub fn denied(text: &str) -> Vec<DeniedPackets> {
    let read = |(name, element): (String, Value)| {
        if !matches!(name.as_str(), "denied4" | "denied6") {
            return None;
        }
        let parts = element.get("val")?.get("concat")?.as_array()?;
        let address = |n: usize| parts.get(n)?.as_str()?.parse().ok();
        let number = |of: &Value, key: &str| of.get(key).and_then(Value::as_u64);
        let ago = number(&element, "timeout")
            .unwrap_or(crate::ruleset::DENIED_TIMEOUT_S)
            .saturating_sub(number(&element, "expires").unwrap_or_default());
        Some(DeniedPackets {
            guest: address(0)?,
            to: address(1)?,
            packets: number(element.get("counter")?, "packets")?,
            ago: Duration::from_secs(ago),
        })
    };
    elements(text).into_iter().filter_map(read).collect()
}

/// The elements of all sets, each with its set's name.
fn elements(text: &str) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for object in objects(text) {
        let Some(set) = object.get("set") else { continue };
        let (Some(name), Some(list)) =
            (set.get("name").and_then(Value::as_str), set.get("elem").and_then(Value::as_array))
        else {
            continue;
        };
        all.extend(list.iter().filter_map(|e| Some((name.to_owned(), e.get("elem")?.clone()))));
    }
    all
}

fn objects(text: &str) -> Vec<Value> {
    let whole: Value = serde_json::from_str(text).unwrap_or_default();
    whole.get("nftables").and_then(Value::as_array).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"nftables": [{"metainfo": {}}, {"table": {"family": "inet", "name": "b"}},
        {"set": {"name": "a4_3", "elem": [{"elem": {"val": "192.0.2.7", "timeout": 60, "expires": 55}}]}},
        {"set": {"name": "f4_3", "elem": [{"elem": {"val": "192.0.2.7", "timeout": 3600, "expires": 9}},
                                          {"elem": {"val": "192.0.2.8", "timeout": 3600, "expires": 9}}]}},
        {"set": {"name": "open4", "elem": ["10.0.0.1"]}},
        {"set": {"name": "denied4", "elem": [{"elem": {"val": {"concat": ["10.77.0.2", "192.0.2.9"]},
            "timeout": 3600, "expires": 3590, "counter": {"packets": 4, "bytes": 9}}}]}}]}"#;

    #[test]
    fn a_listing_is_read() {
        assert_eq!((tables_named(TEXT, "b"), tables_named(TEXT, "c"), tables_named("x", "b")), (1, 0, 0));
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let found = addresses(TEXT);
        assert_eq!(
            found[&3],
            [(ip("192.0.2.7"), Some(Duration::from_secs(55))), (ip("192.0.2.8"), None)].into()
        );
        assert_eq!(found.len(), 1);
        let one = DeniedPackets {
            guest: ip("10.77.0.2"),
            to: ip("192.0.2.9"),
            packets: 4,
            ago: Duration::from_secs(10),
        };
        assert_eq!(denied(TEXT), [one]);
    }
}
