//! The real agent on a real bus, without the other services: what it answers, and what is left when they are not there.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_bus::{Client, testing::TestBus};
use bothy_contract::{
    Code, OpId, Service, VmId,
    methods::{
        VmChannelOpen, VmCreate, VmDelete, VmHostShow, VmListAll, VmOpCancel, VmOpShow, VmShow, VmStart,
    },
    op::{OpEventKind, OpRecord, OpRef, OpState, StageState},
    vm::{CreateVm, DeleteVm, GetVmHost, ListVms, OpenChannel, Shape, StartVm, VmRef, VmSpec},
};
use futures::StreamExt;
use std::{process::Stdio, time::Duration};
use tokio::process::{Child, Command};

struct Host {
    bus: TestBus,
    gateway: Client,
    agent: Child,
}

fn start(bus: &TestBus) -> Child {
    let path = bus.config.run_dir.join("bothy.toml");
    fs_err::write(&path, bus.config.to_toml().unwrap()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_bothy-vm-agent"))
        .arg("--config")
        .arg(path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// A call that waits for an agent that is just starting.
async fn call<M: bothy_contract::Method>(
    gateway: &Client,
    request: M::Request,
) -> Result<M::Reply, bothy_contract::Error> {
    for _ in 0..20 {
        match gateway.call::<M>(&request).await {
            Err(e) if e.code == Code::Unavailable => {}
            done => return done,
        }
    }
    gateway.call::<M>(&request).await
}

impl Host {
    async fn new() -> Self {
        let bus = TestBus::start();
        let gateway = Client::connect(&bus.config, Service::Gateway).await.unwrap();
        gateway.ensure_ops_stream().await.unwrap();
        let agent = start(&bus);
        Self { bus, gateway, agent }
    }

    async fn call<M: bothy_contract::Method>(
        &self,
        request: M::Request,
    ) -> Result<M::Reply, bothy_contract::Error> {
        call::<M>(&self.gateway, request).await
    }

    async fn ended(&self, op: OpId) -> OpRecord {
        loop {
            let record = self.call::<VmOpShow>(OpRef { op }).await.unwrap();
            if record.state.is_final() {
                return record;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn create(name: Option<&str>, shape: Shape) -> CreateVm {
    let spec = VmSpec {
        name: name.map(|n| n.parse().unwrap()),
        image: "debian".parse().unwrap(),
        shape,
        nat: false,
        egress: None,
        publish: Vec::new(),
        groups: Default::default(),
        identity: Default::default(),
        idle: None,
    };
    CreateVm { spec, owner: 1000, force: false, cold: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_without_its_services_is_undone_and_told() {
    let host = Host::new().await;
    let shown = host.call::<VmHostShow>(GetVmHost {}).await.unwrap();
    assert_eq!((shown.driver.as_str(), shown.running, shown.total), ("qemu-microvm", 0, 0));

    let absurd = Shape { memory_mib: 1, ..Shape::default() };
    let refused = host.call::<VmCreate>(create(Some("a"), absurd)).await.unwrap_err();
    assert_eq!(refused.code, Code::InvalidArgument);

    let begun = host.call::<VmCreate>(create(Some("a"), Shape::default())).await.unwrap();
    let taken = host.call::<VmCreate>(create(Some("a"), Shape::default())).await.unwrap_err();
    assert_eq!(taken.code, Code::AlreadyExists);
    assert!(taken.hint.unwrap().contains("bothy vm delete a"));
    let vm = begun.vm.unwrap();
    let early =
        host.call::<VmStart>(StartVm { vm, identity: Default::default(), force: false }).await.unwrap_err();
    assert_eq!(early.code, Code::FailedPrecondition);
    let closed = host.call::<VmChannelOpen>(OpenChannel { vm, port: 1 }).await.unwrap_err();
    assert_eq!(closed.code, Code::FailedPrecondition);

    let record = host.ended(begun.op).await;
    assert_eq!(record.state, OpState::Failed);
    let error = record.error.unwrap();
    assert_eq!(error.code, Code::Unavailable);
    assert!(
        error.message.contains("stage resolve_image failed") && error.message.contains("bothy-image-agent"),
        "{error}"
    );
    assert!(record.stages.iter().all(|s| s.state == StageState::Undone));
    assert!(host.call::<VmListAll>(ListVms {}).await.unwrap().vms.is_empty());
    assert_eq!(host.call::<VmShow>(VmRef { vm }).await.unwrap_err().code, Code::NotFound);
    assert_eq!(
        host.call::<VmDelete>(DeleteVm { vm: VmId::new(), force: true }).await.unwrap_err().code,
        Code::NotFound
    );

    // The whole story is in the stream, for whoever comes late.
    let mut events = Box::pin(host.gateway.watch_op(begun.op).await.unwrap());
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        assert_eq!(event.seq, told.len() as u64);
        let last = matches!(event.what, OpEventKind::Finished { .. });
        told.push(event.what.token());
        if last {
            break;
        }
    }
    assert_eq!(told, ["accepted", "stage_started", "stage_failed", "finished"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_goes_on_where_it_was() {
    let mut host = Host::new().await;
    host.call::<VmHostShow>(GetVmHost {}).await.unwrap();
    let begun = host.call::<VmCreate>(create(None, Shape::default())).await.unwrap();
    // Its first stage waits for the image-agent now.
    host.agent.kill().await.unwrap();
    host.agent = start(&host.bus);
    let record = host.ended(begun.op).await;
    assert!(record.subject.starts_with("vm-"), "{}", record.subject);
    assert_eq!(record.state, OpState::Failed);
    assert!(host.call::<VmListAll>(ListVms {}).await.unwrap().vms.is_empty());

    let begun = host.call::<VmCreate>(create(Some("b"), Shape::default())).await.unwrap();
    assert!(host.call::<VmOpCancel>(OpRef { op: begun.op }).await.unwrap().cancel_requested);
    assert_eq!(host.ended(begun.op).await.state, OpState::Cancelled);
    assert!(host.call::<VmListAll>(ListVms {}).await.unwrap().vms.is_empty());

    // SIGTERM ends it in order, and its socket goes with it.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(host.agent.id().unwrap()).unwrap());
    let socket = host.bus.config.ticket_socket(Service::Vm);
    assert!(socket.exists());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(host.agent.wait().await.unwrap().success());
    assert!(!socket.exists());
}
