//! `host up`: a configuration where there is none, the bus, the five services; then it stays with them.

use super::{
    owner,
    supervise::{Program, Supervised},
};
use crate::{Status, cli::HostUp, http::Gateway, printer::Printer};
use bothy_config::Config;
use bothy_contract::{Code, Error, Service};
use bothy_gateway::api::HostReport;
use fs_err as fs;
use std::{
    net::{Ipv4Addr, TcpListener},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

/// How long the services may take to answer.
const READY: Duration = Duration::from_secs(60);
/// How many unasked ends before that mean that it will not get better.
const HOPELESS: u32 = 4;

pub(crate) fn main(printer: Printer, args: HostUp) -> Result<Status, Error> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(
            Code::PermissionDenied,
            "`bothy host up` needs root: the net-agent makes a bridge, TAPs and nftables rules, the image-agent builds \
             images with their owners, and each VM runs as a user of its own",
        )
        .hint("do it as root; everything else, such as `bothy run`, works without"));
    }
    let state = make_dir(&args.state)?;
    let _lock = owner::take(&state)?;
    let (path, config) = configuration(printer, &state, &args)?;
    // Children are told to end with the thread that started them (prctl(2)), so that must be the main one.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::internal("cannot start the runtime", &e))?;
    runtime.block_on(run(printer, &path, &config))
}

fn make_dir(dir: &Path) -> Result<PathBuf, Error> {
    let failed = |e: std::io::Error| {
        Error::new(Code::FailedPrecondition, format!("cannot make {}: {e}", dir.display()))
    };
    let new = !dir.exists();
    fs::create_dir_all(dir).map_err(failed)?;
    if new {
        // VMMs, each a user of its own, must get through to what is made for them.
        fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
    }
    let dir = fs::canonicalize(dir).map_err(failed)?;
    let meta = fs::metadata(&dir).map_err(failed)?;
    ours(&dir, meta.uid(), meta.permissions().mode())?;
    Ok(dir)
}

/// Refuses a directory in which somebody else can put things: what is in it is believed, and programs that it names are
/// run as root.
fn ours(dir: &Path, uid: u32, mode: u32) -> Result<(), Error> {
    if uid == nix::unistd::geteuid().as_raw() && mode & 0o022 == 0 {
        return Ok(());
    }
    Err(Error::new(
        Code::FailedPrecondition,
        format!(
            "others than root may write to {}: its owner is {uid}, its mode {:o}",
            dir.display(),
            mode & 0o7777
        ),
    )
    .hint("name a directory that is not there yet, or one of root's own"))
}

/// The configuration in the state directory, written first where it is not there.
fn configuration(printer: Printer, state: &Path, args: &HostUp) -> Result<(PathBuf, Config), Error> {
    let path = state.join("bothy.toml");
    let config = if path.exists() {
        let config = Config::load(&path)?;
        // What is named again must be what is there: it would be passed over silently otherwise.
        if config.state_dir != state {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{} is for the state directory {}", path.display(), config.state_dir.display()),
            )
            .hint("correct `state_dir` in it, or remove it to have a new one written"));
        }
        if args.run_dir.as_ref().is_some_and(|dir| *dir != config.run_dir) {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{} has the run_dir {}", path.display(), config.run_dir.display()),
            )
            .hint("leave `--run-dir` out, or change it there"));
        }
        for (what, given, have) in [
            ("recipes", &args.recipes, &config.image.recipe_dir),
            ("guest", &args.guest, &config.image.guest_binary),
            ("bus server", &args.bus_server, &config.bus.server),
        ] {
            if given.as_ref().is_some_and(|given| absolute(given).is_ok_and(|given| given != *have)) {
                printer.always(format!(
                    "the {what} that {} names is used: {}",
                    path.display(),
                    have.display()
                ));
            }
        }
        config
    } else {
        let config = new_configuration(state, args)?;
        let text = config.to_toml()?;
        let temp = state.join(".bothy.toml.new");
        let failed = |e: std::io::Error| Error::internal("cannot write the configuration", &e);
        fs::write(&temp, text).map_err(failed)?;
        fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o644)).map_err(failed)?;
        fs::rename(&temp, &path).map_err(failed)?;
        printer.note(format!("wrote {}", path.display()));
        config
    };
    Ok((path, config))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error::invalid(format!("{} is not a path: {e}", path.display())))
}

