//! The holder of a Firecracker, without one: a stand-in takes the API's requests and speaks the vsock's protocol, as the real
//! one would, so that all is tested that is the holder's part. The real one is met in `conformance.rs`.
//!
//! The stand-in is this very program, started again by the holder for the one test that is no test. So is that for the jailer, which
//! does what the real one does to its process: its own mount namespace, root, device nodes, user.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod host;

use bothy_contract::VmId;
use bothy_vm_agent::vmm::{
    Accel, Driver, Firecracker, LaunchSpec, Memory, Origin, RunState, Save, SealedMemory, Snapshot, Verb,
    VmPlan,
    firecracker::{
        Version,
        api::{Action, Method, Request},
    },
    holder::Holder,
    liveness::rediscover,
    wire::{self, Monitor},
};
use host::{Host, LONG, UID, gone};
use http_body_util::{BodyExt, Full};
use hyper::{Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
    time::{sleep, timeout},
};

/// Names the directory to the stand-in.
const STAND_IN: &str = "BOTHY_TEST_STAND_IN";
/// What the stand-in was asked, one line each.
const ASKED: &str = "vmm.log.asked";

fn spec(host: &Host) -> LaunchSpec {
    let vm = VmId::new();
    spec_of(plan_of(host, vm))
}

fn plan_of(host: &Host, vm: VmId) -> VmPlan {
    let at = |name: &str| host.dir.path().join(name);
    VmPlan {
        vm,
        name: "stand-in".into(),
        dir: at(&vm.to_string()[24..]),
        kernel: at("vmlinux"),
        initrd: at("initrd"),
        rootfs: at("rootfs"),
        system: Some(at("system")),
        work: at("work"),
        cpus: 1,
        memory_mib: 128,
        memory: Memory::Own,
        from: Origin::Boot,
        tap: "tap".into(),
        mac: "52:54:00:00:00:02".into(),
        uid: UID,
        groups: vec![],
        accel: Accel::Kvm,
        tsc_khz: None,
    }
}

/// The stand-in is launched for that.
fn spec_of(plan: VmPlan) -> LaunchSpec {
    let mut spec = driver().launch_spec(&plan).unwrap();
    let me = std::env::current_exe().unwrap();
    let words = ["--ignored", "--exact", "the_stand_in", "--nocapture"];
    spec.argv = vec!["env".into(), format!("{STAND_IN}={}/", spec.dir.display()), me.display().to_string()];
    spec.argv.extend(words.map(str::to_owned));
    spec
}

fn driver() -> Firecracker {
    Firecracker::new("firecracker", Version::from_words("1.16.1").unwrap())
}

