//! Attaching to the VM's TAP, in two steps with different rights.
//!
//! The device node is opened while `launch` is still the agent: where no udev has made it everybody's, the VM's user may
//! not. The attaching is done as the VM's user, who owns the TAP: the agent has no right over network devices, and the
//! kernel asks at that moment (drivers/net/tun.c, `tun_not_capable`). The VMM then only inherits the descriptor.

use crate::os_error;
use bothy_contract::Error;
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use std::os::fd::AsRawFd;

const NODE: &str = "/dev/net/tun";
/// The descriptor's least number in the VMM: out of the way of all that a process opens by itself.
const LEAST: i32 = 100;

/// An open `/dev/net/tun` that is attached to nothing yet.
#[derive(Debug)]
pub(crate) struct Tap(fs_err::File);

impl Tap {
    pub(crate) fn open() -> Result<Self, Error> {
        fs_err::OpenOptions::new().read(true).write(true).open(NODE).map(Self).map_err(|err| {
            os_error("cannot open the TAP driver")(err)
                .hint("make `/dev/net/tun` accessible to the vm-agent, or load the `tun` module")
        })
    }

    /// Attaches to the TAP `name` and gives the number under which every program started from now on finds it.
    pub(crate) fn attach(self, name: &str) -> Result<i32, Error> {
        let failed = |err: nix::Error| Error::internal(format!("cannot attach to TAP `{name}`"), &err);
        set_interface(&self.0, name).map_err(failed)?;
        // Without close-on-exec: being inherited is what it is for.
        fcntl(self.0.file(), FcntlArg::F_DUPFD(LEAST)).map_err(failed)
    }
}

nix::ioctl_write_ptr_bad!(
    /// TUNSETIFF takes an ifreq, whatever its number encodes (linux/if_tun.h).
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

fn set_interface(file: &fs_err::File, name: &str) -> nix::Result<()> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.is_ascii() {
        return Err(nix::Error::ENAMETOOLONG);
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // No packet information in front, but room for offloading headers, as QEMU's own attaching asks for.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifru_flags = i16::try_from(flags).map_err(|_| nix::Error::EINVAL)?;
    let request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    #[expect(unsafe_code, reason = "an ioctl that no safe crate in use wraps")]
    // SAFETY: the descriptor is open, and TUNSETIFF reads one ifreq, which lives through the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }.map(|_| ())
}
