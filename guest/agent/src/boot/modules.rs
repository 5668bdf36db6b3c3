//! Loads the kernel modules that the host packed into the initramfs, in the order that the host gives: `/modules/order`
//! has one file name per line, dependencies first.

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::{BootError, Tried};

const DIRECTORY: &str = "/modules";

/// Loads all modules; one that is there already (or built in) is fine.
pub(super) fn load() -> Result<(), BootError> {
    let order =
        fs_err::read_to_string(format!("{DIRECTORY}/order")).tried(|| "read the order of modules".into())?;
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
