//! Snapshots by the device mapper, where there is one. `e2e/tests/root_disk_dm.rs` runs these in a guest, whose kernel has it:
//! modules come from the directory that `BOTHY_TEST_MODULES` names, and not to run is to fail there.

use super::{
    super::{
        MIB,
        tests::{Host, UID},
    },
    snapshot::prefix,
    tests::{cat, host, on, suite},
    *,
};
use crate::blockdev::{
    dm::Mapper,
    faults,
    loopdev::{count_below, left_below},
};
use bothy_testkit::require_root;
use std::{
    io::Write as _,
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    sync::Once,
};

/// Loads the modules of a directory in whatever order they take, once.
fn load_modules() {
    static LOADED: Once = Once::new();
    let Some(dir) = std::env::var_os("BOTHY_TEST_MODULES") else { return };
    LOADED.call_once(|| {
        let files = || fs_err::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let load = |path: &Path| {
            let file = fs_err::File::open(path).unwrap();
            nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty())
        };
        let mut last = Vec::new();
        // Each round loads those whose needs the rounds before have met.
        for _ in 0..files().count() {
            let failed = files().filter_map(|path| load(&path).err().map(|errno| (path, errno)));
            last = failed.filter(|(_, errno)| *errno != nix::errno::Errno::EEXIST).collect();
        }
        assert!(last.is_empty(), "{last:?}");
    });
}

/// Runs `work` in a directory of its own, and sees that nothing is left of it in the kernel.
fn with_mapper(work: impl FnOnce(&Path, &Mapper) + Send + 'static) {
    load_modules();
    match Mapper::open().unwrap() {
        Some(mapper) => on(None, move |root| {
            work(root, &mapper);
            assert_eq!((devices(root, &mapper), left_below(root)), (vec![], 0));
        }),
        None => {
            assert!(std::env::var_os("BOTHY_TEST_MODULES").is_none(), "the kernel has no device mapper");
            // Not `eprintln!`: the test runner swallows what a passing test prints through the macros.
            let test = std::thread::current();
            let test = test.name().unwrap_or_default();
            let why = "this host's kernel has no device mapper; e2e/tests/root_disk_dm.rs runs it in a guest";
            let _ = writeln!(io::stderr(), "NOT RUN HERE {test}: {why}");
        }
    }
}

