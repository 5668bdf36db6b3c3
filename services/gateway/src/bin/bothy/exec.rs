//! Commands in a guest: gRPC end to end with its agent, through the gateway's channel. Also TCP ports of a guest.
//!
//! Nothing is ever buffered without bound: stdin is read by a thread that waits for the stream, output is written
//! before more is taken, and HTTP/2 windows do the rest.

use crate::{
    cli::Exec,
    http::Gateway,
    printer::Printer,
    terminal::{Raw, is_interactive, window},
};
use bothy_contract::{Code, Error, vm::VmRecord};
use bothy_guest_proto::{
    BULK_PORT, CHUNK, GuestClient,
    v1::{ExecInput, ExecStart, ForwardChunk, exec_input::Input, exec_output::Output},
};
use futures::stream::{PollNext, select_with_strategy};
use std::{
    io::{self, Read},
    time::Duration,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

/// How many pieces of input may wait; each is at most [`CHUNK`] bytes.
const QUEUE: usize = 4;
/// How many signals and changes of size may wait.
const CONTROLS: usize = 16;
/// How many signals that ask to end, with no word from the guest, end the wait for it.
const PATIENCE: u32 = 3;
/// The most that is kept of what a captured command says, in bytes.
const CAPTURED: usize = 16 << 10;
/// How long a guest may take to take a command; an emulated one under load is slow.
const OPEN: Duration = Duration::from_secs(120);

/// A command to run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Command {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) workdir: String,
    pub(crate) user: String,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
}

impl From<Exec> for Command {
    fn from(args: Exec) -> Self {
        let shell = args.command.is_empty();
        Self {
            tty: args.tty || (shell && is_interactive()),
            stdin: args.interactive || args.tty || shell,
            argv: args.command,
            env: args.env,
            workdir: args.workdir.unwrap_or_default(),
            user: args.user.unwrap_or_default(),
        }
    }
}

impl Command {
    /// What the guest is told of it, with no terminal.
    fn start(&self) -> ExecStart {
        ExecStart {
            argv: self.argv.clone(),
            env: self.env.iter().cloned().collect(),
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            ..ExecStart::default()
        }
    }

    /// The login shell of `user`, on a terminal where there is one.
    pub(crate) fn shell(user: String, workdir: Option<String>) -> Self {
        Self {
            user,
            workdir: workdir.unwrap_or_default(),
            tty: is_interactive(),
            stdin: true,
            ..Self::default()
        }
    }
}

/// A connection to the agent of the guest of `vm`, which is called `name`.
pub(crate) async fn connect(gateway: &Gateway, vm: &str, name: &str) -> Result<GuestClient, Error> {
    let stream = gateway.channel(vm, BULK_PORT).await?;
    bothy_guest_proto::client(stream).await.map_err(|e| {
        let mut error = Error::internal(format!("cannot speak with the guest of {name}"), &e);
        error.code = Code::Unavailable;
        error
    })
}

fn lost(vm: &str, status: &tonic::Status) -> Error {
    let code = match status.code() {
        tonic::Code::InvalidArgument => Code::InvalidArgument,
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::FailedPrecondition => Code::FailedPrecondition,
        tonic::Code::PermissionDenied => Code::PermissionDenied,
        tonic::Code::ResourceExhausted => Code::ResourceExhausted,
        _ => Code::Unavailable,
    };
    let mut error = Error::new(code, format!("the guest of {vm} broke off: {}", status.message()));
    error.retryable = false;
    error.hint(format!(
        "a command that was begun may still run; `bothy vm show {vm}` and `bothy vm logs {vm}` may say why"
    ))
}

