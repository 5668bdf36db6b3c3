//! Pulls and imports that go wrong, are stopped, or lose their agent: nothing is left of them but what the next one goes on with.

use crate::{
    host::{Host, MIB, PATIENCE, ended},
    registry::{Behind, Registry, tar},
};
use bothy_bus::Client;
use bothy_contract::{
    Code, ImageName, OpId,
    image::ImageRef,
    intake::{IntakeSource, OpenIntake},
    methods::{ImageIntakeOpen, ImageOpCancel, ImageResolve, ImageShow},
    op::{Begun, OpRef, OpState},
};
use bothy_tickets::{FrameReader, FrameWriter};
use serde_json::json;
use std::{path::PathBuf, time::Duration};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

type Stream = (FrameReader<OwnedReadHalf>, FrameWriter<OwnedWriteHalf>);

async fn open(gateway: &Client, image: &str, source: IntakeSource) -> Stream {
    let image = image.parse().unwrap();
    let ask = OpenIntake { image, source, kernel: None, force: false, owner: 0 };
    let ticket = gateway.call::<ImageIntakeOpen>(&ask).await.unwrap();
    let (read, write) = bothy_tickets::connect(&ticket).await.unwrap().into_split();
    (FrameReader::new(read), FrameWriter::new(write))
}

async fn pull(gateway: &Client, registry: &Registry, tag: &str) -> OpId {
    let reference = format!("{}/team/x:{tag}", registry.at);
    let (mut told, mut send) =
        open(gateway, "pulled", IntakeSource::Registry { reference, insecure_http: false }).await;
    send.end(&json!({})).await.unwrap();
    told.report::<Begun>().await.unwrap().op
}

pub(crate) async fn import(gateway: &Client, image: &str, archive: &[u8]) -> OpId {
    let (mut told, mut send) = open(gateway, image, IntakeSource::Archive { name: "a tar".into() }).await;
    for piece in archive.chunks(bothy_tickets::MAX_DATA) {
        send.data(piece).await.unwrap();
    }
    send.end(&json!({})).await.unwrap();
    told.report::<Begun>().await.unwrap().op
}

