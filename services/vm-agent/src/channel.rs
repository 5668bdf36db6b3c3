//! Tickets: streams to ports of guests, and logs. What a ticket is for is checked when it is asked for and again when it is
//! redeemed, for a VM may be gone by then.

use crate::{lifecycle::Agent, logs};
use bothy_contract::{
    Code, Error, Service, VmId,
    vm::{LogSource, OpenChannel, OpenLog, Ticket},
};
use bothy_tickets::{DEFAULT_TTL, Redeemed, Tickets};
use bothy_vm_agent::vmm::holder::Holder;
use std::time::Duration;
use tokio::{io::copy_bidirectional_with_sizes, time::timeout};
use tokio_util::sync::CancellationToken;

/// How long a stream to a guest may take to open: the guest may be between two sessions.
const OPEN: Duration = Duration::from_secs(30);
/// MACHINE measurements favour 32 to 64 KiB at a time.
const BUFFER: usize = 64 << 10;

/// What a ticket opens.
#[derive(Debug, Clone)]
pub(crate) enum Stream {
    /// A port of a guest.
    Channel {
        /// The VM.
        vm: VmId,
        /// The port.
        port: u32,
    },
    /// A log.
    Log {
        /// The VM.
        vm: VmId,
        /// Which.
        source: LogSource,
        /// Go on as it grows.
        follow: bool,
    },
}

/// The agent's tickets, each with the agent that serves it.
pub(crate) type StreamTickets = Tickets<(Agent, Stream)>;

/// The tickets of `agent`'s socket.
pub(crate) fn tickets(agent: &Agent) -> StreamTickets {
    Tickets::new(agent.config.ticket_socket(Service::Vm))
}

/// Serves tickets until `shutdown`. Streams that are open then are cut: their VMs live on, and whoever reads connects anew.
pub(crate) async fn serve(tickets: StreamTickets, shutdown: CancellationToken) -> Result<(), Error> {
    let end = shutdown.clone();
    tickets
        .serve_redeemed(
            move |(agent, stream), redeemed| {
                let end = end.clone();
                async move {
                    end.run_until_cancelled(open(agent, stream, redeemed)).await;
                }
            },
            shutdown,
        )
        .await
}

async fn open(agent: Agent, stream: Stream, redeemed: Redeemed) {
    match stream {
        Stream::Channel { vm, port } => {
            let guest = match connect(&agent, vm, port).await {
                Ok(guest) => guest,
                Err(e) => return redeemed.refuse(&e).await,
            };
            let mut guest = guest;
            let _used = agent.activity.stream(vm);
            if let Ok(mut caller) = redeemed.accept().await {
                // Either side may go at any time; the end of the stream tells the other.
                drop(copy_bidirectional_with_sizes(&mut caller, &mut guest, BUFFER, BUFFER).await);
            }
        }
        Stream::Log { vm, source, follow } => match logs::Log::open(&agent, vm, source).await {
            Ok(log) => {
                if let Ok(caller) = redeemed.accept().await {
                    log.stream(caller, follow).await;
                }
            }
            Err(e) => redeemed.refuse(&e).await,
        },
    }
}

/// The holder of a VM whose VMM lives.
async fn holder(agent: &Agent, vm: VmId) -> Result<Holder, Error> {
    Ok(agent.running(vm).await?.place.holder(&agent.config, vm))
}

async fn connect(agent: &Agent, vm: VmId, port: u32) -> Result<tokio::net::UnixStream, Error> {
    let holder = holder(agent, vm).await?;
    timeout(OPEN, holder.connect(port)).await.unwrap_or_else(|_| {
        Err(Error::new(Code::Unavailable, format!("the guest does not answer within {} s", OPEN.as_secs()))
            .hint("see its console with `bothy vm logs`"))
    })
}

/// A ticket for a port of a guest.
pub(crate) async fn open_channel(
    agent: &Agent,
    tickets: &StreamTickets,
    ask: OpenChannel,
) -> Result<Ticket, Error> {
    if ask.port == 0 {
        return Err(Error::invalid("0 is not a port of a guest"));
    }
    agent.wake(ask.vm).await?;
    holder(agent, ask.vm).await?;
    Ok(tickets.issue((agent.clone(), Stream::Channel { vm: ask.vm, port: ask.port }), DEFAULT_TTL))
}

/// A ticket for a log.
pub(crate) async fn open_log(agent: &Agent, tickets: &StreamTickets, ask: OpenLog) -> Result<Ticket, Error> {
    logs::Log::open(agent, ask.vm, ask.source).await?;
    let stream = Stream::Log { vm: ask.vm, source: ask.source, follow: ask.follow };
    Ok(tickets.issue((agent.clone(), stream), DEFAULT_TTL))
}
