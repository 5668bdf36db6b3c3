//! The firewall as a pure function: state in, one nftables transaction out, in the types of libnftables' JSON
//! (libnftables-json(5)). `firewall` applies it.
//!
//! Two tables, both named after the bridge, and nothing outside them:
//!
//! - `bridge`: what a TAP may *send*. Only ARP and IPv4, only with the slot's own MAC, sender address and, in ARP, sender
//!   hardware address. Anything else is dropped before the bridge learns from it; frames from TAP to TAP are dropped,
//!   too, should the isolation of the ports ever be off. TAPs are matched by prefix, so one whose slot is in no set
//!   sends nothing at all.
//! - `inet`: where a guest's packets may *go*. Not to the host (only answers to what the host began), not to other
//!   guests by way of the host, not to link-local addresses (cloud metadata), and out only from addresses in the set
//!   `nat`, which are masqueraded. From outside, only answers reach a guest, and only while it has NAT.
//!
//! Slots and NAT are set elements: taking a warm slot changes nothing here, and NAT on or off is one element.

use crate::plan::{Plan, Slot};
use nftables::{
    expr::{CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix},
    schema::{
        Chain, Element, NfCmd, NfListObject, NfObject, Nftables, Rule, Set, SetType, SetTypeValue, Table,
    },
    stmt::{Match, Operator, Statement},
    types::{NfChainPolicy, NfChainType, NfFamily, NfHook},
};
use std::{collections::BTreeSet, net::Ipv4Addr};

type Expr = Expression<'static>;
type Stmt = Statement<'static>;
type Object = NfObject<'static>;

/// A whole transaction.
pub type Transaction = Nftables<'static>;

/// What the rules depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The slots whose devices exist or are about to.
    pub slots: BTreeSet<u32>,
    /// The addresses whose traffic may leave through the host.
    pub nat: BTreeSet<Ipv4Addr>,
    /// Interfaces on which we, and nobody else, turned forwarding on: from these nothing is forwarded but to the bridge,
    /// so that the host is not made a router for its neighbours.
    pub uplinks: BTreeSet<String>,
}

/// Elements to add to or remove from a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// These slots may send.
    AddSlots(BTreeSet<u32>),
    /// These may not any more.
    RemoveSlots(BTreeSet<u32>),
    /// This guest may go out.
    AddNat(Ipv4Addr),
    /// It may not any more.
    RemoveNat(Ipv4Addr),
    /// We turned on forwarding on these interfaces.
    AddUplinks(BTreeSet<String>),
    /// These forward without us.
    RemoveUplinks(BTreeSet<String>),
}

/// The transaction that replaces both tables by what `state` wants, whatever was there before.
pub fn ruleset(plan: &Plan, state: &State) -> Transaction {
    let mut objects = Vec::new();
    for family in [NfFamily::Bridge, NfFamily::INet] {
        // Deleting a table that is not there fails, adding one that is there does not.
        objects.push(add(NfListObject::Table(table(plan, family))));
        objects.push(NfObject::CmdObject(NfCmd::Delete(NfListObject::Table(table(plan, family)))));
        objects.push(add(NfListObject::Table(table(plan, family))));
    }
    objects.extend(bridge_table(plan));
    objects.extend(inet_table(plan));
    let changes = [Change::AddSlots(state.slots.clone()), Change::AddUplinks(state.uplinks.clone())];
    for change in changes.into_iter().chain(state.nat.iter().copied().map(Change::AddNat)) {
        objects.extend(elements(plan, &change));
    }
    Nftables { objects: objects.into() }
}

/// The transaction that makes one change to the sets.
pub fn change(plan: &Plan, change: &Change) -> Transaction {
    Nftables { objects: elements(plan, change).into() }
}

/// The transaction that removes both tables; right also where they are not there.
pub fn removal(plan: &Plan) -> Transaction {
    let objects: Vec<Object> = [NfFamily::Bridge, NfFamily::INet]
        .into_iter()
        .flat_map(|family| {
            let object = || NfListObject::Table(table(plan, family));
            [add(object()), NfObject::CmdObject(NfCmd::Delete(object()))]
        })
        .collect();
    Nftables { objects: objects.into() }
}

