//! The real binary on a real bus with the real guest's agent. Only the way to it is short: where a vm-agent would open a
//! channel into a VM, this test hands out streams to a guest's agent in its own process, whose files are the host's.

use crate::support::{git, git_with, packed};
use bothy_bus::{Client, Server, testing::TestBus};
use bothy_contract::{
    Code, Error, ImageName, Service, VmId,
    methods::{
        VmChannelOpen, VmShow, WorkspaceExportOpen, WorkspaceIdentityFiles, WorkspaceIdentitySync,
        WorkspaceImportOpen,
    },
    vm::{OpenChannel, Shape, Ticket, VmRecord, VmRef, VmState},
    workspace::{
        ExportFormat, ExportReport, Identity, IdentityFiles, ImportReport, OpenExport, OpenImport,
        SyncIdentity,
    },
};
use bothy_guest::{
    Guest, Init,
    agent::{Accepted, server},
};
use bothy_tickets::{DEFAULT_TTL, Frame, FrameReader, FrameWriter, Tickets, connect};
use futures::{StreamExt, stream};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::Arc,
    time::Duration,
};
use tokio::{net::UnixStream, sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

struct Host {
    agent: Agent,
    gateway: Client,
    vm_agent: Client,
    vm: VmId,
    /// Ends all streams to guests, as the death of the VM would.
    death: Arc<Notify>,
    stop: CancellationToken,
    tmp: tempfile::TempDir,
    _bus: TestBus,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn record(vm: VmId, state: VmState) -> VmRecord {
    let name = "testvm".parse().unwrap();
    VmRecord { state, ..VmRecord::new(vm, name, 0, ImageName::default_image(), Shape::default()) }
}

impl Host {
    async fn start() -> Self {
        let bus = TestBus::start();
        let (vm, stop, death) = (VmId::new(), CancellationToken::new(), Arc::new(Notify::new()));
        let vm_agent = Client::connect(&bus.config, Service::Vm).await.unwrap();
        let tickets = Tickets::<()>::new(bus.config.ticket_socket(Service::Vm));
        let serve = {
            let (tickets, stop, death) = (tickets.clone(), stop.clone(), Arc::clone(&death));
            async move {
                let handler = move |(), mut stream: UnixStream| {
                    let death = Arc::clone(&death);
                    async move {
                        let (mut near, far) = tokio::io::duplex(64 << 10);
                        let streams = stream::iter([Ok(Accepted::new(far))]).chain(stream::pending());
                        let guest = tokio::spawn(server(Guest::new(Init::foreign(), Vec::new()), streams));
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut stream, &mut near) => {}
                            () = death.notified() => {}
                        }
                        guest.abort();
                    }
                };
                tickets.serve(handler, stop).await
            }
        };
        tokio::spawn(serve);
        let server = Server::new(vm_agent.clone(), 4)
            .serve::<VmShow, _, _>(move |_, request: VmRef| async move {
                Ok(record(request.vm, if request.vm == vm { VmState::Running } else { VmState::Stopped }))
            })
            .serve::<VmChannelOpen, _, _>(move |_, request: OpenChannel| {
                let tickets = tickets.clone();
                async move {
                    if request.vm == vm {
                        Ok(tickets.issue((), DEFAULT_TTL))
                    } else {
                        Err(Error::not_found("no VM"))
                    }
                }
            });
        tokio::spawn(server.run(stop.clone()));
        let file = bus.config.state_dir.join("bothy.toml");
        fs_err::write(&file, bus.config.to_toml().unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bothy-workspace-agent"));
        let agent = Agent(command.arg("--config").arg(&file).spawn().unwrap());
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        let tmp = tempfile::tempdir().unwrap();
        Self { agent, gateway, vm_agent, vm, death, stop, tmp, _bus: bus }
    }

    /// A repository with a change, and where it is to go.
    fn repository(&self) -> (PathBuf, PathBuf) {
        let host = self.tmp.path().join("host");
        fs_err::create_dir(&host).unwrap();
        git(&host, &["init", "-q", "-b", "main"]);
        let noise: Vec<u8> =
            (0..2_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs_err::write(host.join("big"), noise).unwrap();
        git(&host, &["add", "-A"]);
        git(&host, &["commit", "-qm", "first"]);
        fs_err::write(host.join("big"), "small now\n").unwrap();
        (host, self.tmp.path().join("guest/repo"))
    }

    async fn open_import(&self, vm: VmId, path: &Path) -> Result<Ticket, Error> {
        let guest_path = path.to_str().unwrap().to_owned();
        self.gateway
            .call::<WorkspaceImportOpen>(&OpenImport { vm, guest_path, force: false, readonly: false })
            .await
    }

    async fn import(&self, pack: &[u8], path: &Path) -> Result<ImportReport, Error> {
        let (reader, writer) = connect(&self.open_import(self.vm, path).await?).await?.into_split();
        let mut frames = FrameWriter::new(writer);
        // A refusal may come before all of it is read: the report says why then.
        if frames.data(pack).await.is_ok() {
            drop(frames.end(&()).await);
        }
        FrameReader::new(reader).report().await
    }

    async fn export(&self, path: &Path) -> Result<(Vec<u8>, ExportReport), Error> {
        let guest_path = path.to_str().unwrap().to_owned();
        let ticket = self
            .gateway
            .call::<WorkspaceExportOpen>(&OpenExport {
                vm: self.vm,
                guest_path,
                format: ExportFormat::Patch,
                base: None,
            })
            .await?;
        let mut frames = FrameReader::new(connect(&ticket).await?);
        let mut patch = Vec::new();
        loop {
            match frames.next().await? {
                Frame::Data(data) => patch.extend_from_slice(&data),
                Frame::End(report) => return Ok((patch, serde_json::from_value(report).unwrap())),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_goes_in_and_a_patch_comes_out() {
    let mut host = Host::start().await;
    let (repo, guest) = host.repository();
    let (pack, _) = packed(&repo, false);
    let report = host.import(&pack, &guest).await.unwrap();
    assert_eq!((report.bytes, report.branch.as_deref()), (pack.len() as u64, Some("main")));
    assert_eq!(git(&guest, &["status", "--porcelain"]), " M big");
    host.import(&pack, &guest).await.unwrap();

    fs_err::write(guest.join("new"), "made in the guest\n").unwrap();
    let e = host.import(&pack, &guest).await.unwrap_err();
    assert!(e.code == Code::FailedPrecondition && e.message.contains("1 changed file (new)"), "{e}");
    let (patch, report) = host.export(&guest).await.unwrap();
    assert_eq!((report.bytes, report.files, report.commits), (patch.len() as u64, 1, 0));
    assert!(git_with(&repo, &["apply", "-"], &patch).status.success());
    assert_eq!(fs_err::read_to_string(repo.join("new")).unwrap(), "made in the guest\n");
    let nowhere = host.export(&host.tmp.path().join("nowhere")).await.unwrap_err();
    assert!(nowhere.code == Code::NotFound && nowhere.hint.is_some(), "{nowhere}");

    let home = host.tmp.path().join("home");
    let identity = Identity { git_name: Some("Somebody".into()), ..Identity::default() };
    for name in ["Somebody", "Somebody else"] {
        let identity = Identity { git_name: Some(name.into()), ..identity.clone() };
        let request = SyncIdentity { vm: host.vm, home: home.to_str().unwrap().into(), identity };
        host.vm_agent.call::<WorkspaceIdentitySync>(&request).await.unwrap();
        assert_eq!(git(&home, &["config", "-f", ".gitconfig", "user.name"]), name);
    }

    // What a home that has none yet is given without a word to its guest.
    let ask = IdentityFiles { home: "/root".into(), identity: identity.clone() };
    let told = host.vm_agent.call::<WorkspaceIdentityFiles>(&ask).await.unwrap().files;
    assert_eq!(told.len(), 1, "no keys, so no file for them: {told:?}");
    assert_eq!((told[0].path.as_str(), told[0].mode), ("/root/.gitconfig", 0o644));
    assert_eq!(told[0].content, "[user]\n\tname = \"Somebody\"\n");
    let broken = Identity { git_email: Some("a\nb".into()), ..identity };
    let ask = IdentityFiles { home: "/root".into(), identity: broken };
    let refused = host.vm_agent.call::<WorkspaceIdentityFiles>(&ask).await.unwrap_err();
    assert_eq!(refused.code, Code::InvalidArgument, "{refused}");

    let pid = nix::unistd::Pid::from_raw(host.agent.0.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(host.agent.0.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_not_there_or_goes_away_ends_it_with_words() {
    let host = Host::start().await;
    let (repo, guest) = host.repository();
    let (pack, _) = packed(&repo, false);
    let e = host.open_import(VmId::new(), &guest).await.unwrap_err();
    assert!(e.code == Code::FailedPrecondition && e.hint.is_some(), "{e}");
    assert_eq!(host.open_import(host.vm, Path::new("/../x")).await.unwrap_err().code, Code::InvalidArgument);

    // Half a pack, and the VM dies: the client is told so, though it never ends its stream.
    let (reader, writer) =
        connect(&host.open_import(host.vm, &guest).await.unwrap()).await.unwrap().into_split();
    let mut frames = FrameWriter::new(writer);
    frames.data(&pack[..pack.len() / 2]).await.unwrap();
    let unpacking = || {
        let beside = std::fs::read_dir(guest.parent().unwrap()).ok()?.next()?.ok()?.path();
        beside.join("pack/meta.json").exists().then_some(())
    };
    while unpacking().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A client that stands still does not keep the next one's VM: that one waits its turn.
    let next = async { host.import(&pack, &guest).await };
    let dies = async {
        host.death.notify_waiters();
        let mut reader = FrameReader::new(reader);
        let answer = reader.report::<ImportReport>();
        timeout(Duration::from_secs(30), answer).await.unwrap().unwrap_err()
    };
    let (next, e) = tokio::join!(next, dies);
    assert_eq!(e.code, Code::Unavailable, "{e}");
    assert!(e.message.contains("went away during unpacking"), "{e}");
    // The next one finds what the dead VM's disk has, and sweeps it.
    next.unwrap();
    assert_eq!(fs_err::read_dir(guest.parent().unwrap()).unwrap().count(), 1);
    drop(frames);
}
