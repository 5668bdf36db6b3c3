//! Commands on behalf of the host.
//!
//! ```text
//!  host --stdin, eof, resize, signal--> input task --queue--> stdin writer --> command
//!  host <--4 messages of at most 64 KiB in flight-- pumps (stdout, stderr | terminal) <-- command
//! ```
//! A host that reads slowly stops the pumps and so, in the end, the command; nothing is dropped. When the command has
//! exited, what is in its pipes is still delivered before `exited`. A background child that keeps a pipe open does
//! not hold that up: after the exit a pump reads at most what a pipe can hold, and waits at most [`QUIET`] for more.
//! When the host goes away, the command's process group gets SIGHUP, and once the command has ended or [`HANGUP_GRACE`] is
//! over, SIGKILL: whoever is left of the group goes too. On a terminal the same holds for the job in the foreground.

mod spawn;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bothy_guest_proto::CHUNK;
use bothy_guest_proto::v1::{
    Defaults, ExecExited, ExecInput, ExecOutput, ExecStart, ExecStarted, WindowSize,
};
use bothy_guest_proto::v1::{exec_input::Input, exec_output::Output};
use futures::{Stream, StreamExt};
use nix::libc;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use crate::pty::Master;
use crate::sys;
use spawn::Spawned;

/// How long a pipe that a background child keeps open may be silent, after the command has exited.
const QUIET: Duration = Duration::from_millis(100);
/// The most that is read after the exit: more than a pipe (64 KiB unless the command changed it, at most 1 MiB) holds.
const LEFTOVER: usize = 1 << 20;
/// Between SIGHUP and SIGKILL for a command whose host is gone.
const HANGUP_GRACE: Duration = Duration::from_secs(2);
/// Between two looks whether such a command has ended.
const HANGUP_POLL: Duration = Duration::from_millis(20);
/// What end of file is on a terminal: VEOF, control-D.
const END_OF_TYPING: &[u8] = &[4];

/// Where the answers go.
pub(crate) type Replies = mpsc::Sender<Result<ExecOutput, Status>>;

/// Runs one command to its end, with `defaults` where its start says nothing.
pub(crate) async fn run<S>(start: ExecStart, defaults: Defaults, input: S, replies: Replies)
where
    S: Stream<Item = Result<ExecInput, Status>> + Send + Unpin + 'static,
{
    let spawned = match spawn::spawn(&start, &defaults) {
        Ok(spawned) => spawned,
        Err(failed) => {
            let _ = replies.send(Ok(message(Output::Failed(failed)))).await;
            return;
        }
    };
    let Spawned { mut child, terminal } = spawned;
    let group = Group::new(&child, terminal.clone());
    let _ = replies.send(Ok(message(Output::Started(ExecStarted { pid: group.pid.cast_unsigned() })))).await;

    let (exited, on_exit) = watch::channel(false);
    let mut pumps = Vec::new();
    let (to_stdin, queue) = mpsc::channel(4);
    if let Some(master) = &terminal {
        let source = Source::Terminal(master.clone());
        pumps.push(tokio::spawn(pump(source, Output::Stdout, replies.clone(), on_exit)));
        tokio::spawn(feed_terminal(master.clone(), queue));
    } else {
        if let Some(stdout) = child.stdout.take() {
            pumps.push(tokio::spawn(pump(
                Source::pipe(stdout),
                Output::Stdout,
                replies.clone(),
                on_exit.clone(),
            )));
        }
        if let Some(stderr) = child.stderr.take() {
            pumps.push(tokio::spawn(pump(Source::pipe(stderr), Output::Stderr, replies.clone(), on_exit)));
        }
        if let Some(stdin) = child.stdin.take() {
            tokio::spawn(feed(stdin, queue));
        }
    }
    let listener = tokio::spawn(listen(input, to_stdin, terminal, group.clone()));

    let status = wait(&mut child, &group, &replies).await;
    exited.send_replace(true);
    for pump in pumps {
        let _ = pump.await;
    }
    listener.abort();
    let last = match status {
        Ok(status) => Ok(message(Output::Exited(status))),
        Err(error) => Err(Status::internal(format!("wait for the command: {error}"))),
    };
    let _ = replies.send(last).await;
}

fn message(output: Output) -> ExecOutput {
    ExecOutput { output: Some(output) }
}

/// Waits for the command, and ends it when the host is gone.
async fn wait(child: &mut Child, group: &Group, replies: &Replies) -> io::Result<ExecExited> {
    let status = tokio::select! {
        status = child.wait() => status,
        () = replies.closed() => {
            group.hang_up().await;
            child.wait().await
        }
    };
    group.gone.store(true, Ordering::Relaxed);
    let status = status?;
    let signal = std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0);
    Ok(ExecExited { status: status.code().unwrap_or(128 + signal), signal })
}

/// The command's process group, until its leader is reaped: after that the number may be somebody else's.
#[derive(Debug, Clone)]
struct Group {
    pid: i32,
    gone: Arc<AtomicBool>,
    terminal: Option<Master>,
}

impl Group {
    fn new(child: &Child, terminal: Option<Master>) -> Self {
        let pid = child.id().map_or(0, u32::cast_signed);
        Self { pid, gone: Arc::new(AtomicBool::new(pid <= 1)), terminal }
    }

