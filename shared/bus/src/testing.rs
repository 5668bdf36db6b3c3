//! A private nats-server for tests: the real program, with the real configuration, in a directory of its own.

use crate::setup;
use bothy_config::Config;
use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// The variable that names the program.
pub const SERVER_VARIABLE: &str = "BOTHY_NATS_SERVER";

/// A bus that lives as long as this value.
#[derive(Debug)]
pub struct TestBus {
    /// The configuration that clients connect with: `state_dir` and `run_dir` are below the private directory.
    pub config: Config,
    directory: Option<tempfile::TempDir>,
    server: Option<Child>,
}

impl TestBus {
    /// Starts a bus with every service's identity, and waits until it listens. The program is the one that
    /// `BOTHY_NATS_SERVER` names, else `target/tools/nats-server` of this workspace, else the one on `PATH`.
    ///
    /// # Panics
    /// Where it does not start: a test without its bus must fail.
    #[expect(clippy::expect_used, clippy::panic, reason = "for tests, which are to stop with the reason")]
    pub fn start() -> Self {
        let directory =
            tempfile::Builder::new().prefix("bothy-bus-").tempdir().expect("a temporary directory");
        let mut config = Config::new(directory.path().join("state"), directory.path().join("run"));
        config.bus.server = program();
        fs_err::create_dir_all(&config.run_dir).expect("a run directory");
        let mut bus = Self { config, directory: Some(directory), server: None };
        // Somebody else may take the port between our choice and the server's start: then take another.
        for _ in 0..5 {
            bus.config.bus.port = free_port();
            setup(&bus.config).expect("the bus' set-up");
            if bus.try_start() {
                return bus;
            }
        }
        let log = fs_err::read_to_string(bus.log()).unwrap_or_default();
        panic!("{} did not start:\n{log}", bus.config.bus.server.display());
    }

    /// Where the server's log is.
    pub fn log(&self) -> PathBuf {
        self.config.bus_dir().join("nats.log")
    }

    /// Kills the server, as a crash would.
    ///
    /// # Panics
    /// Where it is not running.
    #[expect(clippy::expect_used, reason = "for tests, which are to stop with the reason")]
    pub fn kill(&mut self) {
        let mut server = self.server.take().expect("a running server");
        server.kill().expect("the server is ours to kill");
        server.wait().expect("the server is our child");
    }

    /// Starts the server again, on the same port, with what it has on disk.
    ///
    /// # Panics
    /// Where it does not start.
    #[expect(clippy::panic, reason = "for tests, which are to stop with the reason")]
    pub fn restart(&mut self) {
        if self.server.is_some() {
            self.kill();
        }
        if !self.try_start() {
            let log = fs_err::read_to_string(self.log()).unwrap_or_default();
            panic!("the bus did not start again:\n{log}");
        }
    }

    /// Starts the server; whether it listens.
    #[expect(clippy::expect_used, reason = "for tests, which are to stop with the reason")]
    fn try_start(&mut self) -> bool {
        let log = fs_err::OpenOptions::new().create(true).append(true).open(self.log()).expect("a log file");
        let errors = log.file().try_clone().expect("a second handle of the log");
        let mut server = Command::new(&self.config.bus.server)
            .arg("-c")
            .arg(self.config.bus_dir().join("nats.conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.into_file()))
            .stderr(Stdio::from(errors))
            .spawn()
            .unwrap_or_else(|e| not_there(&self.config.bus.server, &e));
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && server.try_wait().is_ok_and(|ended| ended.is_none()) {
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.config.bus.port)).is_ok() {
                self.server = Some(server);
                return true;
            }
            sleep(Duration::from_millis(5));
        }
        let _ = server.kill();
        let _ = server.wait();
        false
    }
}

#[expect(clippy::panic, reason = "for tests, which are to stop with the reason")]
fn not_there(program: &Path, error: &std::io::Error) -> ! {
    panic!(
        "cannot run {}: {error}; `cargo xtask setup` installs nats-server, or name one with {SERVER_VARIABLE}",
        program.display()
    )
}

impl Drop for TestBus {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        if std::thread::panicking()
            && let Some(directory) = self.directory.take()
        {
            let kept = directory.keep();
            let _ = writeln!(std::io::stderr(), "the bus of the failed test is kept in {}", kept.display());
        }
    }
}

/// The server's program.
fn program() -> PathBuf {
    if let Some(named) = std::env::var_os(SERVER_VARIABLE) {
        return named.into();
    }
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/nats-server");
    if ours.is_file() { ours } else { "nats-server".into() }
}

#[expect(clippy::expect_used, reason = "for tests, which are to stop with the reason")]
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
