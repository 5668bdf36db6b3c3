//! The bus on a real nats-server: calls, replays, panics, restarts, drains.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which are to stop with the line")]

use bothy_bus::{CallOptions, Client, Server, testing::TestBus};
use bothy_contract::{
    Code, Error, Method, OpId, RequestId, Service, VmId,
    methods::{NetEgressSet, NetHostShow, NetLeaseRelease, VmShow, VmStop},
    net::{Done, Egress, GetNetHost, NetHost, ReleaseLease, SetEgress},
    op::{OpEvent, OpEventKind, OpState},
};
use futures::StreamExt;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

async fn run(server: Server) -> Running {
    let stop = CancellationToken::new();
    let (ready, is_ready) = oneshot::channel();
    let server = server.on_ready(move || ready.send(()).unwrap());
    let task = tokio::spawn(server.run(stop.clone()));
    is_ready.await.unwrap();
    Running { stop, task }
}

async fn client(bus: &TestBus, service: Service) -> Client {
    Client::connect(&bus.config, service).await.unwrap()
}

fn release() -> ReleaseLease {
    ReleaseLease { vm: VmId::new() }
}

/// A net service that counts releases, each of which waits for `gate` where there is one.
fn counting(client: Client, count: &Arc<AtomicUsize>, gate: Option<Arc<Notify>>) -> Server {
    let count = Arc::clone(count);
    Server::new(client, 8).serve::<NetLeaseRelease, _, _>(move |context, _| {
        let (count, gate) = (Arc::clone(&count), gate.clone());
        async move {
            assert_eq!(context.caller, Service::Vm);
            assert!(context.remaining().unwrap() > Duration::ZERO);
            count.fetch_add(1, Ordering::SeqCst);
            if let Some(gate) = gate {
                gate.notified().await;
            }
            Ok(Done {})
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_gets_the_first_reply_also_while_the_first_runs() {
    let bus = TestBus::start();
    let (count, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let running = run(counting(client(&bus, Service::Net).await, &count, Some(Arc::clone(&gate)))).await;
    let vm = client(&bus, Service::Vm).await;
    let options = CallOptions { request_id: Some(RequestId::new()), ..CallOptions::default() };
    let request = release();
    let calls = (0..3).map(|_| vm.call_with::<NetLeaseRelease>(&request, options));
    let all = futures::future::join_all(calls);
    tokio::pin!(all);
    // The three are on their way; the first blocks at the gate, the others wait for it.
    let waited = tokio::time::timeout(Duration::from_millis(200), &mut all).await;
    assert!(waited.is_err());
    assert_eq!(count.load(Ordering::SeqCst), 1);
    gate.notify_one();
    for reply in all.await {
        reply.unwrap();
    }
    vm.call_with::<NetLeaseRelease>(&request, options).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1, "executed once");
    gate.notify_one();
    vm.call::<NetLeaseRelease>(&request).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 2, "another request is executed");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_and_panics_are_answered_and_the_service_goes_on() {
    let bus = TestBus::start();
    let net = client(&bus, Service::Net).await;
    let server = Server::new(net, 8)
        .serve::<NetEgressSet, _, _>(|_, _| async { Err(Error::not_found("no such lease").hint("look")) })
        .serve::<NetLeaseRelease, _, _>(|_, _| async { panic!("what a pity") })
        .serve::<NetHostShow, _, _>(|context, _: GetNetHost| async move {
            assert_eq!(context.caller, Service::Gateway);
            Err(Error::new(Code::ResourceExhausted, "x".repeat(100_000)))
        });
    let running = run(server).await;
    let vm = client(&bus, Service::Vm).await;
    let set = SetEgress { vm: VmId::new(), egress: Egress::Open };
    for _ in 0..2 {
        let error = vm.call::<NetEgressSet>(&set).await.unwrap_err();
        assert_eq!(error, Error::not_found("no such lease").hint("look"));
        let error = vm.call::<NetLeaseRelease>(&release()).await.unwrap_err();
        assert_eq!(error.code, Code::Internal);
        assert!(error.message.contains("net.lease.release panicked: what a pity"), "{error}");
    }
    let gateway = client(&bus, Service::Gateway).await;
    let error = gateway.call::<NetHostShow>(&GetNetHost {}).await.unwrap_err();
    assert_eq!(error.code, Code::ResourceExhausted);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_not_running_is_named() {
    let bus = TestBus::start();
    let gateway = client(&bus, Service::Gateway).await;
    let error = gateway.call::<NetHostShow>(&GetNetHost {}).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.starts_with("bothy-net-agent is not running"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_a_moment_later_is_waited_for() {
    let bus = TestBus::start();
    let count = Arc::new(AtomicUsize::new(0));
    let vm = client(&bus, Service::Vm).await;
    let call = tokio::spawn(async move { vm.call::<NetLeaseRelease>(&release()).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let running = run(counting(client(&bus, Service::Net).await, &count, None)).await;
    call.await.unwrap().unwrap();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_deadline_has_passed_is_not_executed() {
    let bus = TestBus::start();
    let (count, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let net = client(&bus, Service::Net).await;
    let server = {
        let (count, gate) = (Arc::clone(&count), Arc::clone(&gate));
        // One at a time: the second request waits behind the first until its deadline has passed.
        Server::new(net, 1).serve::<NetHostShow, _, _>(move |_, _| {
            let (count, gate) = (Arc::clone(&count), Arc::clone(&gate));
            async move {
                count.fetch_add(1, Ordering::SeqCst);
                gate.notified().await;
                Err::<NetHost, _>(Error::invalid("done"))
            }
        })
    };
    let running = run(server).await;
    let gateway = client(&bus, Service::Gateway).await;
    let first = tokio::spawn({
        let gateway = gateway.clone();
        async move { gateway.call::<NetHostShow>(&GetNetHost {}).await }
    });
    while count.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let short = CallOptions { timeout: Some(Duration::from_millis(100)), ..CallOptions::default() };
    let error = gateway.call_with::<NetHostShow>(&GetNetHost {}, short).await.unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
    gate.notify_one();
    assert_eq!(first.await.unwrap().unwrap_err().code, Code::InvalidArgument);
    running.stop().await;
    assert_eq!(count.load(Ordering::SeqCst), 1, "the expired one was dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_request_does_not_hold_up_others() {
    let bus = TestBus::start();
    let (count, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let server = counting(client(&bus, Service::Net).await, &count, Some(Arc::clone(&gate)))
        .serve::<NetEgressSet, _, _>(|_, _| async { Err(Error::invalid("at once")) });
    let running = run(server).await;
    let vm = client(&bus, Service::Vm).await;
    let slow = tokio::spawn({
        let vm = vm.clone();
        async move { vm.call::<NetLeaseRelease>(&release()).await }
    });
    while count.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let set = SetEgress { vm: VmId::new(), egress: Egress::Open };
    assert_eq!(vm.call::<NetEgressSet>(&set).await.unwrap_err().message, "at once");
    // A server that stops lets it finish.
    running.stop.cancel();
    gate.notify_one();
    slow.await.unwrap().unwrap();
    running.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_survive_a_restart_of_the_bus() {
    let mut bus = TestBus::start();
    let (count, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let running = run(counting(client(&bus, Service::Net).await, &count, Some(Arc::clone(&gate)))).await;
    let vm = client(&bus, Service::Vm).await;
    let call = tokio::spawn({
        let vm = vm.clone();
        async move { vm.call::<NetLeaseRelease>(&release()).await }
    });
    while count.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    bus.restart();
    gate.notify_one();
    call.await.unwrap().unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1, "the repeat got the first one's reply");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stock_service_verbs_answer() {
    let bus = TestBus::start();
    let running = run(counting(client(&bus, Service::Net).await, &Arc::default(), None)).await;
    let seed = fs_err::read_to_string(bus.config.bus_seed(Service::Gateway)).unwrap();
    let raw = async_nats::ConnectOptions::with_nkey(seed)
        .custom_inbox_prefix("_INBOX_bothy_local_gateway")
        .connect(bus.config.bus_url())
        .await
        .unwrap();
    for (verb, word) in [("PING", "ping_response"), ("INFO", "lease-release"), ("STATS", "num_requests")] {
        for subject in [format!("$SRV.{verb}"), format!("$SRV.{verb}.bothy-net-agent")] {
            let reply = raw.request(subject, "".into()).await.unwrap();
            let text = String::from_utf8(reply.payload.to_vec()).unwrap();
            assert!(text.contains(word) && text.contains("bothy-net-agent"), "{text}");
        }
    }
    running.stop().await;
}

fn event(op: OpId, seq: u64, what: OpEventKind) -> OpEvent {
    OpEvent { op, seq, at_us: seq * 10, what }
}

fn stage(n: u64) -> OpEventKind {
    OpEventKind::StageStarted { stage: format!("stage_{n}") }
}

fn finished() -> OpEventKind {
    OpEventKind::Finished { state: OpState::Succeeded, error: None, result: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_watcher_sees_every_event_once_from_the_first() {
    let bus = TestBus::start();
    let gateway = client(&bus, Service::Gateway).await;
    let vm = client(&bus, Service::Vm).await;
    let (op, other) = (OpId::new(), OpId::new());
    let error = vm.publish_op_event(&event(op, 0, stage(0))).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "no stream yet: {error}");
    gateway.ensure_ops_stream().await.unwrap();
    gateway.ensure_ops_stream().await.unwrap();
    for seq in 0..5 {
        vm.publish_op_event(&event(op, seq, stage(seq))).await.unwrap();
        vm.publish_op_event(&event(op, seq, stage(seq))).await.unwrap();
        vm.publish_op_event(&event(other, seq, stage(seq))).await.unwrap();
    }
    let early = gateway.watch_op(op).await.unwrap();
    vm.publish_op_event(&event(op, 5, finished())).await.unwrap();
    let late = gateway.watch_op(op).await.unwrap();
    for watch in [early.boxed(), late.boxed()] {
        let events: Vec<OpEvent> = watch.map(Result::unwrap).collect().await;
        assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert!(events.iter().all(|e| e.op == op));
    }
    let error = vm.watch_op(op).await.map(|_| ()).unwrap_err();
    assert_eq!(error.code, Code::PermissionDenied);
    let net = client(&bus, Service::Net).await;
    let error = net.publish_op_event(&event(op, 6, stage(6))).await.unwrap_err();
    assert_eq!(error.code, Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_survives_a_restart_of_the_bus() {
    let mut bus = TestBus::start();
    let gateway = client(&bus, Service::Gateway).await;
    let vm = client(&bus, Service::Vm).await;
    gateway.ensure_ops_stream().await.unwrap();
    let op = OpId::new();
    vm.publish_op_event(&event(op, 0, stage(0))).await.unwrap();
    let mut watch = gateway.watch_op(op).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().seq, 0);
    bus.kill();
    let publisher = tokio::spawn(async move {
        for (seq, what) in [(1, stage(1)), (2, finished())] {
            while let Err(e) = vm.publish_op_event(&event(op, seq, what.clone())).await {
                assert_eq!(e.code, Code::Unavailable, "{e}");
            }
        }
    });
    bus.restart();
    assert_eq!(watch.next().await.unwrap().unwrap().seq, 1);
    assert_eq!(watch.next().await.unwrap().unwrap().seq, 2);
    assert!(watch.next().await.is_none());
    publisher.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_identity_is_refused_at_once() {
    let bus = TestBus::start();
    let stranger = nkeys::KeyPair::new_user().seed().unwrap();
    fs_err::write(bus.config.bus_seed(Service::Vm), stranger).unwrap();
    let error = Client::connect(&bus.config, Service::Vm).await.unwrap_err();
    assert_eq!(error.code, Code::PermissionDenied, "{error}");
    fs_err::remove_file(bus.config.bus_seed(Service::Vm)).unwrap();
    let error = Client::connect(&bus.config, Service::Vm).await.unwrap_err();
    assert_eq!(error.code, Code::FailedPrecondition, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_start_before_the_bus() {
    let mut bus = TestBus::start();
    bus.kill();
    let config = bus.config.clone();
    let connecting = tokio::spawn(async move { Client::connect(&config, Service::Vm).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    bus.restart();
    connecting.await.unwrap().unwrap().drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_serve_what_belongs_to_another() {
    let bus = TestBus::start();
    let net = client(&bus, Service::Net).await;
    let server = Server::new(net, 1).serve::<VmShow, _, _>(|_, _| async { Err(Error::invalid("no")) });
    let error = server.run(CancellationToken::new()).await.unwrap_err();
    assert!(error.message.contains("cannot serve vm.vm.show"), "{error}");
    assert_eq!(VmStop::SERVICE, Service::Vm);
}