    /// Sends a signal; nobody there to get it is fine.
    fn signal(&self, signal: i32) {
        if !self.gone.load(Ordering::Relaxed) {
            let _ = sys::kill(-self.pid, signal);
        }
    }

    /// The job in the foreground of the terminal, where that is not the command itself: a shell gives each its own group.
    fn foreground(&self) -> Option<i32> {
        let job = self.terminal.as_ref()?.foreground()?;
        (job > 1 && job != self.pid && !self.gone.load(Ordering::Relaxed)).then_some(job)
    }

    /// Sends a signal to whom the terminal's keys would send it; without a terminal, to the command's group.
    fn signal_foreground(&self, signal: i32) {
        match self.foreground() {
            Some(job) => {
                let _ = sys::kill(-job, signal);
            }
            None => self.signal(signal),
        }
    }

    /// Whether the command has ended. It is left to be reaped, so that its number stays its own.
    fn ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(Pid::from_raw(self.pid)), flags), Ok(WaitStatus::StillAlive))
    }

    /// Ends the command and all of its group.
    async fn hang_up(&self) {
        let job = self.foreground();
        // A stopped command would not see the first without the second.
        for signal in [libc::SIGHUP, libc::SIGCONT] {
            self.signal(signal);
            job.map(|job| sys::kill(-job, signal));
        }
        let until = tokio::time::Instant::now() + HANGUP_GRACE;
        while !self.ended() && tokio::time::Instant::now() < until {
            tokio::time::sleep(HANGUP_POLL).await;
        }
        // Those that end by the first signal have a moment more than the command had.
        tokio::time::sleep(QUIET).await;
        self.signal(libc::SIGKILL);
        job.map(|job| sys::kill(-job, libc::SIGKILL));
    }
}

/// Reads the host's messages until it closes its half. Standard input goes through a short queue, so that signals
/// and resizes are not held up by a command that does not read (until the queue is full).
async fn listen<S>(mut input: S, to_stdin: mpsc::Sender<Vec<u8>>, terminal: Option<Master>, group: Group)
where
    S: Stream<Item = Result<ExecInput, Status>> + Unpin,
{
    let mut to_stdin = Some(to_stdin);
    while let Some(Ok(message)) = input.next().await {
        match message.input {
            Some(Input::Stdin(data)) => {
                if let Some(queue) = &to_stdin {
                    // Refused when the command has closed its standard input: its right.
                    let _ = queue.send(data).await;
                }
            }
            Some(Input::StdinEof(true)) => to_stdin = None,
            Some(Input::Resize(size)) => {
                if let Some(terminal) = &terminal {
                    let (rows, cols) = window(Some(size));
                    let _ = terminal.resize(rows, cols);
                }
            }
            Some(Input::Signal(signal)) if (1..=64).contains(&signal) => group.signal_foreground(signal),
            Some(Input::Signal(_) | Input::StdinEof(false) | Input::Start(_)) | None => {}
        }
    }
}

/// Rows and columns, with a plain terminal's where the host does not know.
fn window(size: Option<WindowSize>) -> (u16, u16) {
    let size = size.unwrap_or_default();
    let or = |value: u32, default| u16::try_from(value).ok().filter(|value| *value > 0).unwrap_or(default);
    (or(size.rows, 24), or(size.cols, 80))
}

async fn feed(mut stdin: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(data) = queue.recv().await {
        if stdin.write_all(&data).await.is_err() {
            return;
        }
    }
}

async fn feed_terminal(master: Master, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(data) = queue.recv().await {
        if master.write_all(&data).await.is_err() {
            return;
        }
    }
    let _ = master.write_all(END_OF_TYPING).await;
}

/// Where a pump reads.
enum Source {
    Pipe(Box<dyn AsyncRead + Send + Unpin>),
    Terminal(Master),
}

impl Source {
    fn pipe(pipe: impl AsyncRead + Send + Unpin + 'static) -> Self {
        Self::Pipe(Box::new(pipe))
    }

    async fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(into).await,
            Self::Terminal(master) => master.read(into).await,
        }
    }
}

/// Moves output to the host until its end, or until the command has exited and [`LEFTOVER`] or [`QUIET`] is used up.
async fn pump(
    mut source: Source,
    wrap: fn(Vec<u8>) -> Output,
    replies: Replies,
    mut on_exit: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; CHUNK];
    let mut leftover = LEFTOVER;
    loop {
        let over = *on_exit.borrow_and_update();
        let read = if over {
            match tokio::time::timeout(QUIET, source.read(&mut buffer)).await {
                Ok(read) => read,
                Err(_) => return,
            }
        } else {
            tokio::select! {
                read = source.read(&mut buffer) => read,
                _ = on_exit.changed() => continue,
            }
        };
        let Ok(count @ 1..) = read else { return };
        let data = buffer.get(..count).unwrap_or_default().to_vec();
        if replies.send(Ok(message(wrap(data)))).await.is_err() {
            return;
        }
        if over {
            leftover = leftover.saturating_sub(count);
            if leftover == 0 {
                return;
            }
        }
    }
}
