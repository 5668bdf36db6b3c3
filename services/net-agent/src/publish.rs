//! Published ports: the host listens, and each connection is carried on to the guest.
//!
//! **Why not nftables.** A connection from the host itself to 127.0.0.1 reaches a guest by DNAT only with
//! `route_localnet` on, which lets guests and neighbours of the host send to its loopback addresses, and a
//! masquerade of loopback; and rules cannot know that a port is somebody's already. A listening socket is refused by the
//! kernel where another is, needs no privilege but for ports below 1024, and adds no rule. What it costs is a copy of
//! each byte, and that connections (not the ports) end with the agent: a new one listens again and clients connect again.
//!
//! Only TCP. The guest sees the bridge's address as the peer.

use bothy_contract::{Code, Error, net::Publish};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};

/// Connections that one port carries at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;

/// How long a guest may take to accept: one that rests may have to be brought back.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long until it is taken to rest. A guest that runs accepts, or refuses, in much less.
const AT_ONCE: Duration = Duration::from_millis(200);
/// Guests that are waited for and nobody has been told of yet; more are told of with their next connection.
const MAX_WAITING: usize = 64;

/// The listening sockets of all slots.
#[derive(Debug)]
pub struct Publisher {
    open: Mutex<BTreeMap<u32, Vec<Open>>>,
    unreached: mpsc::Sender<IpAddr>,
    told: Mutex<Option<mpsc::Receiver<IpAddr>>>,
}

impl Default for Publisher {
    fn default() -> Self {
        let (unreached, told) = mpsc::channel(MAX_WAITING);
        Self { open: Mutex::default(), unreached, told: Mutex::new(Some(told)) }
    }
}

#[derive(Debug)]
struct Open {
    publish: Publish,
    listener: Arc<TcpListener>,
    task: AbortHandle,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Publisher {
    /// Publishes `ports` of the guest at `guest`, which has slot `slot`, in place of those before. Sockets that stay are
    /// kept open; connections to ports that go end.
    ///
    /// # Errors
    /// `already_exists`, with nothing changed, where somebody listens at one of them; `invalid_argument` for a list that
    /// contradicts itself.
    pub fn set(&self, slot: u32, guest: IpAddr, ports: &[Publish]) -> Result<(), Error> {
        Publish::check(ports)?;
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = |listen: SocketAddr| {
            let holds = |open: &Open| overlap(open.publish.listen, listen);
            all.iter().find(|(_, opens)| opens.iter().any(holds)).map(|(holder, _)| *holder)
        };
        let mut listeners = Vec::new();
        for publish in ports {
            let kept =
                all.get(&slot).and_then(|opens| opens.iter().find(|o| o.publish.listen == publish.listen));
            let listener = match kept {
                Some(open) => Arc::clone(&open.listener),
                None => Arc::new(
                    listen(publish.listen)
                        .map_err(|e| refused(publish.listen, holder(publish.listen), &e))?,
                ),
            };
            listeners.push((*publish, listener));
        }
        let opens: Vec<Open> = listeners
            .into_iter()
            .map(|(publish, listener)| {
                let to = SocketAddr::new(guest, publish.guest_port);
                let kept = all.get_mut(&slot).and_then(|opens| {
                    let at = opens.iter().position(|open| open.publish == publish)?;
                    Some(opens.swap_remove(at))
                });
                kept.unwrap_or_else(|| {
                    let serving = serve(Arc::clone(&listener), to, self.unreached.clone());
                    let task = tokio::spawn(serving).abort_handle();
                    Open { publish, listener, task }
                })
            })
            .collect();
        if opens.is_empty() {
            all.remove(&slot);
        } else {
            all.insert(slot, opens);
        }
        Ok(())
    }

    /// The guests that somebody waits for, each time one does not accept at once; for whoever asks first.
    pub fn unreached(&self) -> Option<mpsc::Receiver<IpAddr>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Publishes nothing of that slot any more.
    pub fn clear(&self, slot: u32) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
    }

    /// Publishes those of `ports` that can be, where others took them while no agent ran; gives back the rest with the
    /// reasons.
    pub fn restore(&self, slot: u32, guest: IpAddr, ports: &[Publish]) -> Vec<Error> {
        let mut open: Vec<Publish> = {
            let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(&slot).into_iter().flatten().map(|open| open.publish).collect()
        };
        let mut failures = Vec::new();
        for publish in ports.iter().filter(|p| !open.contains(p)).copied().collect::<Vec<_>>() {
            open.push(publish);
            if let Err(e) = self.set(slot, guest, &open) {
                open.pop();
                failures.push(e);
            }
        }
        failures
    }
}

