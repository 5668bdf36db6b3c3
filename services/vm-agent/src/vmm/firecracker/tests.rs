use super::super::Memory;
use super::*;

fn plan() -> VmPlan {
    VmPlan {
        vm: "0192f0c1-2345-7000-8000-000000000001".parse().unwrap(),
        name: "green-hut".into(),
        dir: "/run/bothy/vm/1".into(),
        kernel: "/store/vmlinux".into(),
        initrd: "/store/initrd".into(),
        rootfs: "/store/rootfs.img".into(),
        system: Some("/disks/system.img".into()),
        work: "/disks/work.img".into(),
        cpus: 2,
        memory_mib: 512,
        memory: Memory::Own,
        from: Origin::Boot,
        tap: "bothy-tap-0".into(),
        mac: "52:54:00:00:00:02".into(),
        uid: 780_000,
        groups: vec![106],
        accel: Accel::Kvm,
        tsc_khz: None,
    }
}

fn driver(version: &str) -> Firecracker {
    Firecracker::new("/opt/firecracker", Version::from_words(version).unwrap())
}

#[test]
fn the_requests_of_a_launch() {
    let spec = driver("1.16.1").launch_spec(&plan()).unwrap();
    spec.check().unwrap();
    assert_eq!((spec.uid, spec.gid, spec.groups.as_slice()), (780_000, 780_000, [106].as_slice()));
    assert_eq!(spec.vmm, "firecracker 1.16.1");
    assert_eq!(spec.tap, None);
    let Monitor::Api { requests } = &spec.monitor else { panic!("{:?}", spec.monitor) };
    let mut text = spec.argv.join(" ");
    for request in requests {
        let body = request.body.as_ref().map(Value::to_string).unwrap_or_default();
        text.push_str(&format!("\n\n{request}\n{body}"));
    }
    insta::assert_snapshot!(text);
    // What the holder reads is what was written.
    let line = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<LaunchSpec>(&line).unwrap(), spec);
}

#[test]
fn a_jailed_one_knows_paths_of_its_jail_only() {
    let spec = driver("1.16.1").of_jailed().launch_spec(&plan()).unwrap();
    spec.check().unwrap();
    assert_eq!(spec.vmm, "firecracker 1.16.1 jailed");
    insta::assert_snapshot!(spec.argv.join(" "), @"jailer --id 0192f0c1234570008000000000000001 --exec-file /opt/firecracker --uid 780000 --gid 780000 --chroot-base-dir /run/bothy/vm/1/jail -- --api-sock /api.sock");
    let jail = spec.jail.as_ref().unwrap();
    let files: Vec<_> =
        jail.files.iter().map(|f| (f.name.as_str(), f.path.to_str().unwrap(), f.read_only)).collect();
    assert_eq!(
        files,
        [
            ("kernel", "/store/vmlinux", true),
            ("initrd", "/store/initrd", true),
            ("rootfs.disk", "/store/rootfs.img", true),
            ("system.disk", "/disks/system.img", false),
            ("work.disk", "/disks/work.img", false),
        ]
    );
    let Monitor::Api { requests } = &spec.monitor else { panic!("{:?}", spec.monitor) };
    let told: String = requests.iter().filter_map(|r| r.body.as_ref()).map(Value::to_string).collect();
    for path in ["/kernel", "/initrd", "/log.pipe", "/metrics.pipe", "rootfs.disk", "vsock.sock"] {
        assert!(told.contains(&format!("\"{path}\"")), "{path}: {told}");
    }
    assert!(!["/store", "/disks", "/run"].iter().any(|host| told.contains(host)), "{told}");

    let from = super::super::Snapshot { state: "/store/state".into(), memory: "/proc/1/fd/9".into() };
    let saved = VmPlan { from: Origin::Saved(from), ..plan() };
    let e = driver("1.16.1").of_jailed().launch_spec(&saved).unwrap_err();
    assert!(e.message.contains("saved guest") && e.hint.is_some(), "{e}");
}

#[test]
fn the_requests_of_a_guest_that_goes_on() {
    let from = super::super::Snapshot { state: "/store/state".into(), memory: "/proc/1/fd/9".into() };
    let plan = VmPlan { from: Origin::Template(from.clone()), ..plan() };
    let spec = driver("1.16.1").launch_spec(&plan).unwrap();
    let bytes = 512 << 20;
    assert_eq!(spec.memory, Some(MemoryFile::Map { path: from.memory.clone(), bytes }));
    let Monitor::Api { requests } = &spec.monitor else { panic!("{:?}", spec.monitor) };
    let load = requests.last().unwrap();
    assert_eq!((requests.len(), load.to_string().as_str()), (3, "PUT /snapshot/load"));
    insta::assert_snapshot!(load.body.as_ref().unwrap(), @r#"{"mem_backend":{"backend_path":"/proc/self/fd/@memory-fd@","backend_type":"File"},"network_overrides":[{"host_dev_name":"bothy-tap-0","iface_id":"net"}],"resume_vm":false,"snapshot_path":"/proc/self/fd/@state-fd@"}"#);
    let own = VmPlan { from: Origin::Saved(from.clone()), ..plan.clone() };
    let spec = driver("1.16.1").launch_spec(&own).unwrap();
    assert_eq!(spec.memory, Some(MemoryFile::Own { path: from.memory, bytes }));
    assert_eq!(spec.restore.unwrap().state, from.state);
    for version in ["1.16.0", "1.11.0"] {
        let e = driver(version).launch_spec(&plan).unwrap_err();
        assert!(e.message.contains(version) && e.hint.is_some(), "{e}");
    }
}

#[test]
fn what_it_cannot_do_is_refused_before_anything_runs() {
    let driver = driver("1.16.1");
    let e = driver.launch_spec(&VmPlan { accel: Accel::Tcg, ..plan() }).unwrap_err();
    assert!(e.message.contains("KVM only") && e.hint.is_some(), "{e}");
    let e = driver.launch_spec(&VmPlan { cpus: 33, ..plan() }).unwrap_err();
    assert!(e.message.contains("33 cpus") && e.hint.is_some(), "{e}");
}

#[test]
fn versions() {
    let said = "Firecracker v1.16.1\n\nSupported snapshot data format versions: v10.0.0\n";
    assert_eq!(Version::parse("Firecracker", said).unwrap().to_string(), "1.16.1");
    assert_eq!(Version::parse("Firecracker", "Firecracker v1.13.0-dev").unwrap().to_string(), "1.13.0");
    for odd in ["", "Firecracker", "Firecracker v1", "jailer v1.16.1", "Firecracker vx.y.z"] {
        assert_eq!(Version::parse("Firecracker", odd), None, "{odd}");
    }
    for (version, good) in [("1.9.1", false), ("1.10.0", true), ("1.17.0", true), ("2.0.0", false)] {
        assert_eq!(Version::from_words(version).unwrap().check().is_ok(), good, "{version}");
    }
    for (version, good) in
        [("1.11.0", false), ("1.12.0", true), ("1.15.1", true), ("1.16.0", false), ("1.16.1", true)]
    {
        assert_eq!(driver(version).capabilities().snapshot, good, "{version}");
    }
}

#[test]
fn the_states_of_an_instance() {
    let driver = driver("1.16.1");
    let state = |state: &str| driver.read_run_state(&serde_json::json!({ "state": state }));
    assert_eq!(state("Running"), Some(RunState::Running));
    assert_eq!(state("Paused"), Some(RunState::Paused));
    assert_eq!(state("Not started"), None);
    assert_eq!(driver.read_run_state(&Value::Null), None);
}
