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

const STAGES: [&str; 9] = [
    "resolve_image",
    "acquire_network",
    "prepare_rootfs",
    "prepare_work_disk",
    "launch_vmm",
    "wait_guest",
    "personalise",
    "sync_identity",
    "wait_services",
];

/// The trace that the CLI's create began, once every process has sent its part of it.
fn complete_trace(receiver: &Receiver) -> Option<Vec<Span>> {
    let spans = receiver.spans();
    let root =
        spans.iter().find(|s| s.service == "bothy" && s.parent.is_empty() && s.name.contains("create"))?;
    let trace: Vec<Span> = spans.iter().filter(|s| s.trace == root.trace).cloned().collect();
    let services: BTreeSet<&str> = trace.iter().map(|s| s.service.as_str()).collect();
    let whole = PROCESSES.iter().all(|p| services.contains(p));
    let stages = STAGES.iter().all(|stage| trace.iter().any(|s| s.name == format!("stage.{stage}")));
    (whole && stages).then_some(trace)
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
        if let Some(trace) = complete_trace(&receiver) {
            break trace;
        }
        let seen: BTreeSet<_> = receiver.spans().into_iter().map(|s| (s.service, s.name)).collect();
        assert!(Instant::now() < deadline, "the trace is not complete: {seen:#?}\n{}", host.logs());
        std::thread::sleep(Duration::from_millis(200));
    };

    // A tree: one root, and everybody's parent is in it.
    let by_id: BTreeMap<_, _> = trace.iter().map(|s| (s.id.clone(), s)).collect();
    let roots: Vec<_> = trace.iter().filter(|s| s.parent.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{roots:#?}");
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
