//! TAP devices by the TUN driver's ioctls (Documentation/networking/tuntap.rst, linux/if_tun.h); there is no netlink way
//! to make a persistent one with an owner.
#![expect(unsafe_code, reason = "the TUN driver is driven by ioctl; see the SAFETY comments")]

use fs_err::{File, OpenOptions};
use nix::{
    errno::Errno,
    libc::{self, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, c_int, ifreq},
};
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

const DEVICE: &str = "/dev/net/tun";

mod request {
    use nix::libc::{self, c_int, ifreq};
    nix::ioctl_write_ptr_bad!(set_iff, libc::TUNSETIFF as c_int, ifreq);
    nix::ioctl_write_int_bad!(set_persist, libc::TUNSETPERSIST as c_int);
    nix::ioctl_write_int_bad!(set_owner, libc::TUNSETOWNER as c_int);
    nix::ioctl_write_int_bad!(set_group, libc::TUNSETGROUP as c_int);
}

/// Makes the persistent TAP `name`, which only user `uid` with group `uid` may open.
///
/// The owner is set before the device outlives this call, so at no time is there a persistent TAP without one.
///
/// # Errors
/// `AlreadyExists` where there is a device of that name.
pub fn create(name: &str, uid: u32) -> io::Result<()> {
    let file = attach(name, IFF_TUN_EXCL)?;
    let fd = file.as_raw_fd();
    let id = c_int::try_from(uid).map_err(io::Error::other)?;
    // SAFETY: `fd` is an open TUN descriptor; these requests take an integer by value.
    unsafe {
        request::set_owner(fd, id)?;
        request::set_group(fd, id)?;
        request::set_persist(fd, 1)?;
    }
    Ok(())
}

/// Whether a process has the TAP `name` open, which must exist. The driver lets one at a time in (the device is not
/// multi-queue), so it is asked by trying; the carrier, which a process can set at will, would not be an answer.
pub fn in_use(name: &str) -> io::Result<bool> {
    match open(name) {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(true),
        Err(e) => Err(e),
    }
}

/// Opens the TAP `name` as a VMM does, which must exist. Each frame has a virtio-net header of 10 bytes in front.
pub fn open(name: &str) -> io::Result<File> {
    attach(name, 0)
}

/// Opens the driver and attaches to `name`, making it where it is missing; a device made so goes with the descriptor.
fn attach(name: &str, more: c_int) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let wanted = named(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more)?;
    let fd: RawFd = file.as_raw_fd();
    // SAFETY: `fd` is an open TUN descriptor, and `wanted` is a whole ifreq that outlives the call, as TUNSETIFF reads.
    unsafe { request::set_iff(fd, &raw const wanted) }.map_err(|errno| match errno {
        // With IFF_TUN_EXCL an existing device is EBUSY, like one that somebody has open.
        Errno::EBUSY if more & IFF_TUN_EXCL != 0 => io::ErrorKind::AlreadyExists.into(),
        other => io::Error::from(other),
    })?;
    Ok(file)
}

fn named(name: &str, flags: c_int) -> io::Result<ifreq> {
    // SAFETY: ifreq is plain C data, for which all zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is no device name")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::from_ne_bytes(u16::try_from(flags).map_err(io::Error::other)?.to_ne_bytes());
    Ok(request)
}
