//! What kind of machine this is, as far as it matters: the words that the host put on the kernel's command line for us, and
//! which virtio devices there are.

use std::path::Path;

/// The virtio device type of a console, which has our ports (virtio 1.2, section 5).
pub(crate) const CONSOLE: u32 = 3;
/// The virtio device type of a socket device.
pub(crate) const VSOCK: u32 = 19;

/// The names of the disks in the order in which the machine has them: told where disks have no serials of the host's.
pub(crate) fn disks() -> Option<Vec<String>> {
    let order = word(&command_line(), "bothy.disks")?;
    Some(order.split(',').map(str::to_owned).collect())
}

/// Whether this machine ends when it is reset, and only then: powered off it would stay, halted, for ever.
pub(crate) fn ends_by_reset() -> bool {
    word(&command_line(), "bothy.end").as_deref() == Some("reset")
}

fn command_line() -> String {
    fs_err::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// The value of `name=value`.
fn word(line: &str, name: &str) -> Option<String> {
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .map(str::to_owned)
}

/// Whether there is a virtio device of that type; it need not have a driver.
pub(crate) fn has_virtio(kind: u32) -> bool {
    has_virtio_in(Path::new("/sys/bus/virtio/devices"), kind)
}

fn has_virtio_in(devices: &Path, kind: u32) -> bool {
    let Ok(entries) = fs_err::read_dir(devices) else { return false };
    entries.flatten().any(|entry| {
        let text = fs_err::read_to_string(entry.path().join("device")).unwrap_or_default();
        let number = text.trim().strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
        number == Some(kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_whole_and_the_first_counts() {
        let line = "quiet xbothy.end=a bothy.end=reset bothy.end=b bothy.disks=rootfs,work\n";
        assert_eq!(word(line, "bothy.end").as_deref(), Some("reset"));
        assert_eq!(word(line, "bothy.disks").as_deref(), Some("rootfs,work"));
        assert_eq!(word(line, "bothy"), None);
        assert_eq!(word(line, "quiet"), None);
    }

    #[test]
    fn devices_are_known_by_their_type() {
        let dir = tempfile::tempdir().unwrap();
        for (name, kind) in [("virtio0", "0x0002\n"), ("virtio1", "0x0013\n")] {
            fs_err::create_dir(dir.path().join(name)).unwrap();
            fs_err::write(dir.path().join(name).join("device"), kind).unwrap();
        }
        assert!(has_virtio_in(dir.path(), VSOCK) && !has_virtio_in(dir.path(), CONSOLE));
        assert!(!has_virtio_in(&dir.path().join("none"), VSOCK));
    }
}
