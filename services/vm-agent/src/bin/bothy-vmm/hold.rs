//! The holder: starts the VMM, keeps what must not break, and writes down how it ended.

use crate::{
    firecracker::Firecracker,
    jail,
    link::Link,
    lock,
    log::Log,
    memory, migrate, os_error,
    qmp::Qmp,
    say,
    serve::{self, Vm},
    socket::HolderSocket,
};
use bothy_contract::{Code, Error, vm::ExitRecord};
use bothy_vm_agent::vmm::{
    firecracker::{api::Request, client},
    wire::{self, HolderHandle, LaunchSpec, Launched, MAX_LINE, MemoryFile, Monitor, Process, Running},
};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::Pid,
};
use std::{
    cell::{Cell, RefCell},
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, process::ExitStatusExt},
    },
    path::Path,
    process::{ExitCode, ExitStatus, Stdio},
    rc::Rc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::{UnixListener, unix::pipe},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};

/// How long the VMM may take from its start to its monitor's first answer.
const START: Duration = Duration::from_secs(10);
/// How much longer a Firecracker may take that maps a saved guest's memory.
const API_LOAD: Duration = Duration::from_secs(10);
/// How long the VMM may take to end in its own way when the holder is told to.
const GRACE: Duration = Duration::from_secs(2);
/// How long the last of the console may take to be read once the VMM has ended.
const DRAIN: Duration = Duration::from_secs(1);

/// Holds the VM specified on standard input; the first word on standard output says whether it runs.
pub(crate) fn run(lock: i32, state: Option<i32>) -> ExitCode {
    // Before anything else is opened or started.
    let lock = match lock::inherited(lock) {
        Ok(lock) => lock,
        Err(err) => return say(&Launched::Failed(os_error("cannot inherit the launch's lock")(err))),
    };
    let state = match state.map(lock::inherited).transpose() {
        Ok(state) => state,
        Err(err) => return say(&Launched::Failed(os_error("cannot inherit a saved guest")(err))),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(err) => return say(&Launched::Failed(os_error("cannot start the holder")(err))),
    };
    match tokio::task::LocalSet::new().block_on(&runtime, hold(lock, state)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Start(err)) => say(&Launched::Failed(err)),
        Err(Failed::Later(err)) => {
            drop(writeln!(std::io::stderr(), "bothy-vmm: {err}"));
            ExitCode::FAILURE
        }
    }
}

/// An error before or after the first word.
enum Failed {
    Start(Error),
    Later(Error),
}

impl From<Error> for Failed {
    fn from(err: Error) -> Self {
        Failed::Start(err)
    }
}

/// The way to the VMM, made before it is started.
enum Way {
    /// It connects to these, and nothing polls.
    Qemu { qmp: UnixListener, control: UnixListener, bulk: UnixListener },
    /// It listens itself, and is told these. What it logs and counts comes through pipes.
    Firecracker { requests: Vec<Request>, log: pipe::Receiver, metrics: pipe::Receiver },
}

/// A started VMM and the tasks that keep its output.
struct Vmm {
    child: Child,
    console: JoinHandle<()>,
    errors: JoinHandle<()>,
}

