//! The configuration of nats-server, written from the method table: one nkey identity per service, and for each just
//! the subjects that the table gives it.
//!
//! | may publish to | who |
//! |---|---|
//! | a method's subject | the method's callers |
//! | the events of its own operations | a service that has operations |
//! | making and reading the stream of events | the gateway |
//! | `$SRV.PING`, `INFO`, `STATS` | the gateway |
//! | the inbox of a request it got, once, for a while | every service that serves methods (`allow_responses`) |
//!
//! Each may subscribe to its own methods, the service verbs under its own name, and its own inboxes; nobody to another's.
//! The server listens on loopback only, has no monitoring port, and its system account has no user.

use crate::MAX_TIMEOUT;
use bothy_config::Config;
use bothy_contract::{MethodInfo, Service, methods, subject};
use std::{collections::BTreeMap, fmt::Write};

/// The verbs of the service API (ADR-32).
const VERBS: [&str; 3] = ["PING", "INFO", "STATS"];

/// The whole text of `nats.conf`. A service without a public key in `identities` gets no access.
pub fn server_config(config: &Config, identities: &BTreeMap<Service, String>) -> String {
    let table = methods::table();
    let users: Vec<String> = identities
        .iter()
        .map(|(service, key)| user(*service, key, &Grants::of(config, *service, &table)))
        .collect();
    format!(
        r#"# Written by `bothy host bus-setup` from the method table; changes here are lost.
server_name: {name}
listen: "127.0.0.1:{port}"
max_connections: 64
max_payload: 1MB
max_control_line: 4KB

# Keeps the events of operations.
jetstream {{
  store_dir: {store}
  max_memory_store: 32MB
  max_file_store: 256MB
}}

# Who is not listed has no access, and who is listed may do just this.
authorization {{
  timeout: 5
  users: [
{users}
  ]
}}
"#,
        name = quoted(&format!("bothy-{}", config.host)),
        port = config.bus.port,
        store = quoted(&config.bus_dir().join("jetstream").to_string_lossy()),
        users = users.concat().trim_end(),
    )
}

/// What one service may do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Grants {
    publish: Vec<String>,
    subscribe: Vec<String>,
    responds: bool,
}

impl Grants {
    fn of(config: &Config, service: Service, table: &[MethodInfo]) -> Self {
        let host = &config.host;
        let subject_of = |m: &MethodInfo| subject::of(host, m.service, m.noun, m.verb);
        let served: Vec<_> = table.iter().filter(|m| m.service == service).collect();
        let mut publish: Vec<_> =
            table.iter().filter(|m| m.callers.contains(&service)).map(&subject_of).collect();
        if served.iter().any(|m| m.noun == "op") {
            publish.push(subject::op_events_of(host, service));
        }
        if service == Service::Gateway {
            publish.extend(stream_subjects());
            publish.extend(VERBS.iter().flat_map(|v| [format!("$SRV.{v}"), format!("$SRV.{v}.>")]));
        }
        let mut subscribe = vec![format!("{}.>", subject::inbox_prefix(host, service))];
        subscribe.extend(served.iter().map(|m| subject_of(m)));
        if !served.is_empty() {
            let name = service.binary();
            subscribe.extend(VERBS.iter().flat_map(|verb| {
                [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.*")]
            }));
        }
        Self { publish, subscribe, responds: !served.is_empty() }
    }
}

/// The JetStream API (ADR-44) as far as [`crate::Client::ensure_ops_stream`] and [`crate::Client::watch_op`] use it.
fn stream_subjects() -> Vec<String> {
    let stream = subject::OPS_STREAM;
    ["STREAM.CREATE", "STREAM.UPDATE", "STREAM.INFO", "CONSUMER.CREATE"]
        .iter()
        .map(|verb| format!("$JS.API.{verb}.{stream}"))
        .chain([
            format!("$JS.API.CONSUMER.CREATE.{stream}.>"),
            format!("$JS.API.CONSUMER.INFO.{stream}.*"),
            format!("$JS.API.CONSUMER.DELETE.{stream}.*"),
            format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.*"),
        ])
        .collect()
}

/// One entry of `users`.
fn user(service: Service, key: &str, grants: &Grants) -> String {
    let mut out =
        format!("    # {}\n    {{\n      nkey: {}\n      permissions {{\n", service.binary(), quoted(key));
    list(&mut out, "publish", &grants.publish);
    list(&mut out, "subscribe", &grants.subscribe);
    if grants.responds {
        // One reply to each request, for as long as a caller may wait for it.
        let _ =
            writeln!(out, "        allow_responses {{ max: 1, expires: \"{}s\" }}", MAX_TIMEOUT.as_secs());
    }
    out.push_str("      }\n    }\n");
    out
}

/// `publish` or `subscribe`. An empty list would allow everything, so nothing is written as a denial of all.
fn list(out: &mut String, what: &str, subjects: &[String]) {
    if subjects.is_empty() {
        let _ = writeln!(out, "        {what} {{ deny: [\">\"] }}");
        return;
    }
    let _ = writeln!(out, "        {what} {{ allow: [");
    for subject in subjects {
        let _ = writeln!(out, "          {}", quoted(subject));
    }
    out.push_str("        ] }\n");
}

/// A string of nats-server's configuration language: in double quotes, with `\"`, `\\` and `\xXX` as escapes.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let identities = Service::ALL.map(|s| (s, format!("U{}", s.token().to_ascii_uppercase())));
        server_config(&Config::new("/var/lib/bothy", "/run/bothy"), &identities.into())
    }

    #[test]
    fn the_text_is_what_it_was() {
        insta::assert_snapshot!("nats.conf", text());
    }

    #[test]
    fn every_method_is_granted_to_its_callers_and_to_nobody_else() {
        let config = Config::new("/s", "/r");
        let table = methods::table();
        for m in &table {
            let to = subject::of(&config.host, m.service, m.noun, m.verb);
            for service in Service::ALL {
                let grants = Grants::of(&config, service, &table);
                assert_eq!(grants.publish.contains(&to), m.callers.contains(&service), "{service:?} {to}");
                assert_eq!(grants.subscribe.contains(&to), m.service == service, "{service:?} {to}");
            }
        }
    }

    #[test]
    fn nobody_has_a_wildcard_over_others() {
        let config = Config::new("/s", "/r");
        for service in Service::ALL {
            let grants = Grants::of(&config, service, &methods::table());
            for subject in grants.publish.iter().chain(&grants.subscribe) {
                assert!(!subject.starts_with(['*', '>']) && !subject.starts_with("$SYS"), "{subject}");
                assert!(
                    !subject.starts_with("_INBOX") || subject.contains(&format!("_{}.", service.token()))
                );
            }
        }
    }

    #[test]
    fn strings_cannot_leave_their_quotes() {
        assert_eq!(quoted(r#"/a"b\c"#), r#""/a\"b\\c""#);
        assert_eq!(quoted("a\nb"), r#""a\x0ab""#);
    }
}
