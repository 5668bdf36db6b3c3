//! What `hold` inherits from `launch`, the launch's lock and a saved guest's state: by the numbers of descriptors.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// Owns the inherited descriptor `number`, and keeps it from the VMM.
pub(crate) fn inherited(number: i32) -> io::Result<OwnedFd> {
    // Standard streams have owners.
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // It is open, or this says that it is not.
    fs_err::symlink_metadata(format!("/proc/self/fd/{number}"))?;
    #[expect(unsafe_code, reason = "no safe way leads from a number to a descriptor")]
    // SAFETY: the descriptor is open, as was just seen, and `launch` duplicated it for this process alone: nothing has
    // opened or closed anything here yet that could own it.
    let inherited = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::CLOEXEC)?;
    Ok(inherited)
}