fn new_configuration(state: &Path, args: &HostUp) -> Result<Config, Error> {
    let run_dir = absolute(args.run_dir.as_deref().unwrap_or(Path::new("/run/bothy")))?;
    let mut config = Config::new(state, run_dir);
    config.check()?;
    let port_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|l| l.local_addr());
    config.bus.port = port_free(config.bus.port)
        .or_else(|_| port_free(0))
        .map_err(|e| Error::internal("there is no free port for the bus", &e))?
        .port();
    if let Some(server) = &args.bus_server {
        config.bus.server = absolute(server)?;
    }
    config.image.recipe_dir = match &args.recipes {
        Some(dir) => absolute(dir)?,
        None => near(&["../share/bothy/images", "images"], "guest/images").unwrap_or(config.image.recipe_dir),
    };
    config.image.guest_binary = match &args.guest {
        Some(file) => absolute(file)?,
        None => near(
            &["bothy-guest", "../libexec/bothy/bothy-guest"],
            "target/x86_64-unknown-linux-gnu/guest/bothy-guest",
        )
        .unwrap_or(config.image.guest_binary),
    };
    Ok(config)
}

/// What is at one of `installed` below this program's directory, or, in a build tree, at `source` below its root.
fn near(installed: &[&str], source: &str) -> Option<PathBuf> {
    let me = std::env::current_exe().ok()?;
    let dir = me.parent()?;
    let built = dir.ancestors().find(|d| d.file_name().is_some_and(|n| n == "target")).and_then(Path::parent);
    // In a build tree the guest beside this program is not the static one.
    let source = built.map(|root| root.join(source));
    source
        .into_iter()
        .chain(installed.iter().map(|path| dir.join(path)))
        .find(|path| path.exists())
        .and_then(|path| fs::canonicalize(path).ok())
}

/// The program `name`: beside this one, else on PATH.
pub(crate) fn find_program(name: &Path) -> Option<PathBuf> {
    if name.is_absolute() {
        return name.is_file().then(|| name.to_owned());
    }
    let beside = std::env::current_exe().ok().and_then(|me| me.parent().map(|dir| dir.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|file| fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

fn program(
    config: &Config,
    path: &Path,
    name: &'static str,
    file: &Path,
    hint: &str,
) -> Result<Program, Error> {
    let found = find_program(file).ok_or_else(|| {
        Error::new(Code::FailedPrecondition, format!("cannot find the program {}", file.display())).hint(hint)
    })?;
    Ok(Program {
        name,
        path: found,
        args: Vec::new(),
        config: path.to_owned(),
        logs: config.state_dir.join("log"),
    })
}

async fn run(printer: Printer, path: &Path, config: &Config) -> Result<Status, Error> {
    let begun = Instant::now();
    if UnixStream::connect(config.gateway_socket()).is_ok() {
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("another host's gateway answers on {}", config.gateway_socket().display()),
        )
        .hint("give another `--run-dir`, or stop that host first"));
    }
    // All that can be missing is looked for before anything is started.
    let mut bus = program(
        config,
        path,
        "nats-server",
        &config.bus.server,
        "`cargo xtask setup` installs nats-server 2.12.6 or newer, or name it with `--bus-server`",
    )?;
    bus.args = vec!["-c".into(), config.bus_dir().join("nats.conf").into()];
    let order = [Service::Net, Service::Image, Service::Workspace, Service::Vm, Service::Gateway];
    let mut services = Vec::new();
    for service in order {
        let file = Path::new(service.binary());
        services.push(program(
            config,
            path,
            service.binary(),
            file,
            "it belongs beside `bothy`; `cargo build` makes all of them",
        )?);
    }
    make_dir(&config.run_dir)?;
    let logs = make_dir(&config.state_dir.join("log"))?;
    // They name everybody's machines, and repeat what guests say.
    fs::set_permissions(&logs, std::fs::Permissions::from_mode(0o700))
        .map_err(|e| Error::internal("cannot make the directory of logs private", &e))?;
    bothy_bus::setup(config)?;

    let failed = |e: std::io::Error| Error::internal("cannot watch for signals", &e);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hup = signal(SignalKind::hangup()).map_err(failed)?;
    let gateway = Gateway::new(config.gateway_socket());

    let mut running: Vec<Supervised> = Vec::new();
    let work = async {
        running.push(Supervised::start(printer, bus)?);
        // The bus first: a service that finds none waits, and says so in its log.
        wait_for_bus(config, &running).await?;
        for service in services {
            running.push(Supervised::start(printer, service)?);
        }
        wait_until_ready(&gateway, &running).await?;
        let value = serde_json::json!({
            "ready": true,
            "socket": config.gateway_socket(),
            "config": path,
            "pid": std::process::id(),
        });
        printer.record(&value, |_| {
            format!(
                "ready in {} ms: gateway on {}, logs in {}",
                begun.elapsed().as_millis(),
                config.gateway_socket().display(),
                config.state_dir.join("log").display()
            )
        })?;
        if !printer.json && config.run_dir != Path::new("/run/bothy") {
            printer.note(format!("use it with: export BOTHY_SOCKET={}", config.gateway_socket().display()));
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        std::future::pending::<Result<(), Error>>().await
    };
    let ended = tokio::select! {
        ended = work => ended,
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        _ = hup.recv() => Ok(()),
    };
    printer.note("stopping");
    let left = match gateway.get::<HostReport>("/v1/host").await {
        Ok(report) => report.vm.map_or(0, |vm| vm.running),
        Err(_) => 0,
    };
    // The other way round: who asks stops before who answers, the bus last.
    while let Some(child) = running.pop() {
        child.stop().await;
    }
    if left > 0 {
        printer.always(format!("{left} machine(s) go on running; the next `bothy host up` finds them again"));
    }
    printer.note("stopped");
    ended.map(|()| Status::SUCCESS)
}

fn hopeless(running: &[Supervised]) -> Result<(), Error> {
    match running.iter().find(|child| child.deaths() >= HOPELESS) {
        None => Ok(()),
        Some(child) => Err(Error::new(
            Code::Unavailable,
            format!("{} does not stay up; its last words:\n{}", child.program.name, child.last_words()),
        )
        .hint(format!("more of it is in {}", child.program.log().display()))),
    }
}

async fn wait_for_bus(config: &Config, running: &[Supervised]) -> Result<(), Error> {
    let end = Instant::now() + READY;
    loop {
        if tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, config.bus.port)).await.is_ok() {
            return Ok(());
        }
        hopeless(running)?;
        if Instant::now() >= end {
            return Err(Error::new(
                Code::Unavailable,
                format!("the bus does not listen on port {}", config.bus.port),
            )
            .hint(format!("its log is in {}", config.state_dir.join("log").display())));
        }
        sleep(Duration::from_millis(10)).await;
    }
}

