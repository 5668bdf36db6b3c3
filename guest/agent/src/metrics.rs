//! How the guest stands, as cheaply as it can be told: two small files of `/proc`, and two questions to file systems.

use std::io;
use std::path::Path;

use bothy_guest_proto::v1::MetricsReply;
use nix::sys::statvfs::statvfs;

use crate::timeline::now_us;

/// Reads everything; `home` is what the work disk is mounted on, or `/`.
///
/// # Errors
/// When `/proc` is not there, or says nothing of memory.
pub(crate) fn read(home: &Path) -> io::Result<MetricsReply> {
    let memory = fs_err::read_to_string("/proc/meminfo")?;
    let bytes = |name| {
        kibibytes(&memory, name)
            .map(|kib| kib.saturating_mul(1024))
            .ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {name}")))
    };
    let load = fs_err::read_to_string("/proc/loadavg")?;
    let ((home_size, home_used), (root_size, root_used)) = (space(home)?, space(Path::new("/"))?);
    Ok(MetricsReply {
        uptime_us: now_us(),
        memory_total: bytes("MemTotal")?,
        memory_available: bytes("MemAvailable")?,
        load_1m: load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0),
        home_size,
        home_used,
        root_size,
        root_used,
    })
}

/// A line of proc_meminfo(5): `MemTotal:  247064 kB`.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Size and used bytes of the file system that `path` is on; what is kept for root counts as free.
fn space(path: &Path) -> io::Result<(u64, u64)> {
    let stat =
        statvfs(path).map_err(|e| io::Error::other(format!("statvfs {}: {}", path.display(), e.desc())))?;
    let unit = stat.fragment_size();
    let used = stat.blocks().saturating_sub(stat.blocks_free());
    Ok((stat.blocks().saturating_mul(unit), used.saturating_mul(unit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_meminfo_is_found_by_its_whole_name() {
        let text = "MemTotal:         247064 kB\nMemFree:  1 kB\nHugePages_Total:       0\n";
        assert_eq!(kibibytes(text, "MemTotal"), Some(247_064));
        assert_eq!(kibibytes(text, "Mem"), None);
        assert_eq!(kibibytes(text, "HugePages_Total"), None);
    }

    #[test]
    fn this_machine_has_memory_and_room() {
        let told = read(Path::new("/proc/..")).unwrap();
        assert!(told.memory_total > told.memory_available && told.memory_available > 0);
        assert!(told.root_size >= told.root_used && told.root_size > 0 && told.home_size == told.root_size);
        assert!(told.uptime_us > 0 && told.load_1m.is_finite());
    }
}