/// Whether two sockets cannot both listen there.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let any = a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() == b.port() && (a.ip() == b.ip() || any)
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(at)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn refused(at: SocketAddr, holder: Option<u32>, error: &io::Error) -> Error {
    match (error.kind(), holder) {
        (io::ErrorKind::AddrInUse, Some(slot)) => {
            Error::new(Code::AlreadyExists, format!("{at} is published by the VM in slot {slot}"))
                .hint("choose another port of the host; `bothy vm show` says what each VM publishes")
        }
        (io::ErrorKind::AddrInUse, None) => {
            Error::new(Code::AlreadyExists, format!("a process of this host listens at {at}"))
                .hint(format!("see which with `ss -tlnp 'sport = {}'`, or choose another port", at.port()))
        }
        (io::ErrorKind::AddrNotAvailable, _) => {
            Error::invalid(format!("cannot listen at {at}: {} is no address of this host", at.ip()))
        }
        (io::ErrorKind::PermissionDenied, _) => Error::new(
            Code::FailedPrecondition,
            format!("cannot listen at {at}: ports below 1024 need CAP_NET_BIND_SERVICE"),
        ),
        _ => Error::internal(format!("cannot listen at {at}"), error),
    }
}

async fn serve(listener: Arc<TcpListener>, to: SocketAddr, unreached: mpsc::Sender<IpAddr>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Aborted with this task, so that no connection outlives its port.
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let unreached = unreached.clone();
                connections.spawn(async move {
                    carry(client, to, &unreached).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, mostly: others close some meanwhile.
                tracing::warn!(%error, %to, "cannot accept a connection to a published port");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(mut client: TcpStream, to: SocketAddr, unreached: &mpsc::Sender<IpAddr>) {
    let connect = async {
        let connect = TcpStream::connect(to);
        tokio::pin!(connect);
        match tokio::time::timeout(AT_ONCE, &mut connect).await {
            Ok(connected) => connected,
            Err(_) => {
                // The kernel asks the guest again every second or so; meanwhile the client's words wait here.
                let _ = unreached.try_send(to.ip());
                connect.await
            }
        }
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
    match connected {
        Ok(Ok(mut guest)) => {
            // As if there were one connection: what one side writes goes on at once.
            let _ = client.set_nodelay(true).and_then(|()| guest.set_nodelay(true));
            if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut guest).await {
                tracing::debug!(%error, %to, "a connection to a published port broke");
            }
        }
        // The client learns that nobody is there by a reset, not by an empty answer.
        _ => {
            let _ = client.set_zero_linger();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn publish(listen: SocketAddr, guest_port: u16) -> Publish {
        Publish { listen, guest_port }
    }

    async fn says(to: SocketAddr) -> Result<String, io::Error> {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(b"?").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    /// A server that answers each connection with its word.
    async fn server(word: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read_u8().await;
                let _ = stream.write_all(word.as_bytes()).await;
            }
        });
        port
    }

    #[tokio::test]
    async fn ports_come_change_and_go() {
        let guest: IpAddr = [127, 0, 0, 1].into();
        let (one, two) = (server("one").await, server("two").await);
        let publisher = Publisher::default();
        let at = SocketAddr::new(guest, bothy_testkit::free_port());
        publisher.set(1, guest, &[publish(at, one)]).unwrap();
        assert_eq!(says(at).await.unwrap(), "one");
        publisher.set(1, guest, &[publish(at, two)]).unwrap();
        assert_eq!(says(at).await.unwrap(), "two", "the same socket leads elsewhere");

        let taken = publisher.set(2, guest, &[publish(at, one)]).unwrap_err();
        assert_eq!(taken.code, Code::AlreadyExists);
        assert!(taken.message.contains("slot 1"), "{taken}");
        publisher.clear(1);
        assert!(says(at).await.is_err());
        publisher.set(2, guest, &[publish(at, one)]).unwrap();
    }

    #[tokio::test]
    async fn a_list_is_published_whole_or_not_at_all() {
        let guest: IpAddr = [127, 0, 0, 1].into();
        let publisher = Publisher::default();
        let theirs = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let taken = theirs.local_addr().unwrap();
        let free = SocketAddr::new(guest, bothy_testkit::free_port());
        let refused = publisher.set(1, guest, &[publish(free, 1), publish(taken, 1)]).unwrap_err();
        assert_eq!(refused.code, Code::AlreadyExists);
        assert!(refused.message.contains(&taken.to_string()) && refused.hint.is_some());
        assert!(TcpListener::bind(free).await.is_ok(), "let go of again");
        for bad in [vec![publish(free, 0)], vec![publish(free, 1), publish(free, 2)]] {
            assert_eq!(publisher.set(1, guest, &bad).unwrap_err().code, Code::InvalidArgument);
        }
        let elsewhere = publish("192.0.2.1:8080".parse().unwrap(), 1);
        assert_eq!(publisher.set(1, guest, &[elsewhere]).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(publisher.restore(1, guest, &[publish(free, 1), publish(taken, 1)]).len(), 1);
        assert!(TcpListener::bind(free).await.is_err(), "what can be is published");
    }
}
