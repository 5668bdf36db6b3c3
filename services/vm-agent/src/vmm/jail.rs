//! A Firecracker that sees nothing of the host but its own files: started by its jailer, in a root directory of its own.
//!
//! ```text
//! launch (root)   a mount namespace; in it a tmpfs on <dir>/jail, with the VM's files mounted where the jailer makes the root
//!  '-- hold       the first process of a pid namespace: when it ends, however it does, the kernel ends all others in it
//!       '-- exec  root still, and waits; becomes the jailer, which becomes Firecracker, the VM's user's
//! ```
//! Why it is so: the jailer must be started as root, and its change of user takes away the signal by which a VMM dies with
//! its holder (PR_SET_PDEATHSIG, prctl(2)), which the pid namespace does instead. The holder starts `exec` before anything else
//! and then becomes the VM's user, as every other holder is from the start. What is mounted is the holder's alone and goes
//! with it: nothing of it is ever to be taken down, and nobody else finds device nodes of a VM's user below the run directory.
//!
//! The jailer closes every descriptor but the standard ones, so a jailed VMM has its disks and its kernel by names in its
//! root, opens its TAP itself, and neither saves its guest nor goes on from a saved one.

use super::wire::LaunchSpec;
use bothy_contract::{Error, VmId};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The directory in the holder's that a jail is mounted on; outside the holder's mount namespace it is empty.
pub const PLACE: &str = "jail";
/// The name in [`PLACE`] of a link to the VMM's root, whose own path is too long for a socket's (unix(7)).
pub const ROOT: &str = "root";

/// What a jailed VMM finds in its root beside what its jailer makes there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// What the jailer calls the directory above the root: the name of the program that it starts.
    pub program: String,
    /// Files of the host.
    pub files: Vec<JailFile>,
}

/// A file of the host in a jail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailFile {
    /// Its name there.
    pub name: String,
    /// Where it is on the host.
    pub path: PathBuf,
    /// Whether it can only be read there, whoever owns it.
    pub read_only: bool,
}

impl Jail {
    /// The directory below [`PLACE`] that the jailer makes the VMM's root, as its documentation has it.
    pub fn root(&self, vm: VmId) -> PathBuf {
        [self.program.as_str(), &vm.to_string(), "root"].iter().collect()
    }

    /// Checks what the types of `spec`, whose jail this is, do not.
    pub(super) fn check(&self, spec: &LaunchSpec) -> Result<(), Error> {
        let plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']);
        let mut names = std::iter::once(&self.program).chain(self.files.iter().map(|file| &file.name));
        if let Some(name) = names.find(|name| !plain(name)) {
            return Err(Error::invalid(format!("`{name}` is no name of a file in a jail")));
        }
        if spec.tap.is_some() || spec.memory.is_some() || spec.restore.is_some() || !spec.disks.is_empty() {
            return Err(Error::invalid(
                "a jailed VMM gets files by their names in its jail, and nothing otherwise",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::wire::Monitor;

    #[test]
    fn a_jails_files_have_plain_names_and_nothing_comes_another_way() {
        let spec = |name: &str, tap: Option<&str>| LaunchSpec {
            vm: VmId::new(),
            vmm: "firecracker 1.16.1 jailed".into(),
            dir: "/run/bothy/vm/a".into(),
            argv: vec!["jailer".into()],
            monitor: Monitor::Api { requests: vec![] },
            tap: tap.map(str::to_owned),
            uid: 780_000,
            gid: 780_000,
            groups: vec![],
            cgroup: None,
            memory: None,
            restore: None,
            disks: vec![],
            jail: Some(Jail {
                program: "firecracker".into(),
                files: vec![JailFile { name: name.into(), path: "/d".into(), read_only: true }],
            }),
        };
        spec("kernel", None).check().unwrap();
        for name in ["", ".", "..", "../kernel", "/etc/passwd"] {
            assert!(spec(name, None).check().is_err(), "{name}");
        }
        assert!(spec("kernel", Some("tap")).check().unwrap_err().message.contains("by their names"));
    }
}
