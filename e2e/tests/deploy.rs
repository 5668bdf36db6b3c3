//! The units on a systemd that has booted: one of our own guests, whose kernel has all controllers. What `units.rs` reads, this
//! runs, as far as the bus and the vm-agent go: where VMs' control groups are, and what becomes of them when units come and go.
#![expect(clippy::unwrap_used, reason = "a test's own helpers: what fails in them is a failed test")]

use bothy_e2e::{host::Host, images, ran::Ran};
use bothy_testkit::{binary, require_root};
use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

const VMS: &str = "/sys/fs/cgroup/system.slice/bothy-vms.service";

/// Puts the programs and everything of `deploy/systemd` where docs/privileges.md has them put, below `root`.
fn stage(root: &Path) {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let place = |from: &Path, to: &str| {
        let to = root.join(to);
        fs_err::create_dir_all(to.parent().unwrap()).unwrap();
        fs_err::copy(from, to).unwrap();
    };
    for entry in fs_err::read_dir(&deploy).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".service") || name.ends_with(".target") {
            place(&path, &format!("etc/systemd/system/{name}"));
        }
    }
    place(&deploy.join("sysusers.d/bothy.conf"), "usr/lib/sysusers.d/bothy.conf");
    place(&deploy.join("tmpfiles.d/bothy.conf"), "usr/lib/tmpfiles.d/bothy.conf");
    place(&deploy.join("bothy.toml"), "etc/bothy/bothy.toml");
    let server = images::target_dir().join("tools/nats-server");
    for program in [server, binary("bothy"), binary("bothy-vm-agent"), binary("bothy-vmm")] {
        let to = root.join("usr/bin").join(program.file_name().unwrap());
        fs_err::create_dir_all(to.parent().unwrap()).unwrap();
        // Most of a debug build is what the guest has no use for.
        let stripped = Command::new("strip").arg("-o").args([&to, &program]).status().unwrap();
        assert!(stripped.success(), "{}", program.display());
        fs_err::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Puts the VMM below `root` too, with the libraries that it is linked with: the agent does not start without one.
fn stage_vmm(root: &Path) {
    let qemu = Path::new("/usr/bin/qemu-system-x86_64");
    let linked = Command::new("ldd").arg(qemu).output().unwrap();
    let linked = String::from_utf8(linked.stdout).unwrap();
    let libraries = linked.lines().filter_map(|line| line.split("=> ").nth(1)?.split(' ').next());
    for file in libraries.chain([qemu.to_str().unwrap()]) {
        // `/lib` is a link to `usr/lib`.
        let file = file.strip_prefix("/usr").unwrap_or(file);
        let to = root.join("usr").join(file.trim_start_matches('/'));
        fs_err::create_dir_all(to.parent().unwrap()).unwrap();
        fs_err::copy(Path::new("/usr").join(file.trim_start_matches('/')), to).unwrap();
    }
}

/// Copies `usr` and `etc` below `root` into VM `name`.
fn send(host: &Host, name: &str, root: &Path) {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(root).args(["--owner=0", "--group=0", "-cf", "-", "usr", "etc"]).stdout(Stdio::piped());
    let mut tar = tar.spawn().unwrap();
    let mut command = host.command("bothy");
    command.args(["vm", "exec", "-i", name, "--", "tar", "--skip-old-files", "-C", "/", "-xf", "-"]);
    let mut exec = host.spawn(command.stdin(tar.stdout.take().unwrap()));
    assert!(exec.inner().wait().unwrap().success());
    assert!(tar.wait().unwrap().success());
}

#[test]
fn vms_have_groups_of_their_own_that_outlive_the_agent_and_go_with_their_unit() {
    require_root!();
    let host = Host::start_quick(|_| {});
    host.create_quick("booted", &["--memory", "768M"]);
    let root = host.scratch().join("root");
    stage(&root);
    stage_vmm(&root);
    send(&host, "booted", &root);
    let sh = |line: &str| -> Ran {
        let ran = host.sh("booted", line);
        if ran.status != 0 {
            let journal = host.sh("booted", "journalctl --no-pager -n 60 -u 'bothy-*'");
            panic!("{line}\n{ran:#?}\n{}", journal.stdout);
        }
        ran
    };
    sh("systemd-sysusers bothy.conf && systemd-tmpfiles --create bothy.conf && systemctl daemon-reload");
    sh("systemctl start bothy-bus.service bothy-vm-agent.service");

    // The agent has found the unit's group, and made it one that bounds what is below it.
    let told = sh("journalctl --no-pager -o cat -u bothy-vm-agent").stdout;
    assert!(told.contains(&format!("{VMS} (cpu, memory, pids, io)")), "{told}");
    assert_eq!(sh(&format!("cat {VMS}/cgroup.subtree_control")).stdout.trim(), "cpu io memory pids");

    // With what the agent's unit gives it, and no more, its user makes a group there and enters it. The kernel holds
    // what is in it to its bounds.
    let inside = format!(
        "mkdir {VMS}/hungry && cd {VMS}/hungry && echo 32M > memory.max && echo 1 > memory.oom.group && \
         echo 0 > cgroup.procs && head -c 200M /dev/zero | tail -c 200M | wc -c"
    );
    let caps = "CAP_SETUID CAP_SETGID CAP_CHOWN CAP_DAC_OVERRIDE";
    let ran = host.bothy([
        "vm",
        "exec",
        "booted",
        "--",
        "systemd-run",
        "--wait",
        "--pipe",
        "--quiet",
        "--property=User=bothy-vm-agent",
        "--property=NoNewPrivileges=yes",
        "--property=ProtectSystem=strict",
        &format!("--property=AmbientCapabilities={caps}"),
        &format!("--property=CapabilityBoundingSet={caps}"),
        "sh",
        "-c",
        &inside,
    ]);
    assert!(ran.status != 0 && ran.stdout.is_empty(), "{ran:?}");
    let events = sh(&format!("cat {VMS}/hungry/memory.events && rmdir {VMS}/hungry")).stdout;
    assert!(events.contains("oom_group_kill 1"), "{events}");

    // A restarted agent finds its VMs' processes where they were; a stopped unit takes them with it, and the agent.
    sh(&format!("mkdir {VMS}/other && (sleep 1000 > /dev/null 2>&1 & echo $! > {VMS}/other/cgroup.procs)"));
    let pid = sh(&format!("cat {VMS}/other/cgroup.procs")).stdout;
    sh("systemctl restart bothy-vm-agent.service");
    assert_eq!(sh(&format!("cat {VMS}/other/cgroup.procs")).stdout, pid);
    sh("systemctl stop bothy-vms.service");
    sh(&format!("! systemctl is-active bothy-vm-agent && ! test -e /proc/{} && ! test -e {VMS}", pid.trim()));
    sh("systemctl start bothy-vm-agent.service");
    assert_eq!(sh(&format!("cat {VMS}/cgroup.subtree_control")).stdout.trim(), "cpu io memory pids");
    host.bothy(["vm", "delete", "booted", "--force"]).ok();
    host.finish();
}