async fn wait_until_ready(gateway: &Gateway, running: &[Supervised]) -> Result<(), Error> {
    let end = Instant::now() + READY;
    loop {
        let report =
            if gateway.socket().exists() { gateway.get::<HostReport>("/v1/host").await.ok() } else { None };
        if report.as_ref().is_some_and(HostReport::all_up) {
            return Ok(());
        }
        hopeless(running)?;
        if Instant::now() >= end {
            let missing = match &report {
                Some(report) => {
                    let down: Vec<_> = report.services.iter().filter(|s| !s.up).collect();
                    down.iter()
                        .map(|s| {
                            let why = s.error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default();
                            format!("{}{why}", s.service.binary())
                        })
                        .collect::<Vec<_>>()
                        .join(", ")
                }
                None => Service::Gateway.binary().to_owned(),
            };
            let words: Vec<_> = running
                .iter()
                .filter(|child| missing.contains(child.program.name))
                .map(|child| format!("\n  {}:\n{}", child.program.name, child.last_words()))
                .collect();
            return Err(Error::new(
                Code::DeadlineExceeded,
                format!("after {} s there is no answer from {missing}{}", READY.as_secs(), words.concat()),
            ));
        }
        sleep(Duration::from_millis(30)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let me = nix::unistd::geteuid().as_raw();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert_eq!(make_dir(&path).unwrap(), path);
        for mode in [0o777, 0o1777, 0o775] {
            fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let refused = make_dir(&path).unwrap_err();
            assert!(refused.message.contains("may write to"), "{mode:o}: {refused}");
        }
        for (uid, mode, good) in [(me, 0o40711, true), (me, 0o40700, true), (me + 1, 0o40700, false)] {
            assert_eq!(ours(&path, uid, mode).is_ok(), good, "{uid} {mode:o}");
        }
    }
}