fn bridge_table(plan: &Plan) -> Vec<Object> {
    let family = NfFamily::Bridge;
    let taps = format!("{}*", plan.tap_prefix);
    let from_tap = || equals(meta(MetaKey::Iifname), string(&taps));
    let own = |sender_mac: Expr, sender_ip: Expr| {
        is_in(concat(vec![meta(MetaKey::Iifname), sender_mac, sender_ip]), "guests")
    };
    vec![
        set(plan, family, "guests", &[SetType::Ifname, SetType::EtherAddr, SetType::Ipv4Addr]),
        // Before everything else at this hook, and before the bridge learns the sender's address.
        base_chain(plan, family, "prerouting", NfChainType::Filter, NfHook::Prerouting, -300),
        base_chain(plan, family, "forward", NfChainType::Filter, NfHook::Forward, -200),
        chain(plan, family, "from_guest"),
        rule(plan, family, "prerouting", vec![from_tap(), goto("from_guest")]),
        rule(
            plan,
            family,
            "forward",
            vec![from_tap(), equals(meta(MetaKey::Oifname), string(&taps)), Statement::Drop(None)],
        ),
        rule(
            plan,
            family,
            "from_guest",
            vec![own(payload("ether", "saddr"), payload("ip", "saddr")), Statement::Accept(None)],
        ),
        rule(
            plan,
            family,
            "from_guest",
            vec![
                own(payload("ether", "saddr"), payload("arp", "saddr ip")),
                own(payload("arp", "saddr ether"), payload("arp", "saddr ip")),
                Statement::Accept(None),
            ],
        ),
        rule(plan, family, "from_guest", vec![Statement::Drop(None)]),
    ]
}

fn inet_table(plan: &Plan) -> Vec<Object> {
    let family = NfFamily::INet;
    let from_bridge = || equals(meta(MetaKey::Iifname), string(&plan.bridge));
    let to_bridge = || equals(meta(MetaKey::Oifname), string(&plan.bridge));
    let answer = || {
        matches(ct("state"), Operator::IN, Expression::List(vec![string("established"), string("related")]))
    };
    let drop = || Statement::Drop(None);
    let link_local =
        Expression::Named(NamedExpression::Prefix(Prefix { addr: Box::new(string("169.254.0.0")), len: 16 }));
    vec![
        set(plan, family, "nat", &[SetType::Ipv4Addr]),
        set(plan, family, "uplinks", &[SetType::Ifname]),
        base_chain(plan, family, "input", NfChainType::Filter, NfHook::Input, 0),
        base_chain(plan, family, "forward", NfChainType::Filter, NfHook::Forward, 0),
        base_chain(plan, family, "postrouting", NfChainType::NAT, NfHook::Postrouting, 100),
        chain(plan, family, "from_guest"),
        chain(plan, family, "to_guest"),
        rule(plan, family, "input", vec![from_bridge(), answer(), Statement::Accept(None)]),
        rule(plan, family, "input", vec![from_bridge(), drop()]),
        rule(plan, family, "forward", vec![from_bridge(), goto("from_guest")]),
        rule(plan, family, "forward", vec![to_bridge(), goto("to_guest")]),
        rule(plan, family, "forward", vec![is_in(meta(MetaKey::Iifname), "uplinks"), drop()]),
        rule(plan, family, "from_guest", vec![to_bridge(), drop()]),
        rule(plan, family, "from_guest", vec![equals(payload("ip", "daddr"), link_local), drop()]),
        rule(plan, family, "from_guest", vec![is_in(payload("ip", "saddr"), "nat"), Statement::Accept(None)]),
        rule(plan, family, "from_guest", vec![drop()]),
        rule(
            plan,
            family,
            "to_guest",
            vec![answer(), is_in(payload("ip", "daddr"), "nat"), Statement::Accept(None)],
        ),
        rule(plan, family, "to_guest", vec![drop()]),
        rule(
            plan,
            family,
            "postrouting",
            vec![
                is_in(payload("ip", "saddr"), "nat"),
                matches(meta(MetaKey::Oifname), Operator::NEQ, string(&plan.bridge)),
                Statement::Masquerade(None),
            ],
        ),
    ]
}

