//! One suite for all backends, on the file systems that the host's kernel has: a plain directory, XFS and btrfs on loop devices.

use super::{
    super::{
        MIB,
        tests::{Host, UID, host_with},
    },
    *,
};
use crate::store::tests::replant;
use bothy_testkit::require_root;
use std::{
    io::Write as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    process::Command,
};

/// What the image's root has in `/kept`.
const KEPT: &[u8] = b"what a root begins with";

fn run(program: &str, args: &[&str]) -> String {
    let ran = Command::new(program).args(args).output();
    let ran = ran.unwrap_or_else(|e| panic!("cannot run {program}, `cargo xtask setup` installs it: {e}"));
    assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// Runs `work` with a directory on a file system of that kind, a loop device's where it is named, that only its thread sees.
pub(super) fn on(kind: Option<&'static str>, work: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs_err::create_dir(&root).unwrap();
        let Some(kind) = kind else { return work(&root) };
        let known = fs_err::read_to_string("/proc/filesystems").unwrap();
        if !known.lines().any(|line| line.trim() == kind) {
            // Not `eprintln!`: the test runner swallows what a passing test prints through the macros.
            let _ = writeln!(
                io::stderr(),
                "SKIPPED root disks on {kind}: this host's kernel has no such file system"
            );
            return;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let file = dir.path().join("disk");
        fs_err::File::create(&file).unwrap().set_len(512 * MIB).unwrap();
        let (file, at) = (file.to_str().unwrap(), root.to_str().unwrap());
        run(&format!("mkfs.{kind}"), &["-q", file]);
        // The device goes with the mount, and the mount with its namespace, whatever becomes of this process.
        run("mount", &["-t", kind, "-o", "loop", file, at]);
        work(&root);
        nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
    thread.join().unwrap();
}

/// A host whose image has a real root file system, as those that bothy builds.
pub(super) fn host(root: &Path, kind: RootDisk) -> Host {
    let h = host_with(root.to_owned(), kind);
    let (tree, file) = (root.join("tree"), h.store.dir_of(&h.image).join("rootfs.ext4"));
    fs_err::create_dir(&tree).unwrap();
    fs_err::write(tree.join("kept"), KEPT).unwrap();
    fs_err::write(tree.join("data"), vec![7; 12 * MIB as usize]).unwrap();
    fs_err::remove_file(&file).unwrap();
    make_rootfs(&tree, &file);
    replant(&h.store, &h.image);
    h
}

fn make_rootfs(tree: &Path, file: &Path) {
    let (tree, to) = (tree.to_str().unwrap(), file.to_str().unwrap());
    let features = "^has_journal,^resize_inode,^metadata_csum,^64bit";
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-O", features, "-m", "0", "-d", tree, to, "24m"]);
}

/// What a guest writes to, and a file that shows what is in the root of one that reads it.
fn parts(root: &Rootfs) -> (&Path, &Path) {
    (root.system.as_deref().unwrap_or(&root.base), &root.base)
}

pub(super) fn cat(disk: &Path, path: &str) -> Vec<u8> {
    let told = Command::new("debugfs").args(["-R", &format!("cat {path}")]).arg(disk).output().unwrap();
    told.stdout
}

pub(super) fn suite(kind: RootDisk, root: &Path) {
    let h = host(root, kind);
    let image = h.store.dir_of(&h.image).join("rootfs.ext4");
    let before = crate::digest::of_file(&image, &crate::digest::on).unwrap();
    let prepare = |vm, uid, mib| h.disks.rootfs(&h.store, vm, &h.image, uid, mib);

    // What cannot be made is refused, and leaves nothing.
    for (uid, mib) in [(0, 64), (UID, 0), (UID, MAX_MIB + 1)] {
        assert_eq!(prepare(VmId::new(), uid, mib).unwrap_err().code, Code::InvalidArgument);
    }
    assert_eq!(h.disks.list().unwrap(), []);

    // Two VMs have the image's root, each its own to write to.
    let (one, two) = (VmId::new(), VmId::new());
    let (a, b) = (prepare(one, UID, 64).unwrap(), prepare(two, UID + 1, 64).unwrap());
    assert_eq!(prepare(one, UID, 64).unwrap(), a, "again is the same");
    for (root, uid) in [(&a, UID), (&b, UID + 1)] {
        let (own, base) = parts(root);
        assert_eq!(cat(base, "/kept"), KEPT);
        let meta = fs_err::metadata(own).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (uid, 0o600));
        assert_eq!(root.system.is_some(), kind == RootDisk::Overlay);
        if kind != RootDisk::Overlay {
            run("e2fsck", &["-f", "-n", own.to_str().unwrap()]);
            assert!(crate::ext4::has_journal(own).unwrap(), "a guest may lose its power");
        }
    }
    let usage = h.disks.usage(&[one]).unwrap()[&one];
    assert_eq!((usage.system_size, usage.own_root), (64 * MIB, kind != RootDisk::Overlay));
    let write = |root: &Rootfs, text: &str| {
        let file = fs_err::File::options().write(true).open(parts(root).0).unwrap();
        file.file().write_all_at(text.as_bytes(), 40 * MIB + 5).unwrap();
        file.sync_all().unwrap();
    };
    let read = |root: &Rootfs| {
        let mut text = [0; 5];
        fs_err::File::open(parts(root).0).unwrap().file().read_exact_at(&mut text, 40 * MIB + 5).unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    };
    write(&a, "one's");
    write(&b, "two's");
    assert_eq!((read(&a), read(&b)), ("one's".into(), "two's".into()));
    assert_eq!(crate::digest::of_file(&image, &crate::digest::on).unwrap(), before, "the image is as it was");

    // It grows, keeps what is in it, and goes to another user with its VM's slot.
    h.disks.work(&h.store, one, &h.image, UID, 16).unwrap();
    h.disks.grow(one, 16, 100).unwrap();
    assert_eq!(h.disks.grow(one, 16, 99).unwrap_err().code, Code::InvalidArgument);
    assert_eq!(h.disks.usage(&[one]).unwrap()[&one].system_size, 100 * MIB);
    let kept = prepare(one, UID + 2, 100).unwrap();
    assert_eq!((&kept, read(&kept).as_str()), (&a, "one's"));
    assert_eq!(fs_err::metadata(parts(&kept).0).unwrap().uid(), UID + 2);
    assert_eq!(prepare(one, UID, 101).unwrap_err().code, Code::FailedPrecondition);

    // A VM keeps what it has when the host is set to something else meanwhile, and when its image is built anew.
    let other = if kind == RootDisk::Overlay { RootDisk::Copy } else { RootDisk::Overlay };
    let changed = h.with(other);
    fs_err::remove_dir_all(h.store.dir_of(&h.image)).unwrap();
    crate::store::tests::plant(&h.store, "a", 2 * MIB);
    assert_eq!(changed.rootfs(&h.store, one, &h.image, UID, 100).unwrap(), a);
    assert_eq!(cat(parts(&a).1, "/kept"), KEPT);

    // Removed whatever is there of it, and again is fine.
    for vm in [one, two, one, VmId::new()] {
        h.disks.release(vm).unwrap();
    }
    assert_eq!(h.disks.list().unwrap(), []);
}

/// A template's VMs begin as it was saved.
fn frozen(kind: RootDisk, root: &Path) {
    let h = host(root, kind);
    let maker = VmId::new();
    let made = h.disks.rootfs(&h.store, maker, &h.image, UID, 64).unwrap();
    let file = fs_err::File::options().write(true).open(parts(&made).0).unwrap();
    file.file().write_all_at(b"as saved", 40 * MIB).unwrap();
    h.disks.freeze(maker).unwrap();
    assert_eq!(h.disks.list().unwrap(), []);
    for _ in 0..2 {
        let vm = VmId::new();
        let made = h.disks.rootfs_of_template(maker, vm, UID, 64).unwrap();
        assert_eq!(h.disks.rootfs_of_template(maker, vm, UID, 64).unwrap(), made);
        let file = fs_err::File::options().read(true).write(true).open(parts(&made).0).unwrap();
        let mut text = [0; 8];
        file.file().read_exact_at(&mut text, 40 * MIB).unwrap();
        assert_eq!(&text, b"as saved");
        assert_eq!(cat(parts(&made).1, "/kept"), KEPT);
        file.file().write_all_at(b"another!", 40 * MIB).unwrap();
    }
    h.disks.forget_template(maker).unwrap();
    assert_eq!(h.disks.list().unwrap().len(), 2, "what began with it stays");
}

#[test]
fn overlays_and_copies_on_any_file_system() {
    require_root!();
    for kind in [RootDisk::Overlay, RootDisk::Copy] {
        on(None, move |root| suite(kind, root));
        on(None, move |root| frozen(kind, root));
    }
}

#[test]
fn all_that_xfs_and_btrfs_can() {
    require_root!();
    for file_system in ["xfs", "btrfs"] {
        on(Some(file_system), move |root| {
            for kind in [RootDisk::Overlay, RootDisk::Copy, RootDisk::Reflink] {
                for (name, test) in [("suite", suite as fn(RootDisk, &Path)), ("frozen", frozen)] {
                    let dir = root.join(format!("{name}-{}", kind.word()));
                    fs_err::create_dir(&dir).unwrap();
                    test(kind, &dir);
                }
            }
            assert_eq!(choose(RootDiskChoice::Auto, root, root), RootDisk::Reflink);
        });
    }
}

#[test]
fn a_clone_costs_no_room_where_extents_are_shared_and_is_refused_where_they_are_not() {
    require_root!();
    on(Some("xfs"), |root| {
        let h = host(root, RootDisk::Reflink);
        let free = || {
            rustix::fs::syncfs(fs_err::File::open(root).unwrap()).unwrap();
            let stat = rustix::fs::statvfs(root).unwrap();
            stat.f_bfree * stat.f_frsize
        };
        let clone = |mib| h.disks.rootfs(&h.store, VmId::new(), &h.image, UID, mib).unwrap().base;
        let before = free();
        let first = clone(64);
        let journal = before - free();
        assert!(journal < 20 * MIB, "{journal} bytes for a journal of 16 MiB");
        for _ in 0..8 {
            let more = clone(64);
            assert!(fs_err::read(&first).unwrap() == fs_err::read(more).unwrap());
        }
        let taken = before - free() - journal;
        assert!(taken < 8 * MIB, "{taken} bytes for 8 clones of 12 MiB and a journal of 16");
        // Each size has its own, and so has each image.
        assert_eq!(blocks(&clone(100)) * 4096, 100 * MIB);
        fs_err::write(root.join("tree/kept"), "another image").unwrap();
        let rootfs = h.store.dir_of(&h.image).join("rootfs.ext4");
        fs_err::remove_file(&rootfs).unwrap();
        make_rootfs(&root.join("tree"), &rootfs);
        replant(&h.store, &h.image);
        assert_eq!(cat(&clone(64), "/kept"), b"another image");
        let roots = || fs_err::read_dir(h.root.join("store/roots")).map_or(0, Iterator::count);
        assert_eq!(roots(), 3);
        h.disks.forget_images().unwrap();
        assert_eq!(roots(), 0);
        assert_eq!(cat(&first, "/kept"), KEPT);
        assert_eq!(cat(&clone(64), "/kept"), b"another image");
    });
    // tmpfs shares no extents, whatever the host's own file system can do.
    on(None, |root| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=200m", "tmpfs", root.to_str().unwrap()]);
        assert_eq!(choose(RootDiskChoice::Auto, root, root), RootDisk::Overlay);
        let h = host(root, RootDisk::Reflink);
        let refused = h.disks.rootfs(&h.store, VmId::new(), &h.image, UID, 64).unwrap_err();
        assert_eq!(refused.code, Code::FailedPrecondition, "{refused}");
        assert!(refused.message.contains("cannot be reflink here"), "{refused}");
        assert!(refused.hint.unwrap().contains("root_disk"));
        assert_eq!(h.disks.list().unwrap(), []);
        nix::mount::umount2(root, nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_full_disk_leaves_nothing_of_a_root() {
    require_root!();
    on(Some("btrfs"), |root| {
        let h = host(root, RootDisk::Copy);
        run("truncate", &["-s", "0", root.join("tree/data").to_str().unwrap()]);
        let ballast = fs_err::File::create(root.join("ballast")).unwrap();
        let mib = vec![1; MIB as usize];
        while std::io::Write::write_all(&mut &ballast, &mib).is_ok() {}
        let full = h.disks.rootfs(&h.store, VmId::new(), &h.image, UID, 64).unwrap_err();
        assert_eq!(full.code, Code::ResourceExhausted, "{full}");
        assert_eq!(h.disks.list().unwrap(), []);
    });
}

#[test]
fn a_broken_rootfs_is_said_and_leaves_nothing() {
    require_root!();
    on(None, |root| {
        let h = host(root, RootDisk::Copy);
        fs_err::write(h.store.dir_of(&h.image).join("rootfs.ext4"), vec![9; MIB as usize]).unwrap();
        replant(&h.store, &h.image);
        let err = h.disks.rootfs(&h.store, VmId::new(), &h.image, UID, 64).unwrap_err();
        assert!(
            err.message.contains("of image a could not be grown") && err.message.contains("resize2fs"),
            "{err}"
        );
        assert!(err.hint.unwrap().contains("image verify a"));
        assert_eq!(h.disks.list().unwrap(), []);
    });
}

fn blocks(disk: &Path) -> u64 {
    let told = run("dumpe2fs", &["-h", disk.to_str().unwrap()]);
    let blocks = told.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap();
    blocks.trim().parse().unwrap()
}

/// Images that were imported have another writer of file systems than those that were built.
#[test]
fn the_root_of_an_imported_image_is_writable_and_grows() {
    require_root!();
    on(None, |root| {
        let h = host(root, RootDisk::Copy);
        let rootfs = h.store.dir_of(&h.image).join("rootfs.ext4");
        let (tree, tar) = (root.join("tree"), root.join("tar"));
        run("tar", &["-C", tree.to_str().unwrap(), "-cf", tar.to_str().unwrap(), "."]);
        fs_err::remove_file(&rootfs).unwrap();
        let layer = bothy_flatten::Layer {
            file: tar,
            offset: 0,
            length: None,
            digest: None,
            diff_id: None,
            whiteouts: false,
        };
        bothy_flatten::flatten(&[layer], &rootfs, &bothy_flatten::Limits::default(), &|_| Ok(())).unwrap();
        replant(&h.store, &h.image);
        let vm = VmId::new();
        let disk = h.disks.rootfs(&h.store, vm, &h.image, UID, 64).unwrap().base;
        run("e2fsck", &["-f", "-n", disk.to_str().unwrap()]);
        assert!(crate::ext4::has_journal(&disk).unwrap());
        assert_eq!(blocks(&disk) * 4096, 64 * MIB);
        h.disks.work(&h.store, vm, &h.image, UID, 16).unwrap();
        // A guest grows it while it is mounted, which e2e/tests/root_disk.rs sees. The second time to where the descriptors of
        // groups take another block.
        for mib in [1000, 40 << 10] {
            h.disks.grow(vm, 16, mib).unwrap();
            run("resize2fs", &["-f", disk.to_str().unwrap()]);
            assert_eq!(blocks(&disk) * 4096, mib * MIB);
            run("e2fsck", &["-f", "-n", disk.to_str().unwrap()]);
            assert_eq!(cat(&disk, "/kept"), KEPT);
        }
    });
}

/// One that somebody else has made, and no kernel grows: this is said before the disk is larger than its file system.
#[test]
fn a_file_system_that_no_kernel_grows_is_refused_its_growth() {
    require_root!();
    on(None, |root| {
        let h = host(root, RootDisk::Copy);
        let rootfs = h.store.dir_of(&h.image).join("rootfs.ext4");
        let features = "sparse_super2,^resize_inode";
        run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-O", features, rootfs.to_str().unwrap()]);
        replant(&h.store, &h.image);
        let vm = VmId::new();
        h.disks.rootfs(&h.store, vm, &h.image, UID, 64).unwrap();
        h.disks.work(&h.store, vm, &h.image, UID, 16).unwrap();
        let refused = h.disks.grow(vm, 16, 2048).unwrap_err();
        assert!(refused.message.contains("cannot grow") && refused.hint.is_some(), "{refused}");
        h.disks.grow(vm, 32, 64).unwrap();
        assert_eq!(h.disks.usage(&[vm]).unwrap()[&vm].system_size, 64 * MIB);
    });
}
