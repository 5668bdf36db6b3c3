//! Loads the kernel modules that the host packed into the initramfs, in the order that the host gives: `/modules/order`
//! has one file name per line, dependencies first; `/modules/vsock` has those that a machine with a virtio socket device
//! needs besides, for each module costs time that other machines need not spend.

use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::{BootError, Tried};
use crate::machine;

const DIRECTORY: &str = "/modules";

/// Loads all modules; one that is there already (or built in) is fine.
pub(super) fn load() -> Result<(), BootError> {
    load_all("order")?;
    // Devices show once virtio's transport is loaded. An image without that list may have all of it built in.
    if machine::has_virtio(machine::VSOCK) && Path::new(DIRECTORY).join("vsock").exists() {
        load_all("vsock")?;
    }
    Ok(())
}

fn load_all(list: &str) -> Result<(), BootError> {
    let order = fs_err::read_to_string(format!("{DIRECTORY}/{list}"))
        .tried(|| format!("read the list of modules `{list}`"))?;
    for name in names(&order) {
        let file =
            fs_err::File::open(format!("{DIRECTORY}/{name}")).tried(|| format!("open module `{name}`"))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).tried(|| format!("load module `{name}`")),
        }
    }
    Ok(())
}

fn names(order: &str) -> impl Iterator<Item = &str> {
    order.lines().map(str::trim).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    #[test]
    fn order_is_kept_and_blank_lines_do_not_count() {
        let names: Vec<_> = super::names("virtio_ring.ko\nvirtio.ko\n\n  overlay.ko \n").collect();
        assert_eq!(names, ["virtio_ring.ko", "virtio.ko", "overlay.ko"]);
    }
}
