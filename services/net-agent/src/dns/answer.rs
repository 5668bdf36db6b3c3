//! From a question's bytes to its answer's: who may know what. No sockets here.

use super::{
    cache::Answer,
    filter::Filter,
    upstream::Upstream,
    zone::{Found, Zone},
};
use crate::{firewall::GRANT_TIMES, network::Network};
use bothy_contract::net::Egress;
use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType, rdata::opt::EdnsOption},
};
use std::{net::IpAddr, sync::Arc, time::Duration};

/// The longest datagram that is sent, whatever the asker would take.
const MAX_DATAGRAM: u16 = 1232;
/// The length of a message's header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// The longest TTL that is handed out. A granted address outlives it, so that a connection in its last second succeeds.
const MAX_TTL: Duration = GRANT_TIMES.1.saturating_sub(GRANT_TIMES.0);

/// "Extended DNS Errors" (RFC 8914): the option, and two of its codes.
const EXTENDED_ERROR: u16 = 15;
const FILTERED: u16 = 17;
const PROHIBITED: u16 = 18;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// The guest with that address.
    Guest(IpAddr),
    /// A process of the host.
    Host,
}

/// By what a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Answers may have to be cut.
    Udp,
    /// They need not.
    Tcp,
}

/// All that answers follow from.
#[derive(Debug)]
pub struct Answerer {
    network: Network,
    zone: Arc<Zone>,
    upstream: Upstream,
    filter: Filter,
}

/// What is said, before it is a message.
#[derive(Debug, Default)]
struct Reply {
    code: ResponseCode,
    ours: bool,
    records: Vec<Record>,
    soa: Option<Record>,
    why: Option<(u16, String)>,
}

impl Reply {
    fn of(code: ResponseCode) -> Self {
        Self { code, ..Self::default() }
    }
}

impl Answerer {
    /// Answers by `network`'s policies, and by `upstream`.
    pub fn new(network: Network, upstream: Upstream) -> Self {
        let (zone, filter) = (network.zone(), Filter::new(network.plan()));
        Self { network, zone, upstream, filter }
    }

    /// Who sends from `address`; none for anybody who has no business here.
    pub fn asker(&self, address: IpAddr) -> Option<Asker> {
        let plan = self.network.plan();
        if plan.slot_of(address).is_some() {
            return Some(Asker::Guest(address));
        }
        // From the host itself, a packet to the bridge's address comes from there, or from loopback.
        let own = address.is_loopback()
            || address == IpAddr::V4(plan.gateway())
            || plan.gateway6().is_some_and(|six| address == IpAddr::V6(six));
        own.then_some(Asker::Host)
    }

    /// The slot whose guest has `address`.
    pub fn slot_of(&self, address: IpAddr) -> Option<u32> {
        self.network.plan().slot_of(address)
    }

    /// The resolvers of the host that are asked for other names.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// The answer to the question in `data`; none where it gets none.
    pub async fn answer(&self, asker: Asker, data: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let header = data.get(..HEADER)?;
        // An answer is not answered, or two servers could go on for ever.
        if header.get(2)? & 0x80 != 0 {
            return None;
        }
        let Ok(question) = Message::from_vec(data) else {
            let id = u16::from_be_bytes([*header.first()?, *header.get(1)?]);
            return Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok();
        };
        let reply = match check(&question) {
            Ok(query) => self.reply(asker, query).await?,
            Err(code) => Reply::of(code),
        };
        encode(&question, reply, transport)
    }

    async fn reply(&self, asker: Asker, query: &Query) -> Option<Reply> {
        let (name, kind) = (query.name(), query.query_type());
        match self.zone.find(name, kind) {
            Found::Records(records) => {
                let soa = if records.is_empty() { self.zone.soa() } else { None };
                return Some(Reply { ours: true, records, soa, ..Reply::default() });
            }
            Found::NoName => {
                return Some(Reply { ours: true, soa: self.zone.soa(), ..Reply::of(ResponseCode::NXDomain) });
            }
            Found::Elsewhere => {}
        }
        // The host has its own resolvers, which would ask us again where it was told to ask us for everything.
        let Asker::Guest(guest) = asker else { return Some(Reply::of(ResponseCode::Refused)) };
        let policy = self.network.policy_of(guest)?;
        let text = plain_name(name);
        if policy != Egress::Open && !text.as_deref().is_some_and(|text| policy.covers(text)) {
            return Some(self.deny(guest, name, &policy));
        }
        // Hints in these lead to addresses past all that follows; clients do without them.
        if matches!(kind, RecordType::SVCB | RecordType::HTTPS) {
            return Some(Reply::default());
        }
        let answer = match self.upstream.ask(name, kind).await {
            Ok(answer) => answer,
            Err(why) => {
                tracing::debug!(%name, %kind, %why, "no answer");
                return Some(Reply::of(ResponseCode::ServFail));
            }
        };
        let reply = self.filtered(answer);
        if matches!(policy, Egress::Allow { .. }) {
            let addresses: Vec<(IpAddr, Duration)> = reply
                .records
                .iter()
                .filter_map(|r| Some((r.data.ip_addr()?, Duration::from_secs(r.ttl.into()) + GRANT_TIMES.0)))
                .collect();
            let granted = match (addresses.as_slice(), text) {
                ([], _) | (_, None) => Ok(()),
                (addresses, Some(text)) => self.network.allow(guest, &text, addresses).await,
            };
            if let Err(error) = granted {
                // An address that would be refused is not handed out.
                tracing::warn!(%guest, %name, %error, "a name is allowed, and its addresses cannot be");
                return Some(Reply::of(ResponseCode::ServFail));
            }
        }
        Some(reply)
    }

