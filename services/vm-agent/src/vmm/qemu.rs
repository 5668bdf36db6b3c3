//! QEMU's microvm machine: the command line as a pure function of the plan. For QEMU 7.2 and newer.

use super::{
    Accel, Capabilities, Driver, LaunchSpec, Memory, Origin, RunState, Verb, VmPlan, host_cpu, text,
    wire::{self, MemoryFile, Restore},
};
use bothy_contract::{Code, Error};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// HZ of the kernels that images use (Debian: CONFIG_HZ=250). `lpj` depends on it.
const KERNEL_HZ: u64 = 250;
/// The oldest QEMU whose microvm machine this command line was tested on.
const OLDEST: (u32, u32) = (7, 2);

/// What QEMU calls a microvm's memory.
const RAM: &str = "microvm.ram";
/// The layout of the devices of a guest: another one cannot go on from what was saved of this.
const LAYOUT: u32 = 1;

/// The driver for `-M microvm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuMicrovm {
    program: PathBuf,
    version: String,
    /// The first line of what it says of its version, its packager's included.
    exact: String,
}

impl QemuMicrovm {
    /// A driver for a QEMU whose version is known already.
    pub fn new(program: impl Into<PathBuf>, version: impl Into<String>) -> Self {
        let version = version.into();
        Self { program: program.into(), exact: version.clone(), version }
    }

    /// Asks `program` for its version.
    ///
    /// # Errors
    /// It cannot be run, or is too old.
    pub async fn find(program: &Path) -> Result<Self, Error> {
        let text = super::version_text(program).await.map_err(|e| {
            Error::new(Code::FailedPrecondition, format!("cannot run {}: {e}", program.display()))
                .hint("install it with `apt-get install qemu-system-x86`, or set `vm.qemu` in bothy.toml")
        })?;
        let version = parse_version(&text).ok_or_else(|| {
            Error::new(
                Code::FailedPrecondition,
                format!("`{} --version` does not name a version of QEMU", program.display()),
            )
        })?;
        let mut numbers = version.split('.').map_while(|n| n.parse::<u32>().ok());
        if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < OLDEST {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!(
                    "{} is QEMU {version}, which is older than {}.{}",
                    program.display(),
                    OLDEST.0,
                    OLDEST.1
                ),
            )
            .hint("install a newer one, or set `vm.qemu` in bothy.toml"));
        }
        let exact = text.lines().next().unwrap_or(&version).to_owned();
        Ok(Self { program: program.to_owned(), version, exact })
    }

    /// QEMU's program.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// `QEMU emulator version 10.0.2 (Debian 1:...)` gives `10.0.2`.
fn parse_version(text: &str) -> Option<String> {
    let word = text.lines().next()?.split_once("version ")?.1.split_ascii_whitespace().next()?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
}

/// The kernel's command line.
///
/// A bare microvm under TCG has no clock to calibrate the time-stamp counter against, and sometimes hangs in trying. The
/// guest's counter under TCG is the host's, so its frequency is told instead: `tsc_early_khz`, and `lpj` (loops of delay
/// per jiffy, one loop being one tick of the counter) from it. Under KVM the guest asks kvmclock.
pub(crate) fn kernel_command_line(accel: Accel, tsc_khz: Option<u32>) -> String {
    let mut line = "console=ttyS0 panic=-1 reboot=t quiet cryptomgr.notests".to_owned();
    if accel == Accel::Tcg {
        if let Some(khz) = tsc_khz {
            let lpj = u64::from(khz) * 1000 / KERNEL_HZ;
            line.push_str(&format!(" tsc_early_khz={khz} lpj={lpj}"));
        }
        // A guest of a busy host finds that its counter and its timer interrupts disagree. With nothing else to go by it would
        // give up the counter, which is right, and count interrupts, many of which come late or never.
        line.push_str(" no_timer_check tsc=reliable");
    }
    line
}

/// The part of the command line that does not depend on the VM.
pub(crate) fn machine(program: &Path, accel: Accel) -> Result<Vec<String>, Error> {
    let accelerator = match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=multi",
    };
    let mut argv = vec![text(program)?];
    argv.extend(
        [
            "-accel",
            accelerator,
            "-M",
            "microvm",
            // With the machine's other firmware this kernel spins for ever while it sets ACPI up.
            "-bios",
            "qboot.rom",
            "-cpu",
            cpu(accel),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]
        .map(str::to_owned),
    );
    Ok(argv)
}

/// The processor that guests see.
fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        // With what programs of today take for granted (x86-64-v2): the plainest one kills some with SIGILL.
        Accel::Tcg => "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt",
    }
}

