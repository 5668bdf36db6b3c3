//! What the agent answers, what it refuses, and what a cancelled build leaves.

use crate::host::{Host, MIB, PATIENCE, ended};
use bothy_bus::Client;
use bothy_contract::{
    Code, ImageName, OpId, VmId,
    catalogue::{PruneImages, Verified, VerifyImages},
    image::{
        BuildImage, GetDiskUsage, GrowDisks, ImageRef, ListDisks, ListImages, PrepareRootfs, PrepareWorkDisk,
        ReleaseDisks,
    },
    methods::{
        ImageBuild, ImageDisksGrow, ImageDisksList, ImageDisksRelease, ImageDisksUsage, ImageListAll,
        ImageOpCancel, ImageOpShow, ImagePrune, ImageRemove, ImageResolve, ImageRootfsPrepare, ImageShow,
        ImageVerify, ImageWorkDiskPrepare, VmListAll,
    },
    op::{OpRef, OpState, StageState},
    vm::{Shape, VmList, VmRecord},
};
use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

#[tokio::test(flavor = "multi_thread")]
async fn images_and_disks_over_the_bus() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    let image = host.plant("tiny");
    let list = gateway.call::<ImageListAll>(&ListImages {}).await.unwrap();
    assert_eq!(list.images.iter().map(|i| &i.name).collect::<Vec<_>>(), [&image]);
    let gone = ImageRef { image: "gone".parse().unwrap() };
    let err = gateway.call::<ImageShow>(&gone).await.unwrap_err();
    assert_eq!(err.code, Code::NotFound);
    assert!(err.hint.unwrap().contains("bothy image build gone"));

    let boot = vm_agent.call::<ImageResolve>(&ImageRef { image: image.clone() }).await.unwrap();
    for path in [&boot.kernel, &boot.initrd] {
        assert_eq!(fs_err::metadata(path).unwrap().mode() & 0o777, 0o644, "{}", path.display());
    }

    let (vm, uid) = (VmId::new(), host.bus.config.vm.uid_base + 3);
    let ask = PrepareRootfs { vm, image: image.clone(), uid, system_mib: 64, template: None };
    let rootfs = vm_agent.call::<ImageRootfsPrepare>(&ask).await.unwrap();
    let ask = PrepareWorkDisk { vm, image: image.clone(), uid, work_mib: 128, placeholder: false };
    let work = vm_agent.call::<ImageWorkDiskPrepare>(&ask).await.unwrap();
    for (path, mib) in [(rootfs.system.as_ref().unwrap(), 64), (&work.path, 128)] {
        let meta = fs_err::metadata(path).unwrap();
        assert_eq!((meta.uid(), meta.len(), meta.mode() & 0o777), (uid, mib * MIB, 0o600));
    }
    let root = PrepareWorkDisk { uid: 0, ..ask };
    let err = vm_agent.call::<ImageWorkDiskPrepare>(&root).await.unwrap_err();
    assert_eq!(err.code, Code::InvalidArgument);
    assert_eq!(vm_agent.call::<ImageDisksList>(&ListDisks {}).await.unwrap().vms, [vm]);

    let grow = GrowDisks { vm, work_mib: 256, system_mib: 64 };
    for _ in 0..2 {
        vm_agent.call::<ImageDisksGrow>(&grow).await.unwrap();
    }
    let less = GrowDisks { system_mib: 63, ..grow.clone() };
    let err = vm_agent.call::<ImageDisksGrow>(&less).await.unwrap_err();
    assert_eq!(err.code, Code::InvalidArgument);
    let ask = GetDiskUsage { vms: vec![vm, VmId::new()] };
    let usage = vm_agent.call::<ImageDisksUsage>(&ask).await.unwrap().disks;
    assert_eq!(usage.keys().collect::<Vec<_>>(), [&vm]);
    assert_eq!((usage[&vm].work_size, usage[&vm].system_size), (256 * MIB, 64 * MIB));
    assert!(usage[&vm].work_allocated < 2 * MIB, "{usage:?}");
    vm_agent.call::<ImageDisksRelease>(&ReleaseDisks { vm }).await.unwrap();
    let err = vm_agent.call::<ImageDisksGrow>(&grow).await.unwrap_err();
    assert_eq!(err.code, Code::NotFound);
    assert_eq!(vm_agent.call::<ImageDisksList>(&ListDisks {}).await.unwrap().vms, []);
}

