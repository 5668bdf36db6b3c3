//! Prunes that are killed at whatever moment: what images and VMs need is there afterwards, and the next prune takes the rest.

use crate::{
    bus::answer_for_vms,
    host::{Host, ended},
    pulling::import,
    registry::tar,
};
use bothy_bus::Client;
use bothy_contract::{
    ImageName, VmId,
    catalogue::{PruneImages, Pruned, Verified, VerifyImages},
    image::{ImageManifest, PrepareRootfs},
    methods::{ImagePrune, ImageRootfsPrepare, ImageShow, ImageVerify},
    op::OpState,
    vm::{Shape, VmRecord},
};
use fs_err as fs;
use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// How many blobs nobody has, so that a prune takes a while.
const GARBAGE: usize = 2000;
/// How often a prune is struck at most, and how often within its work it shall have been.
const ROUNDS: u64 = 30;
const WITHIN: usize = 2;

async fn prune(gateway: &Client) -> Result<Pruned, bothy_contract::Error> {
    gateway.call::<ImagePrune>(&PruneImages { dry_run: false, all: true }).await
}

/// An image that is another in all but its name, and so shares all its blobs.
fn copy(images: &Path, from: &ImageManifest, name: &str) {
    let to = images.join(name);
    fs::create_dir(&to).unwrap();
    for artifact in from.artifacts.values() {
        fs::hard_link(images.join(from.name.as_str()).join(&artifact.file), to.join(&artifact.file)).unwrap();
    }
    let manifest = ImageManifest { name: name.parse().unwrap(), ..from.clone() };
    fs::write(to.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

/// The blobs and how many links each has.
fn blobs(store: &Path) -> BTreeMap<PathBuf, u64> {
    let entries = fs::read_dir(store.join("blobs")).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.path(), entry.metadata().unwrap().nlink())).collect()
}