/// Not a test: what the holder starts in Firecracker's place. It runs until it is killed.
#[tokio::test]
#[ignore = "started by the other tests"]
async fn the_stand_in() {
    let Some(dir) = std::env::var_os(STAND_IN).map(PathBuf::from) else { return };
    // As long after its start as the real one is.
    sleep(Duration::from_millis(20)).await;
    let api = UnixListener::bind(dir.join(wire::API_SOCKET)).unwrap();
    loop {
        let (stream, _) = api.accept().await.unwrap();
        let dir = dir.clone();
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let dir = dir.clone();
            async move {
                let what = format!("{} {}", request.method(), request.uri());
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut asked =
                    fs_err::OpenOptions::new().create(true).append(true).open(dir.join(ASKED)).unwrap();
                writeln!(asked, "{what} {}", String::from_utf8_lossy(&body)).unwrap();
                let (status, answer) = match what.as_str() {
                    "GET /" => (200, r#"{"app_name":"x","id":"x","state":"Running","vmm_version":"1"}"#),
                    "PUT /drives/broken" => (400, r#"{"fault_message":"no such drive can be"}"#),
                    _ => (204, ""),
                };
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
                let path = |pointer| body.pointer(pointer).and_then(|path| path.as_str()).unwrap().to_owned();
                if what == "PUT /snapshot/create" {
                    fs_err::write(path("/snapshot_path"), "the state").unwrap();
                    fs_err::write(path("/mem_file_path"), vec![9; 1 << 20]).unwrap();
                }
                if what == "PUT /snapshot/load" {
                    // What it is given, and where its disks are, it says on its console.
                    let state = fs_err::read_to_string(path("/snapshot_path")).unwrap();
                    let memory = fs_err::read(path("/mem_backend/backend_path")).unwrap();
                    let disk = fs_err::read_to_string(wire::disk_link("work")).unwrap();
                    println!("goes on from {state}, {} of {:?}, {disk}", memory.len(), memory.first());
                }
                if what == "PUT /logger" {
                    fs_err::write(dir.join(wire::LOG_PIPE), "a word for the log\n").unwrap();
                }
                if what == "PUT /metrics" {
                    fs_err::write(dir.join(wire::METRICS_PIPE), "{\"counted\":1}\n").unwrap();
                }
                if what == "PUT /actions" && !dir.join(wire::VSOCK_SOCKET).exists() {
                    println!("a guest boots");
                    let vsock = UnixListener::bind(dir.join(wire::VSOCK_SOCKET)).unwrap();
                    tokio::spawn(guest(vsock));
                }
                Response::builder().status(status).body(Full::new(Bytes::from_static(answer.as_bytes())))
            }
        });
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move { drop(connection.await) });
    }
}

/// A guest's vsock: hangs up while the guest boots, then gives back what comes on ports 1 and 2, and has no others.
async fn guest(vsock: UnixListener) {
    for number in 0_u32.. {
        let (stream, _) = vsock.accept().await.unwrap();
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            let there = matches!(line.as_str(), "CONNECT 1\n" | "CONNECT 2\n");
            if number < 3 || !there {
                return;
            }
            stream.write_all(format!("OK {}\n", 1_073_741_824 + number).as_bytes()).await.unwrap();
            let (mut from, mut to) = tokio::io::split(stream);
            drop(tokio::io::copy(&mut from, &mut to).await);
            drop(to.shutdown().await);
        });
    }
}

/// The jailer's command line, for its stand-in.
const JAILER: &str = "BOTHY_TEST_JAILER";

/// Not a test: the jailer's stand-in. Unlike the real one it brings the libraries along that the other stand-in needs, which is
/// not linked statically.
#[test]
#[ignore = "started by another test"]
fn the_jailer() {
    use nix::{
        mount::{MntFlags, MsFlags, mount, umount2},
        sched::{CloneFlags, unshare},
        sys::stat::{Mode, SFlag, makedev, mknod},
    };
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};
    const NONE: Option<&str> = None;
    let Ok(line) = std::env::var(JAILER) else { return };
    let args: Vec<&str> = line.split(' ').collect();
    let of = |name: &str| args[args.iter().position(|arg| *arg == name).unwrap() + 1];
    let (uid, gid): (u32, u32) = (of("--uid").parse().unwrap(), of("--gid").parse().unwrap());
    let program = fs_err::canonicalize(of("--exec-file")).unwrap();
    let name = program.file_name().unwrap();
    let root = Path::new(of("--chroot-base-dir")).join(name).join(of("--id")).join("root");
    fs_err::create_dir_all(&root).unwrap();
    fs_err::copy(&program, root.join(name)).unwrap();
    let me = std::env::current_exe().unwrap();

    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE).unwrap();
    mount(Some(&root), &root, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).unwrap();
    std::env::set_current_dir(&root).unwrap();
    for libraries in ["usr", "lib", "lib64"] {
        let from = Path::new("/").join(libraries);
        if from.is_dir() {
            fs_err::create_dir(libraries).unwrap();
            mount(Some(&from), libraries, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).unwrap();
        }
    }
    fs_err::File::create("stand-in").unwrap();
    mount(Some(&me), "stand-in", NONE, MsFlags::MS_BIND, NONE).unwrap();
    fs_err::create_dir("old_root").unwrap();
    nix::unistd::pivot_root(".", "old_root").unwrap();
    std::env::set_current_dir("/").unwrap();
    umount2("old_root", MntFlags::MNT_DETACH).unwrap();
    fs_err::remove_dir("old_root").unwrap();
    for dir in ["/", "/dev", "/dev/net", "/run"] {
        fs_err::create_dir_all(dir).unwrap();
        fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(dir, Some(uid), Some(gid)).unwrap();
    }
    for (node, minor) in [("/dev/net/tun", 200), ("/dev/kvm", 232)] {
        mknod(node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(10, minor)).unwrap();
        std::os::unix::fs::chown(node, Some(uid), Some(gid)).unwrap();
    }
    assert_eq!(args[args.len() - 3..], ["--", "--api-sock", "/api.sock"]);
    let error = std::process::Command::new("/stand-in")
        // What it is told first, it knows no such option, and may take it for the name of another test.
        .arg0("--id")
        .args([of("--id"), "--ignored", "--exact", "the_stand_in", "--nocapture"])
        .env(STAND_IN, "/")
        .uid(uid)
        .gid(gid)
        .exec();
    panic!("cannot become the stand-in: {error}");
}