/// The vm-agent's answer to who there is, with the vm-agent's own rights on the bus.
pub(crate) fn answer_for_vms(client: Client, vms: Vec<VmRecord>) -> tokio_util::sync::DropGuard {
    let stop = tokio_util::sync::CancellationToken::new();
    let until = stop.clone();
    let answer = move |_, _| {
        let vms = vms.clone();
        async move { Ok(VmList { vms }) }
    };
    tokio::spawn(async move {
        bothy_bus::Server::new(client, 1).serve::<VmListAll, _, _>(answer).run(until).await.unwrap();
    });
    stop.drop_guard()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_removed_once_no_vm_uses_it() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    let image = host.plant("tiny");
    let ask = ImageRef { image: image.clone() };
    // Nobody says who uses it: then nobody may say that nobody does.
    let err = gateway.call::<ImageRemove>(&ask).await.unwrap_err();
    assert!(err.code == Code::Unavailable && err.message.contains("which VMs use"), "{err:?}");

    let vm = VmRecord::new(VmId::new(), "web".parse().unwrap(), 0, image.clone(), Shape::default());
    let serving = answer_for_vms(vm_agent.clone(), vec![vm]);
    let err = loop {
        match gateway.call::<ImageRemove>(&ask).await.unwrap_err() {
            e if e.code == Code::Unavailable => tokio::time::sleep(Duration::from_millis(20)).await,
            e => break e,
        }
    };
    assert_eq!((err.code, err.message.as_str()), (Code::FailedPrecondition, "image tiny is used by VM web"));
    assert!(err.hint.unwrap().contains("bothy vm delete web"));
    let all = PruneImages { dry_run: false, all: true };
    assert_eq!(gateway.call::<ImagePrune>(&all).await.unwrap().images, []);
    drop(serving);

    let vm =
        VmRecord::new(VmId::new(), "web".parse().unwrap(), 0, ImageName::default_image(), Shape::default());
    let _serving = answer_for_vms(vm_agent, vec![vm]);
    let would = loop {
        match gateway.call::<ImagePrune>(&PruneImages { dry_run: true, all: true }).await {
            Ok(would) if !would.images.is_empty() => break would,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert_eq!(would.images, std::slice::from_ref(&image));
    gateway.call::<ImageShow>(&ask).await.unwrap();
    assert_eq!(gateway.call::<ImageRemove>(&ask).await.unwrap().images, [image]);
    assert_eq!(gateway.call::<ImageRemove>(&ask).await.unwrap_err().code, Code::NotFound);
    assert_eq!(fs_err::read_dir(host.home().join("store/images")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn verifying_is_an_operation_that_finds_what_is_damaged() {
    bothy_testkit::require_root!();
    let (host, gateway, _) = Host::start().await;
    let (good, bad) = (host.plant("good"), host.plant("bad"));
    fs_err::write(host.home().join("store/images/bad/kernel"), vec![1; MIB as usize]).unwrap();
    let op = gateway.call::<ImageVerify>(&VerifyImages { image: None, owner: 0 }).await.unwrap().op;
    let record = ended(&gateway, op).await;
    let found: Vec<Verified> = serde_json::from_value(record.result.unwrap()).unwrap();
    assert_eq!(
        found.iter().map(|v| (&v.image, v.is_whole())).collect::<Vec<_>>(),
        [(&bad, false), (&good, true)]
    );
    let gone = VerifyImages { image: Some("gone".parse().unwrap()), owner: 0 };
    assert_eq!(gateway.call::<ImageVerify>(&gone).await.unwrap_err().code, Code::NotFound);
}

/// How many processes work in `dir`, by their command lines.
fn tools_in(dir: &Path) -> usize {
    let dir = dir.join("store").into_os_string().into_string().unwrap();
    let lines = fs_err::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|p| fs_err::read(p.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(&dir)).count()
}

/// Waits until `op` is in its first stage and that has made something.
async fn under_way(host: &Host, gateway: &Client, op: OpId) {
    while host.builds_left().iter().all(|p| !p.join("tree").exists()) {
        let record = gateway.call::<ImageOpShow>(&OpRef { op }).await.unwrap();
        assert!(!record.state.is_final(), "{record:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_cancelled_or_cut_off_leaves_nothing() {
    bothy_testkit::require_root!();
    let (mut host, gateway, _) = Host::start().await;
    let ask = |recipe: &str| BuildImage { recipe: recipe.parse().unwrap(), force: false, owner: 0 };
    let err = gateway.call::<ImageBuild>(&ask("no-such-recipe")).await.unwrap_err();
    assert_eq!(err.code, Code::NotFound);

    let op = gateway.call::<ImageBuild>(&ask("debian")).await.unwrap().op;
    under_way(&host, &gateway, op).await;
    let second = gateway.call::<ImageBuild>(&ask("debian")).await.unwrap_err();
    assert!(second.message.contains(&op.to_string()), "{second}");
    gateway.call::<ImageOpCancel>(&OpRef { op }).await.unwrap();
    let record = ended(&gateway, op).await;
    assert_eq!(record.state, OpState::Cancelled, "{record:?}");
    assert!(record.stages.iter().all(|s| s.state == StageState::Undone), "{record:?}");
    assert_eq!(host.builds_left(), Vec::<PathBuf>::new());

    let op = gateway.call::<ImageBuild>(&ask("debian")).await.unwrap().op;
    under_way(&host, &gateway, op).await;
    host.agent = Host::spawn_after_kill(host.agent, &host.file);
    host.ready(&gateway).await;
    let record = ended(&gateway, op).await;
    assert_eq!(record.state, OpState::Failed, "{record:?}");
    // The tools of the agent that was killed went with it, or they would go on to write there.
    let gone = async {
        while tools_in(&host.home()) > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    assert_eq!(host.builds_left(), Vec::<PathBuf>::new());
}
