//! Kernels, registered images and promotion, with real file systems.

use crate::host::{Host, MIB, ended};
use bothy_bus::Client;
use bothy_contract::{
    Code, ImageName, VmId,
    catalogue::{
        ImportKernel, KernelRef, KernelSource, ListKernels, PromoteImage, RegisterImage, Verified,
        VerifyImages,
    },
    image::{ImageManifest, ImageRef, InitStyle, PrepareWorkDisk},
    methods::{
        ImageOpCancel, ImagePromote, ImageRegister, ImageResolve, ImageShow, ImageVerify,
        ImageWorkDiskPrepare, KernelImport, KernelListAll, KernelRemove,
    },
    op::{OpRecord, OpRef, OpState},
};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

const RELEASE: &str = "6.1.0-9-test";

/// What passes for an unpacked kernel: an ELF file for x86-64 that says its release.
fn kernel(release: &str) -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18..20].copy_from_slice(&62_u16.to_le_bytes());
    elf.extend(format!("Linux version {release} (somebody@somewhere)\0").as_bytes());
    elf
}

/// A module that needs nothing: an ELF file with a `.modinfo` section.
fn module(release: &str) -> Vec<u8> {
    let info = format!("depends=\0vermagic={release} SMP \0");
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let names_at = 64 + info.len();
    let table = names_at + names.len();
    elf.extend(info.as_bytes());
    elf.extend(names);
    for (name, at, len) in [(0, 0, 0), (1, 64, info.len()), (10, names_at, names.len())] {
        let mut section = [0; 64];
        section[..4].copy_from_slice(&(name as u32).to_le_bytes());
        section[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
        section[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
        elf.extend(section);
    }
    elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
    for (at, value) in [(0x3a, 64_u16), (0x3c, 3), (0x3e, 2)] {
        elf[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    elf
}

/// `boot` and `usr/lib/modules` below `root`.
fn boot_files(root: &Path, release: &str, modules_of: &str) {
    let modules = root.join("usr/lib/modules").join(release);
    fs_err::create_dir_all(&modules).unwrap();
    fs_err::create_dir_all(root.join("boot")).unwrap();
    fs_err::write(root.join(format!("boot/vmlinuz-{release}")), kernel(release)).unwrap();
    for name in ["virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "overlay"] {
        fs_err::write(modules.join(format!("{name}.ko")), module(modules_of)).unwrap();
    }
}

struct Things {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
}

/// A root file system with a kernel, a home and data, made as anybody makes one.
fn things() -> Things {
    let dir = tempfile::tempdir().unwrap();
    fs_err::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let root = dir.path().join("root");
    boot_files(&root, RELEASE, RELEASE);
    for d in ["usr/sbin", "root/.ssh"] {
        fs_err::create_dir_all(root.join(d)).unwrap();
    }
    for link in ["lib", "sbin"] {
        std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link)).unwrap();
    }
    fs_err::write(root.join("root/.profile"), "the home's").unwrap();
    fs_err::write(root.join("sbin/init"), "#!/bin/sh\n").unwrap();
    let data: Vec<u8> = (0..24 * MIB).map(|i| (i % 251) as u8).collect();
    fs_err::write(root.join("data"), data).unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    let made = Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&root).arg(&rootfs).arg("64M").status();
    assert!(made.unwrap().success());
    Things { dir, rootfs }
}

fn register(t: &Things, image: &ImageName, kernel: KernelSource) -> RegisterImage {
    RegisterImage {
        image: image.clone(),
        rootfs: t.rootfs.clone(),
        kernel,
        initrd: None,
        init: None,
        wait: Vec::new(),
        force: false,
        owner: 0,
    }
}

async fn run_register(gateway: &Client, ask: &RegisterImage) -> OpRecord {
    let op = gateway.call::<ImageRegister>(ask).await.unwrap().op;
    ended(gateway, op).await
}

fn debugfs(image: &Path, request: &str) -> String {
    let out = Command::new("debugfs").args(["-R", request]).arg(image).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_file_system_is_registered_with_its_own_kernel_and_promoted() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    let (t, image) = (things(), "mine".parse::<ImageName>().unwrap());
    let ask = register(&t, &image, KernelSource::Rootfs);
    let record = run_register(&gateway, &ask).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    assert_eq!(host.builds_left(), Vec::<PathBuf>::new());
    let show = ImageRef { image: image.clone() };
    let manifest = gateway.call::<ImageShow>(&show).await.unwrap();
    assert!(!manifest.is_managed() && manifest.kernel_release == RELEASE);
    assert_eq!(manifest.init, InitStyle::Systemd, "it has an init of its own");
    let dir = host.home().join("store/images/mine");
    assert!(debugfs(&dir.join("work-seed.ext4"), "cat /.profile").contains("the home's"));
    vm_agent.call::<ImageResolve>(&show).await.unwrap();
    let taken = gateway.call::<ImageRegister>(&ask).await.unwrap_err();
    assert_eq!(taken.code, Code::AlreadyExists);

    // Its owner changes it: what was registered is not there any more.
    let mut data = fs_err::read(&t.rootfs).unwrap();
    data[40 * MIB as usize] ^= 1;
    fs_err::write(&t.rootfs, &data).unwrap();
    let err = vm_agent.call::<ImageResolve>(&show).await.unwrap_err();
    assert!(err.message.contains("was altered"), "{err}");
    assert!(err.hint.unwrap().contains("image register"), "what to do fits what it is");
    let promote = PromoteImage { image: image.clone(), owner: 0 };
    let op = gateway.call::<ImagePromote>(&promote).await.unwrap().op;
    let record = ended(&gateway, op).await;
    assert!(record.error.unwrap().message.contains("another one than it was"));
    assert_eq!(gateway.call::<ImageShow>(&show).await.unwrap(), manifest);
    data[40 * MIB as usize] ^= 1;
    fs_err::write(&t.rootfs, &data).unwrap();

    let op = gateway.call::<ImagePromote>(&promote).await.unwrap().op;
    let record = ended(&gateway, op).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    let promoted: ImageManifest = serde_json::from_value(record.result.unwrap()).unwrap();
    assert!(
        promoted.is_managed() && promoted.artifacts["rootfs"].sha256 == manifest.artifacts["rootfs"].sha256
    );
    fs_err::remove_file(&t.rootfs).unwrap();
    vm_agent.call::<ImageResolve>(&show).await.unwrap();
    let again = gateway.call::<ImagePromote>(&promote).await.unwrap_err();
    assert_eq!(again.code, Code::FailedPrecondition);
    let op = gateway.call::<ImageVerify>(&VerifyImages { image: Some(image), owner: 0 }).await.unwrap().op;
    let found: Vec<Verified> = serde_json::from_value(ended(&gateway, op).await.result.unwrap()).unwrap();
    assert!(found.iter().all(Verified::is_whole));
    drop(t.dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_is_cancelled_or_cut_off_leaves_the_image_as_it_was() {
    bothy_testkit::require_root!();
    let (mut host, gateway, vm_agent) = Host::start().await;
    let (t, image) = (things(), "mine".parse::<ImageName>().unwrap());
    let record = run_register(&gateway, &register(&t, &image, KernelSource::Rootfs)).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    let show = ImageRef { image: image.clone() };
    let before = gateway.call::<ImageShow>(&show).await.unwrap();
    let images = host.home().join("store/images");
    let names = || {
        let mut names: Vec<_> = fs_err::read_dir(&images).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let promote = PromoteImage { image, owner: 0 };
    let mut cancelled = false;
    for kill in [false, true] {
        // It may be done before it is struck; then it is whole, and there is nothing to cut off.
        let op = gateway.call::<ImagePromote>(&promote).await.unwrap().op;
        if kill {
            host.agent = Host::spawn_after_kill(host.agent, &host.file);
            host.ready(&gateway).await;
        } else {
            let _ = gateway.call::<ImageOpCancel>(&OpRef { op }).await;
        }
        let record = ended(&gateway, op).await;
        let now = gateway.call::<ImageShow>(&show).await.unwrap();
        assert_eq!(names(), ["mine"], "nothing is left beside");
        vm_agent.call::<ImageResolve>(&show).await.unwrap();
        if record.state == OpState::Succeeded {
            assert!(now.is_managed());
            let again = RegisterImage { force: true, ..register(&t, &now.name, KernelSource::Rootfs) };
            assert_eq!(run_register(&gateway, &again).await.state, OpState::Succeeded);
        } else {
            cancelled = true;
            let same: Vec<_> = now.artifacts.values().map(|a| (&a.sha256, &a.path)).collect();
            let was: Vec<_> = before.artifacts.values().map(|a| (&a.sha256, &a.path)).collect();
            assert!(same[0] == was[0] && !now.is_managed(), "{record:?}");
        }
    }
    assert!(cancelled, "neither struck in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_are_imported_used_and_refused_where_they_do_not_fit() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    let (t, image) = (things(), "mine".parse::<ImageName>().unwrap());
    // A package of Debian's own kind, made by Debian's own tool.
    let package = t.dir.path().join("package");
    boot_files(&package, RELEASE, RELEASE);
    fs_err::create_dir(package.join("DEBIAN")).unwrap();
    let control =
        "Package: linux-image-test\nVersion: 1\nArchitecture: amd64\nMaintainer: a <a@b>\nDescription: x\n";
    fs_err::write(package.join("DEBIAN/control"), control).unwrap();
    let deb = t.dir.path().join("kernel.deb");
    let built = Command::new("dpkg-deb").arg("-b").args([&package, &deb]).output().unwrap();
    assert!(built.status.success(), "{built:?}");
    let import = |file: &Path, modules: Option<PathBuf>| ImportKernel {
        name: None,
        file: file.to_owned(),
        modules,
        owner: 0,
    };
    let run = async |ask: ImportKernel| {
        let op = gateway.call::<KernelImport>(&ask).await.unwrap().op;
        ended(&gateway, op).await
    };
    let record = run(import(&deb, None)).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    assert!(run(import(&deb, None)).await.error.unwrap().message.contains("already"));
    assert_eq!(host.builds_left(), Vec::<PathBuf>::new());
    let plain = t.dir.path().join("vmlinux");
    fs_err::write(&plain, kernel("6.2.0-other")).unwrap();
    let err = run(import(&plain, Some(package.join("usr/lib/modules").join(RELEASE)))).await.error.unwrap();
    assert!(err.message.contains(&format!("is a module of kernel {RELEASE}")), "{err}");
    assert_eq!(run(import(&plain, None)).await.state, OpState::Succeeded);
    let relative = gateway.call::<KernelImport>(&import(Path::new("x"), None)).await.unwrap_err();
    assert_eq!(relative.code, Code::InvalidArgument);

    let name: bothy_contract::KernelName = RELEASE.parse().unwrap();
    let record = run_register(&gateway, &register(&t, &image, KernelSource::Catalogue(name.clone()))).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    vm_agent.call::<ImageResolve>(&ImageRef { image: image.clone() }).await.unwrap();
    let list = gateway.call::<KernelListAll>(&ListKernels {}).await.unwrap().kernels;
    let told: Vec<_> = list.iter().map(|k| (k.manifest.release.as_str(), k.used_by.len())).collect();
    assert_eq!(told, [(RELEASE, 1), ("6.2.0-other", 0)]);
    let err = gateway.call::<KernelRemove>(&KernelRef { kernel: name }).await.unwrap_err();
    assert!(err.message.contains("is used by image mine"), "{err}");
    gateway.call::<KernelRemove>(&KernelRef { kernel: "6.2.0-other".parse().unwrap() }).await.unwrap();

    let bad = t.dir.path().join("not-ext4");
    fs_err::write(&bad, vec![0; 4096]).unwrap();
    let ask = RegisterImage { rootfs: bad, ..register(&t, &"bad".parse().unwrap(), KernelSource::Rootfs) };
    let err = gateway.call::<ImageRegister>(&ask).await.unwrap_err();
    assert!(err.message.contains("is not an ext4 file system"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_goes_on_without_its_seed_and_the_seed_comes_back_once() {
    bothy_testkit::require_root!();
    let (host, gateway, vm_agent) = Host::start().await;
    let (t, image) = (things(), "mine".parse::<ImageName>().unwrap());
    let record = run_register(&gateway, &register(&t, &image, KernelSource::Rootfs)).await;
    assert_eq!(record.state, OpState::Succeeded, "{record:?}");
    let uid = host.bus.config.vm.uid_base + 1;
    let prepare = async || {
        let ask =
            PrepareWorkDisk { vm: VmId::new(), image: image.clone(), uid, work_mib: 128, placeholder: false };
        vm_agent.call::<ImageWorkDiskPrepare>(&ask).await.unwrap()
    };
    let dir = host.home().join("store/images/mine");
    let seed = dir.join("work-seed.ext4");
    assert!(["reflink", "copy"].contains(&prepare().await.how.as_str()));
    let edit = |change: &dyn Fn(&mut ImageManifest)| {
        let path = dir.join("manifest.json");
        let mut manifest: ImageManifest = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
        change(&mut manifest);
        fs_err::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    };
    for (what, why) in [(0, "is missing"), (1, "was altered"), (2, "is stale")] {
        match what {
            0 => fs_err::remove_file(&seed).unwrap(),
            1 => {
                // As long as before: only the digest tells.
                let text = fs_err::read(&seed).unwrap();
                fs_err::remove_file(&seed).unwrap();
                fs_err::write(&seed, vec![7; text.len()]).unwrap();
            }
            _ => edit(&|manifest| manifest.seed_fingerprint = Some("of another key".to_owned())),
        }
        let disks = tokio::join!(prepare(), prepare(), prepare());
        for disk in [&disks.0, &disks.1, &disks.2] {
            assert!(debugfs(&disk.path, "cat /.profile").contains("the home's"), "{disk:?}");
        }
        assert!(disks.0.how.contains("made anew") && disks.0.how.contains(why), "{disks:?}");
        // It is back, and whoever comes now has it.
        while prepare().await.how.contains("made anew") {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let ask = VerifyImages { image: Some(image.clone()), owner: 0 };
        let op = gateway.call::<ImageVerify>(&ask).await.unwrap().op;
        let found: Vec<Verified> = serde_json::from_value(ended(&gateway, op).await.result.unwrap()).unwrap();
        assert!(found.iter().all(Verified::is_whole), "{found:?}");
    }
    for entry in fs_err::read_dir(host.home().join("disks")).unwrap() {
        let left: Vec<_> =
            fs_err::read_dir(entry.unwrap().path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["work.ext4"], "nothing is left of the slower way");
    }
    drop(t.dir);
}
