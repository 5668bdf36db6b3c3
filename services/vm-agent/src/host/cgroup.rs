//! A control group per VM (cgroups(7), version 2): the bounds of holder and VMM, and a way to end all of a VM's processes
//! for sure. A group's name follows from its VM, `bothy-vm-<id>`, so it is found and removed where every record is lost.
//!
//! Under systemd groups are made in the unit `bothy-vms.service`, which is delegated to the agent (`Delegate=`) and is there for
//! nothing else, so that they outlive the agent's own unit; elsewhere below the agent's own group, if it may. Which bounds
//! there are depends on the controllers that the parent has; without any the groups still end processes.

use super::{MIB, memory::overhead_mib};
use crate::vmm::Accel;
use bothy_contract::{Error, VmId, vm::Shape};
use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};

/// The controllers that bound a VM.
const WANTED: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// The prefix of a group's name.
const PREFIX: &str = "bothy-vm-";
/// The unit beside the agent's that is the place of VMs' groups (deploy/systemd). Its one process is in a group below it too, so
/// it can pass on controllers.
const UNIT: &str = "bothy-vms.service";
/// Threads of the VMM beside the guest's processors, the holder's, and some to spare.
const TASKS: u32 = 128;
/// How often and how long removal waits for the last process of a killed group to be gone.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// Where VMs' groups are, and which controllers they have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    parent: PathBuf,
    controllers: Vec<&'static str>,
}