/// The blobs that came from registries, whole and not.
fn blobs(host: &Host) -> Vec<String> {
    let entries = fs_err::read_dir(host.home().join("blobs")).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until so much of a blob has come.
async fn came(host: &Host, sha256: &str, bytes: usize) {
    let part = host.home().join("blobs").join(format!("{sha256}.part"));
    let there = async {
        while fs_err::metadata(&part).map_or(0, |meta| meta.len()) < bytes as u64 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, there).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_sends_is_bounded_and_is_what_was_asked_for() {
    let (host, gateway, _) = Host::start().await;
    let registry = Registry::start();
    let layer = tar(3);
    let digest = registry.image("good", &layer);

    registry.manifest("endless", Behind::Endless(vec![b' '; 1 << 20]));
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 3,
        "digest": format!("sha256:{digest}"), "platform": { "architecture": "riscv64", "os": "linux" },
    }] });
    registry.manifest("other-machines", Behind::All(index.to_string().into_bytes()));
    for (tag, code, why) in [
        ("endless", Code::ResourceExhausted, "is larger than 4 MiB"),
        ("other-machines", Code::FailedPrecondition, "it has: linux/riscv64"),
        ("none", Code::NotFound, "has no image"),
    ] {
        let op = pull(&gateway, &registry, tag).await;
        let record = ended(&gateway, op).await;
        let error = record.error.unwrap();
        assert!(error.message.contains(why) && error.code == code, "{error:?}");
    }
    // Of an answer without end no more was taken than the bound and what the sockets hold.
    let sent = registry.sent();
    assert!(sent < 64 << 20, "{sent} bytes");
    assert_eq!(blobs(&host), [""; 0]);

    // One that always breaks off at the same place is given up, and what came of it is kept.
    registry.blob(&digest, Behind::Cut(layer.clone(), 1 << 20));
    let op = pull(&gateway, &registry, "good").await;
    let error = ended(&gateway, op).await.error.unwrap();
    assert_eq!(error.code, Code::Unavailable, "{error:?}");
    assert_eq!(registry.asked(&digest), [0, MIB as usize, MIB as usize, MIB as usize]);
    assert!(blobs(&host).contains(&format!("{digest}.part")));

    // One that was altered behind that is refused, and is not gone on with the next time.
    let mut altered = layer.clone();
    altered[2 << 20] ^= 1;
    registry.blob(&digest, Behind::All(altered));
    let op = pull(&gateway, &registry, "good").await;
    let error = ended(&gateway, op).await.error.unwrap();
    assert!(error.message.contains(&format!("should have sha256:{digest}")), "{error:?}");
    assert!(!blobs(&host).iter().any(|name| name.starts_with(&digest)));
    assert_eq!(host.builds_left(), Vec::<PathBuf>::new());
    let shown = ImageRef { image: "pulled".parse().unwrap() };
    assert_eq!(gateway.call::<ImageShow>(&shown).await.unwrap_err().code, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_stopped_or_loses_its_agent_leaves_what_the_next_one_goes_on_with() {
    bothy_testkit::require_root!();
    let (mut host, gateway, vm_agent) = Host::start().await;
    host.plant(ImageName::default_image().as_str());
    let registry = Registry::start();
    let layer = tar(12);
    let digest = registry.image("1", &layer);
    let mut from = vec![0];
    for (mib, kill) in [(3, false), (6, true), (9, false)] {
        let bytes = mib << 20;
        registry.blob(&digest, Behind::Stuck(layer.clone(), bytes));
        let op = pull(&gateway, &registry, "1").await;
        // The last piece may wait in memory for more.
        came(&host, &digest, bytes - (1 << 20)).await;
        if kill {
            host.agent = Host::spawn_after_kill(host.agent, &host.file);
            host.ready(&gateway).await;
        } else {
            gateway.call::<ImageOpCancel>(&OpRef { op }).await.unwrap();
        }
        let record = ended(&gateway, op).await;
        let expected = if kill { OpState::Failed } else { OpState::Cancelled };
        assert_eq!(record.state, expected, "{record:?}");
        assert_eq!(host.builds_left(), Vec::<PathBuf>::new());
        assert_eq!(blobs(&host).iter().filter(|name| name.ends_with(".part")).count(), 1);
        let part = host.home().join("blobs").join(format!("{digest}.part"));
        let has = fs_err::read(&part).unwrap();
        assert!(layer.starts_with(&has), "what came is what it is");
        from.push(has.len());
    }
    registry.blob(&digest, Behind::All(layer));
    let op = pull(&gateway, &registry, "1").await;
    let record = ended(&gateway, op).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    assert_eq!(registry.asked(&digest), from, "each went on where the one before broke off");
    assert!(blobs(&host).contains(&digest));
    vm_agent.call::<ImageResolve>(&ImageRef { image: "pulled".parse().unwrap() }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_loses_its_agent_leaves_nothing() {
    bothy_testkit::require_root!();
    let (mut host, gateway, vm_agent) = Host::start().await;
    host.plant(ImageName::default_image().as_str());
    let archive = tar(48);
    let incoming = host.home().join("incoming");
    let files = || fs_err::read_dir(&incoming).unwrap().count();

    // While it comes.
    let (_told, mut send) = open(&gateway, "imported", IntakeSource::Archive { name: "a tar".into() }).await;
    for piece in archive[..8 << 20].chunks(bothy_tickets::MAX_DATA) {
        send.data(piece).await.unwrap();
    }
    assert_eq!(files(), 1);
    host.agent = Host::spawn_after_kill(host.agent, &host.file);
    host.ready(&gateway).await;
    assert_eq!(files(), 0);

    // While an image is made of it, at several moments.
    for stage in ["layers", "flatten", "seeds"] {
        let op = import(&gateway, "imported", &archive).await;
        let begun = async {
            loop {
                let record =
                    gateway.call::<bothy_contract::methods::ImageOpShow>(&OpRef { op }).await.unwrap();
                let there = record.stages.iter().any(|s| s.name == stage);
                if record.state.is_final() || there {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, begun).await.unwrap();
        host.agent = Host::spawn_after_kill(host.agent, &host.file);
        host.ready(&gateway).await;
        let record = ended(&gateway, op).await;
        assert_eq!(host.builds_left(), Vec::<PathBuf>::new(), "{stage}");
        assert_eq!(files(), 0);
        let shown = ImageRef { image: "imported".parse().unwrap() };
        if record.state == OpState::Succeeded {
            // It was done before it was struck: then it is whole.
            vm_agent.call::<ImageResolve>(&shown).await.unwrap();
            fs_err::remove_dir_all(host.home().join("store/images/imported")).unwrap();
        } else {
            assert_eq!(gateway.call::<ImageShow>(&shown).await.unwrap_err().code, Code::NotFound);
        }
    }
    let op = import(&gateway, "imported", &archive).await;
    let record = ended(&gateway, op).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
}