/// A driver whose Firecracker's jailer, and its program, say that they are of these versions.
async fn jailed(dir: &Path, firecracker: &str, jailer: &str) -> Result<Firecracker, bothy_contract::Error> {
    let me = std::env::current_exe().unwrap();
    let script = |name: &str, text: String| {
        let path = dir.join(name);
        fs_err::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs_err::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path
    };
    let program = script("firecracker", format!("echo 'Firecracker v{firecracker}'"));
    let jailer = script(
        "jailer",
        format!(
            "[ \"$1\" != --version ] || exec echo 'Jailer v{jailer}'\n\
             {JAILER}=\"$*\" exec {} --ignored --exact the_jailer --nocapture",
            me.display()
        ),
    );
    Firecracker::find(&program).await.unwrap().jailed(&jailer).await
}

#[tokio::test]
async fn a_jailed_firecracker_sees_its_own_files_only_and_dies_with_its_holder() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let e = jailed(host.dir.path(), "1.16.1", "1.15.0").await.unwrap_err();
    assert!(e.message.contains("is of release 1.15.0, and Firecracker of 1.16.1") && e.hint.is_some(), "{e}");
    let driver = jailed(host.dir.path(), "1.16.1", "1.16.1").await.unwrap();
    assert!(!driver.capabilities().snapshot);
    let vm = VmId::new();
    let mut plan = plan_of(&host, vm);
    plan.dir = host.dir.path().join(vm.to_string());
    for file in ["vmlinux", "initrd", "rootfs", "system", "work"] {
        fs_err::write(host.dir.path().join(file), file).unwrap();
    }
    std::os::unix::fs::chown(&plan.work, Some(UID), Some(UID)).unwrap();
    let spec = driver.launch_spec(&plan).unwrap();
    let (holder, handle) = host.launch(&spec).await;

    let status = holder.status().await.unwrap();
    let known = bothy_vm_agent::vmm::driver_of(&status.vmm_version).unwrap();
    assert!(!known.capabilities().snapshot, "{}", status.vmm_version);

    // Both are the VM's user, with no right beside, and by other numbers in a pid namespace of their own.
    for process in [handle.holder, handle.vmm] {
        let status = fs_err::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
        let field = |name: &str| -> Vec<&str> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_ascii_whitespace().collect()
        };
        let uid = UID.to_string();
        assert_eq!(field("Uid:"), [uid.as_str(); 4], "{status}");
        assert_eq!(field("Gid:"), [uid.as_str(); 4], "{status}");
        assert_eq!(
            (field("CapEff:"), field("CapPrm:")),
            (vec!["0000000000000000"], vec!["0000000000000000"])
        );
        assert!(field("Groups:").is_empty() && field("NSpid:").len() == 2, "{status}");
    }
    // The VMM's root has its files, devices of its own, and a boot set that not even root could write to.
    let root = PathBuf::from(format!("/proc/{}/root", handle.vmm.pid));
    for (there, here) in
        [("kernel", "vmlinux"), ("initrd", "initrd"), ("system.disk", "system"), ("work.disk", "work")]
    {
        assert_eq!(fs_err::read_to_string(root.join(there)).unwrap(), here);
    }
    for name in ["kernel", "initrd", "rootfs.disk"] {
        let e = fs_err::OpenOptions::new().write(true).open(root.join(name)).unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{name}");
    }
    fs_err::write(root.join("work.disk"), "written").unwrap();
    assert_eq!(fs_err::read_to_string(&plan.work).unwrap(), "written");
    assert!(fs_err::metadata(root.join("firecracker")).unwrap().is_file());
    for node in ["dev/kvm", "dev/net/tun"] {
        assert_eq!(fs_err::metadata(root.join(node)).unwrap().uid(), UID);
    }
    assert!(!root.join("etc").exists() && !root.join("proc").exists());
    // Nobody else sees any of it.
    assert_eq!(fs_err::read_dir(spec.dir.join("jail")).unwrap().count(), 0);

    let Monitor::Api { requests } = &spec.monitor else { panic!("no requests") };
    let asked = fs_err::read_to_string(root.join(ASKED)).unwrap();
    let expected: Vec<String> =
        requests.iter().map(|r| format!("{r} {}", r.body.as_ref().unwrap())).collect();
    assert_eq!(asked.lines().collect::<Vec<_>>(), expected);
    echoes(&holder, 1, 100_000).await;
    contains(&spec.dir.join(wire::VMM_LOG), "a word for the log").await;
    contains(&spec.dir.join(wire::METRICS_LOG), "counted").await;
    let state = holder.perform(&driver.run_state()).await.unwrap();
    assert_eq!(driver.read_run_state(&state), Some(RunState::Running));
    holder.perform(&driver.resize_disk("work", 1 << 30)).await.unwrap();
    let asked = fs_err::read_to_string(root.join(ASKED)).unwrap();
    assert!(asked.lines().last().unwrap().contains(r#""path_on_host":"work.disk""#), "{asked}");
    assert_eq!(rediscover(&holder).await.unwrap().unwrap().handle, handle);
    // By its processes too, where its holder is silent.
    handle.holder.signal(19).unwrap();
    fs_err::remove_file(spec.dir.join(wire::HOLDER_SOCKET)).unwrap();
    let found = rediscover(&holder).await.unwrap().unwrap();
    assert_eq!((found.handle, found.status), (handle, None));
    handle.holder.signal(18).unwrap();
    timeout(LONG, async {
        while holder.status().await.is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();

    // Told to end by its holder; and, in the same place again, left alone by one that is killed.
    holder.perform(&driver.quit()).await.unwrap();
    gone(handle).await;
    assert_eq!(holder.exit().unwrap().unwrap().signal, Some(15));
    let (_, handle) = host.launch(&spec).await;
    handle.holder.signal(9).unwrap();
    gone(handle).await;
    assert_eq!(fs_err::read_dir(spec.dir.join("jail")).unwrap().count(), 0);

    // What the jailer says against it is told.
    fs_err::write(host.dir.path().join("jailer"), "#!/bin/sh\necho Jailer error: no room >&2; exit 1\n")
        .unwrap();
    let e = Holder::launch(host::program(), &spec).await.unwrap_err();
    assert!(e.message.contains("it ended (exit status: 1)") && e.message.contains("no room"), "{e}");
    fs_err::remove_file(&plan.kernel).unwrap();
    let e = Holder::launch(host::program(), &spec).await.unwrap_err();
    assert!(e.message.contains("cannot make the jail") && e.hint.is_some(), "{e}");
    let mounts = fs_err::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(spec.dir.to_str().unwrap()), "{mounts}");
}

async fn contains(file: &Path, text: &str) {
    timeout(LONG, async {
        while !fs_err::read_to_string(file).unwrap_or_default().contains(text) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

async fn echoes(holder: &Holder, port: u32, bytes: usize) {
    let sent: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
    let mut back = Vec::new();
    let stream = timeout(LONG, holder.connect(port)).await.unwrap().unwrap();
    let (mut from, mut to) = stream.into_split();
    let send = async {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let receive = from.read_to_end(&mut back);
    let ((), read) = timeout(LONG, async { tokio::join!(send, receive) }).await.unwrap();
    read.unwrap();
    assert!(back == sent, "{} of {} bytes came back", back.len(), sent.len());
}

#[tokio::test]
async fn a_holder_configures_its_firecracker_and_leads_to_the_guest() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let spec = spec(&host);
    let (holder, handle) = host.launch(&spec).await;
    let Monitor::Api { requests } = &spec.monitor else { panic!("no requests") };
    let asked = fs_err::read_to_string(spec.dir.join(ASKED)).unwrap();
    let expected: Vec<String> =
        requests.iter().map(|r| format!("{r} {}", r.body.as_ref().unwrap())).collect();
    assert_eq!(asked.lines().collect::<Vec<_>>(), expected, "everything, once, in that order");

    let status = holder.status().await.unwrap();
    assert!(!status.control_up && !status.bulk_up);
    assert_eq!(status.vmm_version, "firecracker 1.16.1");
    // It hangs up three times before it is there, and that does not show.
    echoes(&holder, 1, 10).await;
    echoes(&holder, 2, 3_000_000).await;
    assert!(holder.status().await.unwrap().control_up);
    let e = timeout(LONG, holder.connect(99)).await.unwrap().unwrap_err();
    assert!(e.message.contains("nobody listens on port 99"), "{e}");

    // What it says goes where a QEMU's words go.
    contains(&spec.dir.join(wire::CONSOLE_LOG), "a guest boots").await;
    contains(&spec.dir.join(wire::VMM_LOG), "a word for the log").await;
    contains(&spec.dir.join(wire::METRICS_LOG), "counted").await;

    // Verbs, and a fault in Firecracker's own words.
    let driver = driver();
    let state = holder.perform(&driver.run_state()).await.unwrap();
    assert_eq!(driver.read_run_state(&state), Some(RunState::Running));
    holder.perform(&driver.pause()).await.unwrap();
    holder.perform(&driver.powerdown()).await.unwrap();
    holder.perform(&driver.resize_disk("work", 1 << 30)).await.unwrap();
    let asked = fs_err::read_to_string(spec.dir.join(ASKED)).unwrap();
    let patch = r#"PATCH /drives/work {"drive_id":"work","path_on_host":"work.disk"}"#;
    assert_eq!(asked.lines().last().unwrap(), patch, "with the path that it was launched with");
    let broken = Request { method: Method::Put, path: "/drives/broken".into(), body: None };
    let e = holder.perform(&Verb::Api(broken)).await.unwrap_err();
    assert!(e.message.contains("status 400: no such drive can be"), "{e}");
    let e = holder.qmp(&serde_json::json!({ "execute": "quit" })).await.unwrap_err();
    assert!(e.message.contains("no QMP monitor"), "{e}");

    // Found by its processes too: its command line names the directory.
    assert_eq!(rediscover(&holder).await.unwrap().unwrap().handle, handle);
    holder.perform(&driver.quit()).await.unwrap();
    gone(handle).await;
    assert_eq!(holder.exit().unwrap().unwrap().signal, Some(15));
    for left in
        [wire::API_SOCKET, wire::VSOCK_SOCKET, wire::LOG_PIPE, wire::METRICS_PIPE, wire::HOLDER_SOCKET]
    {
        assert!(!spec.dir.join(left).exists(), "{left}");
    }
    // And again in the same place.
    let (holder, handle) = host.launch(&spec).await;
    holder.kill(9).await.unwrap();
    gone(handle).await;
}

#[tokio::test]
async fn a_guest_is_saved_by_way_of_the_holders_directory_and_goes_on() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let boot = spec(&host);
    let (holder, handle) = host.launch(&boot).await;
    let store = host.dir.path().join("store");
    fs_err::create_dir(&store).unwrap();
    fs_err::set_permissions(&store, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let to = Snapshot { state: store.join("state"), memory: store.join("memory") };
    for (what, goes_on) in [(Save::Whole { resume: true }, true), (Save::Devices, false)] {
        let saved = holder.save(&to, what, 1).await.unwrap();
        assert_eq!((saved.state_bytes, saved.memory_bytes), (9, Some(1 << 20)));
        let asked = fs_err::read_to_string(boot.dir.join(ASKED)).unwrap();
        let last = if goes_on { r#"PATCH /vm {"state":"Resumed"}"# } else { "PUT /snapshot/create" };
        assert!(asked.lines().last().unwrap().starts_with(last), "{asked}");
        for file in [&to.state, &to.memory] {
            let meta = fs_err::metadata(file).unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600));
        }
    }
    assert!(!boot.dir.join(wire::STATE_SPOOL).exists() && !boot.dir.join(wire::MEMORY_SPOOL).exists());
    holder.perform(&driver().quit()).await.unwrap();
    gone(handle).await;

    // As another user, who gets to neither file by its path; and in the place of the first one, as that user.
    fs_err::write(host.dir.path().join("work"), "and its disk").unwrap();
    let sealed = SealedMemory::load(&to.memory).unwrap();
    let template = Snapshot { state: to.state.clone(), memory: sealed.path() };
    let first = boot.vm;
    for (from, vm, uid) in
        [(Origin::Template(template), VmId::new(), UID + 1), (Origin::Saved(to.clone()), first, UID)]
    {
        let spec = spec_of(VmPlan { from, uid, memory_mib: 1, ..plan_of(&host, vm) });
        let (holder, handle) = host.launch(&spec).await;
        let said = "goes on from the state, 1048576 of Some(9), and its disk";
        contains(&spec.dir.join(wire::CONSOLE_LOG), said).await;
        holder.perform(&driver().resize_disk("work", 1 << 30)).await.unwrap();
        let asked = fs_err::read_to_string(spec.dir.join(ASKED)).unwrap();
        assert!(asked.lines().last().unwrap().contains(r#""path_on_host":"work.disk""#), "{asked}");
        holder.perform(&driver().quit()).await.unwrap();
        gone(handle).await;
    }
}

#[tokio::test]
async fn a_firecracker_that_refuses_is_not_left_behind() {
    bothy_testkit::require_root!();
    let host = Host::new();
    let mut spec = spec(&host);
    let broken = Request { method: Method::Put, path: "/drives/broken".into(), body: None };
    spec.monitor = Monitor::Api { requests: vec![broken, Request::action(Action::InstanceStart)] };
    let e = Holder::launch(host::program(), &spec).await.unwrap_err();
    assert!(
        e.message.contains("PUT /drives/broken: Firecracker refused with status 400: no such drive can be"),
        "{e}"
    );
    let asked = fs_err::read_to_string(spec.dir.join(ASKED)).unwrap();
    assert_eq!(asked.lines().count(), 1, "nothing more is asked after a refusal: {asked}");
    assert_eq!(rediscover(&Holder::new(&spec.dir, UID)).await.unwrap(), None);
    assert!(!spec.dir.join(wire::API_SOCKET).exists());

    // One that ends before it listens is not waited for.
    spec.argv = vec!["sh".into(), "-c".into(), "echo no KVM here >&2; exit 3".into()];
    let e = Holder::launch(host::program(), &spec).await.unwrap_err();
    assert!(e.message.contains("it ended (exit status: 3)") && e.message.contains("no KVM here"), "{e}");
}
