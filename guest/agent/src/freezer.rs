//! Everybody's processes held still, by the kernel's control groups (cgroup v2, `cgroup.freeze`): a template's, from the
//! moment it is quiesced until a machine of it has its own clock, randomness, name and address. They notice nothing.
//!
//! systemd itself and this agent are in a group of their own (`init.scope`), which goes on. An image whose init is the agent has
//! no groups, and nothing is held still there.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where systemd mounts the hierarchy.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// How long processes may take to stand still: one that waits for a disk does so when it has what it waits for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Holds all groups below `root` still but the one of this process. Says which do not come to stand still, and why.
///
/// # Errors
/// When the groups cannot be listed.
pub(crate) fn freeze(root: &Path) -> io::Result<Vec<String>> {
    let groups = others(root, &fs_err::read_to_string("/proc/self/cgroup")?)?;
    let mut left = Vec::new();
    for group in &groups {
        if let Err(error) = fs_err::write(group.join("cgroup.freeze"), "1") {
            left.push(error.to_string());
        }
    }
    let until = Instant::now() + PATIENCE;
    for group in &groups {
        while !is_frozen(&fs_err::read_to_string(group.join("cgroup.events"))?) {
            if Instant::now() > until {
                left.push(format!("the processes of {} do not come to stand still", group.display()));
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(left)
}

/// Lets them all go on.
///
/// # Errors
/// When a group cannot be let go: its processes stay as they are.
pub(crate) fn thaw(root: &Path) -> io::Result<()> {
    for group in others(root, &fs_err::read_to_string("/proc/self/cgroup")?)? {
        fs_err::write(group.join("cgroup.freeze"), "0")?;
    }
    Ok(())
}

/// The groups right below `root`, without that of the process that `/proc/self/cgroup` says `own` of.
fn others(root: &Path, own: &str) -> io::Result<Vec<PathBuf>> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let own = own.split('/').next().unwrap_or_default();
    let entries = match fs_err::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut groups = Vec::new();
    for entry in entries {
        let group = entry?.path();
        // The hierarchy of old has no such files; a process that would stop itself could never go on.
        let is_own = own.is_empty() || group.file_name().is_some_and(|name| name == own);
        if !is_own && group.join("cgroup.freeze").is_file() {
            groups.push(group);
        }
    }
    groups.sort();
    Ok(groups)
}

fn is_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_but_our_own_is_held_still() {
        let dir = tempfile::tempdir().unwrap();
        for group in ["init.scope", "system.slice", "user.slice", "old"] {
            fs_err::create_dir(dir.path().join(group)).unwrap();
            if group != "old" {
                fs_err::write(dir.path().join(group).join("cgroup.freeze"), "0\n").unwrap();
            }
        }
        let names = |own: &str| -> Vec<String> {
            let groups = others(dir.path(), own).unwrap();
            groups.iter().map(|group| group.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names("1:name=systemd:/x\n0::/init.scope\n"), ["system.slice", "user.slice"]);
        assert_eq!(names("0::/system.slice/a.service\n"), ["init.scope", "user.slice"]);
        // Whoever is in the root group would be held still with any of them, for all it knows.
        assert!(names("0::/\n").is_empty() && names("").is_empty());
        assert!(others(&dir.path().join("none"), "0::/init.scope").unwrap().is_empty());
    }

    #[test]
    fn what_stands_still_says_so() {
        assert!(is_frozen("populated 1\nfrozen 1\n") && !is_frozen("populated 1\nfrozen 0\n"));
    }
}
