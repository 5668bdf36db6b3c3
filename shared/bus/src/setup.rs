//! The bus' directory on disk: identities, and the server's configuration.
//!
//! ```text
//! <state>/bus/                 0755
//!   nats.conf                  0644, public keys only
//!   identity/<service>.nk      0600, owned by the service's user where it has one
//!   jetstream/                 0700, owned by the bus' user where there is one
//! ```

use crate::permissions::server_config;
use bothy_config::Config;
use bothy_contract::{Code, Error, Service};
use fs_err::os::unix::fs::OpenOptionsExt;
use nix::unistd::{Uid, User, chown};
use nkeys::KeyPair;
use std::{
    collections::BTreeMap,
    fs::Permissions,
    io::{ErrorKind, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process,
};

/// The user that the systemd unit of the bus runs as.
const BUS_USER: &str = "bothy-bus";

/// Creates the bus' directory, an identity for each service, and the server's configuration. Identities that exist are
/// kept; the configuration is always written anew, in one step. Can be run again at any time, also beside a running
/// bus, which reads the new configuration at its next start or on SIGHUP.
///
/// As root, each identity is given to the user named like the service's binary, where there is such a user (the
/// systemd units); else everything belongs to who runs this.
///
/// # Errors
/// Where a file cannot be written, or an identity that exists is not one.
pub fn setup(config: &Config) -> Result<(), Error> {
    let dir = config.bus_dir();
    let io = |e: std::io::Error| {
        Error::new(Code::Internal, format!("cannot set up the bus in {}: {e}", dir.display()))
    };
    directory(&dir, 0o755, None).map_err(io)?;
    directory(&dir.join("identity"), 0o755, None).map_err(io)?;
    directory(&dir.join("jetstream"), 0o700, account(BUS_USER)).map_err(io)?;
    let mut identities = BTreeMap::new();
    for service in Service::ALL {
        let path = config.bus_seed(service);
        let key = identity(&path)?;
        own(&path, account(service.binary())).map_err(io)?;
        identities.insert(service, key.public_key());
    }
    let path = dir.join("nats.conf");
    let temporary = temporary_beside(&path);
    write_new(&temporary, 0o644, server_config(config, &identities).as_bytes())
        .and_then(|()| fs_err::rename(&temporary, &path))
        .and_then(|()| sync(&dir))
        .map_err(|e| {
            let _ = fs_err::remove_file(&temporary);
            io(e)
        })
}

/// The identity at `path`, made where there is none.
fn identity(path: &Path) -> Result<KeyPair, Error> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Code::FailedPrecondition, format!("{} is not an identity: {e}", path.display()))
            .hint("remove it, and a new one is made")
    };
    match fs_err::read_to_string(path) {
        Ok(seed) => {
            let key = KeyPair::from_seed(seed.trim()).map_err(|e| failed(&e))?;
            fs_err::set_permissions(path, Permissions::from_mode(0o600)).map_err(|e| failed(&e))?;
            return Ok(key);
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(failed(&e)),
    }
    let key = KeyPair::new_user();
    let seed = key.seed().map_err(|e| Error::internal("cannot make an identity", &e))?;
    let temporary = temporary_beside(path);
    // A link does not replace: of two set-ups at once, the first one's identity is the one that both use.
    let linked =
        write_new(&temporary, 0o600, seed.as_bytes()).and_then(|()| fs_err::hard_link(&temporary, path));
    let removed = fs_err::remove_file(&temporary);
    match linked {
        Ok(()) => removed.map(|()| key).map_err(|e| failed(&e)),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => identity(path),
        Err(e) => Err(Error::new(Code::Internal, format!("cannot make an identity: {e}"))),
    }
}

fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", process::id()));
    name.into()
}

/// Writes a file that must not exist, with `mode` from its first moment, down to the disk.
fn write_new(path: &Path, mode: u32, content: &[u8]) -> std::io::Result<()> {
    let mut file = fs_err::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

fn sync(dir: &Path) -> std::io::Result<()> {
    fs_err::File::open(dir)?.sync_all()
}

fn directory(path: &Path, mode: u32, owner: Option<User>) -> std::io::Result<()> {
    fs_err::create_dir_all(path)?;
    fs_err::set_permissions(path, Permissions::from_mode(mode))?;
    own(path, owner)
}

/// The account of that name, where we may give files away and there is one.
fn account(name: &str) -> Option<User> {
    if Uid::effective().is_root() { User::from_name(name).ok().flatten() } else { None }
}

fn own(path: &Path, owner: Option<User>) -> std::io::Result<()> {
    match owner {
        Some(user) => chown(path, Some(user.uid), Some(user.gid)).map_err(std::io::Error::from),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_kept_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::new(dir.path().join("s"), dir.path().join("r"));
        setup(&config).unwrap();
        let seeds = || Service::ALL.map(|s| fs_err::read_to_string(config.bus_seed(s)).unwrap());
        let (first, conf) = (seeds(), fs_err::read_to_string(config.bus_dir().join("nats.conf")).unwrap());
        fs_err::set_permissions(config.bus_seed(Service::Vm), Permissions::from_mode(0o644)).unwrap();
        setup(&config).unwrap();
        assert_eq!(first, seeds());
        assert_eq!(conf, fs_err::read_to_string(config.bus_dir().join("nats.conf")).unwrap());
        for service in Service::ALL {
            let mode = fs_err::metadata(config.bus_seed(service)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{service:?}");
            assert!(!conf.contains(first[service as usize].as_str()));
        }
        let names: Vec<_> = fs_err::read_dir(config.bus_dir().join("identity")).unwrap().collect();
        assert_eq!(names.len(), Service::ALL.len(), "nothing temporary is left: {names:?}");
    }

    #[test]
    fn a_broken_identity_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::new(dir.path().join("s"), dir.path().join("r"));
        let path = config.bus_seed(Service::Net);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, "nonsense").unwrap();
        let error = setup(&config).unwrap_err();
        assert!(error.message.contains("net.nk"), "{error}");
        assert_eq!(fs_err::read_to_string(&path).unwrap(), "nonsense");
        assert!(!config.bus_dir().join("nats.conf").exists());
    }
}