fn elements(plan: &Plan, change: &Change) -> Vec<Object> {
    let slots = |numbers: &BTreeSet<u32>| -> Vec<Expr> {
        numbers.iter().filter_map(|n| plan.slot(*n)).map(|slot| guest(&slot)).collect()
    };
    let names = |names: &BTreeSet<String>| -> Vec<Expr> { names.iter().map(|n| string(n)).collect() };
    let (family, name, adding, elements) = match change {
        Change::AddSlots(numbers) => (NfFamily::Bridge, "guests", true, slots(numbers)),
        Change::RemoveSlots(numbers) => (NfFamily::Bridge, "guests", false, slots(numbers)),
        Change::AddNat(address) => (NfFamily::INet, "nat", true, vec![string(&address.to_string())]),
        Change::RemoveNat(address) => (NfFamily::INet, "nat", false, vec![string(&address.to_string())]),
        Change::AddUplinks(links) => (NfFamily::INet, "uplinks", true, names(links)),
        Change::RemoveUplinks(links) => (NfFamily::INet, "uplinks", false, names(links)),
    };
    if elements.is_empty() {
        return Vec::new();
    }
    let element = NfListObject::Element(Element {
        family,
        table: plan.bridge.clone().into(),
        name: name.into(),
        elem: elements.into(),
    });
    vec![if adding { add(element) } else { NfObject::CmdObject(NfCmd::Delete(element)) }]
}

fn guest(slot: &Slot) -> Expr {
    concat(vec![string(&slot.tap), string(&slot.mac.to_string()), string(&slot.address.to_string())])
}

fn add(object: NfListObject<'static>) -> Object {
    NfObject::CmdObject(NfCmd::Add(object))
}

fn table(plan: &Plan, family: NfFamily) -> Table<'static> {
    Table { family, name: plan.bridge.clone().into(), handle: None }
}

fn set(plan: &Plan, family: NfFamily, name: &'static str, types: &[SetType]) -> Object {
    let set_type = match types {
        [one] => SetTypeValue::Single(*one),
        many => SetTypeValue::Concatenated(many.to_vec().into()),
    };
    add(NfListObject::Set(Box::new(Set {
        family,
        table: plan.bridge.clone().into(),
        name: name.into(),
        set_type,
        ..Set::default()
    })))
}

fn chain(plan: &Plan, family: NfFamily, name: &'static str) -> Object {
    add(NfListObject::Chain(Chain {
        family,
        table: plan.bridge.clone().into(),
        name: name.into(),
        ..Chain::default()
    }))
}

fn base_chain(
    plan: &Plan,
    family: NfFamily,
    name: &'static str,
    kind: NfChainType,
    hook: NfHook,
    prio: i32,
) -> Object {
    add(NfListObject::Chain(Chain {
        family,
        table: plan.bridge.clone().into(),
        name: name.into(),
        _type: Some(kind),
        hook: Some(hook),
        prio: Some(prio),
        policy: Some(NfChainPolicy::Accept),
        ..Chain::default()
    }))
}

fn rule(plan: &Plan, family: NfFamily, chain: &'static str, statements: Vec<Stmt>) -> Object {
    add(NfListObject::Rule(Rule {
        family,
        table: plan.bridge.clone().into(),
        chain: chain.into(),
        expr: statements.into(),
        ..Rule::default()
    }))
}

fn goto(chain: &'static str) -> Stmt {
    Statement::Goto(nftables::stmt::JumpTarget { target: chain.into() })
}

fn matches(left: Expr, op: Operator, right: Expr) -> Stmt {
    Statement::Match(Match { left, right, op })
}

