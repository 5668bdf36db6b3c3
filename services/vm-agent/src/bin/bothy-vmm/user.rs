//! Giving up the agent's rights.

use bothy_contract::Error;
use bothy_vm_agent::vmm::wire::LaunchSpec;
use nix::{
    sys::stat::{Mode, umask},
    unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid},
};

/// Gives up everything but the VM's user: groups, user, and the capabilities that an agent which is not root has.
pub(crate) fn become_user(spec: &LaunchSpec) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
    let failed = |err: nix::Error| {
        Error::internal(format!("cannot become user {uid}"), &err)
            .hint("the vm-agent runs as root, or with CAP_SETUID, CAP_SETGID and CAP_CHOWN")
    };
    if geteuid() != uid {
        let groups: Vec<Gid> = spec.groups.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups).map_err(failed)?;
        setresgid(gid, gid, gid).map_err(failed)?;
        setresuid(uid, uid, uid).map_err(failed)?;
    }
    // A change from one plain user to another keeps ambient capabilities (capabilities(7)); the next exec would too.
    rustix::thread::clear_ambient_capability_set()
        .map_err(|e| failed(nix::Error::from_raw(e.raw_os_error())))?;
    nix::sys::prctl::set_no_new_privs().map_err(failed)?;
    umask(Mode::from_bits_truncate(0o027));
    Ok(())
}
