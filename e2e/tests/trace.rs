//! One create is one trace: from the CLI through the gateway, the bus and every agent, into the guest.

use bothy_e2e::{
    host::Host,
    otlp::{Receiver, Span},
};
use bothy_testkit::{Netns, require_root};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

const PROCESSES: [&str; 6] = [
    "bothy",
    "bothy-gateway",
    "bothy-vm-agent",
    "bothy-net-agent",
    "bothy-image-agent",
    "bothy-workspace-agent",
];

const STAGES: [&str; 10] = [
    "resolve_image",
    "acquire_network",
    "prepare_rootfs",
    "prepare_work_disk",
    "launch_vmm",
    "wait_guest",
    "personalise",
    "publish_dns",
    "sync_identity",
    "wait_services",
];

/// The spans of the create's trace so far.
fn trace_of_create(receiver: &Receiver) -> Vec<Span> {
    let spans = receiver.spans();
    let Some(create) = spans.iter().find(|s| s.name == "op.vm.create") else { return Vec::new() };
    spans.iter().filter(|s| s.trace == create.trace).cloned().collect()
}

/// What `trace` lacks: each process sends its part when its batch is full or its time is over.
fn missing(trace: &[Span]) -> Vec<String> {
    let processes =
        PROCESSES.iter().filter(|p| !trace.iter().any(|s| s.service == **p)).map(|p| (*p).to_owned());
    let stages = STAGES.iter().map(|stage| format!("stage.{stage}"));
    processes.chain(stages.filter(|name| !trace.iter().any(|s| s.name == *name))).collect()
}

#[test]
fn a_create_is_one_trace_over_all_processes_and_the_guest() {
    require_root!();
    let netns = Netns::new();
    let receiver = Receiver::start(&netns);
    let endpoint = receiver.endpoint.clone();
    let host = Host::start_inside(netns, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)], |_| {});
    host.create("traced");

    let deadline = Instant::now() + Duration::from_secs(60);
    let trace = loop {
        let trace = trace_of_create(&receiver);
        if missing(&trace).is_empty() {
            break trace;
        }
        let names: BTreeSet<_> = trace.iter().map(|s| format!("{} {}", s.service, s.name)).collect();
        assert!(
            Instant::now() < deadline,
            "{:?} not in the trace: {names:#?}\n{}",
            missing(&trace),
            host.logs()
        );
        std::thread::sleep(Duration::from_millis(200));
    };

    // A tree: one root, and everybody's parent is in it.
    let by_id: BTreeMap<_, _> = trace.iter().map(|s| (s.id.clone(), s)).collect();
    let roots: Vec<_> = trace.iter().filter(|s| s.parent.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{roots:#?}");
    assert_eq!(roots[0].service, "bothy", "it begins where the user typed");
    for span in trace.iter().filter(|s| !s.parent.is_empty()) {
        assert!(by_id.contains_key(&span.parent), "an orphan: {span:#?}");
        assert!(span.start <= span.end, "{span:#?}");
    }
    // Each process' work hangs below the stage that asked for it.
    let ancestors = |span: &Span| {
        let mut names = vec![];
        let mut at = span.parent.clone();
        while let Some(above) = by_id.get(&at) {
            names.push(above.name.clone());
            at = above.parent.clone();
        }
        names
    };
    for (service, stage) in [
        ("bothy-net-agent", "stage.acquire_network"),
        ("bothy-image-agent", "stage.prepare_rootfs"),
        ("bothy-workspace-agent", "stage.sync_identity"),
    ] {
        let below = trace.iter().any(|s| s.service == service && ancestors(s).iter().any(|n| n == stage));
        assert!(below, "nothing of {service} is below {stage}: {trace:#?}");
    }
    // The guest's boot is there with its own times.
    assert!(trace.iter().any(|s| s.name.starts_with("guest.")), "no step of the guest's boot: {trace:#?}");

    host.bothy(["vm", "delete", "traced", "--force"]).ok();
    host.finish();
}