async fn hold(lock: OwnedFd, state: Option<OwnedFd>) -> Result<(), Failed> {
    // Out of the agent's session: a hang-up or interrupt meant for the agent does not come here.
    nix::unistd::setsid().map_err(|e| Error::internal("cannot begin a session", &e))?;
    memory::bound()?;
    let mut terminate = signal(SignalKind::terminate()).map_err(os_error("cannot wait for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(os_error("cannot wait for signals"))?;
    let spec = read_spec()?;
    let waiting = match spec.jail {
        None => None,
        // It stays root, and this process does not.
        Some(_) => {
            let process = spawn(&spec)?;
            jail::leave_root(&spec)?;
            Some(process)
        }
    };
    let socket = HolderSocket::listen(&spec.dir).map_err(os_error("cannot listen on the holder's socket"))?;
    let way = prepare(&spec)?;
    let (state, limit) = saved(&spec, state)?;
    let mut vmm = match waiting {
        None => keep_output(spawn(&spec)?, &spec)?,
        Some(mut process) => {
            let word = process.stdin.take().and_then(|stdin| stdin.into_owned_fd().ok());
            let word = word.ok_or_else(|| Error::new(Code::Internal, "cannot start the VMM: no pipe"))?;
            jail::release(word).map_err(os_error("cannot start the VMM"))?;
            keep_output(process, &spec)?
        }
    };
    let vmm_started = wire::monotonic_now()?;
    let link = tokio::select! {
        connected = tokio::time::timeout(limit, connect(way, &spec, state)) => match connected {
            Ok(Ok(link)) => link,
            Ok(Err(why)) => return Err(give_up(vmm, &spec, &why).await),
            Err(_) => return Err(give_up(vmm, &spec, "it did not answer in time").await),
        },
        _ = vmm.child.wait() => return Err(give_up(vmm, &spec, "it ended").await),
        _ = terminate.recv() => return Err(give_up(vmm, &spec, "the holder was told to end").await),
    };
    let (Some(handle), Some(child)) = (find(&vmm.child, &spec), vmm.child.id()) else {
        return Err(give_up(vmm, &spec, "it ended").await);
    };
    let vm = Rc::new(Vm {
        id: spec.vm,
        vmm_version: spec.vmm.clone(),
        handle,
        child,
        link,
        exit: RefCell::new(None),
        opened: Cell::new(0),
        memory_apart: matches!(spec.memory, Some(MemoryFile::Make { .. })),
        saving: Cell::new(false),
    });
    let serving = tokio::task::spawn_local(serve::serve(socket, vm.clone()));
    say(&Launched::Running(Running { handle, vmm_started }));
    // From here on whoever looks finds this holder.
    drop(lock);
    silence().map_err(Failed::Later)?;

    let status = tokio::select! {
        status = vmm.child.wait() => status,
        _ = terminate.recv() => end(&mut vmm.child).await,
        _ = interrupt.recv() => end(&mut vmm.child).await,
    };
    let status = status.map_err(|e| Failed::Later(os_error("cannot wait for the VMM")(e)))?;
    let record = record(status);
    *vm.exit.borrow_mut() = Some(record.clone());
    drain(vmm).await;
    let written = write_record(&spec.dir, &record);
    serving.abort();
    wire::remove_sockets(&spec.dir);
    written.map_err(|e| Failed::Later(os_error("cannot write down how the VMM ended")(e)))
}

fn read_spec() -> Result<LaunchSpec, Error> {
    let mut text = Vec::new();
    std::io::stdin()
        .take(MAX_LINE as u64)
        .read_to_end(&mut text)
        .map_err(os_error("cannot read the launch specification"))?;
    let spec: LaunchSpec = serde_json::from_slice(&text)
        .map_err(|e| Error::invalid(format!("standard input is not a launch specification: {e}")))?;
    spec.check()?;
    Ok(spec)
}

/// What a guest goes on from, as the VMM is told it.
struct State {
    file: OwnedFd,
    memory_apart: bool,
}

/// What the guest goes on from, if it does not boot, and how long all may take until it can be told to.
fn saved(spec: &LaunchSpec, file: Option<OwnedFd>) -> Result<(Option<State>, Duration), Error> {
    match (&spec.restore, file) {
        (None, _) => Ok((None, START)),
        // Firecracker opens it itself, and answers its request once it is loaded.
        (Some(_), None) if matches!(spec.monitor, Monitor::Api { .. }) => Ok((None, START + API_LOAD)),
        (Some(restore), Some(file)) => {
            let stat =
                rustix::fs::fstat(&file).map_err(|e| Error::internal("cannot look at a saved guest", &e))?;
            let limit = START + wire::load_limit(u64::try_from(stat.st_size).unwrap_or_default());
            Ok((Some(State { file, memory_apart: restore.memory_apart }), limit))
        }
        (Some(_), None) => Err(Error::invalid("a guest that goes on needs the state that it was saved in")),
    }
}

fn prepare(spec: &LaunchSpec) -> Result<Way, Error> {
    let bind = |name: &str| {
        let path = spec.dir.join(name);
        let listener =
            UnixListener::bind(&path).map_err(os_error(format!("cannot listen on {}", path.display())))?;
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
            .map_err(os_error("cannot set the mode of a socket"))?;
        Ok::<_, Error>(listener)
    };
    let pipe = |name: &str| {
        let path = spec.vmm_dir().join(name);
        let made = nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(std::io::Error::from);
        // Open for writing as well: so it never ends, whoever has it open beside.
        made.and_then(|()| pipe::OpenOptions::new().read_write(true).open_receiver(&path))
            .map_err(os_error(format!("cannot make the pipe {}", path.display())))
    };
    Ok(match &spec.monitor {
        Monitor::Qmp => Way::Qemu {
            qmp: bind(wire::QMP_SOCKET)?,
            control: bind(wire::CONTROL_SOCKET)?,
            bulk: bind(wire::BULK_SOCKET)?,
        },
        Monitor::Api { requests } => Way::Firecracker {
            requests: requests.clone(),
            log: pipe(wire::LOG_PIPE)?,
            metrics: pipe(wire::METRICS_PIPE)?,
        },
    })
}

/// Waits until the VMM is what it is to be; or says why it is not.
async fn connect(way: Way, spec: &LaunchSpec, state: Option<State>) -> Result<Link, String> {
    match way {
        Way::Qemu { qmp, control, bulk } => {
            let qmp = async { Qmp::negotiate(qmp.accept().await?.0).await };
            let connected = tokio::try_join!(qmp, control.accept(), bulk.accept());
            let (qmp, (control, _), (bulk, _)) =
                connected.map_err(|err: std::io::Error| format!("its sockets failed: {err}"))?;
            if let Some(state) = state {
                // Not before the ports are connected: a guest that goes on without them never answers.
                migrate::load(&qmp, state.file, state.memory_apart)
                    .await
                    .map_err(|why| format!("its load failed: {why}"))?;
            }
            Ok(Link::qemu(qmp, control, bulk))
        }
        Way::Firecracker { requests, log, metrics } => {
            let open = |name: &str| {
                Log::open(spec.dir.join(name)).map_err(|err| format!("cannot open a log: {err}"))
            };
            tokio::task::spawn_local(keep(log, open(wire::VMM_LOG)?));
            tokio::task::spawn_local(keep(metrics, open(wire::METRICS_LOG)?));
            let vmm = Firecracker::configure(&spec.vmm_dir(), requests).await;
            vmm.map(Link::Firecracker).map_err(|err| client::chain(&err))
        }
    }
}

/// Starts the VMM, or what becomes it once it is told to.
fn spawn(spec: &LaunchSpec) -> Result<Child, Error> {
    // Where Firecracker finds its disks by the same paths as any other.
    let place = if spec.disks.is_empty() { Path::new("/") } else { &spec.dir };
    let jailed = spec.jail.is_some();
    Command::new("/proc/self/exe")
        .current_dir(place)
        .arg("exec")
        .arg(format!("--parent={}", std::process::id()))
        .args(jailed.then_some("--wait"))
        .arg("--")
        .args(&spec.argv)
        .stdin(if jailed { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(os_error("cannot start the VMM"))
}

fn keep_output(mut child: Child, spec: &LaunchSpec) -> Result<Vmm, Error> {
    let log = |name: &str| Log::open(spec.dir.join(name)).map_err(os_error("cannot open a log"));
    let (console, errors) = (log(wire::CONSOLE_LOG)?, log(wire::VMM_LOG)?);
    let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new(Code::Internal, "cannot start the VMM: no pipes"));
    };
    Ok(Vmm {
        child,
        console: tokio::task::spawn_local(keep(out, console)),
        errors: tokio::task::spawn_local(keep(err, errors)),
    })
}

/// Copies what is written to `from` into `log`. A log that cannot be written does not stop the guest.
async fn keep(mut from: impl AsyncRead + Unpin, mut log: Log) {
    let mut buf = vec![0; 16 << 10];
    while let Ok(n) = from.read(&mut buf).await {
        if n == 0 {
            return;
        }
        drop(log.write(buf.get(..n).unwrap_or_default()));
    }
}

/// Both, as the host knows them.
fn find(child: &Child, spec: &LaunchSpec) -> Option<HolderHandle> {
    if spec.jail.is_some() {
        return Some(HolderHandle { holder: jail::this_process()?, vmm: jail::child()? });
    }
    Some(HolderHandle { holder: Process::find(std::process::id())?, vmm: Process::find(child.id()?)? })
}

/// Ends a VMM that did not come up, and says why with its own last words.
async fn give_up(mut vmm: Vmm, spec: &LaunchSpec, why: &str) -> Failed {
    drop(vmm.child.start_kill());
    let status = vmm.child.wait().await.map(|status| format!(" ({status})")).unwrap_or_default();
    drain(vmm).await;
    wire::remove_sockets(&spec.dir);
    let log = wire::read_untrusted(&spec.dir.join(wire::VMM_LOG), 2 << 20).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let said = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join("; ");
    let said = if said.is_empty() { "it said nothing".to_owned() } else { said };
    let (code, what) = match spec.restore {
        None => (Code::Internal, "the VMM did not start"),
        Some(_) => (Code::FailedPrecondition, "the saved guest does not go on"),
    };
    Failed::Start(Error::new(code, format!("{what}: {why}{status}: {said}")))
}

/// Ends the VMM: in its own way, so that it flushes its disks, or soon after by force.
async fn end(child: &mut Child) -> std::io::Result<ExitStatus> {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // Ended already: the wait below sees it.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if let Ok(status) = tokio::time::timeout(GRACE, child.wait()).await {
        return status;
    }
    child.start_kill()?;
    child.wait().await
}

/// Reads the last of its output; nothing else holds those pipes, but nothing here may wait for ever.
async fn drain(vmm: Vmm) {
    let rest = async { tokio::join!(vmm.console, vmm.errors) };
    drop(tokio::time::timeout(DRAIN, rest).await);
}

/// Nobody listens to standard output any more, and whoever waits for its end must not wait for ours.
fn silence() -> Result<(), Error> {
    let null = fs_err::OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .map_err(os_error("cannot let go of standard output"))?;
    nix::unistd::dup2_stdout(&null.into_parts().0)
        .map_err(|e| Error::internal("cannot let go of standard output", &e))
}

fn record(status: ExitStatus) -> ExitRecord {
    ExitRecord { at: jiff::Timestamp::now(), status: status.code(), signal: status.signal() }
}

/// Whole or not at all, and there after a crash of the host.
fn write_record(dir: &Path, record: &ExitRecord) -> std::io::Result<()> {
    let (path, beside) = (dir.join(wire::EXIT_RECORD), dir.join("exit.json.new"));
    let mut file = fs_err::File::create(&beside)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs_err::rename(&beside, &path)?;
    fs_err::File::open(dir)?.sync_all()
}
