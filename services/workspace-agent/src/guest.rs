//! What this agent asks of a guest: run a script, take a tar stream, give a script's output as a stream, write small
//! files. [`Channel`] is the real one; tests run the very same scripts on the host.

use crate::script::{Finished, OUTPUT_MAX, Script};
use bothy_bus::Client;
use bothy_contract::{Code, Error, VmId, methods::VmChannelOpen, vm::OpenChannel};
use bothy_guest_proto::{
    GuestClient,
    v1::{
        ExecInput, ExecOutput, ExecStart, File, GetTarRequest, TarChunk, WriteFilesRequest,
        exec_input::Input, exec_output::Output,
    },
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tonic::Streaming;

/// How long a stream may stand still before it is given up.
pub const STALL: Duration = Duration::from_secs(60);

/// A guest, as the three jobs see it.
pub trait Guest: Sync {
    /// Runs a script to its end.
    fn run(&self, script: &Script, args: &[&str]) -> impl Future<Output = Result<Finished, Error>> + Send;

    /// Runs a script and sends what it prints to `out` as it comes; [`Finished::stdout`] stays empty.
    fn read(
        &self,
        script: &Script,
        args: &[&str],
        out: mpsc::Sender<Bytes>,
    ) -> impl Future<Output = Result<Finished, Error>> + Send;

    /// Unpacks a tar stream below `dir`. Ends with an error once the guest refuses.
    fn put_tar(
        &self,
        dir: &str,
        data: mpsc::Receiver<Bytes>,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Writes small files, each atomically.
    fn write_files(&self, files: Vec<File>) -> impl Future<Output = Result<(), Error>> + Send;

    /// Whether a file or directory is there.
    fn exists(&self, path: &str) -> impl Future<Output = Result<bool, Error>> + Send;
}

/// A guest over one stream to a port of its agent.
#[derive(Debug)]
pub struct Channel {
    vm: VmId,
    client: GuestClient,
}

impl Channel {
    /// Opens a stream to `port` of the guest of `vm`.
    ///
    /// # Errors
    /// Those of the vm-agent (no such VM, not running), and [`Code::Unavailable`] where the guest does not answer.
    pub async fn open(bus: &Client, vm: VmId, port: u32) -> Result<Self, Error> {
        let ticket = bus.call::<VmChannelOpen>(&OpenChannel { vm, port }).await?;
        let stream = bothy_tickets::connect(&ticket).await?;
        let client = timeout(STALL, bothy_guest_proto::client(stream))
            .await
            .map_err(|_| stalled("the guest's agent did not answer"))?
            .map_err(|e| Error::internal("cannot talk to the guest's agent", &e))?;
        Ok(Self { vm, client })
    }

    /// What a failed call means.
    fn failed(&self, what: &str, status: &tonic::Status) -> Error {
        use tonic::Code as C;
        let code = match status.code() {
            // What a call says when the stream below it has ended: the VM stopped, or its holder died.
            C::Unavailable | C::Unknown | C::Cancelled | C::Aborted => {
                return Error {
                    retryable: false,
                    ..Error::new(
                        Code::Unavailable,
                        format!("the guest went away during {what}: {}", status.message()),
                    )
                }
                .hint(format!("see whether it still runs: `bothy vm show {}`", self.vm));
            }
            C::InvalidArgument | C::OutOfRange => Code::InvalidArgument,
            C::NotFound => Code::NotFound,
            C::AlreadyExists => Code::AlreadyExists,
            C::FailedPrecondition => Code::FailedPrecondition,
            C::ResourceExhausted => Code::ResourceExhausted,
            C::DeadlineExceeded => Code::DeadlineExceeded,
            C::PermissionDenied | C::Unauthenticated => Code::PermissionDenied,
            _ => Code::Internal,
        };
        Error::new(code, format!("{what} failed in the guest: {}", status.message()))
    }

    /// Starts a script. The input side stays open as long as the call: its end would end the command.
    async fn start(&self, script: &Script, args: &[&str]) -> Result<Streaming<ExecOutput>, Error> {
        let argv = ["/bin/sh", "-c", script.text, script.name].into_iter().chain(args.iter().copied());
        let start = ExecStart {
            argv: argv.map(str::to_owned).collect(),
            workdir: "/".into(),
            ..ExecStart::default()
        };
        let first =
            [Input::Start(start), Input::StdinEof(true)].map(|input| ExecInput { input: Some(input) });
        let replies = self.client.clone().exec(stream::iter(first).chain(stream::pending())).await;
        replies.map(tonic::Response::into_inner).map_err(|s| self.failed(&format!("`{}`", script.name), &s))
    }

    async fn follow(
        &self,
        script: &Script,
        args: &[&str],
        out: Option<mpsc::Sender<Bytes>>,
    ) -> Result<Finished, Error> {
        let what = format!("`{}`", script.name);
        let mut replies = self.start(script, args).await?;
        let mut end = Finished::default();
        while let Some(reply) = replies.message().await.map_err(|s| self.failed(&what, &s))? {
            match reply.output {
                Some(Output::Stdout(data)) => {
                    if let Some(out) = &out {
                        if out.send(data.into()).await.is_err() {
                            // The receiver has its own reason to stop, and tells it.
                            return Ok(end);
                        }
                    } else {
                        keep(&mut end.stdout, &data);
                    }
                }
                Some(Output::Stderr(data)) => keep(&mut end.stderr, &data),
                Some(Output::Exited(exited)) => {
                    end.status = exited.status;
                    return Ok(end);
                }
                Some(Output::Failed(failed)) => {
                    return Err(Error::new(
                        Code::FailedPrecondition,
                        format!("the guest cannot run `sh`: {}", failed.message),
                    ));
                }
                Some(Output::Started(_)) | None => {}
            }
        }
        Err(Error::new(Code::Unavailable, format!("the guest went away during {what}")))
    }
}

/// Appends to bounded output.
fn keep(kept: &mut Vec<u8>, data: &[u8]) {
    let room = OUTPUT_MAX.saturating_sub(kept.len());
    kept.extend_from_slice(data.get(..room).unwrap_or(data));
}

/// The error of something that stood still.
pub(crate) fn stalled(what: &str) -> Error {
    Error::new(Code::DeadlineExceeded, format!("{what} for {} s", STALL.as_secs()))
}

async fn within<T>(script: &Script, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(script.limit, work).await.unwrap_or_else(|_| {
        let limit = script.limit.as_secs();
        Err(Error::new(
            Code::DeadlineExceeded,
            format!("`{}` in the guest took longer than {limit} s", script.name),
        ))
    })
}

impl Guest for Channel {
    async fn run(&self, script: &Script, args: &[&str]) -> Result<Finished, Error> {
        within(script, self.follow(script, args, None)).await
    }

    async fn read(
        &self,
        script: &Script,
        args: &[&str],
        out: mpsc::Sender<Bytes>,
    ) -> Result<Finished, Error> {
        within(script, self.follow(script, args, Some(out))).await
    }

    async fn put_tar(&self, dir: &str, data: mpsc::Receiver<Bytes>) -> Result<(), Error> {
        let first = stream::iter([TarChunk { dir: dir.to_owned(), data: Vec::new() }]);
        let rest = stream::unfold(data, async |mut data| {
            let chunk = data.recv().await?;
            Some((TarChunk { dir: String::new(), data: chunk.into() }, data))
        });
        let reply = self.client.clone().put_tar(first.chain(rest)).await;
        reply.map(drop).map_err(|s| self.failed("unpacking", &s))
    }

    async fn write_files(&self, files: Vec<File>) -> Result<(), Error> {
        let call =
            async { self.client.clone().write_files(WriteFilesRequest { files, below_home: false }).await };
        let reply = timeout(STALL, call).await.map_err(|_| stalled("the guest did not write files"))?;
        reply.map(drop).map_err(|s| self.failed("writing files", &s))
    }

    async fn exists(&self, path: &str) -> Result<bool, Error> {
        let call = async {
            let mut chunks =
                self.client.clone().get_tar(GetTarRequest { path: path.to_owned() }).await?.into_inner();
            chunks.message().await.map(|chunk| chunk.is_some())
        };
        match timeout(STALL, call).await.map_err(|_| stalled("the guest did not answer"))? {
            Ok(there) => Ok(there),
            Err(s) if s.code() == tonic::Code::NotFound => Ok(false),
            Err(s) => Err(self.failed("looking for a file", &s)),
        }
    }
}
