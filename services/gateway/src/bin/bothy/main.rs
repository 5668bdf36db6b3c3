//! `bothy`, the command line. `cli` is what one can type; each command is a module; `http` speaks with the gateway,
//! `exec` with guests; all output goes through `printer`.
//!
//! Exit status: the command's own for `run` and `vm exec` (126 and 127 as shells do), 125 when bothy itself failed or does
//! not understand what was typed, 130 when the user cancelled.

mod bootstrap;
mod catalogue;
mod cli;
mod dirs;
mod doctor;
mod exec;
mod file_sync;
mod host;
mod http;
mod image;
mod intake;
mod interrupt;
mod kernel;
mod op;
mod plain;
mod printer;
mod progress;
mod pull;
mod registry_auth;
mod run;
mod ssh;
mod ssh_agent;
mod template;
mod terminal;
mod vm;
mod workspace;

use crate::{cli::Command, http::Gateway, printer::Printer};
use bothy_contract::{Code, Error};
use bothy_gateway::api;
use clap::{CommandFactory, Parser};
use std::{path::PathBuf, process::ExitCode};
use tracing::Instrument;

/// The exit status where bothy itself failed, as docker(1) and env(1) have it.
const FAILED: u8 = 125;
/// The exit status where the user cancelled: what a shell says of a process that SIGINT ended.
const CANCELLED: u8 = 130;

/// What every command has.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) gateway: Gateway,
    pub(crate) printer: Printer,
}

/// An exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u8);

impl Status {
    pub(crate) const SUCCESS: Self = Self(0);
    /// A check found something: no error of bothy's, but no success.
    pub(crate) const FOUND: Self = Self(1);
}

fn main() -> ExitCode {
    let args = match cli::Cli::try_parse() {
        Ok(args) => args,
        Err(said) => {
            // Help and version come this way, too. A mistyped `bothy run` must not look like the command's own status 2.
            let _ = said.print();
            return if said.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS };
        }
    };
    let printer = Printer { json: args.json, quiet: args.quiet };
    match start(args, printer) {
        Ok(Status(status)) => ExitCode::from(status),
        Err(error) => {
            printer.error(&error);
            ExitCode::from(if error.code == Code::Cancelled { CANCELLED } else { FAILED })
        }
    }
}

/// Does what needs no runtime, and starts one for the rest.
fn start(args: cli::Cli, printer: Printer) -> Result<Status, Error> {
    match args.command {
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut cli::Cli::command(), "bothy", &mut text);
            printer.line(String::from_utf8_lossy(&text).trim_end());
            return Ok(Status::SUCCESS);
        }
        Command::Host(cli::Host::Child { parent, argv }) => return host::child::main(parent, &argv),
        Command::Host(cli::Host::BusSetup { config }) => return host::bus_setup(printer, &config),
        Command::Host(cli::Host::Up(args)) => return host::up::main(printer, args),
        _ => {}
    }
    let context = Context { gateway: Gateway::new(socket(args.socket)?), printer };
    // Telemetry costs a subscriber, and logs of a command line are its own output: only where a trace goes somewhere.
    let traced = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let telemetry = traced.then(|| bothy_telemetry::init("bothy"));
    // What moves bulk does so while it waits for the terminal, and traces are sent beside. All else asks and prints, and
    // is done before a second thread would have started.
    let mut runtime = if traced || moves_bulk(&args.command) {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2);
        runtime
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime =
        runtime.enable_all().build().map_err(|e| Error::internal("cannot start the runtime", &e))?;
    let span = tracing::info_span!("bothy.command", otel.kind = "client", command = name(&args.command));
    let done = runtime.block_on(dispatch(&context, args.command).instrument(span));
    // A thread may wait for stdin for ever.
    runtime.shutdown_background();
    if let Some(telemetry) = telemetry {
        telemetry.shutdown();
    }
    done
}

fn moves_bulk(command: &Command) -> bool {
    use cli::Vm::{Exec, Logs, Proxy, Shell};
    matches!(
        command,
        Command::Run(_)
            | Command::Workspace(_)
            | Command::Image(cli::Image::Intake(_))
            | Command::Vm(Exec(_) | Shell { .. } | Proxy { .. } | Logs { .. })
    )
}

fn name(command: &Command) -> &'static str {
    match command {
        Command::Run(_) => "run",
        Command::Vm(_) => "vm",
        Command::Workspace(_) => "workspace",
        Command::Image(_) => "image",
        Command::Kernel(_) => "kernel",
        Command::Op(_) => "op",
        Command::Host(_) => "host",
        Command::Doctor => "doctor",
        Command::Version => "version",
        Command::Completions { .. } => "completions",
    }
}

async fn dispatch(context: &Context, command: Command) -> Result<Status, Error> {
    match command {
        Command::Run(args) => run::main(context, args).await,
        Command::Vm(command) => vm::main(context, command).await,
        Command::Workspace(command) => workspace::main(context, command).await,
        Command::Image(command) => image::main(context, command).await,
        Command::Kernel(command) => kernel::main(context, command).await,
        Command::Op(command) => op::main(context, command).await,
        Command::Host(cli::Host::Down(args)) => host::down::main(context, args).await,
        Command::Host(_) => host::status(context).await,
        Command::Doctor => doctor::main(context).await,
        Command::Version | Command::Completions { .. } => version(context).await,
    }
}

async fn version(context: &Context) -> Result<Status, Error> {
    let cli = env!("CARGO_PKG_VERSION");
    let gateway: Option<api::Version> =
        if context.gateway.socket().exists() { context.gateway.get("/v1/version").await.ok() } else { None };
    let value = serde_json::json!({ "bothy": cli, "gateway": gateway.as_ref().map(|g| &g.version) });
    context.printer.record(&value, |_| match &gateway {
        Some(gateway) => format!("bothy {cli}, gateway {}", gateway.version),
        None => format!("bothy {cli}, no gateway on {}", context.gateway.socket().display()),
    })?;
    Ok(Status::SUCCESS)
}

/// Where the gateway is: `--socket` or BOTHY_SOCKET, else what BOTHY_CONFIG says, else the usual place.
fn socket(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(socket) = given {
        return Ok(socket);
    }
    match std::env::var_os(bothy_config::PATH_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => Ok(bothy_config::Config::load(path.as_ref())?.gateway_socket()),
        None => Ok("/run/bothy/gateway.sock".into()),
    }
}