/// The devices of the disks of a host below `root`.
fn devices(root: &Path, mapper: &Mapper) -> Vec<String> {
    let prefix = prefix(&root.join("disks"));
    mapper.names().unwrap().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

fn prepare(h: &Host, vm: VmId, mib: u64) -> Result<Rootfs, Error> {
    h.disks.rootfs(&h.store, vm, &h.image, UID, mib)
}

#[test]
fn a_snapshot_can_what_every_root_disk_can() {
    require_root!();
    with_mapper(|root, _| suite(RootDisk::DmSnapshot, root));
}

#[test]
fn a_snapshot_is_a_device_of_its_vms_user_and_no_template() {
    require_root!();
    with_mapper(|root, mapper| {
        let h = host(root, RootDisk::DmSnapshot);
        let vm = VmId::new();
        let made = prepare(&h, vm, 64).unwrap();
        let meta = fs_err::metadata(&made.base).unwrap();
        assert!(meta.file_type().is_block_device());
        assert_eq!((meta.uid(), meta.mode() & 0o777, &made.system), (UID, 0o600, &None));
        let cow = fs_err::metadata(h.root.join("disks").join(vm.to_string()).join("root.cow")).unwrap();
        assert_eq!((cow.uid(), cow.mode() & 0o777), (0, 0o600));
        assert_eq!((devices(root, mapper).len(), count_below(root)), (2, 3));
        let refused = h.disks.freeze(vm).unwrap_err();
        assert!(refused.message.contains("dm-snapshot"), "{refused}");
        assert_eq!(prepare(&h, vm, 64).unwrap(), made, "and is what it was");
        h.disks.release(vm).unwrap();
    });
}

#[test]
fn no_failing_call_leaks_a_device() {
    require_root!();
    with_mapper(|root, mapper| {
        let h = host(root, RootDisk::DmSnapshot);
        let (made, calls) = faults::with(None, || prepare(&h, VmId::new(), 64));
        made.unwrap();
        assert!(calls > 20, "{calls}");
        h.disks.release(h.disks.list().unwrap()[0]).unwrap();
        for call in 0..calls {
            let (failed, _) = faults::with(Some(call), || prepare(&h, VmId::new(), 64));
            let failed = failed.expect_err("a call failed");
            assert!(failed.message.contains("failed on request"), "{failed}");
            assert_eq!(devices(root, mapper), [""; 0], "{failed}");
            assert_eq!(left_below(root), 0, "{failed}");
            assert_eq!(h.disks.list().unwrap(), [], "{failed}");
        }

        // A growth that fails leaves the disk as it was for the guest, and can be done again.
        let vm = VmId::new();
        let node = prepare(&h, vm, 64).unwrap().base;
        h.disks.work(&h.store, vm, &h.image, UID, 16).unwrap();
        let size = || {
            use std::io::Seek as _;
            fs_err::File::open(&node).unwrap().seek(io::SeekFrom::End(0)).unwrap() / MIB
        };
        let mut mib = 64;
        for call in 0.. {
            let (grown, calls) = faults::with(Some(call), || h.disks.grow(vm, 16, mib + 1));
            if call == calls {
                grown.unwrap();
                break;
            }
            grown.unwrap_err();
            assert!((mib..=mib + 1).contains(&size()));
            h.disks.usage(&[vm]).unwrap();
            mib += 2;
            h.disks.grow(vm, 16, mib).unwrap();
            assert_eq!((size(), count_below(root)), (mib, 3));
        }

        // A removal that fails can be done again.
        for call in 0.. {
            let (gone, calls) = faults::with(Some(call), || h.disks.release(vm));
            if call == calls {
                gone.unwrap();
                break;
            }
            gone.unwrap_err();
        }
        assert_eq!(h.disks.list().unwrap(), []);
    });
}

#[test]
fn devices_are_found_with_every_record_lost_and_when_the_host_has_started_since() {
    require_root!();
    with_mapper(|root, mapper| {
        let h = host(root, RootDisk::DmSnapshot);
        let (lost, kept) = (VmId::new(), VmId::new());
        prepare(&h, lost, 64).unwrap();
        let node = prepare(&h, kept, 64).unwrap().base;
        let file = fs_err::File::options().write(true).open(&node).unwrap();
        file.file().write_all_at(b"the guest's", 3 * MIB).unwrap();
        file.file().write_all_at(b"the guest's", 60 * MIB).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let home = |vm: VmId| h.root.join("disks").join(vm.to_string());

        fs_err::remove_dir_all(home(lost)).unwrap();
        assert_eq!(devices(root, mapper).len(), 4);
        h.disks.sweep().unwrap();
        assert_eq!(devices(root, mapper).len(), 2, "the other's");

        // As after a start of the host: the files are there, the devices are not, and the node is another's.
        for name in devices(root, mapper).iter().filter(|name| name.ends_with("-root")) {
            mapper.remove(name).unwrap();
        }
        for name in devices(root, mapper) {
            mapper.remove(&name).unwrap();
        }
        assert_eq!(left_below(root), 0);
        h.disks.sweep().unwrap();
        assert!(!node.exists());
        assert_eq!(prepare(&h, kept, 64).unwrap().base, node);
        let file = fs_err::File::open(&node).unwrap();
        for at in [3, 60] {
            let mut text = [0; 11];
            file.file().read_exact_at(&mut text, at * MIB).unwrap();
            assert_eq!(&text, b"the guest's");
        }
        assert_eq!(cat(&node, "/kept"), b"what a root begins with");
        drop(file);

        // A removal, too, finds them by their names alone.
        fs_err::remove_dir_all(home(kept)).unwrap();
        h.disks.release(kept).unwrap();
    });
}

#[test]
fn a_device_that_somebody_has_open_is_waited_for() {
    require_root!();
    with_mapper(|root, mapper| {
        let h = host(root, RootDisk::DmSnapshot);
        let vm = VmId::new();
        let held = fs_err::File::open(prepare(&h, vm, 64).unwrap().base).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(300));
                drop(held);
            });
            h.disks.release(vm).unwrap();
        });
        assert_eq!(devices(root, mapper), [""; 0]);
    });
}