/// Runs a short command of bothy's own in `vm`; gives its exit status and the beginning of what it said.
///
/// # Errors
/// It could not be run, or was not done within two minutes.
pub(crate) async fn capture(
    gateway: &Gateway,
    vm: &VmRecord,
    command: &Command,
) -> Result<(u8, String), Error> {
    let run = async {
        let mut client = connect(gateway, &vm.id.to_string(), vm.name.as_str()).await?;
        let vm = vm.name.as_str();
        let input = [message(Input::Start(command.start())), message(Input::StdinEof(true))];
        let opened = client.exec(futures::stream::iter(input)).await;
        let mut output = opened.map_err(|s| lost(vm, &s))?.into_inner();
        let mut said = Vec::new();
        loop {
            let next = output.message().await.map_err(|s| lost(vm, &s))?;
            match next.and_then(|next| next.output) {
                Some(Output::Stdout(data) | Output::Stderr(data)) => {
                    let room = CAPTURED.saturating_sub(said.len());
                    said.extend(data.into_iter().take(room));
                }
                Some(Output::Exited(end)) => {
                    let status = u8::try_from(end.status & 0xff).unwrap_or(u8::MAX);
                    return Ok((status, String::from_utf8_lossy(&said).into_owned()));
                }
                Some(Output::Failed(failed)) => {
                    let what = format!("cannot run {:?} in {vm}: {}", command.argv.first(), failed.message);
                    return Err(Error::new(Code::FailedPrecondition, what));
                }
                Some(Output::Started(_)) => {}
                None => return Err(lost(vm, &tonic::Status::unavailable("it gave no exit status"))),
            }
        }
    };
    tokio::time::timeout(OPEN, run).await.unwrap_or_else(|_| {
        let message = format!("the guest of {} was not done within {} s", vm.name, OPEN.as_secs());
        Err(Error::new(Code::DeadlineExceeded, message))
    })
}

/// Runs `command` in `vm` to its end, on this process' stdin, stdout and stderr. Returns its exit status, or what shells
/// return for a command that cannot be started: 127 where it was not found, 126 otherwise.
///
/// # Errors
/// When the command's fate is not known: the guest or its VM has gone, or the user stopped waiting.
pub(crate) async fn exec(
    gateway: &Gateway,
    printer: Printer,
    vm: &VmRecord,
    command: &Command,
) -> Result<u8, Error> {
    if command.tty && !is_interactive() {
        return Err(Error::invalid("stdin and stdout are not a terminal").hint("leave out `--tty`"));
    }
    let mut client = connect(gateway, &vm.id.to_string(), vm.name.as_str()).await?;
    let vm = vm.name.as_str();
    let start = ExecStart {
        image_defaults: true,
        tty: command.tty,
        window: if command.tty { window() } else { None },
        term: if command.tty { std::env::var("TERM").unwrap_or_default() } else { String::new() },
        ..command.start()
    };
    // What controls the command never waits behind stdin, which a command that does not read holds up.
    let (control, controls) = mpsc::channel(CONTROLS);
    let (stdin, pieces) = mpsc::channel(QUEUE);
    let queue =
        select_with_strategy(ReceiverStream::new(controls), ReceiverStream::new(pieces), |(): &mut ()| {
            PollNext::Left
        });
    // Neither can fail: the queue is empty and its other end is held here.
    let _ = control.send(message(Input::Start(start))).await;
    if !command.stdin {
        let _ = control.send(message(Input::StdinEof(true))).await;
    }
    // Signals are caught from before the command starts, so that none ends bothy and leaves the command behind.
    let mut signals = Signals::new()?;
    let raw = command.tty.then(Raw::enter).transpose()?;
    let mut output = tokio::select! {
        opened = tokio::time::timeout(OPEN, client.exec(queue)) => opened
            .map_err(|_| {
                let message = format!("the guest of {vm} did not take the command within {} s", OPEN.as_secs());
                Error::new(Code::DeadlineExceeded, message).hint(format!("`bothy vm logs {vm}` may say why"))
            })?
            .map_err(|s| lost(vm, &s))?
            .into_inner(),
        // The guest has not taken the command, so there is nothing yet that a signal could be passed on to.
        () = signals.asked_to_end() => return Err(left(vm)),
    };
    if command.stdin {
        read_stdin(move |piece| {
            let message = message(match piece {
                Some(data) => Input::Stdin(data),
                None => Input::StdinEof(true),
            });
            stdin.blocking_send(message).is_ok()
        })?;
    }
    let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
    let mut interrupts = 0;
    let status = loop {
        let said = tokio::select! {
            said = output.message() => said.map_err(|s| lost(vm, &s))?,
            number = signals.next() => {
                interrupts += u32::from(asks_to_end(number));
                if interrupts >= PATIENCE {
                    return Err(left(vm));
                }
                let sent = if number == SignalKind::window_change().as_raw_value() {
                    command.tty.then(window).flatten().map(Input::Resize)
                } else {
                    Some(Input::Signal(number))
                };
                if let Some(sent) = sent {
                    // A full queue means that the guest takes nothing; waiting for it would stop the output too.
                    let _ = control.try_send(message(sent));
                }
                continue;
            }
        };
        let Some(said) = said else {
            return Err(lost(vm, &tonic::Status::unavailable("it ended the stream without an exit status")));
        };
        match said.output {
            Some(Output::Stdout(data)) => {
                interrupts = 0;
                if let Some(status) = write(&mut out, &data).await? {
                    break status;
                }
            }
            Some(Output::Stderr(data)) => {
                interrupts = 0;
                if let Some(status) = write(&mut err, &data).await? {
                    break status;
                }
            }
            Some(Output::Exited(end)) => break u8::try_from(end.status & 0xff).unwrap_or(u8::MAX),
            Some(Output::Failed(failed)) => {
                drop(raw);
                let name = command.argv.first().map_or("the shell", String::as_str);
                printer.error(&Error::new(
                    if failed.errno == ENOENT { Code::NotFound } else { Code::FailedPrecondition },
                    format!("cannot run {name:?} in {vm}: {}", failed.message),
                ));
                return Ok(if failed.errno == ENOENT { 127 } else { 126 });
            }
            Some(Output::Started(_)) | None => {}
        }
    };
    drop(raw);
    Ok(status)
}

