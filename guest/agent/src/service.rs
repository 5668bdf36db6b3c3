//! The gRPC service: each method in a few lines over the module that does it, and what they share: whether the
//! machine has its identity, what PID 1 is, and the boot's timeline.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bothy_guest_proto::v1::{self, exec_input::Input, guest_server};
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::timeline::{Step, now_us};
use crate::{
    exec, files, forward, identity, kmsg, machine, metrics, ports, shutdown, systemd, tarball, wait, workdisk,
};

mod change;
mod init;
mod pending;

pub use init::Init;

type Reply<T> = Result<Response<T>, Status>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The agent. Clones share everything.
#[derive(Debug, Clone)]
pub struct Guest(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    init: Init,
    steps: Mutex<Vec<Step>>,
    /// The last identity, and the lock that lets one `Personalise` run at a time.
    identity: tokio::sync::Mutex<Option<v1::PersonaliseRequest>>,
    known: Mutex<Known>,
    /// A directory on the disk that takes what is written to the root.
    upper: OnceLock<fs_err::File>,
    /// What the last `Personalise` left to do.
    pending: pending::Pending,
    /// What `Quiesce` holds back.
    held: Mutex<change::Held>,
}

/// What is known of the identity without waiting for a `Personalise` that runs.
#[derive(Debug, Default, Clone)]
struct Known {
    personalised: bool,
    template: bool,
    home: String,
    defaults: v1::Defaults,
    address: Option<Ipv4Addr>,
}

impl Guest {
    /// The agent of a machine whose boot went through `steps` so far.
    #[must_use]
    pub fn new(init: Init, steps: Vec<Step>) -> Self {
        Self(Arc::new(Shared {
            init,
            steps: Mutex::new(steps),
            identity: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            upper: OnceLock::new(),
            pending: pending::Pending::default(),
            held: Mutex::default(),
        }))
    }

    /// The same, with a directory on the disk that takes what is written to the root: `GrowDisks` needs it.
    #[must_use]
    pub fn writing_to(self, upper: fs_err::File) -> Self {
        self.0.upper.get_or_init(|| upper);
        self
    }

    /// Adds a step of the boot.
    pub fn add_step(&self, step: Step) {
        self.0.steps.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }

    fn known(&self) -> Known {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses what would run before the machine has its identity.
    fn ready(&self) -> Result<(), Status> {
        if self.0.init.started() {
            return Ok(());
        }
        Err(Status::failed_precondition("the guest is not personalised yet: call Personalise first"))
    }
}

fn failed(what: &str, error: &io::Error) -> Status {
    let text = format!("{what}: {error}");
    match error.kind() {
        io::ErrorKind::NotFound => Status::not_found(text),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => Status::invalid_argument(text),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::resource_exhausted(text),
        _ => Status::internal(text),
    }
}

fn absolute(path: &str) -> Result<PathBuf, Status> {
    files::check_path(path).map_err(Status::invalid_argument)?;
    Ok(Path::new(path).to_owned())
}

fn port(number: u32) -> Result<u16, Status> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Status::invalid_argument(format!("{number} is not a TCP port")))
}

/// Runs blocking work off the agent's only thread.
async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    result.map_err(|error| failed(what, &error))
}

