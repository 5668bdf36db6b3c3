//! Paths in the guest, as users give them.

use bothy_contract::Error;

/// Checks a path in the guest: absolute, no `.` and `..`, no empty parts, no control characters, not the root itself.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(what: &str, path: &str) -> Result<(), Error> {
    let refuse = |why: &str| {
        Err(Error::invalid(format!("the {what} {path:?} {why}"))
            .hint("give an absolute path, such as `/root/repo`"))
    };
    let Some(relative) = path.strip_prefix('/') else { return refuse("is not absolute") };
    if path.len() > 1024 {
        return refuse("is longer than 1024 bytes");
    }
    if path.chars().any(char::is_control) {
        return refuse("has control characters");
    }
    if relative.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("has empty parts, `.` or `..`");
    }
    if relative.split('/').any(|part| part.len() > 200 || part.starts_with(".bothy-")) {
        return refuse("has a part that is too long, or begins with `.bothy-`");
    }
    if matches!(relative.split('/').next(), Some("proc" | "sys" | "dev")) {
        return refuse("is on a file system of the kernel's");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        for good in ["/root/repo", "/a b", "/ä/-x", "/root/.config"] {
            assert!(check("path", good).is_ok(), "{good}");
        }
        for bad in
            ["", "a", "/", "/a/", "//a", "/a/../b", "/./a", "/a\nb", "/proc/x", "/root/.bothy-import-1"]
        {
            assert!(check("path", bad).is_err(), "{bad}");
        }
        assert!(check("path", &format!("/{}", "x/".repeat(600))).is_err());
    }
}