fn equals(left: Expr, right: Expr) -> Stmt {
    matches(left, Operator::EQ, right)
}

fn is_in(left: Expr, set: &str) -> Stmt {
    equals(left, string(&format!("@{set}")))
}

fn string(text: &str) -> Expr {
    Expression::String(text.to_owned().into())
}

fn meta(key: MetaKey) -> Expr {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn ct(key: &'static str) -> Expr {
    Expression::Named(NamedExpression::CT(CT { key: key.into(), family: None, dir: None }))
}

fn payload(protocol: &'static str, field: &'static str) -> Expr {
    let field = PayloadField { protocol: protocol.into(), field: field.into() };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}

fn concat(parts: Vec<Expr>) -> Expr {
    Expression::Named(NamedExpression::Concat(parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_config::Config;

    /// One line of JSON per command.
    fn text(transaction: &Transaction) -> Vec<String> {
        transaction.objects.iter().map(|object| serde_json::to_string(object).unwrap()).collect()
    }

    fn plan() -> Plan {
        Plan::new(&Config::new("/s", "/r")).unwrap()
    }

    #[test]
    fn the_whole_is_one_replacement_of_our_two_tables() {
        let state = State {
            slots: [1, 3, 254].into(),
            nat: [Ipv4Addr::new(10, 77, 0, 2)].into(),
            uplinks: ["eth0".to_owned()].into(),
        };
        let lines = text(&ruleset(&plan(), &state));
        assert_eq!(lines[0], r#"{"add":{"table":{"family":"bridge","name":"bothy0"}}}"#);
        assert_eq!(lines[1], r#"{"delete":{"table":{"family":"bridge","name":"bothy0"}}}"#);
        assert_eq!(lines[4], r#"{"delete":{"table":{"family":"inet","name":"bothy0"}}}"#);
        assert!(lines.iter().skip(6).all(|l| l.starts_with(r#"{"add":"#)), "nothing else is deleted");
        for table in lines.iter().filter_map(|l| l.split(r#""table":""#).nth(1)) {
            assert!(table.starts_with("bothy0\""), "{table}");
        }
        let tail = &lines[lines.len() - 3..];
        assert_eq!(
            tail[0],
            concat!(
                r#"{"add":{"element":{"family":"bridge","table":"bothy0","name":"guests","elem":["#,
                r#"{"concat":["bothy-tap-1","52:54:00:4d:00:02","10.77.0.2"]},"#,
                r#"{"concat":["bothy-tap-3","52:54:00:4d:00:04","10.77.0.4"]}]}}}"#
            ),
            "slot 254 does not exist"
        );
        assert!(tail[1].contains(r#""name":"uplinks","elem":["eth0"]"#));
        assert!(tail[2].contains(r#""name":"nat","elem":["10.77.0.2"]"#));
        // Each list of rules ends in a drop: what nothing names is refused.
        for chain in ["from_guest", "to_guest"] {
            for family in ["bridge", "inet"] {
                let head =
                    format!(r#"{{"add":{{"rule":{{"family":"{family}","table":"bothy0","chain":"{chain}","#);
                if let Some(last) = lines.iter().rfind(|l| l.starts_with(&head)) {
                    assert!(last.ends_with(r#""expr":[{"drop":null}]}}}"#), "{last}");
                }
            }
        }
        assert!(lines.iter().any(|l| l.contains(r#""hook":"postrouting""#)));
    }

    #[test]
    fn a_change_is_one_command() {
        let address = Ipv4Addr::new(10, 77, 0, 9);
        assert_eq!(
            text(&change(&plan(), &Change::RemoveNat(address))),
            [
                r#"{"delete":{"element":{"family":"inet","table":"bothy0","name":"nat","elem":["10.77.0.9"]}}}"#
            ]
        );
        assert!(text(&change(&plan(), &Change::AddSlots(BTreeSet::new()))).is_empty());
        assert_eq!(text(&removal(&plan())).len(), 4);
    }
}
