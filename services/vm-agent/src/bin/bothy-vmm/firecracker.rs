//! Firecracker as the holder sees it: an API to be told things by, and a socket that leads to the guest's vsock.

use bothy_vm_agent::vmm::{
    Save,
    firecracker::{
        api::{Method, Request, SAME_PATH, SnapshotCreate, SnapshotType, VmState},
        client::{self, ApiError},
    },
    snapshot,
    wire::{self, SaveReply, SaveRequest},
};
use serde_json::Value;
use std::{
    cell::Cell,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{sleep, timeout},
};

/// How long one try to reach a port of the guest may take: Firecracker itself gives up a little earlier.
const TRY: Duration = Duration::from_secs(3);
/// How long to wait between tries while the guest boots; at first far less.
const PAUSE: Duration = Duration::from_millis(50);
const FIRST_PAUSE: Duration = Duration::from_millis(2);
/// How often to look whether Firecracker listens, which it does a few milliseconds after its start.
const LOOK: Duration = Duration::from_millis(1);
/// The longest answer to `CONNECT`: `OK ` and a number.
const MAX_WORD: usize = 32;

/// A running Firecracker.
#[derive(Debug)]
pub(crate) struct Firecracker {
    api: PathBuf,
    vsock: PathBuf,
    /// What it was told at its launch.
    requests: Vec<Request>,
    /// Whether the guest has taken a connection, and none of its ports has refused one since.
    up: Cell<bool>,
}

impl Firecracker {
    /// Waits until the process that was just started listens, and tells it all that it is to be. When this returns, the
    /// guest boots. It waits for ever where the process does not come to listen.
    pub(crate) async fn configure(dir: &Path, requests: Vec<Request>) -> Result<Self, ApiError> {
        let this = Self {
            api: dir.join(wire::API_SOCKET),
            vsock: dir.join(wire::VSOCK_SOCKET),
            requests,
            up: Cell::new(false),
        };
        while UnixStream::connect(&this.api).await.is_err() {
            sleep(LOOK).await;
        }
        for request in &this.requests {
            client::call(&this.api, request).await?;
        }
        Ok(this)
    }

    /// Sends `request`.
    pub(crate) async fn call(&self, request: Request) -> Result<Value, ApiError> {
        client::call(&self.api, &self.filled_in(request)).await
    }

    /// The request with the path that its drive was launched with where it asks for that.
    fn filled_in(&self, mut request: Request) -> Request {
        const FIELD: &str = "path_on_host";
        let path = |body: &Value| body.get(FIELD).cloned();
        let wants = request.method == Method::Patch
            && request.body.as_ref().and_then(path).is_some_and(|path| path == SAME_PATH);
        let launched = self.requests.iter().find(|r| r.method == Method::Put && r.path == request.path);
        let link = request.path.strip_prefix("/drives/").map(wire::disk_link).map(Value::String);
        if wants
            // One that goes on was not told of its disks: it has them by the links' names from the one that was saved.
            && let Some(path) = launched.and_then(|r| path(r.body.as_ref()?)).or(link)
            && let Some(field) = request.body.as_mut().and_then(|body| body.get_mut(FIELD))
        {
            *field = path;
        }
        request
    }

    /// Saves the guest, by way of files in the holder's directory, which is where Firecracker may write: it takes paths and no
    /// descriptors. It cannot be given up in the middle. Where this fails, the guest is as it was before.
    pub(crate) async fn save(
        &self,
        request: &SaveRequest,
        state: OwnedFd,
        memory: OwnedFd,
    ) -> Result<SaveReply, String> {
        let tell = async |request: Request| self.call(request).await.map_err(|err| client::chain(&err));
        let info = tell(Request::describe()).await?;
        let ran = match info.get("state").and_then(Value::as_str) {
            Some("Running") => true,
            Some("Paused") => false,
            other => return Err(format!("the guest is `{}`", other.unwrap_or("of an unknown state"))),
        };
        if ran {
            tell(Request::vm(VmState::Paused)).await?;
        }
        let spool = Spool::new(self.dir());
        let create = Request::save(&SnapshotCreate {
            snapshot_path: wire::STATE_SPOOL.into(),
            mem_file_path: wire::MEMORY_SPOOL.into(),
            snapshot_type: SnapshotType::Full,
        });
        let saved = match tokio::time::timeout(request.limit, tell(create)).await {
            Ok(Ok(_)) => spool.copy(state, memory).await,
            Ok(Err(why)) => Err(why),
            Err(_) => Err(format!("it is not done after {} s", request.limit.as_secs())),
        };
        let goes_on = match (&saved, request.what) {
            (Ok(()), Save::Whole { resume }) => resume,
            (Ok(()), Save::Devices) => false,
            (Err(_), _) => ran,
        };
        if goes_on {
            tell(Request::vm(VmState::Resumed)).await.map_err(|err| match &saved {
                Ok(()) => format!("the guest is saved, and does not go on: {err}"),
                Err(why) => format!("{why}; and the guest does not go on: {err}"),
            })?;
        }
        saved.map(|()| SaveReply { memory_written: true, ran })
    }

    fn dir(&self) -> &Path {
        self.api.parent().unwrap_or(Path::new("/"))
    }

    /// Whether the guest takes connections.
    pub(crate) fn is_up(&self) -> bool {
        self.up.get()
    }

    /// A stream to `port` of the guest, once the guest is there. A guest that is says at once when nobody listens on a port.
    pub(crate) async fn open(&self, port: u32) -> io::Result<UnixStream> {
        let mut pause = FIRST_PAUSE;
        loop {
            let tried = timeout(TRY, self.connect(port)).await;
            match tried.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => {
                    self.up.set(true);
                    return Ok(stream);
                }
                Err(err) if err.kind() == io::ErrorKind::ConnectionRefused && self.up.get() => {
                    return Err(err);
                }
                Err(_) => {
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE);
                }
            }
        }
    }

    /// <https://github.com/firecracker-microvm/firecracker/blob/main/docs/vsock.md>, "Host-Initiated Connections".
    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.vsock).await?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let mut word = Vec::new();
        loop {
            match stream.read_u8().await {
                Ok(b'\n') if word.starts_with(b"OK ") => return Ok(stream),
                Ok(byte) if word.len() < MAX_WORD && byte != b'\n' => word.push(byte),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "not an answer to CONNECT")),
                // It only hangs up where the guest refuses.
                Err(_) => {
                    let text = format!("nobody listens on port {port} of the guest");
                    return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
                }
            }
        }
    }
}

/// What Firecracker saves into; gone when this is.
struct Spool([PathBuf; 2]);

impl Spool {
    fn new(dir: &Path) -> Self {
        let spool = Self([dir.join(wire::STATE_SPOOL), dir.join(wire::MEMORY_SPOOL)]);
        spool.remove();
        spool
    }

    fn remove(&self) {
        for path in &self.0 {
            drop(fs_err::remove_file(path));
        }
    }

    /// Copies both, holes left out, and brings the copies to the disk.
    async fn copy(&self, state: OwnedFd, memory: OwnedFd) -> Result<(), String> {
        for (path, to) in self.0.clone().into_iter().zip([state, memory]) {
            let copied = tokio::task::spawn_blocking(move || {
                let to = fs_err::File::from_parts(to.into(), &path);
                snapshot::copy_sparse(&fs_err::File::open(&path)?, &to)?;
                to.sync_all()
            });
            let copied = copied.await.map_err(io::Error::other).flatten();
            copied.map_err(|err| format!("the saved guest does not get to the disk: {err}"))?;
        }
        Ok(())
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.remove();
    }
}
