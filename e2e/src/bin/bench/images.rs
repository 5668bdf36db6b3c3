//! What an image costs each of its VMs: their disks, made by the image-agent as a create has them made, at three sizes of the
//! rootfs; and what a second VM reads of a rootfs that a first one has read.

use crate::median;
use bothy_bus::Client;
use bothy_contract::{
    ImageName, Service, VmId,
    image::{PrepareRootfs, PrepareWorkDisk, ReleaseDisks},
    methods::{ImageDisksRelease, ImageRootfsPrepare, ImageWorkDiskPrepare},
    vm::Shape,
};
use bothy_e2e::{host::Host, images};
use sha2::{Digest as _, Sha256};
use std::{
    io::{Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

const MIB: u64 = 1 << 20;
/// How much data the larger rootfs have. The default image's own is the one of 0.3 GiB.
const LARGE_MIB: [u64; 2] = [1536, 6144];
const BAR_MS: f64 = 15.0;
const BAR_MIB: f64 = 4.0;
const BAR_READ: f64 = 5.0;

/// What one VM's disks came to.
struct Made {
    ms: f64,
    /// What the file system has given the files that were made.
    allocated: u64,
    /// What the agent wrote, as the kernel counts it.
    written: u64,
}

pub(crate) fn run(creates: usize) {
    assert!(creates > 0, "at least one create");
    let host = Host::start();
    disks(&host, creates);
    page_cache(&host);
    host.finish();
}

fn disks(host: &Host, creates: usize) {
    println!(
        "{:>16} {:>10} {:>11} {:>12} {:>15} {:>13}",
        "rootfs data, MiB", "first, ms", "median, ms", "slowest, ms", "allocated, MiB", "written, MiB"
    );
    let own = store_of(host, "debian").join("rootfs.ext4");
    let own = fs_err::metadata(own).expect("the default image's rootfs").blocks() * 512 / MIB;
    let (mut ms, mut mib) = (0.0_f64, 0.0_f64);
    for data in [own].into_iter().chain(LARGE_MIB) {
        let name = if data == own { "debian".to_owned() } else { format!("data-{data}") };
        if data != own {
            images::variant_into(&host.config, &name, |manifest| {
                enlarge(
                    &store_of(host, &name).join("rootfs.ext4"),
                    data,
                    &mut manifest["artifacts"]["rootfs"],
                );
            });
        }
        let image: ImageName = name.parse().expect("a name");
        // What the bench itself has written is no longer on its way to the disk.
        nix::unistd::sync();
        let made: Vec<Made> = host.block_on(async {
            let bus = Client::connect(&host.config, Service::Vm).await.expect("the bus");
            let mut made = Vec::new();
            for _ in 0..=creates {
                made.push(create(host, &bus, &image).await);
            }
            made
        });
        if data != own {
            fs_err::remove_dir_all(store_of(host, &name)).expect("the image goes");
        }
        // The first of an image may find its grown seed missing.
        let (first, rest) = made.split_first().expect("one create");
        let times: Vec<f64> = rest.iter().map(|m| m.ms).collect();
        let largest = |of: fn(&Made) -> u64| rest.iter().map(of).max().unwrap_or(0) as f64 / MIB as f64;
        let (allocated, written) = (largest(|m| m.allocated), largest(|m| m.written));
        let slowest = times.iter().copied().fold(0.0, f64::max);
        println!(
            "{data:>16} {:>10.1} {:>11.1} {slowest:>12.1} {allocated:>15.2} {written:>13.2}",
            first.ms,
            median(&times)
        );
        ms = ms.max(median(&times));
        mib = mib.max(allocated).max(written);
    }
    println!(
        "disks of a VM, {creates} creates each: {ms:.1} ms (bar: {BAR_MS} ms), {mib:.2} MiB written (bar: {BAR_MIB} MiB)"
    );
}

/// The two requests that a create makes, side by side as it makes them.
async fn create(host: &Host, bus: &Client, image: &ImageName) -> Made {
    let (vm, uid, shape) = (VmId::new(), host.config.vm.uid_base, Shape::default());
    let rootfs =
        PrepareRootfs { vm, image: image.clone(), uid, system_mib: shape.system_mib, template: None };
    let work =
        PrepareWorkDisk { vm, image: image.clone(), uid, work_mib: shape.work_mib, placeholder: false };
    let agent = host.pids_of("bothy-image-agent");
    let agent = *agent.first().expect("the image-agent's process");
    let before = io_of(agent, "write_bytes");
    let began = Instant::now();
    let (rootfs, work) =
        tokio::join!(bus.call::<ImageRootfsPrepare>(&rootfs), bus.call::<ImageWorkDiskPrepare>(&work));
    let ms = began.elapsed().as_secs_f64() * 1e3;
    let written = io_of(agent, "write_bytes") - before;
    let made = [rootfs.expect("a root").system.expect("an overlay"), work.expect("a work disk").path];
    let allocated = made
        .iter()
        .map(|path| {
            // Blocks are given when the data goes to the disk.
            let file = fs_err::File::open(path).expect("a disk");
            file.sync_all().expect("its data on the disk");
            file.metadata().expect("its size").blocks() * 512
        })
        .sum();
    bus.call::<ImageDisksRelease>(&ReleaseDisks { vm }).await.expect("a release");
    Made { ms, allocated, written }
}

/// Puts a rootfs in place of the one that is linked there: that one, and behind its file system data until it has `mib` MiB.
/// Nothing boots it. `artifact` is what the manifest says of it.
fn enlarge(path: &Path, mib: u64, artifact: &mut serde_json::Value) {
    let mut from = fs_err::File::open(path).expect("the default image's rootfs");
    fs_err::remove_file(path).expect("the link to it");
    let mut to = fs_err::File::create_new(path).expect("a rootfs");
    let mut sha = Sha256::new();
    let mut block = vec![0; 1 << 20];
    let (mut size, mut seed) = (0, mib);
    while size < mib * MIB {
        let mut read = from.read(&mut block).expect("its content");
        if read == 0 {
            // No two blocks are the same, so that nothing below can share them.
            for word in block.chunks_exact_mut(8) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                word.copy_from_slice(&seed.to_le_bytes());
            }
            read = block.len();
        }
        sha.update(&block[..read]);
        to.write_all(&block[..read]).expect("room for a rootfs");
        size += read as u64;
    }
    to.sync_all().expect("the rootfs on the disk");
    let meta = to.metadata().expect("its stamp");
    artifact["sha256"] = hex::encode(sha.finalize()).into();
    artifact["size"] = size.into();
    artifact["stamp"] = serde_json::json!({
        "inode": meta.ino(), "mtime": meta.mtime(), "mtime_nsec": meta.mtime_nsec()
    });
}

fn page_cache(host: &Host) {
    // Kernel, initramfs and the VMM's own program are read by one that does not count.
    host.create("warm-up");
    host.bothy(["vm", "delete", "warm-up", "--force"]).ok();
    let rootfs = fs_err::File::open(store_of(host, "debian").join("rootfs.ext4")).expect("the rootfs");
    rootfs.sync_all().expect("nothing of it is dirty");
    nix::fcntl::posix_fadvise(&rootfs, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .expect("its pages dropped");
    let mut read = Vec::new();
    for name in ["first", "second"] {
        host.create(name);
        let (_, vmm) = host.vmm_of(name).expect("its VMM");
        read.push(io_of(vmm, "read_bytes"));
    }
    for name in ["first", "second"] {
        host.bothy(["vm", "delete", name, "--force"]).ok();
    }
    let (first, second) = (read[0] as f64 / MIB as f64, read[1] as f64 / MIB as f64);
    assert!(first > 16.0, "the first VM read {first:.1} MiB: the rootfs was still in the page cache");
    println!(
        "read from the disk until ready: first VM {first:.1} MiB, second {second:.2} MiB, {:.2} % (bar: {BAR_READ} %)",
        second / first * 100.0
    );
}

fn store_of(host: &Host, image: &str) -> PathBuf {
    host.config.service_dir(Service::Image).join("store/images").join(image)
}

/// A counter of a process's input and output, proc_pid_io(5).
fn io_of(pid: i32, what: &str) -> u64 {
    let io = fs_err::read_to_string(format!("/proc/{pid}/io")).expect("the process's counters");
    let line = io.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(": "));
    line.and_then(|n| n.parse().ok()).expect("a counter")
}
