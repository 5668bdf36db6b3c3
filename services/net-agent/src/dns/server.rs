//! The sockets: UDP and TCP port 53 at the bridge's addresses. Where a port is taken, it is tried again until it is free.

use super::{
    answer::{Answerer, Asker, Transport},
    bounds::{Bounds, Use},
    resolv::Resolv,
    upstream::Upstream,
};
use crate::network::Network;
use bothy_contract::net::NameServer;
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::{sleep, timeout},
};

/// The port of DNS.
pub const PORT: u16 = 53;

/// How often an address that is not free is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// After an error of a socket, so that one that stays does not take a processor.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest question; even with all that can go with one, few are a tenth of it.
const MAX_QUESTION: usize = 4096;
/// Datagrams that may wait while others are read.
const RECEIVE_BUFFER: usize = 1 << 20;
/// How long a TCP connection may be silent, and how long one message may take.
const IDLE: Duration = Duration::from_secs(10);
/// See [`IDLE`].
const TRANSFER: Duration = Duration::from_secs(5);

/// The name server. It stops when it is dropped.
#[derive(Debug)]
pub struct Dns {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    answerer: Answerer,
    bounds: Bounds,
    /// The addresses to listen at, and why not.
    places: Mutex<BTreeMap<IpAddr, Option<String>>>,
}

impl Dns {
    /// Listens at the bridge's addresses, and answers. `resolv_conf` names the host's own resolvers. An address whose port
    /// is taken is no error here: it is tried again, and [`Dns::status`] says so.
    pub async fn start(network: Network, resolv_conf: PathBuf) -> Self {
        let plan = network.plan();
        let own: Vec<IpAddr> =
            std::iter::once(IpAddr::V4(plan.gateway())).chain(plan.gateway6().map(IpAddr::V6)).collect();
        let upstream = Upstream::new(Resolv::new(resolv_conf, own.clone()));
        let shared = Arc::new(Shared {
            answerer: Answerer::new(network, upstream),
            bounds: Bounds::default(),
            places: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for address in own {
            let bound = bind(address).await;
            shared.note(address, bound.as_ref().err());
            tasks.spawn(Arc::clone(&shared).serve(address, bound));
        }
        Self { shared, _tasks: tasks }
    }

    /// Where it listens and whom it asks.
    pub fn status(&self) -> NameServer {
        let places = self.shared.places();
        NameServer {
            listens: places.iter().filter(|(_, why)| why.is_none()).map(|(at, _)| *at).collect(),
            failures: places.values().flatten().cloned().collect(),
            resolvers: self.shared.answerer.upstream().servers(),
            resolved: None,
        }
    }
}

async fn bind(address: IpAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let at = SocketAddr::new(address, PORT);
    let socket = UdpSocket::bind(at).await?;
    // Beyond the usual limit, which CAP_NET_ADMIN may; without it, the usual one does.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    Ok((socket, TcpListener::bind(at).await?))
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Option<String>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, address: IpAddr, error: Option<&io::Error>) {
        let at = SocketAddr::new(address, PORT);
        let why = error.map(|e| format!("cannot listen at {at}: {e}"));
        let before = self.places().insert(address, why.clone());
        match (&why, before) {
            (Some(why), before) if before.as_ref() != Some(&Some(why.clone())) => {
                tracing::error!(%why, "guests cannot resolve names; trying again");
            }
            (None, before) if before != Some(None) => tracing::info!(%at, "names are answered"),
            _ => {}
        }
    }

    async fn serve(self: Arc<Self>, address: IpAddr, mut bound: io::Result<(UdpSocket, TcpListener)>) {
        loop {
            if let Ok((socket, listener)) = bound {
                tokio::join!(self.datagrams(Arc::new(socket)), self.connections(listener));
                return;
            }
            sleep(RETRY).await;
            bound = bind(address).await;
            self.note(address, bound.as_ref().err());
        }
    }

    async fn datagrams(self: &Arc<Self>, socket: Arc<UdpSocket>) {
        // One more byte tells a question that is too long.
        let mut data = [0; MAX_QUESTION + 1];
        loop {
            let (count, from) = match socket.recv_from(&mut data).await {
                Ok(got) => got,
                Err(error) => {
                    tracing::debug!(%error, "cannot receive");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let Some((asker, slot)) = self.asker(from.ip()) else { continue };
            let Some(question) = data.get(..count).filter(|q| q.len() <= MAX_QUESTION) else { continue };
            if !self.bounds.may_ask(slot) {
                continue;
            }
            let Some(permit) = self.bounds.take(slot, Use::Question) else { continue };
            let (shared, socket, question) = (Arc::clone(self), Arc::clone(&socket), question.to_vec());
            tokio::spawn(async move {
                let _permit = permit;
                if let Some(answer) = shared.answerer.answer(asker, &question, Transport::Udp).await
                    && let Err(error) = socket.send_to(&answer, from).await
                {
                    tracing::debug!(%from, %error, "cannot send an answer");
                }
            });
        }
    }

    async fn connections(self: &Arc<Self>, listener: TcpListener) {
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let Some((asker, slot)) = self.asker(from.ip()) else { continue };
            let Some(permit) = self.bounds.take(slot, Use::Connection) else { continue };
            let shared = Arc::clone(self);
            tokio::spawn(async move {
                let _permit = permit;
                if let Err(error) = shared.connection(stream, asker, slot).await {
                    tracing::debug!(%from, %error, "a connection ended");
                }
            });
        }
    }

    /// One question after the other, until the asker is silent, goes, or asks too much.
    async fn connection(&self, mut stream: TcpStream, asker: Asker, slot: u32) -> io::Result<()> {
        loop {
            let length = usize::from(timeout(IDLE, stream.read_u16()).await??);
            if length > MAX_QUESTION || !self.bounds.may_ask(slot) {
                return Ok(());
            }
            let mut question = vec![0; length];
            timeout(TRANSFER, stream.read_exact(&mut question)).await??;
            let Some(_permit) = self.bounds.take(slot, Use::Question) else { return Ok(()) };
            let Some(answer) = self.answerer.answer(asker, &question, Transport::Tcp).await else {
                return Ok(());
            };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let whole = [&length.to_be_bytes(), answer.as_slice()].concat();
            timeout(TRANSFER, stream.write_all(&whole)).await??;
        }
    }

    fn asker(&self, address: IpAddr) -> Option<(Asker, u32)> {
        let address = address.to_canonical();
        let asker = self.answerer.asker(address)?;
        let slot = match asker {
            Asker::Guest(_) => self.answerer.slot_of(address)?,
            Asker::Host => 0,
        };
        Some((asker, slot))
    }
}
