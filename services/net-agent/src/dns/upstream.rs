//! Questions to the host's own resolvers: one at a time, each from a port and with a number that nobody can guess, over TCP
//! where the answer is too long.

use super::{
    cache::{Answer, Cache},
    resolv::Resolv,
};
use hickory_proto::{
    op::{Edns, Message, MessageType, Query, ResponseCode},
    rr::{DNSClass, Name, RecordType},
};
use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// How long one resolver may take, over all that it is asked. Three such are less than the 5 s after which a guest's C
/// library asks again.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How many times a question is sent in all.
const TRIES: usize = 3;
/// The longest datagram that arrives in one piece nearly everywhere (RFC 9715).
const PAYLOAD: u16 = 1232;
/// How many records of one answer are passed on.
const MAX_RECORDS: usize = 128;

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// There is nobody to ask.
    NoServers,
    /// The last one that was asked did not answer, or not well.
    Server(SocketAddr, io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoServers => f.write_str("the host's resolv.conf names no resolver but this one"),
            Self::Server(server, why) => write!(f, "resolver {server}: {why}"),
        }
    }
}

/// The host's resolvers and what they have said.
#[derive(Debug)]
pub struct Upstream {
    resolv: Resolv,
    cache: Cache,
    /// Counts on when a resolver fails, so that the next question begins with the next one.
    first: AtomicUsize,
}

impl Upstream {
    /// Those that `resolv` names.
    pub fn new(resolv: Resolv) -> Self {
        Self { resolv, cache: Cache::default(), first: AtomicUsize::new(0) }
    }

    /// The resolvers that would be asked.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.resolv.servers().addresses.to_vec()
    }

    /// The answer to a question.
    ///
    /// # Errors
    /// Where none of the resolvers gives one in time.
    pub async fn ask(&self, name: &Name, kind: RecordType) -> Result<Answer, Failure> {
        let key = name.to_ascii().to_ascii_lowercase();
        let servers = self.resolv.servers();
        if let Some(answer) = self.cache.get(&key, kind, servers.generation) {
            return Ok(answer);
        }
        let mut failure = Failure::NoServers;
        let mut edns = true;
        let first = self.first.load(Ordering::Relaxed);
        let tries = if servers.addresses.is_empty() { 0 } else { TRIES.max(servers.addresses.len()) };
        for server in servers.addresses.iter().cycle().skip(first % TRIES).take(tries) {
            let asked = timeout(PATIENCE, exchange(*server, name, kind, edns)).await;
            let why = match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok((message, bytes)) => match message.metadata.response_code {
                    ResponseCode::NoError | ResponseCode::NXDomain => {
                        let answer = read(message);
                        self.cache.put(&key, kind, servers.generation, &answer, bytes);
                        return Ok(answer);
                    }
                    // One that does not know EDNS says so in this way.
                    code => {
                        edns = edns && code != ResponseCode::FormErr;
                        io::Error::other(code.to_str())
                    }
                },
                Err(e) => e,
            };
            failure = Failure::Server(*server, why);
            self.first.fetch_add(1, Ordering::Relaxed);
        }
        Err(failure)
    }
}

/// What of a message is passed on: nothing that was not asked for, such as the addresses of name servers.
fn read(message: Message) -> Answer {
    let Message { metadata, mut answers, authorities, .. } = message;
    answers.retain(|record| record.dns_class == DNSClass::IN);
    answers.truncate(MAX_RECORDS);
    let soa = authorities.into_iter().find(|record| record.record_type() == RecordType::SOA);
    Answer { code: metadata.response_code, soa: soa.filter(|_| answers.is_empty()), records: answers }
}

/// One question to one resolver, and how long its answer was.
async fn exchange(
    server: SocketAddr,
    name: &Name,
    kind: RecordType,
    edns: bool,
) -> io::Result<(Message, usize)> {
    // With a random number.
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name.clone(), kind));
    if edns {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        question.set_edns(edns);
    }
    let bytes = question.to_vec().map_err(io::Error::other)?;
    let any: SocketAddr =
        if server.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    // From nobody else, and an error at once where nobody listens.
    socket.connect(server).await?;
    socket.send(&bytes).await?;
    let mut data = [0; 4096];
    loop {
        let count = socket.recv(&mut data).await?;
        let data = data.get(..count).unwrap_or_default();
        let Some(answer) = answer_to(&question, data) else { continue };
        if answer.metadata.truncation {
            return over_tcp(server, &question, &bytes).await;
        }
        return Ok((answer, count));
    }
}

async fn over_tcp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<(Message, usize)> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let mut data = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut data).await?;
    let answer =
        answer_to(question, &data).ok_or_else(|| io::Error::other("an answer to another question"))?;
    Ok((answer, data.len()))
}

/// A message, if it is the answer to `question`.
fn answer_to(question: &Message, data: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(data).ok()?;
    let fits = answer.metadata.id == question.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && (answer.queries == question.queries
            // Some say no more than that.
            || answer.queries.is_empty() && answer.metadata.response_code == ResponseCode::FormErr);
    fits.then_some(answer)
}
