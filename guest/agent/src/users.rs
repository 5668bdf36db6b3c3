//! Users and groups from `/etc/passwd` and `/etc/group`, read as files: a static binary has no name service, and an
//! image may come from any distribution.

use std::io;
use std::path::{Path, PathBuf};

/// A user, as login(1) would see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups, the primary one too.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: PathBuf,
    pub(crate) shell: PathBuf,
}

/// Looks up a user by name, or by number. A number that no line has is a user all the same, of group 0 and with no
/// home, which is what images for containers expect.
///
/// # Errors
/// `NotFound` when there is none.
pub(crate) fn lookup(name: &str) -> io::Result<User> {
    // An image from scratch has no passwd; root is root there all the same.
    let read = |path: &str| fs_err::read_to_string(path).unwrap_or_default();
    find(&read("/etc/passwd"), &read("/etc/group"), name).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("no user `{name}` in the guest's /etc/passwd"))
    })
}

/// The same, in the group of that name or number and no other.
///
/// # Errors
/// `NotFound` when there is no such user or group.
pub(crate) fn lookup_in(name: &str, group: &str) -> io::Result<User> {
    let user = lookup(name)?;
    let groups = fs_err::read_to_string("/etc/group").unwrap_or_default();
    let gid = group_named(&groups, group).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("no group `{group}` in the guest's /etc/group"))
    })?;
    Ok(User { gid, groups: vec![gid], ..user })
}

fn group_named(groups: &str, group: &str) -> Option<u32> {
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == group).then(|| fields.nth(1)?.parse().ok())?
    });
    named.or_else(|| group.parse().ok())
}

fn find(passwd: &str, group: &str, name: &str) -> Option<User> {
    let mut user = passwd.lines().find_map(|line| parse(line, name));
    if user.is_none() && (name == "root" || name == "0") {
        user = parse("root:x:0:0::/root:/bin/sh", name);
    } else if user.is_none() && name.parse::<u32>().is_ok() {
        user = parse(&format!("{name}:x:{name}:0::/:/bin/sh"), name);
    }
    let mut user = user?;
    user.groups = groups_of(group, &user.name, user.gid);
    Some(user)
}

fn parse(line: &str, wanted: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let uid = fields.nth(1)?;
    if name != wanted && uid != wanted {
        return None;
    }
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?;
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh");
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid,
        groups: Vec::new(),
        home: Path::new(if home.is_empty() { "/" } else { home }).to_owned(),
        shell: Path::new(shell).to_owned(),
    })
}

/// What initgroups(3) would set.
fn groups_of(group: &str, name: &str, primary: u32) -> Vec<u32> {
    let mut groups = vec![primary];
    for line in group.lines() {
        let mut fields = line.split(':').skip(2);
        let (Some(Ok(gid)), Some(members)) = (fields.next().map(str::parse), fields.next()) else { continue };
        if gid != primary && members.split(',').any(|member| member == name) {
            groups.push(gid);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\ndev:x:1000:1000:Dev,,,:/home/dev:\nbroken\n";
    const GROUP: &str = "root:x:0:\ndev:x:1000:dev\nsudo:x:27:adm,dev\nadm:x:4:devil\n";

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let dev = find(PASSWD, GROUP, "dev").unwrap();
        assert_eq!((dev.uid, dev.gid, dev.shell.as_path()), (1000, 1000, Path::new("/bin/sh")));
        assert_eq!(dev.groups, [1000, 27]);
        assert_eq!(find(PASSWD, GROUP, "1000"), Some(dev));
        assert_eq!(find(PASSWD, GROUP, "root").unwrap().home, Path::new("/root"));
        assert_eq!(find(PASSWD, GROUP, "broken"), None);
        assert_eq!(find(PASSWD, GROUP, "nobody"), None);
    }

    #[test]
    fn an_image_without_passwd_has_root() {
        assert_eq!(find("", "", "root").unwrap().uid, 0);
        assert_eq!(find("", "", "dev"), None);
        let number = find("", "", "4321").unwrap();
        assert_eq!((number.uid, number.gid, number.home.as_path()), (4321, 0, Path::new("/")));
        assert_eq!(find("", "", "-1"), None);
    }

    #[test]
    fn groups_are_found_by_name_and_by_number() {
        assert_eq!(group_named(GROUP, "sudo"), Some(27));
        assert_eq!(group_named(GROUP, "4321"), Some(4321));
        assert_eq!(group_named(GROUP, "nobody"), None);
    }
}
