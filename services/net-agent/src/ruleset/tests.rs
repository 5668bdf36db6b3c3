//! The rules as text.

use super::*;
use bothy_config::Config;

fn plan() -> Plan {
    let plan = Plan::new(&Config::new("/s", "/r")).unwrap();
    plan.with_prefix6(Some("fd12:3456:789a::".parse().unwrap()))
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn the_whole_is_one_replacement_of_our_two_tables() {
    let gates = [(1, Gate::Open), (3, Gate::Allow([("192.0.2.7".parse().unwrap(), 60)].into()))].into();
    let state = State {
        slots: [1, 3, 254].into(),
        gates,
        peers: [(1, 3), (3, 300)].into(),
        uplinks: ["eth0".to_owned()].into(),
        uplinks6: ["eth1".to_owned()].into(),
        guard6: false,
        inside: ["docker0".to_owned(), "x\"; flush ruleset".to_owned()].into(),
    };
    let text = ruleset(&plan(), &state);
    let all = lines(&text);
    assert_eq!(
        all[..4],
        [
            "add table bridge bothy0",
            "delete table bridge bothy0",
            "add table inet bothy0",
            "delete table inet bothy0"
        ]
    );
    assert!(
        all[4..].iter().all(|l| !l.starts_with("delete") && !l.starts_with("flush")),
        "nothing else goes"
    );
    assert!(all.contains(
        &"add element bridge bothy0 guests { \"bothy-tap-1\" . 52:54:00:4d:00:02 . 10.77.0.2, \"bothy-tap-3\" . \
          52:54:00:4d:00:04 . 10.77.0.4 }"
    ), "slot 254 does not exist");
    assert!(text.contains("\"bothy-tap-1\" . 52:54:00:4d:00:02 . fd12:3456:789a::2, "));
    assert!(text.contains("\"bothy-tap-1\" . 52:54:00:4d:00:02 . fe80::5054:ff:fe4d:2, "));
    assert!(all.contains(&"add element inet bothy0 uplinks { \"eth0\" }"));
    assert!(all.contains(&"add element inet bothy0 inside { \"docker0\" }"), "a name is no command");
    assert!(all.contains(&"add element inet bothy0 peers4 { 10.77.0.2 . 10.77.0.4, 10.77.0.4 . 10.77.0.2 }"));
    assert!(text.contains("peers6 { fd12:3456:789a::2 . fd12:3456:789a::4, fd12:3456:789a::4 . fd12:"));
    assert!(all.contains(&"add element inet bothy0 open4 { 10.77.0.2 }"));
    assert!(all.contains(&"add element inet bothy0 allow4 { 10.77.0.4 : goto allow_3 }"));
    assert!(all.contains(&"add element inet bothy0 a4_3 { 192.0.2.7 timeout 60s }"));
    assert!(all.contains(&"add element inet bothy0 uplinks6 { \"eth1\" }"));
    assert!(!text.contains("meta nfproto ipv6 drop"));
    assert!(ruleset(&plan(), &State { guard6: true, ..state }).contains("meta nfproto ipv6 drop"));
}

#[test]
fn every_chain_of_guests_ends_in_a_refusal() {
    let state = State { gates: [(1, Gate::Allow(BTreeMap::new()))].into(), ..State::default() };
    let text = ruleset(&plan(), &state);
    let mut seen = 0;
    for chain in text.split("\tchain ").skip(1) {
        let (name, body) = chain.split_once(" {").unwrap();
        if ["prerouting", "forward", "input", "postrouting", "output"].contains(&name) {
            continue;
        }
        let last = body.split("\n\t}").next().unwrap().lines().last().unwrap().trim();
        assert!(
            ["drop", "goto denied", "reject with icmpx type admin-prohibited"].contains(&last),
            "{name}: {last}"
        );
        seen += 1;
    }
    assert_eq!(seen, 9);
}

#[test]
fn a_change_is_small() {
    let to = |from: Option<Gate>, to: Option<Gate>| change(&plan(), &Change::Gate { slot: 8, from, to });
    let open = Some(Gate::Open);
    let allow = |a: &str, s| Some(Gate::Allow([(a.parse().unwrap(), s)].into()));
    assert_eq!(
        lines(&to(open.clone(), None)),
        [
            "delete element inet bothy0 open4 { 10.77.0.9 }",
            "delete element inet bothy0 open6 { fd12:3456:789a::9 }"
        ]
    );
    assert_eq!(to(open.clone(), open.clone()), "");
    assert_eq!(to(None, None), "");
    let between = to(allow("192.0.2.1", 9), allow("2001:db8::1", 0));
    assert_eq!(
        lines(&between),
        [
            "flush set inet bothy0 a4_8",
            "flush set inet bothy0 a6_8",
            "flush set inet bothy0 f4_8",
            "flush set inet bothy0 f6_8",
            "add element inet bothy0 f6_8 { 2001:db8::1 timeout 3600s }"
        ]
    );
    let ends = to(allow("192.0.2.1", 9), open);
    assert!(
        ends.contains("delete set inet bothy0 a4_8")
            && ends.ends_with("add element inet bothy0 open6 { fd12:3456:789a::9 }\n")
    );
    assert_eq!(
        lines(&change(&plan(), &Change::Allow(8, [("192.0.2.1".parse().unwrap(), 30)].into()))),
        [
            "add element inet bothy0 a4_8 { 192.0.2.1 timeout 30s }",
            "delete element inet bothy0 a4_8 { 192.0.2.1 }",
            "add element inet bothy0 a4_8 { 192.0.2.1 timeout 30s }"
        ]
    );
    let peers = Change::Peers { add: [(1, 3)].into(), remove: [(1, 2)].into() };
    let verbs: Vec<String> =
        lines(&change(&plan(), &peers)).iter().map(|l| l.split(" {").next().unwrap().to_owned()).collect();
    assert_eq!(
        verbs,
        ["delete", "delete", "add", "add"]
            .into_iter()
            .zip([4, 6, 4, 6])
            .map(|(verb, v)| format!("{verb} element inet bothy0 peers{v}"))
            .collect::<Vec<_>>()
    );
    assert_eq!(change(&plan(), &Change::AddSlots(BTreeSet::new())), "");
    assert_eq!(lines(&removal(&plan())).len(), 4);
}
