//! The methods on the bus, and the streams behind the tickets that they give.
//!
//! A method only checks and answers with a ticket. The work is done on the stream: it waits for the VM's turn
//! ([`crate::queue`]), opens its own stream to the guest, and ends with a report or an error in a last frame.

use crate::{
    export::{self, SCRATCH},
    guest::Channel,
    identity,
    import::{self, until},
    path,
    queue::Queues,
};
use bothy_bus::{Client, Server};
use bothy_contract::{
    Code, Error, VmId,
    methods::{
        VmShow, WorkspaceExportOpen, WorkspaceHostShow, WorkspaceIdentityFiles, WorkspaceIdentitySync,
        WorkspaceImportOpen,
    },
    net::Done,
    vm::{VmRef, VmState},
    workspace::{GuestFiles, IdentityFiles, OpenExport, OpenImport, WorkspaceHost},
};
use bothy_guest_proto::{BULK_PORT, CONTROL_PORT};
use bothy_telemetry::record_error;
use bothy_tickets::{DEFAULT_TTL, FrameReader, FrameWriter, Tickets};
use std::path::PathBuf;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Requests that are answered at the same time; each is short.
const CONCURRENT: usize = 32;

/// What a ticket stands for.
#[derive(Debug)]
enum Job {
    Import(OpenImport),
    Export(OpenExport),
}

/// Serves until `shutdown`, then ends running jobs, each with an error to its client and the guest cleaned up.
///
/// # Errors
/// Where the socket or the bus cannot be served.
pub async fn run(
    client: Client,
    socket: PathBuf,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let tickets = Tickets::new(socket);
    let queues = Queues::default();
    let counted = queues.clone();
    let streams = {
        let (bus, stop) = (client.clone(), shutdown.clone());
        let handler = move |(job, span): (Job, tracing::Span), stream| {
            work(bus.clone(), queues.clone(), job, stream, stop.clone()).instrument(span)
        };
        let (tickets, shutdown) = (tickets.clone(), shutdown.clone());
        async move { tickets.serve(handler, shutdown).await }
    };
    let imports = (client.clone(), tickets.clone());
    let exports = (client.clone(), tickets);
    let syncs = client.clone();
    let server = Server::new(client, CONCURRENT)
        .on_ready(ready)
        .serve::<WorkspaceHostShow, _, _>(move |_, _| {
            let host = WorkspaceHost { busy: counted.busy() };
            async move { Ok(host) }
        })
        .serve::<WorkspaceImportOpen, _, _>(move |_, request: OpenImport| {
            let (bus, tickets) = imports.clone();
            async move {
                path::check("guest path", &request.guest_path)?;
                check_runs(&bus, request.vm).await?;
                let span = tracing::info_span!("workspace.import", bothy.vm.id = %request.vm);
                Ok(tickets.issue((Job::Import(request), span), DEFAULT_TTL))
            }
        })
        .serve::<WorkspaceExportOpen, _, _>(move |_, request: OpenExport| {
            let (bus, tickets) = exports.clone();
            async move {
                path::check("guest path", &request.guest_path)?;
                check_runs(&bus, request.vm).await?;
                let span = tracing::info_span!("workspace.export", bothy.vm.id = %request.vm);
                Ok(tickets.issue((Job::Export(request), span), DEFAULT_TTL))
            }
        })
        .serve::<WorkspaceIdentitySync, _, _>(move |_, request| {
            let bus = syncs.clone();
            async move {
                // Part of the VM's create, when it does not run yet; and too short to wait behind an import.
                let guest = Channel::open(&bus, request.vm, CONTROL_PORT).await?;
                identity::sync(&guest, &request).await?;
                Ok(Done {})
            }
        })
        .serve::<WorkspaceIdentityFiles, _, _>(|_, request| async move {
            let IdentityFiles { home, identity } = request;
            Ok(GuestFiles { files: identity::files(&home, &identity)? })
        });
    let stop = shutdown.clone();
    let serve = async {
        let served = server.run(shutdown.clone()).await;
        shutdown.cancel();
        served
    };
    let stream = async {
        let served = streams.await;
        stop.cancel();
        served
    };
    let (served, streamed) = tokio::join!(serve, stream);
    served.and(streamed)
}

/// Refuses early, in words that fit, what would fail later.
async fn check_runs(bus: &Client, vm: VmId) -> Result<(), Error> {
    let record = bus.call::<VmShow>(&VmRef { vm }).await?;
    // One that rests goes on when the stream to it opens.
    if matches!(record.state, VmState::Running | VmState::Paused | VmState::Suspended) {
        return Ok(());
    }
    let name = record.name;
    Err(Error::new(Code::FailedPrecondition, format!("the VM {name} does not run"))
        .hint(format!("`bothy vm start {name}`, or see why: `bothy vm show {name}`")))
}

/// Does one job on its stream, and tells the client how it ended.
async fn work(bus: Client, queues: Queues, job: Job, stream: UnixStream, stop: CancellationToken) {
    let (reader, writer) = stream.into_split();
    let mut out = FrameWriter::new(writer);
    let told = match job {
        Job::Import(request) => {
            let mut pack = FrameReader::new(reader);
            let done = async {
                let _turn = until(&stop, queues.turn(request.vm)).await?;
                let guest = Channel::open(&bus, request.vm, BULK_PORT).await?;
                import::import(&guest, &request, &mut pack, &stop).await
            };
            tell(&mut out, done.await).await
        }
        Job::Export(request) => {
            let done = async {
                let _turn = until(&stop, queues.turn(request.vm)).await?;
                let guest = Channel::open(&bus, request.vm, BULK_PORT).await?;
                export::export(&guest, &request, SCRATCH, &mut out, &stop).await
            }
            .await;
            tell(&mut out, done).await
        }
    };
    if let Err(e) = told {
        tracing::info!(error = %e, "the client went away before it could be told how its job ended");
    }
}

/// Sends the last frame.
async fn tell<T: serde::Serialize + std::fmt::Debug>(
    out: &mut FrameWriter<tokio::net::unix::OwnedWriteHalf>,
    done: Result<T, Error>,
) -> std::io::Result<()> {
    match done {
        Ok(report) => {
            tracing::info!(?report, "done");
            out.end(&report).await
        }
        Err(error) => {
            record_error(&tracing::Span::current(), error.code, &error);
            tracing::warn!(code = %error.code, "{error}");
            out.fail(&error).await
        }
    }
}