fn garbage(store: &Path) -> usize {
    blobs(store).values().filter(|links| **links == 1).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_that_is_killed_loses_nothing_and_the_next_one_takes_the_rest() {
    bothy_testkit::require_root!();
    let (mut host, gateway, vm_agent) = Host::start().await;
    host.plant(ImageName::default_image().as_str());
    let op = import(&gateway, "kept", &tar(2)).await;
    assert_eq!(ended(&gateway, op).await.state, OpState::Succeeded);
    let image: ImageName = "kept".parse().unwrap();
    let show = bothy_contract::image::ImageRef { image: image.clone() };
    let kept = gateway.call::<ImageShow>(&show).await.unwrap();
    let vm = VmRecord::new(VmId::new(), "web".parse().unwrap(), 0, image.clone(), Shape::default());
    let _serving = answer_for_vms(vm_agent.clone(), vec![vm]);
    while prune(&gateway).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let store = host.home().join("store");
    let images = store.join("images");
    let uid = host.bus.config.vm.uid_base + 1;
    let (mut vms, mut within) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        for n in 0..GARBAGE {
            fs::write(store.join("blobs").join(format!("{:064x}", n)), "nobody's").unwrap();
        }
        for n in 0..8 {
            let name = format!("gone-{n}");
            if !images.join(&name).exists() {
                copy(&images, &kept, &name);
            }
        }
        let ask =
            PrepareRootfs { vm: VmId::new(), image: image.clone(), uid, system_mib: 64, template: None };
        let (a, b, of) = (gateway.clone(), vm_agent.clone(), ask.clone());
        let pruned = tokio::spawn(async move { prune(&a).await });
        let created = tokio::spawn(async move { b.call::<ImageRootfsPrepare>(&of).await });
        // The first before it has begun, the others later and later.
        let later = if round == 0 { 0 } else { 9 + 3 * round };
        tokio::time::sleep(Duration::from_millis(later)).await;
        host.agent = Host::spawn_after_kill(host.agent, &host.file);
        // Both calls are of an agent that is gone: what they come to, now or after a while, is no matter unless it is a reply.
        let answered = tokio::time::timeout(Duration::from_millis(1), created).await;
        if matches!(answered, Ok(Ok(Ok(_)))) {
            vms.push(ask);
        }
        pruned.abort();
        host.ready(&gateway).await;
        let left = garbage(&store);
        within += usize::from(left > 0 && left < GARBAGE);

        let whole = gateway.call::<ImageVerify>(&VerifyImages { image: Some(image.clone()), owner: 0 }).await;
        let record = ended(&gateway, whole.unwrap().op).await;
        let verified: Vec<Verified> = serde_json::from_value(record.result.unwrap()).unwrap();
        assert!(verified.iter().all(Verified::is_whole), "{verified:?}");
        let names = fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().file_name());
        let hidden = names.filter(|name| name.to_string_lossy().starts_with('.')).count();
        assert_eq!(hidden, 0, "what was half removed is gone");

        prune(&gateway).await.unwrap();
        assert_eq!((garbage(&store), prune(&gateway).await.unwrap()), (0, Pruned::default()));
        assert!((0..8).all(|n| !images.join(format!("gone-{n}")).exists()));
        let all = blobs(&store);
        for artifact in kept.artifacts.values() {
            let own = fs::metadata(images.join("kept").join(&artifact.file)).unwrap();
            let blob = fs::metadata(store.join("blobs").join(&artifact.sha256)).unwrap();
            assert_eq!(own.ino(), blob.ino());
            assert!(all[&store.join("blobs").join(&artifact.sha256)] >= 2);
        }
        if within == WITHIN && !vms.is_empty() {
            break;
        }
    }
    assert!(within > 0, "no prune was struck within its work");
    // Each VM that was told so has its base, and is over the image's own.
    let rootfs = fs::metadata(images.join("kept/rootfs.ext4")).unwrap();
    for ask in &vms {
        let disks = vm_agent.call::<ImageRootfsPrepare>(ask).await.unwrap();
        assert_eq!(fs::metadata(disks.base).unwrap().ino(), rootfs.ino());
    }
    assert!(rootfs.nlink() >= 2 + vms.len() as u64, "{} links", rootfs.nlink());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_made_and_vms_that_begin_while_others_prune_are_whole() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    host.plant(ImageName::default_image().as_str());
    let stop = tokio_util::sync::CancellationToken::new();
    let (a, until) = (gateway.clone(), stop.clone());
    let pruning = tokio::spawn(async move {
        let mut count = 0;
        while !until.is_cancelled() {
            a.call::<ImagePrune>(&PruneImages { dry_run: false, all: false }).await.unwrap();
            count += 1;
        }
        count
    });
    for n in 0..4 {
        // The same content each time: its blobs are shared while they are collected.
        let image = format!("made-{n}");
        let op = import(&gateway, &image, &tar(1)).await;
        let record = ended(&gateway, op).await;
        assert_eq!(record.state, OpState::Succeeded, "{record:?}");
        let uid = host.bus.config.vm.uid_base + n;
        let image: ImageName = image.parse().unwrap();
        let ask =
            PrepareRootfs { vm: VmId::new(), image: image.clone(), uid, system_mib: 64, template: None };
        vm_agent.call::<ImageRootfsPrepare>(&ask).await.unwrap();
        let op =
            gateway.call::<ImageVerify>(&VerifyImages { image: Some(image), owner: 0 }).await.unwrap().op;
        let found: Vec<Verified> = serde_json::from_value(ended(&gateway, op).await.result.unwrap()).unwrap();
        assert!(found.iter().all(Verified::is_whole), "{found:?}");
        // What this one had alone is garbage from here on, under way or not.
        if n % 2 == 0 {
            fs::remove_dir_all(host.home().join("store/images").join(format!("made-{n}"))).unwrap();
        }
    }
    stop.cancel();
    assert!(pruning.await.unwrap() > 4);
    assert_eq!(
        gateway.call::<ImagePrune>(&PruneImages { dry_run: false, all: false }).await.unwrap().images,
        []
    );
    assert_eq!(garbage(&host.home().join("store")), 0);
}
