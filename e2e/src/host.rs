//! One private host: `bothy host up` in a namespace of its own, and commands run on it as a user would.

use crate::{
    images,
    leak::{Census, Kind, Scope, Thing},
    ran::Ran,
    resumed::{self, Warmed},
};
use bothy_config::Config;
use bothy_contract::Service;
use bothy_testkit::{ChildGuard, Netns, TempDir, binary, temp_dir};
use nix::sys::signal::Signal;
use std::{
    ffi::{OsStr, OsString},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a host may take to come up or go down before the test fails. Generous: two cores may be booting guests.
const PATIENCE: Duration = Duration::from_secs(90);

/// The image whose VMs are ready as soon as their guest has its identity.
pub const QUICK: &str = "quick";

/// A host of bothy with a network namespace and directories of its own. Everything goes when it is dropped; a test
/// that cares how it goes calls [`Host::finish`].
#[derive(Debug)]
pub struct Host {
    /// Where everything is.
    pub config: Config,
    up: Option<ChildGuard>,
    netns: Netns,
    fresh: Mutex<Census>,
    /// Where machines are to be resumed rather than booted.
    warmed: Option<Warmed>,
    environment: Vec<(String, String)>,
    /// Where its programs are, if not where cargo puts them.
    programs: Option<PathBuf>,
    /// Last, so that it is removed after the processes that work in it are gone.
    dir: TempDir,
}

impl Host {
    /// A host with the default image in its store, up and ready.
    pub fn start() -> Self {
        Self::start_with(&[], |_| {})
    }

    /// The same, with `environment` for all its processes and `change` applied to its configuration.
    pub fn start_with(environment: &[(&str, &str)], change: impl FnOnce(&mut Config)) -> Self {
        Self::start_inside(Netns::new(), environment, change)
    }

    /// The same with an image [`QUICK`] beside the default one: nothing in it is waited for, so a VM is ready as soon as its
    /// guest has its identity. For tests of what happens to VMs, not in them.
    pub fn start_quick(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with(&[], |config| {
            images::variant_into(config, QUICK, |manifest| manifest["wait"] = serde_json::json!([]));
            change(config);
        })
    }

    /// The same inside a namespace that the test has made, with what it put there.
    pub fn start_inside(
        netns: Netns,
        environment: &[(&str, &str)],
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let image = images::default_image();
        Self::start_in(netns, environment, false, |config| {
            images::link_into(&image, config);
            change(config);
        })
    }

    /// A host with the default image whose programs are copies of its own, to be replaced by the test.
    pub fn start_installed() -> Self {
        let image = images::default_image();
        Self::start_in(Netns::new(), &[], true, |config| images::link_into(&image, config))
    }

    /// A host without any image.
    pub fn start_bare(environment: &[(&str, &str)], change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(Netns::new(), environment, false, change)
    }

    fn start_in(
        netns: Netns,
        environment: &[(&str, &str)],
        install: bool,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let dir = temp_dir();
        let programs = install.then(|| {
            let programs = dir.path().join("bin");
            fs_err::create_dir(&programs).expect("a directory of programs");
            let services = Service::ALL.iter().map(|s| s.binary());
            for name in services.chain(["bothy", "bothy-vmm"]) {
                fs_err::copy(binary(name), programs.join(name)).expect("a copy of a program");
            }
            programs
        });
        let mut config = configure(dir.path(), &netns);
        change(&mut config);
        // A test that keeps templates of its own says how many.
        let warmed = (resumed::wanted() && config.template.max == 0).then(Warmed::default);
        if warmed.is_some() {
            config.template.max = resumed::TEMPLATES;
        }
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let fresh = Mutex::default();
        let mut host = Self { config, up: None, netns, fresh, warmed, environment, programs, dir };
        host.up();
        host.take_for_granted();
        host
    }

    /// Starts `bothy host up` and waits until the host answers.
    ///
    /// # Panics
    /// If it does not within a minute and a half, with the logs.
    pub fn up(&mut self) {
        let toml = self.config.to_toml().expect("a configuration");
        fs_err::create_dir_all(&self.config.state_dir).expect("the state directory");
        fs_err::write(self.config.state_dir.join("bothy.toml"), toml).expect("bothy.toml");
        let mut command = self.command("bothy");
        command.args(["host", "up", "--state"]).arg(&self.config.state_dir);
        let log = fs_err::File::create(self.dir.path().join("host-up.log")).expect("a log").into_parts().0;
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a handle")).stderr(log);
        let child = self.netns.spawn(&mut command).expect("`bothy host up`");
        let mut up = ChildGuard::new(child);
        let deadline = Instant::now() + PATIENCE;
        while self.bothy(["host", "status"]).status != 0 {
            if !up.is_running() || Instant::now() > deadline {
                panic!("the host did not come up\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.up = Some(up);
    }

    /// Takes the host down as a user would, with `args` for what becomes of its VMs; [`Host::up`] brings it back.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn down(&mut self, args: &[&str]) {
        let down = self.bothy(["host", "down"].iter().chain(args));
        assert_eq!(down.status, 0, "`host down` failed\n{down:#?}\n{}", self.logs());
        drop(self.up.take());
    }

    /// The file of program `name`.
    pub fn program(&self, name: &str) -> PathBuf {
        match &self.programs {
            Some(dir) => dir.join(name),
            None => binary(name),
        }
    }

    /// A command inside the namespace, set up to reach this host.
    pub fn command(&self, binary_name: &str) -> Command {
        let mut command = Command::new(self.program(binary_name));
        self.equip(&mut command);
        command
    }

    /// Sets what makes `command` reach this host, as a user of its own.
    fn equip(&self, command: &mut Command) {
        command
            // It would go before the configuration, and lead to a host of whoever runs the tests.
            .env_remove("BOTHY_SOCKET")
            .env("BOTHY_CONFIG", self.config.state_dir.join("bothy.toml"))
            .env("XDG_DATA_HOME", self.dir.path().join("home/data"))
            .env("XDG_STATE_HOME", self.dir.path().join("home/state"))
            .env("XDG_CONFIG_HOME", self.user_config())
            .env("PATH", images::path_with_tools())
            .envs(self.environment.iter().map(|(k, v)| (k, v)));
    }

    /// Where the configuration of the user is who runs `bothy`.
    pub fn user_config(&self) -> PathBuf {
        self.dir.path().join("home/config")
    }

    /// Starts `command` inside the host's namespace.
    pub fn spawn(&self, command: &mut Command) -> ChildGuard {
        ChildGuard::new(self.netns.spawn(command).expect("a child in the namespace"))
    }

    /// Runs `bothy` with `args` to its end.
    pub fn bothy<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        self.bothy_in(self.dir.path(), args)
    }

    /// Runs `bothy` with `args` in directory `cwd`.
    pub fn bothy_in<S: AsRef<OsStr>>(&self, cwd: &Path, args: impl IntoIterator<Item = S>) -> Ran {
        let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let Some(warmed) = &self.warmed else { return self.just_bothy(cwd, &args) };
        let warm = warmed.before(&args, |shape| {
            let before = self.census();
            let made =
                self.just_bothy(cwd, ["image", "warm"].map(OsString::from).iter().chain(shape)).status == 0;
            self.fresh.lock().unwrap_or_else(PoisonError::into_inner).add(self.census().since(&before));
            made
        });
        let ran = self.just_bothy(cwd, &args);
        // A `run` may go on in a machine that it has made before.
        if warm && ran.status == 0 && args.first().is_some_and(|arg| arg == "vm") {
            warmed.created();
        }
        ran
    }

    fn just_bothy<S: AsRef<OsStr>>(&self, cwd: &Path, args: impl IntoIterator<Item = S>) -> Ran {
        let mut command = self.command("bothy");
        command
            .args(args)
            .current_dir(cwd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = self.netns.spawn(&mut command).expect("bothy");
        Ran::new(child.wait_with_output().expect("its output"))
    }

    /// Runs `bothy` with `args` in `cwd`, its output straight to this process' own. Returns the exit status.
    pub fn bothy_live<S: AsRef<OsStr>>(&self, cwd: &Path, args: impl IntoIterator<Item = S>) -> i32 {
        let mut command = self.command("bothy");
        command.args(args).current_dir(cwd).stdin(Stdio::null());
        let mut child = self.netns.spawn(&mut command).expect("bothy");
        child.wait().expect("its end").code().unwrap_or(-1)
    }

    /// Creates a VM called `name` and returns its record.
    #[track_caller]
    pub fn create(&self, name: &str) -> serde_json::Value {
        self.bothy(["vm", "create", "--name", name, "--json"]).json();
        self.show(name)
    }

    /// Creates a VM called `name` from the image [`QUICK`], with `more` arguments.
    #[track_caller]
    pub fn create_quick(&self, name: &str, more: &[&str]) -> serde_json::Value {
        let args = ["vm", "create", "--image", QUICK, "--name", name, "--json"];
        self.bothy(args.iter().chain(more)).json();
        self.show(name)
    }

    /// Makes a template of the default image with the arguments `shape`: machines of that shape are resumed from then on, not
    /// booted. The host must make templates; this one stays, and is taken for granted.
    ///
    /// # Panics
    /// If it cannot be made.
    #[track_caller]
    pub fn warm(&mut self, shape: &[&str]) {
        self.bothy(["image", "warm"].iter().chain(shape)).ok();
        self.take_for_granted();
    }

    /// How many machines of this host were resumed from a template.
    pub fn resumed(&self) -> u64 {
        let templates = self.bothy(["image", "templates", "--json"]).json();
        templates.as_array().into_iter().flatten().filter_map(|template| template["uses"].as_u64()).sum()
    }

    /// The boot id of VM `name`, as the guest says it.
    #[track_caller]
    pub fn boot_id(&self, name: &str) -> String {
        self.sh(name, "cat /proc/sys/kernel/random/boot_id").ok().stdout.trim().to_owned()
    }

    /// Asks `good` about VM `name` until it says yes, for up to a minute and a half; the VM then.
    ///
    /// # Panics
    /// With the VM and the logs, if it does not.
    #[track_caller]
    pub fn await_vm(
        &self,
        name: &str,
        what: &str,
        good: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.bothy(["vm", "show", name, "--json"]);
            if shown.status == 0 {
                let vm = self.show(name);
                if good(&vm) {
                    return vm;
                }
            }
            assert!(Instant::now() < deadline, "{what}: {shown:#?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The record of VM `name`.
    #[track_caller]
    pub fn show(&self, name: &str) -> serde_json::Value {
        match self.bothy(["vm", "show", name, "--json"]).json() {
            serde_json::Value::Array(mut one) if one.len() == 1 => one.remove(0),
            record => record,
        }
    }

    /// Runs a shell line in VM `name`.
    pub fn sh(&self, name: &str, line: &str) -> Ran {
        self.bothy(["vm", "exec", name, "--", "sh", "-c", line])
    }

    /// Runs a bash line inside the host's namespace, as a process of the host; `bothy` in it reaches this host.
    pub fn run_bash(&self, line: &str) -> Ran {
        let mut command = Command::new("bash");
        self.equip(&mut command);
        command.args(["-c", line]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.netns.spawn(&mut command).expect("bash");
        Ran::new(child.wait_with_output().expect("its output"))
    }

    /// Runs `future` inside the host's namespace: processes that it starts are on this host's network.
    pub fn block_on<F: Future<Output: Send> + Send>(&self, future: F) -> F::Output {
        self.netns.block_on(future)
    }

    /// A directory for the test's own files, gone with the host.
    pub fn scratch(&self) -> PathBuf {
        let dir = self.dir.path().join("scratch");
        fs_err::create_dir_all(&dir).expect("a scratch directory");
        dir
    }

    /// The process ids of all processes of this host.
    pub fn pids(&self) -> Vec<i32> {
        let processes = Census::of_processes(&self.scope()).expect("a census").of(&[Kind::Process]);
        processes.iter().filter_map(|p| p.what.split(' ').next()?.parse().ok()).collect()
    }

    /// The process ids of a service of this host.
    pub fn pids_of(&self, program: &str) -> Vec<i32> {
        let processes = Census::of_processes(&self.scope()).expect("a census").of(&[Kind::Process]);
        processes
            .iter()
            .filter_map(|p| {
                let (pid, command_line) = p.what.split_once(' ')?;
                let argv0 = command_line.split(' ').next()?;
                (Path::new(argv0).file_name()? == program).then(|| pid.parse().ok())?
            })
            .collect()
    }

    /// The process ids of the holder and the VMM of VM `name`, found by the VMM's command line and its parent, so that
    /// they are known whatever bothy knows.
    pub fn vmm_of(&self, name: &str) -> Option<(i32, i32)> {
        let mark = format!(" -name bothy-{name},");
        let processes = Census::of_processes(&self.scope()).expect("a census").of(&[Kind::Process]);
        let vmm = processes.iter().find(|p| p.what.contains(&mark))?;
        let vmm: i32 = vmm.what.split(' ').next()?.parse().ok()?;
        let status = fs_err::read_to_string(format!("/proc/{vmm}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        Some((parent.trim().parse().ok()?, vmm))
    }

    /// Kills a service with SIGKILL; `host up` starts it again.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill_service(&self, service: Service) -> i32 {
        let pid = *self.pids_of(service.binary()).first().expect("the service runs");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).expect("to kill it");
        pid
    }

    /// Everything of this host that is there now.
    pub fn census(&self) -> Census {
        Census::take(&self.scope()).expect("a census")
    }

    /// What this host may touch.
    pub fn scope(&self) -> Scope {
        Scope {
            netns: netns_path(&self.netns),
            state_dir: self.config.state_dir.clone(),
            run_dir: self.config.run_dir.clone(),
            tap_prefix: self.config.net.tap_prefix.clone(),
        }
    }

    /// What is there now and was not when the host had just come up. The warm pool may differ, and so may processes
    /// that a restart replaced; what is counted is what a VM or an operation can leave.
    pub fn leaks(&self) -> Vec<Thing> {
        let of_host = ["nats-server", "bothy host up"];
        let services: Vec<&str> = Service::ALL.iter().map(|s| s.binary()).chain(of_host).collect();
        let fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        self.census()
            .since(&fresh)
            .into_iter()
            .filter(|t| !t.what.ends_with("(free)"))
            .filter(|t| !(t.kind == Kind::Process && services.iter().any(|s| t.what.contains(s))))
            .collect()
    }

    /// Waits until nothing is left of VMs and operations, for at most `patience`: background work such as refilling the
    /// pool may take a moment. What is left then.
    pub fn left_after(&self, patience: Duration) -> Vec<Thing> {
        self.left_beside(&[], patience)
    }

    /// The same, but for what has one of `marks` in its words: another VM's.
    pub fn left_beside(&self, marks: &[String], patience: Duration) -> Vec<Thing> {
        let deadline = Instant::now() + patience;
        let theirs = |thing: &Thing| marks.iter().any(|mark| thing.what.contains(mark.as_str()));
        loop {
            let leaks: Vec<Thing> = self.leaks().into_iter().filter(|thing| !theirs(thing)).collect();
            if leaks.is_empty() || Instant::now() > deadline {
                return leaks;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Takes what is there now for what a fresh host has, so that it is not told again.
    pub fn take_for_granted(&mut self) {
        self.fresh = Mutex::new(self.census());
    }

    /// Waits until nothing is left of VMs and operations.
    ///
    /// # Panics
    /// With what is left and the logs, after ten seconds.
    #[track_caller]
    pub fn assert_no_leaks(&self) {
        let leaks = self.left_after(Duration::from_secs(10));
        if !leaks.is_empty() {
            let list: Vec<String> = leaks.iter().map(ToString::to_string).collect();
            panic!("left behind:\n{}\n{}", list.join("\n"), self.logs());
        }
    }

    /// Takes the host down as a user would and checks that nothing at all is left but files in its state directory.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn finish(mut self) {
        self.assert_no_leaks();
        if let Some(creates) = self.warmed.as_ref().map(Warmed::creates) {
            assert!(self.resumed() >= creates, "of {creates} machines only {} were resumed", self.resumed());
        }
        self.down(&[]);
        let kinds = [
            Kind::Process,
            Kind::Tap,
            Kind::Link,
            Kind::Nftables,
            Kind::Mount,
            Kind::LoopDevice,
            Kind::Socket,
            Kind::Cgroup,
        ];
        let left: Vec<String> = self.census().of(&kinds).iter().map(ToString::to_string).collect();
        assert!(left.is_empty(), "left after `host down`:\n{}\n{}", left.join("\n"), self.logs());
    }

    /// Every log of this host, the ends of long ones.
    pub fn logs(&self) -> String {
        let mut out = String::new();
        let mut show = |path: &Path| {
            let text =
                fs_err::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n");
            out.push_str(&format!("---- {}\n{tail}\n", path.display()));
        };
        show(&self.dir.path().join("host-up.log"));
        for entry in fs_err::read_dir(self.config.state_dir.join("log")).into_iter().flatten().flatten() {
            show(&entry.path());
        }
        out
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The ordinary way first, so that even a failed test leaves no VM; what is left in the namespace is killed.
        if self.up.is_some() {
            let _ = self.bothy(["host", "down", "--stop-vms"]);
        }
        drop(self.up.take());
        let left = Census::take(&self.scope()).unwrap_or_default();
        for process in left.of(&[Kind::Process]) {
            if let Some(pid) = process.what.split(' ').next().and_then(|p| p.parse().ok()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

fn netns_path(netns: &Netns) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), netns.fd().as_raw_fd()).into()
}

/// The configuration of a private host below `dir`.
fn configure(dir: &Path, netns: &Netns) -> Config {
    let mut config = Config::new(dir.join("state"), dir.join("run"));
    config.bus.port = netns.run(bothy_testkit::free_port);
    images::configure(&mut config);
    config
}