/// The arguments that make a file the guest's memory, and that file; nothing where its memory is its own.
fn memory(plan: &VmPlan) -> Result<(Vec<String>, Option<MemoryFile>), Error> {
    let bytes = plan.memory_mib << 20;
    let (share, file) = match (&plan.memory, &plan.from) {
        (Memory::Own, Origin::Boot | Origin::Saved(_)) => return Ok((Vec::new(), None)),
        // What the guest writes is in the file.
        (Memory::Shared(path), Origin::Boot) => ("on", MemoryFile::Make { path: path.clone(), bytes }),
        // What it writes is its own, what it only reads is the file's.
        (Memory::Own, Origin::Template(from)) => {
            ("off", MemoryFile::Map { path: from.memory.clone(), bytes })
        }
        (Memory::Shared(_), _) => {
            return Err(Error::invalid("only a guest that boots can have its memory in a file of its own"));
        }
    };
    // By its descriptor: the VM's user gets to the file in no other way. Called as QEMU calls the memory that a guest has of
    // its own, or a whole save of this one would not fit that.
    let object = format!(
        "memory-backend-file,id={RAM},size={bytes},mem-path=/proc/self/fd/{},share={share},\
         x-use-canonical-path-for-ramblock-id=off",
        wire::MEMORY_FD
    );
    let words = ["-object", &object, "-machine", &format!("memory-backend={RAM}")];
    Ok((words.map(str::to_owned).into(), Some(file)))
}

/// A path as a value within `key=value,...`: QEMU takes a doubled comma for a comma.
fn value(path: &Path) -> Result<String, Error> {
    Ok(text(path)?.replace(',', ",,"))
}

impl Driver for QemuMicrovm {
    fn name(&self) -> &'static str {
        super::QEMU_MICROVM
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn version_key(&self, accel: Accel) -> String {
        let mut key = format!(
            "{} {} {} {accel} {} layout {LAYOUT}",
            self.name(),
            self.program.display(),
            self.exact,
            cpu(accel)
        );
        if accel == Accel::Kvm {
            key.push_str(&format!(" {}", host_cpu()));
        }
        key
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { snapshot: true, resize_disk: true, power_off: true, tcg: true }
    }

