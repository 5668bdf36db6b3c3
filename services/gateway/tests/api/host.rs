//! A host for a test: the real bus and gateway, and small services behind them.

use bothy_bus::{Client, Server, testing::TestBus};
use bothy_contract::{
    Code, Error, ImageName, OpId, Service, VmId,
    methods::{
        ImageOpShow, NetEgressShow, VmChannelOpen, VmCreate, VmDelete, VmKill, VmListAll, VmLogOpen,
        VmOpCancel, VmOpShow, VmPortsList, VmRestart, VmSet, VmShow, VmStatsShow, VmStop,
        WorkspaceExportOpen, WorkspaceImportOpen,
    },
    net::{Denied, Egress, EgressReport},
    op::{Begun, OpEvent, OpEventKind, OpRecord, OpRef, OpState},
    usage::{GuestPort, PortList, VmStats, VmStatsList},
    vm::{Shape, VmList, VmRecord, VmState},
    workspace::{ExportReport, ImportReport},
};
use bothy_tickets::{Frame, FrameReader, FrameWriter, Tickets};
use jiff::Timestamp;
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

pub(crate) const ALICE: u32 = 61_001;
pub(crate) const BOB: u32 = 61_002;
pub(crate) const PATCH: &[u8] = b"diff --git a/new b/new\nnew file mode 100644\nindex 0000000000000000000000000000000000000000..257cc5642cb1a054f08cc83f2d943e56fd3ebe99\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+foo\n";

pub(crate) fn vm(name: &str, owner: u32) -> VmRecord {
    let name = name.parse().unwrap();
    VmRecord {
        state: VmState::Running,
        created: "2026-01-02T03:04:05Z".parse().unwrap(),
        ..VmRecord::new(VmId::new(), name, owner, ImageName::default_image(), Shape::default())
    }
}

pub(crate) fn op(id: OpId, owner: u32) -> OpRecord {
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
pub(crate) enum Stream {
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
pub(crate) struct Done {
    client: Client,
    vms: Vec<VmRecord>,
    /// The operations, and whose they are.
    known: Arc<Mutex<Vec<(OpId, u32)>>>,
}

impl Done {
    pub(crate) async fn begun(&self, vm: VmId) -> Begun {
        let op = OpId::new();
        let owner = self.vms.iter().find(|have| have.id == vm).map_or(0, |vm| vm.owner);
        self.known.lock().unwrap().push((op, owner));
        self.finish(op, OpState::Succeeded).await;
        Begun { op, vm: Some(vm) }
    }

    pub(crate) async fn finish(&self, op: OpId, state: OpState) {
        let event = OpEvent {
            op,
            seq: 0,
            at_us: 5000,
            what: OpEventKind::Finished { state, error: None, result: None },
        };
        self.client.publish_op_event(&event).await.unwrap();
    }

    pub(crate) fn owner(&self, op: OpId) -> Option<u32> {
        self.known.lock().unwrap().iter().find(|(have, _)| *have == op).map(|(_, owner)| *owner)
    }
}

pub(crate) fn stats(vm: VmId) -> VmStats {
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

pub(crate) struct Host {
    _bus: TestBus,
    pub(crate) dir: bothy_testkit::TempDir,
    pub(crate) socket: PathBuf,
    pub(crate) bothy: PathBuf,
    pub(crate) vms: Vec<VmRecord>,
    pub(crate) op: OpId,
    /// What changes reached a service.
    pub(crate) changes: Arc<Mutex<Vec<String>>>,
    /// How often the list of VMs was asked for.
    pub(crate) lists: Arc<AtomicUsize>,
    pub(crate) vm_client: Client,
    pub(crate) stop: CancellationToken,
    pub(crate) gateway: bothy_testkit::ChildGuard,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(crate) async fn host() -> Host {
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
        let mut noted = format!("set {} {:?}", request.vm, request.memory_mib);
        if let Some(egress) = &request.egress {
            noted.push_str(&format!(" {egress}"));
        }
        for port in request.publish.iter().flatten() {
            noted.push_str(&format!(" {port}"));
        }
        n.lock().unwrap().push(noted);
        let done = d.clone();
        async move { Ok(done.begun(request.vm).await) }
    });
    tokio::spawn(server.run(stop.clone()));
    let image = Server::new(Client::connect(&bus.config, Service::Image).await.unwrap(), 4)
        .serve::<ImageOpShow, _, _>(|_, _| async { Err(Error::not_found("no such operation")) });
    tokio::spawn(image.run(stop.clone()));
    let asked = Arc::clone(&changes);
    let net = Server::new(Client::connect(&bus.config, Service::Net).await.unwrap(), 4)
        .serve::<NetEgressShow, _, _>(move |_, request| {
            asked.lock().unwrap().push(format!("egress of {}", request.vm));
            let denied = |name: &str, last| Denied { name: name.to_owned(), count: 2, last };
            // Something from long ago, and something that is denied again and again.
            let denied =
                vec![denied("new.test", Timestamp::now()), denied("old.test", Timestamp::UNIX_EPOCH)];
            let policy = Egress::Allow { names: vec!["a.b".to_owned()] };
            async move { Ok(EgressReport { policy, allowed: Vec::new(), denied }) }
        });
    tokio::spawn(net.run(stop.clone()));
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

pub(crate) async fn serve(
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
                sync: None,
            };
            let _ = FrameWriter::new(write).end(&report).await;
        }
        Stream::Export { cut } => {
            let mut frames = FrameWriter::new(write);
            let _ = frames.data(PATCH).await;
            if !cut {
                let _ = frames
                    .end(&ExportReport { bytes: PATCH.len() as u64, files: 1, ..ExportReport::default() })
                    .await;
            }
        }
    }
}

impl Host {
    /// Runs the command line as user `uid`.
    pub(crate) fn run(&self, uid: u32, args: &[&str]) -> Output {
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

    pub(crate) async fn until(&self, true_by_now: impl Fn() -> bool) {
        for _ in 0..3000 {
            if true_by_now() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come true");
    }

    pub(crate) fn json(&self, uid: u32, args: &[&str]) -> Value {
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

    pub(crate) fn code(&self, uid: u32, args: &[&str]) -> String {
        self.json(uid, args)["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Host {
    /// A request as HTTP has it; the whole answer.
    pub(crate) async fn raw(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
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

    pub(crate) fn spawn(&self, args: &[&str]) -> std::process::Child {
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

    pub(crate) fn name_ids(&self, text: &str) -> String {
        self.vms.iter().fold(text.to_owned(), |text, vm| text.replace(&vm.id.to_string(), vm.name.as_str()))
    }
}

/// The end of a process, which must come by itself.
pub(crate) async fn end(child: std::process::Child) -> (Option<i32>, String, String) {
    let out = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap());
    let out = tokio::time::timeout(Duration::from_secs(60), out).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}