/// "No such file or directory" in the guest, which is Linux on the same architecture (errno(3)).
const ENOENT: i32 = 2;

/// Whether a signal asks a process to end.
fn asks_to_end(number: i32) -> bool {
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()]
        .iter()
        .any(|kind| kind.as_raw_value() == number)
}

/// The user does not wait for the guest any longer.
fn left(vm: &str) -> Error {
    Error::new(Code::Cancelled, "no longer waiting for the command, which may still run")
        .hint(format!("`bothy vm stop {vm}` ends it for sure"))
}

fn message(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

/// Writes `data`. A reader that has gone ends the command's run as it would end a process in a pipeline: status 141.
async fn write(out: &mut (impl AsyncWrite + Unpin), data: &[u8]) -> Result<Option<u8>, Error> {
    let done = async {
        out.write_all(data).await?;
        out.flush().await
    };
    match done.await {
        Ok(()) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Some(141)),
        Err(e) => Err(Error::internal("cannot write the command's output", &e)),
    }
}

/// Reads stdin on a thread of its own, which ends with the process if nothing more comes. `send` gets each piece, then
/// `None`, and says whether anybody wants more.
fn read_stdin(send: impl Fn(Option<Vec<u8>>) -> bool + Send + 'static) -> Result<(), Error> {
    let read = move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            match stdin.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    send(None);
                    return;
                }
                Ok(n) => {
                    if !send(Some(buffer.get(..n).unwrap_or_default().to_vec())) {
                        return;
                    }
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(read)
        .map(drop)
        .map_err(|e| Error::internal("cannot start a thread for stdin", &e))
}

/// The signals that belong to the guest's command while it runs.
struct Signals(mpsc::Receiver<i32>);

impl Signals {
    fn new() -> Result<Self, Error> {
        let (send, receive) = mpsc::channel(16);
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        for kind in kinds {
            let mut stream = signal(kind).map_err(|e| Error::internal("cannot catch signals", &e))?;
            let send = send.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if send.send(kind.as_raw_value()).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self(receive))
    }

    /// Returns once one of them asks to end.
    async fn asked_to_end(&mut self) {
        while !asks_to_end(self.next().await) {}
    }

    async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            // The tasks live as long as the runtime.
            None => std::future::pending().await,
        }
    }
}

/// Connects stdin and stdout to TCP port `port` of `vm`, until the guest closes the connection. The end of stdin is
/// passed on as a half-close.
pub(crate) async fn proxy(gateway: &Gateway, vm: &str, port: u16) -> Result<(), Error> {
    let mut client = connect(gateway, vm, vm).await?;
    let (input, queue) = mpsc::channel(QUEUE);
    // Cannot fail: the queue is empty and its other end is held here.
    let _ = input.send(ForwardChunk { port: port.into(), data: Vec::new() }).await;
    let mut output = client.forward(ReceiverStream::new(queue)).await.map_err(|s| lost(vm, &s))?.into_inner();
    read_stdin(move |piece| {
        piece.is_some_and(|data| input.blocking_send(ForwardChunk { port: 0, data }).is_ok())
    })?;
    let mut out = tokio::io::stdout();
    while let Some(chunk) = output.message().await.map_err(|s| lost(vm, &s))? {
        if write(&mut out, &chunk.data).await?.is_some() {
            break;
        }
    }
    Ok(())
}