impl Cgroups {
    /// The place for VMs' groups on this host, made ready.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn find() -> Result<Self, String> {
        let (mount, own) = own()?;
        let unit = own.with_file_name(UNIT);
        if own != mount && unit.is_dir() {
            return Self::below(&unit, true);
        }
        // Only the root of the hierarchy may have processes of its own and controllers in groups below it.
        Self::below(&own, own == mount)
    }

    /// The same for groups below `parent`, which get controllers where it `may` pass them on.
    fn below(parent: &Path, may: bool) -> Result<Self, String> {
        let probe = parent.join(format!("{PREFIX}probe-{}", std::process::id()));
        fs_err::create_dir(&probe).map_err(|e| format!("its cgroup is not delegated to the agent: {e}"))?;
        fs_err::remove_dir(&probe).map_err(|e| e.to_string())?;
        let there = fs_err::read_to_string(parent.join("cgroup.controllers")).map_err(|e| e.to_string())?;
        let there = |controller: &&str| may && there.split_ascii_whitespace().any(|t| t == *controller);
        let mut controllers: Vec<_> = WANTED.into_iter().filter(there).collect();
        let enable: Vec<_> = controllers.iter().map(|c| format!("+{c}")).collect();
        if !enable.is_empty()
            && let Err(error) = fs_err::write(parent.join("cgroup.subtree_control"), enable.join(" "))
        {
            // The root of a container's namespace looks like the root of the hierarchy, and may not either.
            tracing::info!(%error, "VMs' cgroups get no controllers");
            controllers.clear();
        }
        Ok(Self { parent: parent.to_owned(), controllers })
    }

    /// How VMs are bounded, for people.
    pub fn describe(&self) -> String {
        let bounds = match self.controllers.as_slice() {
            [] => "without controllers, so nothing is bounded".to_owned(),
            some => some.join(", "),
        };
        format!("cgroup v2 below {} ({bounds})", self.parent.display())
    }

    fn group(&self, vm: VmId) -> PathBuf {
        self.parent.join(format!("{PREFIX}{vm}"))
    }

    /// Makes the group of `vm`, or sets the bounds of the one that is there. A process enters it by writing its id to the
    /// file that this returns.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create(&self, vm: VmId, bounds: &Bounds) -> Result<PathBuf, Error> {
        let group = self.group(vm);
        let failed = |e: io::Error| Error::internal(format!("cannot make the cgroup of VM {vm}"), &e);
        make_dir(&group).map_err(failed)?;
        for (file, value) in bounds.files(&self.controllers) {
            // A controller may be there without all of its files: io.weight takes a scheduler that knows weights.
            if !group.join(file).exists() {
                continue;
            }
            fs_err::write(group.join(file), value).map_err(failed)?;
        }
        Ok(group.join("cgroup.procs"))
    }

    /// Ends every process of the group of `vm` and removes it. One that is not there is not an error.
    ///
    /// # Errors
    /// A process does not end.
    pub async fn remove(&self, vm: VmId) -> Result<(), Error> {
        let group = self.group(vm);
        let mut tries = 0;
        loop {
            match fs_err::remove_dir(&group) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
                Err(e) if tries == TRIES => {
                    return Err(Error::internal(format!("cannot remove the cgroup of VM {vm}"), &e));
                }
                // EBUSY: processes are in it.
                Err(_) => {}
            }
            match fs_err::write(group.join("cgroup.kill"), "1") {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::NotFound && !group.exists() => return Ok(()),
                // Kernels before 5.14 have no cgroup.kill; the processes are killed one by one by their holder.
                Err(e) => tracing::debug!(bothy.vm.id = %vm, error = %e, "cannot kill a cgroup"),
            }
            tries += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Where cgroup v2 is mounted, and the group of this process there.
///
/// # Errors
/// Why there is none, in words.
pub fn own() -> Result<(PathBuf, PathBuf), String> {
    let read = |path: &str| fs_err::read_to_string(path).map_err(|e| e.to_string());
    let mount = mount_point(&read("/proc/self/mountinfo")?).ok_or("cgroup v2 is not mounted")?;
    let groups = read("/proc/self/cgroup")?;
    let own = own_group(&groups).ok_or("this process is in no cgroup v2")?;
    let own = mount.join(own.trim_start_matches('/'));
    Ok((mount, own))
}

/// Moves this process into `group`, which is made if it is not there.
///
/// # Errors
/// The kernel refuses.
pub fn enter(group: &Path) -> io::Result<()> {
    make_dir(group)?;
    fs_err::write(group.join("cgroup.procs"), std::process::id().to_string())
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs_err::create_dir(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The bounds of one VM's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    memory: u64,
    cpus: u32,
}

impl Bounds {
    /// Those of a VM of `shape`. They are to keep a VMM that has gone wild from the others, not to be felt by a guest at
    /// work: beside the guest's memory there is room for the VMM, under TCG for all the translated code that it may keep
    /// (QEMU's `tb-size`, at most 1 GiB), and beside the guest's processors one for the VMM's own threads.
    pub fn of(shape: &Shape, accel: Accel) -> Self {
        let code_mib = match accel {
            Accel::Kvm => 0,
            Accel::Tcg => 1024,
        };
        let mib = shape.memory_mib + 2 * overhead_mib(accel) + code_mib;
        Self { memory: mib * MIB, cpus: shape.cpus + 1 }
    }

    /// The files of a group with these `controllers`, and what goes into them.
    fn files(&self, controllers: &[&str]) -> Vec<(&'static str, String)> {
        let all = [
            // One hundredth of a second at a time, as many as there are processors.
            ("cpu", "cpu.max", format!("{} 100000", u64::from(self.cpus) * 100_000)),
            ("memory", "memory.max", self.memory.to_string()),
            // A VM of which a part was killed is of no use.
            ("memory", "memory.oom.group", "1".to_owned()),
            ("pids", "pids.max", (self.cpus + TASKS).to_string()),
            // Each VM the same share of a disk.
            ("io", "io.weight", "default 100".to_owned()),
        ];
        all.into_iter()
            .filter(|(controller, ..)| controllers.contains(controller))
            .map(|(_, file, value)| (file, value))
            .collect()
    }
}

/// Where cgroup v2 is mounted, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let is_v2 = right.split(' ').next() == Some("cgroup2");
        is_v2.then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// This process' group in version 2's hierarchy, from `/proc/self/cgroup`.
fn own_group(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_testkit::require_root;

    #[test]
    fn the_place_is_read_from_proc() {
        let mountinfo = "25 1 0:22 / /sys rw shared:7 - sysfs sysfs rw\n\
            30 25 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mountinfo), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("25 1 0:22 / /sys rw - sysfs sysfs rw\n"), None);
        assert_eq!(own_group("4:cpu:/x\n0::/system.slice/a.service\n"), Some("/system.slice/a.service"));
        assert_eq!(own_group("4:cpu:/x\n"), None);
    }

    #[test]
    fn bounds_are_wider_than_the_guest_and_only_what_the_host_can() {
        let shape = Shape { cpus: 2, memory_mib: 512, ..Shape::default() };
        let (kvm, tcg) = (Bounds::of(&shape, Accel::Kvm), Bounds::of(&shape, Accel::Tcg));
        assert!(kvm.memory > 512 * MIB && tcg.memory > kvm.memory + 1024 * MIB);
        let files = kvm.files(&WANTED);
        let value = |file: &str| files.iter().find(|(name, _)| *name == file).map(|(_, v)| v.as_str());
        assert_eq!(value("cpu.max"), Some("300000 100000"));
        assert_eq!(value("memory.max"), Some((608 * MIB).to_string().as_str()));
        assert_eq!(value("pids.max"), Some("131"));
        assert_eq!(kvm.files(&["pids"]).len(), 1);
        assert!(kvm.files(&[]).is_empty());
    }

    /// On the real hierarchy, with the controllers that it happens to have.
    #[tokio::test]
    async fn a_group_holds_processes_and_takes_them_with_it() {
        require_root!();
        let groups = match Cgroups::find() {
            Ok(groups) => groups,
            Err(why) => return eprintln!("skipped: {why}"),
        };
        assert!(groups.describe().contains("cgroup v2"));
        let vm = VmId::new();
        let bounds = Bounds::of(&Shape::default(), Accel::Tcg);
        groups.create(vm, &bounds).unwrap();
        let procs = groups.create(vm, &bounds).unwrap();
        assert!(groups.group(vm).exists());
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        fs_err::write(&procs, child.id().to_string()).unwrap();
        assert_eq!(fs_err::read_to_string(&procs).unwrap().trim(), child.id().to_string());
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
        groups.remove(vm).await.unwrap();
        assert!(!ended.await.unwrap().success(), "it was killed");
        assert!(!groups.group(vm).exists());
        groups.remove(vm).await.unwrap();
    }
}
