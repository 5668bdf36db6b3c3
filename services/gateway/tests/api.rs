//! The real gateway and the real command line on a real nats-server. The services behind them are made here, small and
//! on the real bus: these tests are about routing, about who may do what, and about streams that break. What the real
//! services answer is tested end to end elsewhere.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test stops with the line that failed"
)]

use bothy_bus::{Client, Server, testing::TestBus};
use bothy_contract::{
    Code, Error, ImageName, OpId, Service, VmId,
    methods::{
        ImageOpShow, VmChannelOpen, VmCreate, VmDelete, VmKill, VmListAll, VmLogOpen, VmOpCancel, VmOpShow,
        VmPortsList, VmRestart, VmSet, VmShow, VmStatsShow, VmStop, WorkspaceExportOpen, WorkspaceImportOpen,
    },
    op::{Begun, OpEvent, OpEventKind, OpRecord, OpRef, OpState},
    usage::{GuestPort, PortList, VmStats, VmStatsList},
    vm::{Shape, VmList, VmRecord, VmState},
    workspace::{ExportReport, ImportReport},
};
use bothy_tickets::{Frame, FrameReader, FrameWriter, Tickets};
use serde_json::Value;
use std::{
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

const ALICE: u32 = 61_001;
const BOB: u32 = 61_002;
const PATCH: &[u8] = b"diff --git a/new b/new\nnew file mode 100644\nindex 0000000000000000000000000000000000000000..257cc5642cb1a054f08cc83f2d943e56fd3ebe99\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+foo\n";

fn vm(name: &str, owner: u32) -> VmRecord {
    let name = name.parse().unwrap();
    VmRecord {
        state: VmState::Running,
        created: "2026-01-02T03:04:05Z".parse().unwrap(),
        ..VmRecord::new(VmId::new(), name, owner, ImageName::default_image(), Shape::default())
    }
}

fn op(id: OpId, owner: u32) -> OpRecord {
    OpRecord {
        id,
        service: Service::Vm,
        kind: "vm.create".to_owned(),
        subject: "web".to_owned(),
        vm: None,
        owner,
        state: OpState::Running,
        cancel_requested: false,
        accepted: "2026-01-02T03:04:05Z".parse().unwrap(),
        finished: None,
        stages: Vec::new(),
        error: None,
        result: None,
    }
}

/// What a ticket of the in-test services opens.
enum Stream {
    Echo,
    /// A guest that takes everything and says nothing.
    Silent,
    /// A guest's real agent; its commands run here.
    Agent,
    Log,
    Import,
    Export {
        cut: bool,
    },
}

/// Operations that are over at once.
#[derive(Clone)]
struct Done {
    client: Client,
    vms: Vec<VmRecord>,
    /// The operations, and whose they are.
    known: Arc<Mutex<Vec<(OpId, u32)>>>,
}

impl Done {
    async fn begun(&self, vm: VmId) -> Begun {
        let op = OpId::new();
        let owner = self.vms.iter().find(|have| have.id == vm).map_or(0, |vm| vm.owner);
        self.known.lock().unwrap().push((op, owner));
        self.finish(op, OpState::Succeeded).await;
        Begun { op, vm: Some(vm) }
    }

    async fn finish(&self, op: OpId, state: OpState) {
        let event = OpEvent {
            op,
            seq: 0,
            at_us: 5000,
            what: OpEventKind::Finished { state, error: None, result: None },
        };
        self.client.publish_op_event(&event).await.unwrap();
    }

    fn owner(&self, op: OpId) -> Option<u32> {
        self.known.lock().unwrap().iter().find(|(have, _)| *have == op).map(|(_, owner)| *owner)
    }
}

fn stats(vm: VmId) -> VmStats {
    VmStats {
        vm,
        at: "2026-01-02T03:04:05Z".parse().unwrap(),
        uptime_s: Some(61),
        cpu_us: Some(1_000_000),
        cpu_percent: Some(12.5),
        memory_bytes: Some(64 << 20),
        disks: None,
        received_bytes: None,
        sent_bytes: None,
        guest: None,
    }
}

struct Host {
    _bus: TestBus,
    dir: bothy_testkit::TempDir,
    socket: PathBuf,
    bothy: PathBuf,
    vms: Vec<VmRecord>,
    op: OpId,
    /// What changes reached a service.
    changes: Arc<Mutex<Vec<String>>>,
    /// How often the list of VMs was asked for.
    lists: Arc<AtomicUsize>,
    vm_client: Client,
    stop: CancellationToken,
    gateway: bothy_testkit::ChildGuard,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn host() -> Host {
    let mut bus = TestBus::start();
    // Reachable by other users, as a real run directory is.
    let dir = bothy_testkit::temp_dir();
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    open(dir.path());
    bus.config.run_dir = dir.path().join("run");
    fs_err::create_dir(&bus.config.run_dir).unwrap();
    open(&bus.config.run_dir);
    let config = dir.path().join("bothy.toml");
    fs_err::write(&config, bus.config.to_toml().unwrap()).unwrap();
    let bothy = dir.path().join("bothy");
    fs_err::copy(env!("CARGO_BIN_EXE_bothy"), &bothy).unwrap();
    open(&bothy);

    let gateway =
        Command::new(env!("CARGO_BIN_EXE_bothy-gateway")).env("BOTHY_CONFIG", &config).spawn().unwrap();
    let gateway = bothy_testkit::ChildGuard::new(gateway);

    let stop = CancellationToken::new();
    let (vms, op_id) =
        (vec![vm("web", ALICE), vm("db", BOB), vm("cut", ALICE), vm("real", ALICE)], OpId::new());
    let changes = Arc::new(Mutex::new(Vec::new()));
    let vm_client = Client::connect(&bus.config, Service::Vm).await.unwrap();
    let channel: Tickets<Stream> = Tickets::new(bus.config.ticket_socket(Service::Vm));
    let workspace: Tickets<Stream> = Tickets::new(bus.config.ticket_socket(Service::Workspace));
    for tickets in [channel.clone(), workspace.clone()] {
        let stop = stop.clone();
        tokio::spawn(async move {
            tickets
                .serve(
                    |what, stream| async move {
                        let (read, write) = stream.into_split();
                        serve(what, read, write).await;
                    },
                    stop,
                )
                .await
                .unwrap();
        });
    }
    let (list, shown) = (vms.clone(), vms.clone());
    let (noted, noted_create) = (Arc::clone(&changes), Arc::clone(&changes));
    let (noted_channel, silent, agent, log) = (Arc::clone(&changes), vms[2].id, vms[3].id, channel.clone());
    let lists = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&lists);
    let done = Done { client: vm_client.clone(), vms: vms.clone(), known: Arc::default() };
    let (known_shown, cancel_done, slow_id) = (done.clone(), done.clone(), OpId::new());
    let server = Server::new(vm_client.clone(), 16)
        .serve::<VmListAll, _, _>(move |_, _| {
            lists.fetch_add(1, Ordering::Relaxed);
            let vms = list.clone();
            async move { Ok(VmList { vms }) }
        })
        .serve::<VmShow, _, _>(move |_, request| {
            let found = shown.iter().find(|vm| vm.id == request.vm).cloned();
            async move { found.ok_or_else(|| Error::not_found("there is no such VM")) }
        })
        .serve::<VmOpShow, _, _>(move |_, request: OpRef| {
            let known = known_shown.clone();
            async move {
                if request.op == op_id || request.op == slow_id {
                    Ok(op(request.op, ALICE))
                } else if let Some(owner) = known.owner(request.op) {
                    Ok(op(request.op, owner))
                } else {
                    Err(Error::not_found("no such operation"))
                }
            }
        })
        .serve::<VmStop, _, _>(move |_, request| {
            noted.lock().unwrap().push(format!("stop {}", request.vm));
            async move { Ok(Begun { op: op_id, vm: Some(request.vm) }) }
        })
        .serve::<VmCreate, _, _>(move |_, request| {
            noted_create.lock().unwrap().push(format!("create for {}", request.owner));
            let slow = request.spec.name.is_some_and(|name| name.as_str() == "slow");
            async move {
                if slow {
                    return Ok(Begun { op: slow_id, vm: Some(VmId::new()) });
                }
                Err(Error::new(Code::AlreadyExists, "there is a VM of that name").hint("take another"))
            }
        })
        .serve::<VmChannelOpen, _, _>(move |_, request| {
            let what = match request.vm {
                vm if vm == silent => Stream::Silent,
                vm if vm == agent => Stream::Agent,
                _ => Stream::Echo,
            };
            let ticket = channel.issue(what, Duration::from_secs(30));
            noted_channel.lock().unwrap().push(format!("channel of {}", request.vm));
            async move { Ok(ticket) }
        })
        .serve::<VmLogOpen, _, _>(move |_, _| {
            let ticket = log.issue(Stream::Log, Duration::from_secs(30));
            async move { Ok(ticket) }
        })
        .serve::<VmOpCancel, _, _>(move |_, request: OpRef| {
            let done = cancel_done.clone();
            async move {
                if request.op == op_id {
                    return Err(Error::new(Code::FailedPrecondition, "it cannot be cancelled"));
                }
                tokio::spawn(async move {
                    // An undo takes longer than the answer.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    done.finish(request.op, OpState::Cancelled).await;
                });
                Ok(op(request.op, ALICE))
            }
        })
        .serve::<VmStatsShow, _, _>(|_, request| async move {
            let stats = request.vms.into_iter().map(stats).collect();
            Ok(VmStatsList { stats })
        })
        .serve::<VmPortsList, _, _>(|_, _| async {
            let ssh = GuestPort {
                protocol: "tcp".to_owned(),
                address: "0.0.0.0".to_owned(),
                port: 22,
                process: Some("sshd".to_owned()),
            };
            Ok(PortList { ports: vec![ssh] })
        });
    let (d, n) = (done.clone(), Arc::clone(&changes));
    let server = server.serve::<VmKill, _, _>(move |_, request| {
        n.lock().unwrap().push(format!("kill {} {}", request.vm, request.signal));
        let done = d.clone();
        async move { Ok(done.begun(request.vm).await) }
    });
    let (d, n) = (done.clone(), Arc::clone(&changes));
    let server = server.serve::<VmRestart, _, _>(move |_, request| {
        n.lock().unwrap().push(format!("restart {} {}", request.vm, request.grace_ms));
        let done = d.clone();
        async move { Ok(done.begun(request.vm).await) }
    });
    let (d, n) = (done.clone(), Arc::clone(&changes));
    let server = server.serve::<VmDelete, _, _>(move |_, request| {
        n.lock().unwrap().push(format!("delete {} {}", request.vm, request.force));
        let done = d.clone();
        async move { Ok(done.begun(request.vm).await) }
    });
    let (d, n) = (done.clone(), Arc::clone(&changes));
    let server = server.serve::<VmSet, _, _>(move |_, request| {
        n.lock().unwrap().push(format!("set {} {:?}", request.vm, request.memory_mib));
        let done = d.clone();
        async move { Ok(done.begun(request.vm).await) }
    });
    tokio::spawn(server.run(stop.clone()));
    let image = Server::new(Client::connect(&bus.config, Service::Image).await.unwrap(), 4)
        .serve::<ImageOpShow, _, _>(|_, _| async { Err(Error::not_found("no such operation")) });
    tokio::spawn(image.run(stop.clone()));
    let (import, cut) = (workspace.clone(), vms[2].id);
    let server = Server::new(Client::connect(&bus.config, Service::Workspace).await.unwrap(), 4)
        .serve::<WorkspaceImportOpen, _, _>(move |_, _| {
            let ticket = import.issue(Stream::Import, Duration::from_secs(30));
            async move { Ok(ticket) }
        })
        .serve::<WorkspaceExportOpen, _, _>(move |_, request| {
            let ticket = workspace.issue(Stream::Export { cut: request.vm == cut }, Duration::from_secs(30));
            async move { Ok(ticket) }
        });
    tokio::spawn(server.run(stop.clone()));

    let socket = bus.config.gateway_socket();
    let host = Host {
        _bus: bus,
        dir,
        socket,
        bothy,
        vms,
        op: op_id,
        changes,
        lists: counted,
        vm_client,
        stop,
        gateway,
    };
    // The services register side by side; a call that finds nobody waits for a while by itself.
    for _ in 0..500 {
        if host.socket.exists() && host.run(0, &["vm", "list"]).status.success() {
            return host;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the gateway does not answer");
}

async fn serve(
    what: Stream,
    mut read: tokio::net::unix::OwnedReadHalf,
    mut write: tokio::net::unix::OwnedWriteHalf,
) {
    match what {
        Stream::Echo => {
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
        Stream::Silent => {
            let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
            drop(write);
        }
        Stream::Agent => {
            let stream = bothy_guest::agent::Accepted::new(tokio::io::join(read, write));
            let guest = bothy_guest::Guest::new(bothy_guest::Init::foreign(), Vec::new());
            let streams = tokio_stream::once(Ok::<_, std::io::Error>(stream));
            let _ = bothy_guest::agent::server(
                guest,
                tokio_stream::StreamExt::chain(streams, tokio_stream::pending()),
            )
            .await;
        }
        Stream::Log => {
            let text: String = (0..1000).map(|n| format!("line {n}\n")).collect();
            let _ = write.write_all(text.as_bytes()).await;
        }
        Stream::Import => {
            let (mut frames, mut bytes) = (FrameReader::new(read), 0);
            while let Ok(Frame::Data(data)) = frames.next().await {
                bytes += data.len() as u64;
            }
            let report = ImportReport {
                guest_path: "/root/repo".to_owned(),
                head: "0123456789abcdef".to_owned(),
                branch: Some("main".to_owned()),
                bytes,
            };
            let _ = FrameWriter::new(write).end(&report).await;
        }
        Stream::Export { cut } => {
            let mut frames = FrameWriter::new(write);
            let _ = frames.data(PATCH).await;
            if !cut {
                let _ = frames.end(&ExportReport { bytes: PATCH.len() as u64, files: 1, commits: 0 }).await;
            }
        }
    }
}

impl Host {
    /// Runs the command line as user `uid`.
    fn run(&self, uid: u32, args: &[&str]) -> Output {
        let mut command = Command::new(&self.bothy);
        command
            .arg("--socket")
            .arg(&self.socket)
            .args(args)
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path());
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        command.output().unwrap()
    }

    async fn until(&self, true_by_now: impl Fn() -> bool) {
        for _ in 0..3000 {
            if true_by_now() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come true");
    }

    fn json(&self, uid: u32, args: &[&str]) -> Value {
        let args: Vec<_> = ["--json"].iter().chain(args).copied().collect();
        let out = self.run(uid, &args);
        // An error is the last line, behind remarks.
        let text = if out.status.success() {
            out.stdout
        } else {
            out.stderr.trim_ascii_end().rsplit(|&b| b == b'\n').next().unwrap().to_vec()
        };
        serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&text)))
    }

    fn code(&self, uid: u32, args: &[&str]) -> String {
        self.json(uid, args)["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_user_sees_and_touches_only_what_is_theirs() {
    bothy_testkit::require_root!();
    let host = host().await;
    let names = |value: Value| {
        let mut names: Vec<_> =
            value.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(host.json(0, &["vm", "list"])), ["cut", "db", "real", "web"]);
    assert_eq!(names(host.json(ALICE, &["vm", "list"])), ["cut", "real", "web"]);
    assert_eq!(names(host.json(BOB, &["vm", "list"])), ["db"]);
    assert_eq!(host.json(ALICE, &["vm", "show", "we"])["name"], "web");
    let dbs = host.vms[1].id.to_string();
    for vm in ["db", &dbs, "d"] {
        assert_eq!(host.code(ALICE, &["vm", "show", vm]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "stop", vm]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "logs", vm]), "not_found");
        for verb in ["start", "restart", "kill", "delete", "stats", "ports", "shell"] {
            assert_eq!(host.code(ALICE, &["vm", verb, vm]), "not_found", "{verb}");
        }
        assert_eq!(host.code(ALICE, &["vm", "set", vm, "--nat", "on"]), "not_found");
        assert_eq!(host.code(ALICE, &["vm", "proxy", vm, "22"]), "not_found");
        assert_eq!(host.code(ALICE, &["workspace", "export", vm]), "not_found");
    }
    let op = host.op.to_string();
    assert_eq!(host.json(ALICE, &["op", "show", &op])["id"].as_str().unwrap().replace('-', ""), op);
    assert_eq!(host.code(BOB, &["op", "show", &op]), "not_found");
    assert_eq!(host.code(BOB, &["op", "cancel", &op]), "not_found");
    assert_eq!(host.code(ALICE, &["image", "build"]), "permission_denied");
    assert!(host.changes.lock().unwrap().is_empty(), "no refused change reached a service");
    // The owner is who calls, whatever they say.
    assert_eq!(host.code(BOB, &["vm", "create", "--name", "web"]), "already_exists");
    assert_eq!(*host.changes.lock().unwrap(), [format!("create for {BOB}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_watcher_sees_all_stages_and_the_error_at_the_end() {
    bothy_testkit::require_root!();
    let host = host().await;
    let stage = || "launch_vmm".to_owned();
    let failed = Error::new(Code::StageFailed, "launch_vmm: no memory").hint("ask for less");
    let events = [
        OpEventKind::Accepted { kind: "vm.stop".to_owned(), subject: "web".to_owned() },
        OpEventKind::StageStarted { stage: stage() },
        OpEventKind::StageDone {
            stage: stage(),
            took_us: 12_000,
            note: Some("with \u{1b}[2J in it".to_owned()),
        },
        OpEventKind::Finished { state: OpState::Failed, error: Some(failed), result: None },
    ];
    for (seq, what) in events.into_iter().enumerate() {
        let event = OpEvent { op: host.op, seq: seq as u64, at_us: 1000 * seq as u64, what };
        host.vm_client.publish_op_event(&event).await.unwrap();
    }
    let out = host.run(ALICE, &["vm", "stop", "web"]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(125), "{text}");
    insta::assert_snapshot!(text, @r"
      launch_vmm            12 ms  with \u{1b}[2J in it
    error: launch_vmm: no memory
      hint: ask for less
    ");
    assert_eq!(*host.changes.lock().unwrap(), [format!("stop {}", host.vms[0].id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_that_was_cut_short_is_an_error_and_no_file() {
    bothy_testkit::require_root!();
    let host = host().await;
    let good = host.dir.path().join("good.patch");
    let out = host.run(0, &["workspace", "export", "web", "-o", good.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(fs_err::read(&good).unwrap(), PATCH);
    let bad = host.dir.path().join("bad.patch");
    assert_eq!(host.code(0, &["workspace", "export", "cut", "-o", bad.to_str().unwrap()]), "unavailable");
    assert!(!bad.exists());
    let left: Vec<_> = fs_err::read_dir(host.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".bothy-")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_goes_in() {
    bothy_testkit::require_root!();
    let host = host().await;
    let repo = host.dir.path().join("repo");
    fs_err::create_dir(&repo).unwrap();
    let git = |args: &[&str]| {
        let out = Command::new("git")
            .arg("-C")
            .arg(&repo)
            .args(["-c", "user.name=a", "-c", "user.email=a@b"])
            .args(args)
            .output();
        assert!(out.unwrap().status.success(), "git {args:?}");
    };
    git(&["init", "-q", "-b", "main"]);
    git(&["commit", "-q", "--allow-empty", "-m", "start"]);
    let report = host.json(0, &["workspace", "prepare", "web", repo.to_str().unwrap()]);
    assert!(report["bytes"].as_u64().unwrap() > 1000, "{report}");
    assert_eq!(
        host.code(0, &["workspace", "prepare", "web", host.dir.path().to_str().unwrap()]),
        "failed_precondition"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_raw_bytes_both_ways() {
    bothy_testkit::require_root!();
    let host = host().await;
    let mut stream = tokio::net::UnixStream::connect(&host.socket).await.unwrap();
    let head = "GET /v1/vms/web/channel/2 HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: bothy-channel\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
    let sent: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_be_bytes).collect();
    let (mut read, mut write) = stream.into_split();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    writer.await.unwrap();
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_opens_connections_without_end_harms_only_themselves() {
    bothy_testkit::require_root!();
    let host = host().await;
    // Held by a process of that user, each with half a request on it.
    let flood = "use Socket; $SIG{PIPE} = 'IGNORE'; my @s; \
                 for (1..400) { socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; \
                 connect($s, pack_sockaddr_un($ARGV[0])) or die; syswrite($s, 'GET /v1/ver'); push @s, $s } \
                 $| = 1; print qq(open\\n); <STDIN>";
    let mut flood = Command::new("perl")
        .args(["-e", flood])
        .arg(&host.socket)
        .uid(ALICE)
        .gid(ALICE)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 5];
    std::io::Read::read_exact(flood.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"open\n");
    let refused = host.run(ALICE, &["vm", "list"]);
    assert!(!refused.status.success());
    assert!(host.run(BOB, &["vm", "list"]).status.success());
    assert!(host.run(0, &["vm", "list"]).status.success());
    drop(flood.stdin.take());
    assert!(flood.wait().unwrap().success());
    for _ in 0..500 {
        if host.run(ALICE, &["vm", "list"]).status.success() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the places were not given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_says_nothing_is_left_on_request() {
    bothy_testkit::require_root!();
    let host = host().await;
    let asked = format!("channel of {}", host.vms[2].id);
    for signal in ["-INT", "-TERM", "-HUP"] {
        host.changes.lock().unwrap().clear();
        let child = Command::new(&host.bothy)
            .arg("--socket")
            .arg(&host.socket)
            .args(["vm", "exec", "cut", "--", "true"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        host.until(|| host.changes.lock().unwrap().contains(&asked)).await;
        // It catches signals from a moment after that on; before, a signal ends it as it ends any process.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap().success());
        let out = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap());
        let out = tokio::time::timeout(Duration::from_secs(30), out).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(text.contains("no longer waiting") && out.status.code() == Some(130), "{signal}: {text}");
    }
}

impl Host {
    /// A request as HTTP has it; the whole answer.
    async fn raw(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = tokio::net::UnixStream::connect(&self.socket).await.unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap())
    }

    fn spawn(&self, args: &[&str]) -> std::process::Child {
        Command::new(&self.bothy)
            .arg("--socket")
            .arg(&self.socket)
            .args(args)
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn name_ids(&self, text: &str) -> String {
        self.vms.iter().fold(text.to_owned(), |text, vm| text.replace(&vm.id.to_string(), vm.name.as_str()))
    }
}

/// The end of a process, which must come by itself.
async fn end(child: std::process::Child) -> (Option<i32>, String, String) {
    let out = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap());
    let out = tokio::time::timeout(Duration::from_secs(60), out).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn several_machines_are_resolved_once_and_each_is_told_of() {
    bothy_testkit::require_root!();
    let host = host().await;
    let before = host.lists.load(Ordering::Relaxed);
    let id = host.vms[0].id.to_string();
    let out = host.run(ALICE, &["vm", "kill", "web", "nope", "cu", "db", &id, "web", "--signal", "term"]);
    assert_eq!(host.lists.load(Ordering::Relaxed) - before, 1);
    insta::assert_snapshot!(format!("{:?}\n{}", out.status.code(), String::from_utf8_lossy(&out.stderr)), @r#"
    Some(125)
    error: there is no VM "nope"
      hint: `bothy vm list` shows the VMs
    error: there is no VM "db"
      hint: `bothy vm list` shows the VMs
    "#);
    let text = String::from_utf8(out.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["cut is killed (5 ms)", "web is killed (5 ms)"]);
    let mut changes: Vec<_> = host.changes.lock().unwrap().iter().map(|c| host.name_ids(c)).collect();
    changes.sort();
    assert_eq!(changes, ["kill cut 15", "kill web 15"]);

    // As JSON: a document for each that was done, and one for each that failed.
    let out = host.run(ALICE, &["--json", "vm", "restart", "web", "nope"]);
    let done: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(done["vm"]["name"] == "web" && done["took_us"] == 5000, "{done}");
    let text = String::from_utf8(out.stderr).unwrap();
    let failed: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(failed["vm"] == "nope" && failed["error"]["code"] == "not_found", "{failed}");
    assert!(host.changes.lock().unwrap().last().unwrap().ends_with(" 10000"), "the default grace");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_means_the_callers_own_and_a_delete_of_all_is_confirmed() {
    bothy_testkit::require_root!();
    let host = host().await;
    assert_eq!(host.code(ALICE, &["vm", "delete", "--all"]), "failed_precondition");
    assert!(host.changes.lock().unwrap().is_empty());
    let out = host.run(0, &["vm", "delete", "--all", "--force"]);
    assert!(out.status.success() && out.stdout.is_empty(), "root has none of their own: {out:?}");
    assert!(host.run(BOB, &["vm", "delete", "--all", "--force"]).status.success());
    assert_eq!(*host.changes.lock().unwrap(), [format!("delete {} true", host.vms[1].id)]);
    // None of them is stopped, so none is pruned.
    let out = host.run(ALICE, &["vm", "prune", "--yes"]);
    assert!(out.status.success() && out.stdout.is_empty(), "{out:?}");
    assert_eq!(host.changes.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_cannot_become_is_refused_before_a_service_is_asked() {
    bothy_testkit::require_root!();
    let host = host().await;
    let out = host.run(ALICE, &["vm", "set", "web", "--disk", "1G"]);
    insta::assert_snapshot!(String::from_utf8_lossy(&out.stderr), @r"
    error: the work disk of web has 10240 MiB and cannot be made smaller, to 1024 MiB
      hint: disks only grow; a new VM can have a smaller one
    ");
    let (status, error) = host.raw("PATCH", "/v1/vms/web", r#"{"work_mib":1024}"#).await;
    assert!(status == 400 && error["code"] == "invalid_argument", "{error}");
    let (status, _) = host.raw("PATCH", "/v1/vms/web", "{}").await;
    assert_eq!(status, 400);
    assert!(host.changes.lock().unwrap().is_empty());
    let (status, begun) = host.raw("PATCH", "/v1/vms/we", r#"{"memory_mib":2048}"#).await;
    assert!(status == 202 && begun["op"].is_string(), "{begun}");
    assert_eq!(*host.changes.lock().unwrap(), [format!("set {} Some(2048)", host.vms[0].id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_of_what_is_named_or_of_all_that_run() {
    bothy_testkit::require_root!();
    let host = host().await;
    let (_, all) = host.raw("GET", "/v1/stats", "").await;
    assert_eq!(all["stats"].as_array().unwrap().len(), 4);
    let gone = VmId::new();
    let (_, some) = host.raw("GET", &format!("/v1/stats?vm=db&vm=we&vm=web&vm={gone}"), "").await;
    assert_eq!(some["stats"].as_array().unwrap().len(), 2, "{some}");
    assert_eq!(host.raw("GET", "/v1/stats?vm=nope", "").await.0, 404);
    assert_eq!(host.raw("GET", "/v1/stats?name=web", "").await.0, 400);
    let out = host.run(BOB, &["vm", "stats"]);
    insta::assert_snapshot!(String::from_utf8_lossy(&out.stdout), @r"
    NAME  CPU %              MEMORY  WORK DISK  SYSTEM DISK  NET IN  NET OUT     UPTIME
    db     12.5  64.0 MiB / 1.0 GiB          -            -       -        -  1 min 1 s
    ");
    let row = host.json(BOB, &["vm", "stats", "db"]);
    assert!(row["name"] == "db" && row["cpu_us"] == 1_000_000, "{row}");
    let ports = host.json(BOB, &["vm", "ports", "db"]);
    assert!(ports["host"] == "db.vm" && ports["ports"][0]["port"] == 22, "{ports}");
    // The reader of what never ends may leave.
    let script = format!(
        "{} --socket {} --json vm stats --watch | head -n 1",
        host.bothy.display(),
        host.socket.display()
    );
    let mut shell = Command::new("bash");
    shell.args(["-c", &script]).stdout(std::process::Stdio::piped());
    let (status, text, _) = end(shell.spawn().unwrap()).await;
    assert!(status == Some(0) && text.contains("cpu_percent"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_of_a_log() {
    bothy_testkit::require_root!();
    let host = host().await;
    let tail = |args: &[&str]| {
        let args: Vec<_> = ["vm", "logs", "web"].iter().chain(args).copied().collect();
        String::from_utf8(host.run(ALICE, &args).stdout).unwrap()
    };
    assert_eq!(tail(&[]).lines().count(), 1000);
    assert_eq!(tail(&["--tail", "2"]), "line 998\nline 999\n");
    assert_eq!(tail(&["-n", "2", "--follow"]), "line 998\nline 999\n");
    assert_eq!(tail(&["-n", "0"]), "");
    assert_eq!(tail(&["-n", "5000"]).lines().count(), 1000);
    assert_eq!(host.code(ALICE, &["vm", "logs", "web", "-n", "100001"]), "invalid_argument");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_cancels_what_can_be_cancelled_and_leaves_the_rest() {
    bothy_testkit::require_root!();
    let host = host().await;
    let interrupt = async |args: &[&str], begun: &str| {
        let child = host.spawn(args);
        host.until(|| host.changes.lock().unwrap().iter().any(|c| c.starts_with(begun))).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let (status, _, text) = end(child).await;
        (status, text)
    };
    let (status, text) = interrupt(&["vm", "stop", "web"], "stop").await;
    assert_eq!(status, Some(130), "{text}");
    insta::assert_snapshot!(text.replace(&host.op.to_string(), "[OP]"), @r"
    error: no longer waiting for operation [OP], which cannot be cancelled and goes on
      hint: `bothy op show --watch [OP]` shows how it goes
    ");
    let (status, text) = interrupt(&["vm", "create", "--name", "slow"], "create").await;
    assert_eq!(status, Some(130), "{text}");
    insta::assert_snapshot!(text, @r"
    cancelling; what was done is being undone (Ctrl-C again to leave it to that)
    error: cancelled; what was done is undone
    ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_s_output_arrives_whole_and_its_end_is_never_made_up() {
    bothy_testkit::require_root!();
    let mut host = host().await;
    // 100 MiB of which every byte has its place, through the command line, the gateway and a guest's real agent.
    let out =
        host.run(0, &["vm", "exec", "real", "--", "sh", "-c", "seq 1 15000000 | head -c 104857600; exit 7"]);
    assert_eq!(out.status.code(), Some(7), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.stdout.len(), 100 << 20);
    let mut at = 0;
    for n in 1.. {
        let line = format!("{n}\n");
        let rest = &out.stdout[at..];
        if rest.len() < line.len() {
            assert!(line.as_bytes().starts_with(rest));
            break;
        }
        assert!(rest.starts_with(line.as_bytes()), "line {n}");
        at += line.len();
    }
    // A signal reaches a command that does not read its stdin, however much of that waits.
    let mut child = host.spawn(&[
        "vm",
        "exec",
        "-i",
        "real",
        "--",
        "sh",
        "-c",
        "trap 'exit 9' INT; echo up; while :; do sleep 0.1; done",
    ]);
    let mut stdin = child.stdin.take().unwrap();
    let filler = std::thread::spawn(move || {
        let _ = std::io::Write::write_all(&mut stdin, &[0; 300 << 10]);
        stdin
    });
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let (status, _, text) = end(child).await;
    assert_eq!(status, Some(9), "{text}");
    drop(filler.join());
    // The gateway dies while a command runs: an error, and neither silence nor a success.
    let mut child = host.spawn(&["vm", "exec", "real", "--", "sh", "-c", "echo up; sleep 600"]);
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    host.gateway.inner().kill().unwrap();
    let (status, _, text) = end(child).await;
    assert_eq!(status, Some(125), "{text}");
    assert!(text.contains("the guest of real broke off") && text.contains("may still run"), "{text}");
    // A new one serves the next.
    let config = host.dir.path().join("bothy.toml");
    let gateway =
        Command::new(env!("CARGO_BIN_EXE_bothy-gateway")).env("BOTHY_CONFIG", &config).spawn().unwrap();
    host.gateway = bothy_testkit::ChildGuard::new(gateway);
    host.until(|| host.run(0, &["vm", "list"]).status.success()).await;
    assert_eq!(host.run(0, &["vm", "exec", "real", "--", "sh", "-c", "exit 3"]).status.code(), Some(3));
}