    /// "No such name", which programs take as final; a refusal they would take as a reason to try again. Without an SOA,
    /// nobody keeps it: it may be allowed a moment later.
    fn deny(&self, guest: IpAddr, name: &Name, policy: &Egress) -> Reply {
        // A question for the name of an address is no wish to go there.
        if !name.iter().next_back().is_some_and(|label| label.eq_ignore_ascii_case(b"arpa")) {
            self.network.denied(guest, &name.to_ascii());
        }
        let policy = match policy {
            Egress::Allow { .. } => "allow",
            Egress::None | Egress::Open => "none",
        };
        let why = format!("not covered by the egress policy of this machine, which is `{policy}`");
        Reply { why: Some((PROHIBITED, why)), ..Reply::of(ResponseCode::NXDomain) }
    }

    fn filtered(&self, answer: Answer) -> Reply {
        let Answer { code, mut records, soa } = answer;
        let before = records.len();
        records.retain(|record| {
            !matches!(record.record_type(), RecordType::SVCB | RecordType::HTTPS)
                && record.data.ip_addr().is_none_or(|address| !self.filter.forbids(address))
        });
        let most = u32::try_from(MAX_TTL.as_secs()).unwrap_or(u32::MAX);
        records.iter_mut().for_each(|record| record.ttl = record.ttl.min(most));
        let why = (records.len() < before)
            .then(|| (FILTERED, "an address of this host, its link or its cloud was left out".to_owned()));
        Reply { code, ours: false, records, soa, why }
    }
}

/// The one question in a message that can be answered.
fn check(message: &Message) -> Result<&Query, ResponseCode> {
    if message.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Err(ResponseCode::BADVERS);
    }
    let [query] = message.queries.as_slice() else { return Err(ResponseCode::FormErr) };
    if query.query_class() != DNSClass::IN {
        return Err(ResponseCode::Refused);
    }
    // Transfers, "everything", and what is part of messages and of no zone (RFC 6895, section 3.1).
    match u16::from(query.query_type()) {
        0 | 41 | 128..=255 => Err(ResponseCode::NotImp),
        _ => Ok(query),
    }
}

fn encode(question: &Message, reply: Reply, transport: Transport) -> Option<Vec<u8>> {
    let Reply { code, ours, records, soa, why } = reply;
    let mut message = Message::new(question.metadata.id, MessageType::Response, question.metadata.op_code);
    message.metadata = Metadata::response_from_request(&question.metadata);
    message.metadata.recursion_available = true;
    message.metadata.authoritative = ours;
    message.metadata.response_code = code;
    message.add_queries(question.queries.iter().take(1).cloned());
    message.add_answers(records);
    message.add_authorities(soa);
    let mut room = 512;
    if let Some(asked) = &question.edns {
        room = asked.max_payload().clamp(512, MAX_DATAGRAM);
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_DATAGRAM);
        if let Some((code, text)) = why {
            let data = [&code.to_be_bytes(), text.as_bytes()].concat();
            edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, data));
        }
        message.set_edns(edns);
    }
    let bytes = message.to_vec().ok()?;
    let room = if transport == Transport::Udp { room.into() } else { usize::from(u16::MAX) };
    if bytes.len() <= room { Some(bytes) } else { message.truncate().to_vec().ok() }
}

/// A name as policies have it; none for one with other characters, which no policy covers, and where a dot could be part
/// of a label.
fn plain_name(name: &Name) -> Option<String> {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_';
    name.iter().all(|label| label.iter().all(plain)).then(|| name.to_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::{RData, rdata};

    #[test]
    fn a_dot_within_a_label_is_no_end_of_it() {
        let name = Name::from_labels([&b"evil.crates"[..], b"io"]).unwrap();
        assert_eq!(plain_name(&name), None);
        let good = Name::from_ascii("Static.crates.io.").unwrap();
        assert_eq!(plain_name(&good).as_deref(), Some("Static.crates.io."));
    }

    #[test]
    fn answers_fit_their_transport() {
        let name = Name::from_ascii("a.test.").unwrap();
        let mut question = Message::query();
        question.add_query(Query::query(name.clone(), RecordType::A));
        let reply = |n: u8| Reply {
            records: (0..n)
                .map(|n| Record::from_rdata(name.clone(), 60, RData::A(rdata::A::new(192, 0, 2, n))))
                .collect(),
            ..Reply::default()
        };
        let answer = |question: &Message, n, transport| {
            let bytes = encode(question, reply(n), transport).unwrap();
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!((message.metadata.id, &message.queries), (question.metadata.id, &question.queries));
            (bytes.len(), message.metadata.truncation, message.answers.len())
        };
        let (length, cut, records) = answer(&question, 60, Transport::Udp);
        assert!(length <= 512 && cut && records == 0);
        let mut edns = Edns::new();
        edns.set_max_payload(65_535);
        question.set_edns(edns);
        let (length, cut, records) = answer(&question, 60, Transport::Udp);
        assert!(length <= usize::from(MAX_DATAGRAM) && !cut && records == 60);
        assert!(answer(&question, 120, Transport::Udp).1);
        let (_, cut, records) = answer(&question, 120, Transport::Tcp);
        assert!(!cut && records == 120);
    }
}
