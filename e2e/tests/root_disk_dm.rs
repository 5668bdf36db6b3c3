//! Root disks by the device mapper, which few hosts' kernels of tests have and every guest's has: the image-agent's own tests of
//! them run in a machine. Its image is one that was registered: a root file system and a kernel package of the host.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helper: a failed step is a failed test"
)]

use bothy_e2e::{
    host::Host,
    images::{cache_dir, default_image, workspace_dir},
};
use bothy_testkit::{require_root, target_dir};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

/// What the tests need of the kernel.
const MODULES: [&str; 5] = ["dax", "dm-mod", "dm-bufio", "dm-snapshot", "loop"];

#[track_caller]
fn run(program: &str, args: &[&str], dir: &Path) -> String {
    let ran = Command::new(program).args(args).current_dir(dir).output().unwrap();
    assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// Debian's package of the kernel for machines, fetched once.
fn kernel_package() -> PathBuf {
    let dir = cache_dir().join("kernel");
    fs_err::create_dir_all(&dir).unwrap();
    let there = || {
        let files = fs_err::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        files.into_iter().find(|path| path.extension().is_some_and(|e| e == "deb"))
    };
    there().unwrap_or_else(|| {
        let shown = run("apt-cache", &["show", "--no-all-versions", "linux-image-cloud-amd64"], &dir);
        let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap();
        let package = depends.split([' ', ',']).next().unwrap();
        let beside = dir.join("half");
        let _ = fs_err::remove_dir_all(&beside);
        fs_err::create_dir(&beside).unwrap();
        run("apt-get", &["-o", "APT::Sandbox::User=root", "download", "-q", package], &beside);
        let file = fs_err::read_dir(&beside).unwrap().next().unwrap().unwrap();
        fs_err::rename(file.path(), dir.join(file.file_name())).unwrap();
        there().unwrap()
    })
}

/// The image-agent's tests, as this build has them.
fn image_agents_tests() -> PathBuf {
    let time = |path: &Path| fs_err::metadata(path).unwrap().modified().unwrap();
    let files = fs_err::read_dir(target_dir().join("deps")).unwrap().map(|entry| entry.unwrap().path());
    let programs = files.filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("bothy_image_agent-") && path.extension().is_none() && is_tests(path)
    });
    let newest = programs.max_by_key(|path| time(path));
    let source = workspace_dir().join("services/image-agent/src");
    let written = newest_below(&source);
    let fresh = newest.filter(|path| time(path) >= written);
    fresh
        .expect("the image-agent's tests are not built: run `cargo test -p bothy-image-agent --no-run` first")
}

fn is_tests(program: &Path) -> bool {
    let listed = Command::new(program).args(["--list", "tests_dm"]).output().unwrap();
    String::from_utf8_lossy(&listed.stdout).contains("tests_dm::")
}

fn newest_below(dir: &Path) -> SystemTime {
    let entries = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let times = entries.map(|path| {
        if path.is_dir() { newest_below(&path) } else { path.metadata().unwrap().modified().unwrap() }
    });
    times.max().unwrap()
}

/// The modules and the tests in one archive.
fn archive(package: &Path, dir: &Path) -> PathBuf {
    let (kernel, modules) = (dir.join("kernel"), dir.join("t/modules"));
    fs_err::create_dir_all(&modules).unwrap();
    run("dpkg-deb", &["-x", package.to_str().unwrap(), kernel.to_str().unwrap()], dir);
    let listed = run("find", &["kernel", "-name", "*.ko"], dir);
    for file in listed.lines().map(Path::new) {
        if MODULES.iter().any(|name| file.file_stem().is_some_and(|stem| stem == *name)) {
            fs_err::copy(dir.join(file), modules.join(file.file_name().unwrap())).unwrap();
        }
    }
    let tests = image_agents_tests();
    // Nine tenths of it are for a debugger.
    run("strip", &["-o", "t/tests", tests.to_str().unwrap()], dir);
    run("tar", &["-czf", "t.tgz", "-C", "t", "."], dir);
    dir.join("t.tgz")
}

#[test]
fn snapshots_of_a_registered_image_with_a_kernel_of_its_own() {
    require_root!();
    let package = kernel_package();
    let dir = bothy_testkit::temp_dir();
    let archive = archive(&package, dir.path());
    let rootfs = default_image().join("rootfs.ext4");
    let host = Host::start_bare(&[], |_| {});
    host.bothy(["kernel", "import", package.to_str().unwrap(), "--name", "own"]).ok();
    let file = rootfs.to_str().unwrap();
    host.bothy(["image", "register", "registered", "--rootfs", file, "--kernel", "own"]).ok();
    let shape = ["--cpus", "2", "--memory", "768M", "--disk", "2G", "--cold", "--json"];
    let args = ["vm", "create", "--image", "registered", "--name", "dm"];
    host.bothy(args.iter().chain(&shape)).json();
    let bothy = host.program("bothy");
    let send = format!(
        "{} vm exec -i dm -- sh -c 'mkdir /root/t && tar -xz -C /root/t' < {}",
        bothy.display(),
        archive.display()
    );
    host.run_bash(&send).ok();
    let ran = host.sh(
        "dm",
        "mkdir /root/tmp && TMPDIR=/root/tmp BOTHY_TEST_MODULES=/root/t/modules BOTHY_TEST_NO_SKIP=1 \
         RUST_BACKTRACE=0 /root/t/tests tests_dm 2>&1",
    );
    assert_eq!(ran.status, 0, "{}", ran.stdout);
    assert!(ran.stdout.contains("test result: ok. 5 passed"), "{}", ran.stdout);
    // What a registered image is used for it says by name.
    let refused = host.bothy(["image", "rm", "registered"]);
    assert!(refused.status != 0 && refused.stderr.contains("dm"), "{}", refused.stderr);
    host.bothy(["vm", "delete", "dm", "--force"]).ok();
    host.bothy(["image", "rm", "registered"]).ok();
    assert!(Path::new(file).is_file(), "the host's file is the host's");
    host.finish();
}
