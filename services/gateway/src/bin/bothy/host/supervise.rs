//! One child process that is to run: started, its output kept, started again when it ends unasked, stopped on request.

use crate::printer::Printer;
use bothy_contract::{Code, Error};
use fs_err as fs;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

/// The pauses before a restart: they double from the first to the last, and begin anew after a quiet time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_secs(30);
/// How long a child may take to stop before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);
/// A log larger than this is set aside when its child is first started.
const MAX_LOG: u64 = 16 << 20;

/// What to run.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Its name, for people and for its log.
    pub(super) name: &'static str,
    /// The program.
    pub(super) path: PathBuf,
    pub(super) args: Vec<std::ffi::OsString>,
    /// The host's configuration, given in the environment.
    pub(super) config: PathBuf,
    /// The directory of logs.
    pub(super) logs: PathBuf,
}

impl Program {
    pub(super) fn log(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    fn spawn(&self) -> Result<Child, Error> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .map_err(|e| Error::internal("cannot open a log", &e))?
            .into_parts()
            .0;
        let stderr = log.try_clone().map_err(|e| Error::internal("cannot open a log", &e))?;
        // Not by its path: after an upgrade that names another program, or for a moment none, and a service that ends
        // then could not be started again.
        Command::new("/proc/self/exe")
            .arg0("bothy")
            .args(["host", "child", "--parent", &std::process::id().to_string(), "--"])
            .arg(&self.path)
            .args(&self.args)
            .env(bothy_config::PATH_VARIABLE, &self.config)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(stderr)
            // Ctrl-C is for `host up`, which stops its children in order.
            .process_group(0)
            .spawn()
            .map_err(|e| Error::internal(format!("cannot start {}", self.name), &e))
    }
}

/// A program under supervision.
#[derive(Debug)]
pub(super) struct Supervised {
    pub(super) program: Program,
    deaths: Arc<AtomicU32>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Supervised {
    /// Starts `program` and stays with it.
    ///
    /// # Errors
    /// When it cannot be started the first time.
    pub(super) fn start(printer: Printer, program: Program) -> Result<Self, Error> {
        if fs::metadata(program.log()).is_ok_and(|m| m.len() > MAX_LOG) {
            let old = program.logs.join(format!("{}.log.1", program.name));
            fs::rename(program.log(), old).map_err(|e| Error::internal("cannot set an old log aside", &e))?;
        }
        let child = program.spawn()?;
        let deaths = Arc::new(AtomicU32::new(0));
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(stay(printer, program.clone(), child, Arc::clone(&deaths), stopped));
        Ok(Self { program, deaths, stop, task })
    }

    /// How often it has ended unasked.
    pub(super) fn deaths(&self) -> u32 {
        self.deaths.load(Ordering::Relaxed)
    }

    /// The last lines of its log.
    pub(super) fn last_words(&self) -> String {
        let text = tail(&self.program.log()).unwrap_or_default();
        let lines: Vec<_> = text.lines().rev().take(5).collect();
        lines.into_iter().rev().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
    }

    /// Stops it and waits until it has.
    pub(super) async fn stop(self) {
        self.stop.send_replace(true);
        // The task has no way to fail but a panic, and then there is nothing to wait for.
        let _ = self.task.await;
    }
}

fn tail(path: &Path) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(8 << 10)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn how(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|e| format!("cannot be waited for: {e}"), |status| format!("ended ({status})"))
}

/// Ends once a stop is asked for. Who could ask being gone is a stop too.
async fn asked(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn stay(
    printer: Printer,
    program: Program,
    mut child: Child,
    deaths: Arc<AtomicU32>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = SystemTime::now();
        let status = tokio::select! {
            status = child.wait() => status,
            () = asked(&mut stopped) => return end(printer, &program, child).await,
        };
        deaths.fetch_add(1, Ordering::Relaxed);
        if begun.elapsed().is_ok_and(|ran| ran >= QUIET) {
            pause = FIRST_PAUSE;
        }
        printer.always(format!(
            "{} {}; starting it again in {} ms (its log: {})",
            program.name,
            how(status),
            pause.as_millis(),
            program.log().display()
        ));
        loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = asked(&mut stopped) => return,
            }
            pause = (pause * 2).min(LAST_PAUSE);
            match program.spawn() {
                Ok(new) => {
                    child = new;
                    break;
                }
                Err(e) => printer.error(&e),
            }
        }
    }
}

async fn end(printer: Printer, program: &Program, mut child: Child) {
    // The id is the child's as long as it has not been waited for.
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if timeout(PATIENCE, child.wait()).await.is_err() {
        printer.always(format!(
            "{} did not stop within {} s and is killed",
            program.name,
            PATIENCE.as_secs()
        ));
        if let Err(e) = child.kill().await {
            printer.error(&Error::new(Code::Internal, format!("cannot kill {}: {e}", program.name)));
        }
    }
}