#[tonic::async_trait]
impl guest_server::Guest for Guest {
    async fn health(&self, _: Request<v1::HealthRequest>) -> Reply<v1::HealthReply> {
        Ok(Response::new(v1::HealthReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: identity::boot_id().map_err(|error| failed("read the boot id", &error))?,
            personalised: self.known().personalised,
            init_started: self.0.init.started(),
            uptime_us: now_us(),
            template: self.known().template,
            unix_time_us: identity::clock_us(),
            pending: self.0.pending.names(),
        }))
    }

    async fn personalise(&self, request: Request<v1::PersonaliseRequest>) -> Reply<v1::PersonaliseReply> {
        // A task of its own: a host that goes away half-way leaves no half-done identity.
        let (guest, request) = (self.clone(), request.into_inner());
        let task = tokio::spawn(async move { guest.personalise_now(request).await });
        task.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn quiesce(&self, _: Request<v1::QuiesceRequest>) -> Reply<v1::QuiesceReply> {
        self.ready()?;
        let guest = self.clone();
        let task = tokio::spawn(async move { guest.quiesce_now().await });
        task.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn resumed(&self, request: Request<v1::ResumedRequest>) -> Reply<v1::ResumedReply> {
        self.resumed_now(request.into_inner()).await.map(Response::new)
    }

    async fn step_clock(&self, request: Request<v1::StepClockRequest>) -> Reply<v1::StepClockReply> {
        let by = request.into_inner().by_us;
        identity::step_clock(by).map_err(|error| failed("move the clock", &error))?;
        Ok(Response::new(v1::StepClockReply { unix_time_us: identity::clock_us() }))
    }

    async fn timeline(&self, _: Request<v1::TimelineRequest>) -> Reply<v1::TimelineReply> {
        let steps = self.0.steps.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let steps = steps.into_iter().map(Into::into).collect();
        Ok(Response::new(v1::TimelineReply { steps }))
    }

    type ExecStream = ReceiverStream<Result<v1::ExecOutput, Status>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Reply<Self::ExecStream> {
        self.ready()?;
        let mut input = request.into_inner();
        let Some(v1::ExecInput { input: Some(Input::Start(start)) }) = input.message().await? else {
            return Err(Status::invalid_argument("the first message of Exec must be `start`"));
        };
        let (replies, output) = mpsc::channel(4);
        let defaults = if start.image_defaults { self.known().defaults } else { Default::default() };
        tokio::spawn(exec::run(start, defaults, input, replies));
        Ok(Response::new(ReceiverStream::new(output)))
    }

    async fn put_tar(&self, request: Request<Streaming<v1::TarChunk>>) -> Reply<v1::PutTarReply> {
        self.ready()?;
        let mut input = request.into_inner();
        let first = input.message().await?.ok_or_else(|| Status::invalid_argument("an empty stream"))?;
        let directory = absolute(&first.dir)?;
        let (chunks, queue) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut next = Some(Ok::<_, Status>(first));
            while let Some(chunk) = next {
                let chunk =
                    chunk.map(|chunk| chunk.data).map_err(|error| io::Error::other(error.to_string()));
                let ended = chunk.is_err();
                if chunks.send(chunk).await.is_err() || ended {
                    return;
                }
                next = input.next().await;
            }
        });
        let done = blocking("unpack the archive", move || {
            let mut reader = tarball::QueueReader::new(queue);
            let done = tarball::unpack(&mut reader, &directory)?;
            // Padding after the end mark: a sender must be able to finish.
            io::copy(&mut reader, &mut io::sink())?;
            Ok(done)
        });
        let done = done.await?;
        Ok(Response::new(v1::PutTarReply { entries: done.entries, bytes: done.bytes }))
    }

    type GetTarStream = BoxStream<v1::TarChunk>;

    async fn get_tar(&self, request: Request<v1::GetTarRequest>) -> Reply<Self::GetTarStream> {
        self.ready()?;
        let path = absolute(&request.into_inner().path)?;
        if let Err(error) = fs_err::symlink_metadata(&path) {
            return Err(failed("pack", &error));
        }
        let (chunks, queue) = mpsc::channel(4);
        let packing = blocking("pack", move || tarball::pack(&path, tarball::QueueWriter::new(chunks)));
        // Chunks while there are any, then how it ended.
        let data = ReceiverStream::new(queue).map(|data| Ok(v1::TarChunk { dir: String::new(), data }));
        let end =
            futures::stream::once(packing).filter_map(async |end: Result<(), Status>| end.err().map(Err));
        Ok(Response::new(Box::pin(futures::stream::select(data, end))))
    }

    async fn write_files(&self, request: Request<v1::WriteFilesRequest>) -> Reply<v1::WriteFilesReply> {
        self.ready()?;
        let v1::WriteFilesRequest { files, below_home } = request.into_inner();
        files::check(&files).map_err(Status::invalid_argument)?;
        let home = Some(self.known().home).filter(|home| below_home && !home.is_empty());
        let root = match (below_home, home) {
            (true, Some(home)) => PathBuf::from(home),
            (true, None) => return Err(Status::failed_precondition("this machine has no home")),
            (false, _) => PathBuf::from("/"),
        };
        blocking("write files", move || {
            files::write_all(&root, &files)?;
            files::make_durable(&root, &files)
        })
        .await?;
        Ok(Response::new(v1::WriteFilesReply {}))
    }

    async fn ports(&self, _: Request<v1::PortsRequest>) -> Reply<v1::PortsReply> {
        let ports = blocking("list ports", || Ok(ports::list())).await?;
        Ok(Response::new(v1::PortsReply { ports }))
    }

    async fn metrics(&self, _: Request<v1::MetricsRequest>) -> Reply<v1::MetricsReply> {
        let home = self.known().home;
        // A file system may be slow to answer: one of the guest's own making that hangs, say.
        let read = blocking("read the metrics", move || {
            metrics::read(Path::new(if home.is_empty() { "/" } else { &home }))
        });
        Ok(Response::new(read.await?))
    }

    async fn grow_disks(&self, request: Request<v1::GrowDisksRequest>) -> Reply<v1::GrowDisksReply> {
        self.ready()?;
        let v1::GrowDisksRequest { work_bytes, system_bytes } = request.into_inner();
        // The kernel refuses two growths of one file system at a time.
        let guest = self.clone();
        let task = tokio::spawn(async move {
            let _one = guest.0.identity.lock().await;
            let home = guest.known().home;
            let upper = guest.0.upper.get().map(fs_err::File::try_clone).transpose();
            blocking("grow the disks", move || {
                let system_bytes = match upper? {
                    Some(upper) => workdisk::grow_system(&upper, system_bytes)?,
                    None => 0,
                };
                let work_bytes =
                    if home.is_empty() { 0 } else { workdisk::grow_work(Path::new(&home), work_bytes)? };
                Ok(v1::GrowDisksReply { work_bytes, system_bytes })
            })
            .await
        });
        Ok(Response::new(task.await.map_err(|error| Status::internal(error.to_string()))??))
    }

    async fn wait_service(&self, request: Request<v1::WaitServiceRequest>) -> Reply<v1::WaitServiceReply> {
        self.ready()?;
        let v1::WaitServiceRequest { port: number, unit, timeout_ms } = request.into_inner();
        let port = (number != 0).then(|| port(number)).transpose()?;
        let unit = (!unit.is_empty()).then_some(unit);
        match &unit {
            None if port.is_none() => {
                return Err(Status::invalid_argument("a service to wait for has a port or a unit"));
            }
            Some(unit) if !systemd::is_unit_name(unit) => {
                return Err(Status::invalid_argument(format!("`{unit}` is not the name of a unit")));
            }
            Some(unit) if !self.0.init.is_systemd() => {
                return Err(Status::failed_precondition(format!(
                    "unit {unit} cannot be waited for: the init of this guest is not systemd, so a service of it is a port"
                )));
            }
            _ => {}
        }
        let began = now_us();
        let timeout = Duration::from_millis(timeout_ms);
        let done = match self.0.pending.wait(timeout).await {
            Ok(()) => wait::wait(&wait::Wanted { port, unit, timeout }, self.known().address).await,
            Err(why) => Err(wait::NotUp { why, log: String::new() }),
        };
        let waited_us = now_us().saturating_sub(began);
        let (ready, (why, log)) = match done {
            Ok(()) => (true, Default::default()),
            Err(not_up) => (false, (not_up.why, not_up.log)),
        };
        Ok(Response::new(v1::WaitServiceReply { ready, waited_us, why, log }))
    }

    type ForwardStream = ReceiverStream<Result<v1::ForwardChunk, Status>>;

    async fn forward(&self, request: Request<Streaming<v1::ForwardChunk>>) -> Reply<Self::ForwardStream> {
        let mut input = request.into_inner();
        let first = input.message().await?.ok_or_else(|| Status::invalid_argument("an empty stream"))?;
        let tcp = forward::connect(port(first.port)?, self.known().address).await?;
        let (output, replies) = mpsc::channel(4);
        tokio::spawn(forward::run(tcp, first.data, input, output));
        Ok(Response::new(ReceiverStream::new(replies)))
    }

    async fn sync(&self, _: Request<v1::SyncRequest>) -> Reply<v1::SyncReply> {
        let began = now_us();
        blocking("sync", || {
            nix::unistd::sync();
            Ok(())
        })
        .await?;
        Ok(Response::new(v1::SyncReply { took_us: now_us().saturating_sub(began) }))
    }

    async fn shutdown(&self, request: Request<v1::ShutdownRequest>) -> Reply<v1::ShutdownReply> {
        let reboot = request.into_inner().reboot || machine::ends_by_reset();
        let guest = self.clone();
        tokio::spawn(async move {
            // The answer first: with a small machine the end is quicker than its way out.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = tokio::task::spawn_blocking(nix::unistd::sync).await;
            let asked = if guest.0.init.is_systemd() {
                shutdown::ask_systemd(reboot).await
            } else {
                guest.0.init.end(reboot).await
            };
            if let Err(error) = asked {
                kmsg::error(&format!("shut down: {error}"));
            }
        });
        Ok(Response::new(v1::ShutdownReply {}))
    }
}
