//! Both ends of DNS with real sockets: a resolver as the host's is, with a few names, and a client. It has no answer, not
//! even that there is none, for names that begin with `slow`.

use bothy_testkit::Netns;
use hickory_proto::{
    op::{Message, MessageType, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex},
    time::Duration,
};

const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) type Names = BTreeMap<String, Vec<(u32, RData)>>;

/// What it has been asked, and may be told in a test. It runs as long as the test does.
#[derive(Clone, Default)]
pub(crate) struct Resolver {
    pub(crate) names: Arc<Mutex<Names>>,
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
    /// Says over UDP that everything is too long.
    pub(crate) cuts: bool,
    /// Says that it cannot.
    pub(crate) fails: bool,
}

impl Resolver {
    /// Starts it at port 53 of `address`.
    pub(crate) fn start(&self, ns: &Netns, address: &str) {
        let at: SocketAddr = SocketAddr::new(address.parse().unwrap(), 53);
        let (socket, listener) = ns.run(|| (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap()));
        let me = self.clone();
        std::thread::spawn(move || {
            let mut data = [0; 4096];
            while let Ok((n, from)) = socket.recv_from(&mut data) {
                let answer = me.answer(&data[..n], me.cuts);
                if !answer.is_empty() {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        let me = self.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Some(question) = read(&mut stream) else { continue };
                let _ = write(&mut stream, &me.answer(&question, false));
            }
        });
    }

    /// One more record.
    pub(crate) fn add(&self, name: &str, ttl: u32, data: &str) {
        let data = match data.parse() {
            Ok(IpAddr::V4(a)) => RData::A(rdata::A(a)),
            Ok(IpAddr::V6(a)) => RData::AAAA(rdata::AAAA(a)),
            Err(_) => match data.strip_prefix("text ") {
                Some(text) => RData::TXT(rdata::TXT::new(vec![text.to_owned()])),
                None => RData::CNAME(rdata::CNAME(Name::from_ascii(data).unwrap())),
            },
        };
        self.names.lock().unwrap().entry(name.to_owned()).or_default().push((ttl, data));
    }

    /// The names that it was asked for, in their order.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn answer(&self, question: &[u8], cut: bool) -> Vec<u8> {
        let question = Message::from_vec(question).unwrap();
        let query = question.queries[0].clone();
        let mut name = query.name().to_ascii().to_ascii_lowercase();
        self.asked.lock().unwrap().push(name.clone());
        if name.starts_with("slow") {
            return Vec::new();
        }
        let mut answer = Message::new(question.metadata.id, MessageType::Response, question.metadata.op_code);
        answer.add_query(query.clone());
        answer.metadata.recursion_available = true;
        answer.metadata.truncation = cut;
        if self.fails {
            answer.metadata.response_code = ResponseCode::ServFail;
            return answer.to_vec().unwrap();
        }
        let names = self.names.lock().unwrap();
        answer.metadata.response_code = ResponseCode::NXDomain;
        while let Some(records) = names.get(&name) {
            answer.metadata.response_code = ResponseCode::NoError;
            let owner = Name::from_ascii(&name).unwrap();
            for (ttl, data) in records {
                let alias = matches!(data, RData::CNAME(_));
                if !cut && (alias || data.record_type() == query.query_type()) {
                    answer.add_answer(Record::from_rdata(owner.clone(), *ttl, data.clone()));
                }
            }
            match &records[0].1 {
                RData::CNAME(target) => name = target.0.to_ascii(),
                _ => break,
            }
        }
        if answer.answers.is_empty() {
            let soa = Name::from_ascii("test.").unwrap();
            let data = RData::SOA(rdata::SOA::new(soa.clone(), soa.clone(), 1, 1, 1, 1, 60));
            answer.add_authority(Record::from_rdata(soa, 60, data));
        }
        answer.to_vec().unwrap()
    }
}

/// The bytes of a question, with an EDNS option as resolvers send it.
pub(crate) fn question(name: &str, kind: RecordType) -> Message {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    question
}

/// Asks over UDP, once more each second as a C library would, and gives back the answer.
pub(crate) fn ask(ns: &Netns, server: IpAddr, name: &str, kind: RecordType) -> Message {
    let question = question(name, kind);
    let socket = ns.run(|| UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })).unwrap();
    socket.connect((server, 53)).unwrap();
    socket.set_read_timeout(Some(PATIENCE / 2)).unwrap();
    let mut data = [0; 4096];
    for _ in 0..4 {
        socket.send(&question.to_vec().unwrap()).unwrap();
        if let Ok(n) = socket.recv(&mut data) {
            let answer = Message::from_vec(&data[..n]).unwrap();
            assert_eq!((answer.metadata.id, &answer.queries), (question.metadata.id, &question.queries));
            return answer;
        }
    }
    panic!("{server} does not answer {name}");
}

/// Asks over TCP.
pub(crate) fn ask_tcp(ns: &Netns, server: IpAddr, name: &str, kind: RecordType) -> Message {
    let mut stream = ns.run(|| TcpStream::connect_timeout(&(server, 53).into(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write(&mut stream, &question(name, kind).to_vec().unwrap()).unwrap();
    Message::from_vec(&read(&mut stream).unwrap()).unwrap()
}

/// The data of an answer's records.
pub(crate) fn data(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

pub(crate) fn write(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length, message].concat())
}

pub(crate) fn read(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut data = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut data).ok()?;
    Some(data)
}
