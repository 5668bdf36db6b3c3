//! A VM whose root is its own, a copy of the image's: it boots, keeps what it writes, grows, and is resumed from a template. That
//! of an imported image has another writer of file systems, and grows as well.

use bothy_config::RootDiskChoice;
use bothy_contract::Service;
use bothy_e2e::{host::Host, oci::layout};
use bothy_testkit::require_root;
use std::process::Command;

const SHAPE: [&str; 4] = ["--cpus", "1", "--memory", "256M"];

#[test]
fn a_root_of_ones_own_boots_keeps_grows_and_is_resumed() {
    require_root!();
    let mut host = Host::start_quick(|config| {
        config.image.root_disk = RootDiskChoice::Copy;
        config.template.max = 1;
    });
    host.create_quick("own", &[&SHAPE[..], &["--cold", "--system-disk", "2G"]].concat());
    let sh = |line: &str| host.sh("own", line).ok().stdout.trim().to_owned();
    let size = || sh("df -Pk / | tail -1 | tr -s ' ' | cut -d' ' -f2").parse::<u64>().unwrap();
    assert_eq!(
        sh("while read d m t o; do [ $m = / ] && echo $t ${o%%,*}; done < /proc/mounts; true"),
        "ext4 rw"
    );
    assert!((1_900_000..2 << 20).contains(&size()), "{} KiB", size());
    sh("echo kept > /etc/kept; sync");
    host.bothy(["vm", "set", "own", "--system-disk", "3G"]).ok();
    assert!((2_900_000..3 << 20).contains(&size()), "{} KiB", size());

    // A cut of power costs nothing that was synced, and the root has a journal to mend what it finds.
    host.bothy(["vm", "kill", "own"]).ok();
    host.bothy(["vm", "start", "own"]).ok();
    assert_eq!(sh("cat /etc/kept"), "kept");
    host.bothy(["vm", "delete", "own", "--force"]).ok();
    let disks = host.config.service_dir(Service::Image).join("disks");
    assert_eq!(fs_err::read_dir(disks).unwrap().count(), 0);

    host.warm(&[&SHAPE[..], &["quick"]].concat());
    host.create_quick("resumed", &SHAPE);
    assert_eq!(host.resumed(), 1);
    host.sh("resumed", "echo its own > /etc/mine && sync && cat /etc/mine").ok();
    host.bothy(["vm", "delete", "resumed", "--force"]).ok();
    host.finish();
}

#[test]
fn the_root_of_an_imported_image_grows_while_it_is_mounted() {
    require_root!();
    let host = Host::start_with(&[], |config| config.image.root_disk = RootDiskChoice::Copy);
    let dir = tempfile::tempdir().unwrap();
    host.bothy(["image", "import", "tiny", layout(dir.path()).to_str().unwrap()]).ok();
    let create = ["vm", "create", "--name", "t", "--image", "tiny", "--cold", "--system-disk", "1G"];
    host.bothy(create.iter().chain(&SHAPE)).ok();
    let as_root = |line: &str| host.bothy(["vm", "exec", "--user", "root", "t", "--", "sh", "-c", line]);
    as_root("echo kept > /etc/mine").ok();
    // To where its groups' descriptors take more blocks than they have.
    host.bothy(["vm", "set", "t", "--system-disk", "40G"]).ok();
    // Neither the shell nor anything else in this image can tell a size: the file system does, once nobody has it.
    host.bothy(["vm", "stop", "t"]).ok();
    let disks = host.config.service_dir(Service::Image).join("disks");
    let disk = fs_err::read_dir(disks).unwrap().next().unwrap().unwrap().path().join("root.ext4");
    let sound = Command::new("e2fsck").arg("-fn").arg(&disk).output().unwrap();
    assert!(sound.status.success(), "{}", String::from_utf8_lossy(&sound.stdout));
    let told = Command::new("dumpe2fs").arg("-h").arg(&disk).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let blocks = told.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap().trim();
    assert_eq!(blocks.parse::<u64>().unwrap() * 4096, 40 << 30, "{told}");
    host.bothy(["vm", "start", "t"]).ok();
    assert_eq!(as_root("read -r mine < /etc/mine && echo $mine").ok().stdout, "kept\n");
    host.bothy(["vm", "delete", "t", "--force"]).ok();
    host.finish();
}