    fn launch_spec(&self, plan: &VmPlan) -> Result<LaunchSpec, Error> {
        for (what, word) in [("MAC address", &plan.mac), ("VM name", &plan.name)] {
            if word.is_empty() || !word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b)) {
                return Err(Error::invalid(format!("{what} `{word}` cannot be put on a command line")));
            }
        }
        let mut argv = machine(&self.program, plan.accel)?;
        let mut add = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["-name", &format!("bothy-{},process=bothy-{}", plan.name, plan.name)]);
        // No new programs and no other user, whatever the guest makes of QEMU.
        add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
        add(&["-smp", &plan.cpus.to_string(), "-m", &plan.memory_mib.to_string()]);
        add(&["-kernel", &text(&plan.kernel)?, "-initrd", &text(&plan.initrd)?]);
        add(&["-append", &kernel_command_line(plan.accel, plan.tsc_khz)]);
        let (words, memory) = memory(plan)?;
        add(&words.iter().map(String::as_str).collect::<Vec<_>>());
        let restore = match &plan.from {
            Origin::Boot => None,
            Origin::Template(from) => Some(Restore { state: from.state.clone(), memory_apart: true }),
            Origin::Saved(from) => Some(Restore { state: from.state.clone(), memory_apart: false }),
        };
        if restore.is_some() {
            // Stopped, and loaded once the holder says so: its ports must be connected before.
            add(&["-S", "-incoming", "defer"]);
        }
        for (serial, path, read_only) in plan.disks() {
            // The guest's discards make holes, so that deleted files give their space back.
            let options = if read_only { ",readonly=on" } else { ",discard=unmap" };
            add(&["-drive", &format!("id={serial},file={},format=raw,if=none{options}", value(path)?)]);
            add(&["-device", &format!("virtio-blk-device,drive={serial},serial={serial}")]);
        }
        add(&["-netdev", &format!("tap,id=net,fd={},vhost=off", wire::TAP_FD)]);
        add(&["-device", &format!("virtio-net-device,netdev=net,mac={}", plan.mac)]);
        add(&["-device", "virtio-rng-device"]);
        add(&["-device", "virtio-serial-device,id=serial"]);
        let sockets = [("control", 1, wire::CONTROL_SOCKET), ("bulk", 2, wire::BULK_SOCKET)];
        for (name, number, socket) in sockets {
            let path = value(&plan.dir.join(socket))?;
            add(&["-chardev", &format!("socket,id={name},path={path},server=off")]);
            add(&[
                "-device",
                &format!("virtserialport,bus=serial.0,nr={number},chardev={name},name=bothy.{name}"),
            ]);
        }
        let monitor = value(&plan.dir.join(wire::QMP_SOCKET))?;
        add(&[
            "-chardev",
            &format!("socket,id=qmp,path={monitor},server=off"),
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        Ok(LaunchSpec {
            vm: plan.vm,
            vmm: format!("{} {}", self.name(), self.version),
            dir: plan.dir.clone(),
            argv,
            monitor: wire::Monitor::Qmp,
            tap: Some(plan.tap.clone()),
            uid: plan.uid,
            gid: plan.uid,
            groups: plan.groups.clone(),
            cgroup: None,
            memory,
            restore,
            disks: Vec::new(),
            jail: None,
        })
    }

    fn quit(&self) -> Verb {
        Verb::Qmp(json!({ "execute": "quit" }))
    }

    fn powerdown(&self) -> Verb {
        Verb::Qmp(json!({ "execute": "system_powerdown" }))
    }

    fn pause(&self) -> Verb {
        Verb::Qmp(json!({ "execute": "stop" }))
    }

    fn resume(&self) -> Verb {
        Verb::Qmp(json!({ "execute": "cont" }))
    }

    /// `-no-reboot` would make an end of it, so that is lifted meanwhile.
    fn reset(&self) -> Vec<Verb> {
        let on_reboot = |action: &str| json!({ "execute": "set-action", "arguments": { "reboot": action } });
        let reset = json!({ "execute": "system_reset" });
        let resume = json!({ "execute": "cont" });
        [on_reboot("reset"), reset, resume, on_reboot("shutdown")].map(Verb::Qmp).into()
    }

    fn resize_disk(&self, serial: &str, bytes: u64) -> Verb {
        Verb::Qmp(json!({ "execute": "block_resize", "arguments": { "device": serial, "size": bytes } }))
    }

    fn run_state(&self) -> Verb {
        Verb::Qmp(json!({ "execute": "query-status" }))
    }

    fn read_run_state(&self, answer: &Value) -> Option<RunState> {
        match answer.get("status")?.as_str()? {
            "running" => Some(RunState::Running),
            "paused" | "postmigrate" | "prelaunch" => Some(RunState::Paused),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> VmPlan {
        VmPlan {
            vm: "0192f0c1-2345-7000-8000-000000000001".parse().unwrap(),
            name: "green-hut".into(),
            dir: "/run/bothy/vm/1".into(),
            kernel: "/store/vmlinux".into(),
            initrd: "/store/initrd".into(),
            rootfs: "/store/root,fs.img".into(),
            system: Some("/disks/system.img".into()),
            work: "/disks/work.img".into(),
            cpus: 2,
            memory_mib: 512,
            memory: Memory::Own,
            from: Origin::Boot,
            tap: "bothy-tap-0".into(),
            mac: "52:54:00:00:00:02".into(),
            uid: 780_000,
            groups: vec![],
            accel: Accel::Tcg,
            tsc_khz: Some(2_445_404),
        }
    }

    #[test]
    fn the_command_line() {
        let spec = QemuMicrovm::new("/usr/bin/qemu-system-x86_64", "10.0.2").launch_spec(&plan()).unwrap();
        assert_eq!((spec.uid, spec.gid, spec.vmm.as_str()), (780_000, 780_000, "qemu-microvm 10.0.2"));
        spec.check().unwrap();
        insta::assert_snapshot!(spec.argv.join("\n").replace("\n-", "\n\n-"));
    }

    #[test]
    fn a_root_of_the_vms_own_is_written_to() {
        let driver = QemuMicrovm::new("qemu", "10.0.2");
        let argv = driver.launch_spec(&VmPlan { system: None, ..plan() }).unwrap().argv;
        assert!(argv.contains(&"id=rootfs,file=/store/root,,fs.img,format=raw,if=none,discard=unmap".into()));
        assert!(!argv.iter().any(|word| word.contains("serial=system")), "{argv:?}");
    }

    #[test]
    fn kvm_needs_no_help_with_clocks() {
        let plan = VmPlan { accel: Accel::Kvm, groups: vec![106], ..plan() };
        let spec = QemuMicrovm::new("qemu", "7.2.22").launch_spec(&plan).unwrap();
        let line = spec.argv.join(" ");
        assert!(line.contains("-accel kvm ") && line.contains("-cpu host "), "{line}");
        assert!(!line.contains("tsc_early_khz") && !line.contains("no_timer_check"), "{line}");
        assert_eq!(spec.groups, [106]);
    }

    #[test]
    fn nothing_gets_onto_the_command_line_that_could_be_another_option() {
        let driver = QemuMicrovm::new("qemu", "10.0.2");
        for plan in [
            VmPlan { mac: "52:54:00:00:00:02,x=y".into(), ..plan() },
            VmPlan { mac: String::new(), ..plan() },
            VmPlan { name: "a b".into(), ..plan() },
        ] {
            assert!(driver.launch_spec(&plan).is_err());
        }
    }

    #[test]
    fn versions() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright";
        assert_eq!(parse_version(debian).as_deref(), Some("10.0.2"));
        assert_eq!(parse_version("something else"), None);
    }
}
