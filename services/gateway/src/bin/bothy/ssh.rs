//! The ssh tools, and who the user is to a guest: bothy's own key pair, the user's public keys, their git name.
//!
//! All that bothy knows of `ssh` and `ssh-keygen` is here. bothy's key is the user's (`$XDG_DATA_HOME/bothy`), made once;
//! its host keys are in a file of their own, by VM id, so that a new VM of an old name is not an alarm.

use crate::{dirs, printer::Printer};
use bothy_contract::{Code, Error, VmId, workspace::Identity};
use fs_err as fs;
use std::{
    ffi::OsString,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The longest public key file that is taken, in bytes; an RSA key of 16384 bits has less than 3 KiB.
const MAX_KEY: u64 = 16 << 10;

fn private_dir() -> Result<PathBuf, Error> {
    let dir = dirs::data()?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(|e| Error::internal(format!("cannot make {}", dir.display()), &e))?;
    Ok(dir)
}

/// The path of bothy's private key, made first where it is not there.
fn own_key() -> Result<PathBuf, Error> {
    let dir = private_dir()?;
    let key = dir.join("id_ed25519");
    if key.exists() && key.with_extension("pub").exists() {
        return Ok(key);
    }
    // Made beside and renamed, the private half last: whoever sees it sees a whole pair, also when two are started at
    // once.
    let temp = tempfile::tempdir_in(&dir)
        .map_err(|e| Error::internal(format!("cannot write to {}", dir.display()), &e))?;
    let made = temp.path().join("id_ed25519");
    let out = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "bothy", "-f"])
        .arg(&made)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Error::new(Code::FailedPrecondition, format!("cannot run `ssh-keygen`: {e}"))
                .hint("install it: `apt-get install openssh-client`")
        })?;
    if !out.status.success() {
        let why = String::from_utf8_lossy(&out.stderr);
        return Err(Error::new(Code::Internal, format!("`ssh-keygen` failed: {}", why.trim())));
    }
    if !key.exists() {
        let failed = |e: std::io::Error| Error::internal("cannot keep bothy's ssh key", &e);
        fs::rename(made.with_extension("pub"), key.with_extension("pub")).map_err(failed)?;
        fs::rename(&made, &key).map_err(failed)?;
    }
    Ok(key)
}

/// The first line of a public key file, if it is one.
fn public_key(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    if !meta.is_file() || meta.len() > MAX_KEY {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().next()?.trim();
    let kind = line.split_whitespace().next()?;
    let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|prefix| kind.starts_with(prefix));
    (known && !line.chars().any(char::is_control)).then(|| line.to_owned())
}

/// What the user has set for all of their repositories. Not what the one here says, if this runs in one: that goes with the
/// repository, and holds for its checkout alone.
fn git_config(name: &str) -> Option<String> {
    let mut git = Command::new("git");
    let out = outside(&mut git).args(["config", "--get", name]).stdin(Stdio::null()).output().ok()?;
    let value = String::from_utf8(out.stdout).ok()?;
    let value = value.trim();
    (out.status.success() && !value.is_empty()).then(|| value.to_owned())
}

/// Has git look into no repository.
fn outside(git: &mut Command) -> &mut Command {
    git.current_dir("/").env_remove("GIT_DIR").env("GIT_CEILING_DIRECTORIES", "/")
}

/// The user's public identity. What is missing is left out; a machine is of use without ssh, too.
pub(crate) fn identity(printer: Printer) -> Identity {
    let mut keys = Vec::new();
    match own_key() {
        Ok(key) => keys.extend(public_key(&key.with_extension("pub"))),
        Err(e) => printer.note(format!("`bothy vm ssh` will not work: {e}")),
    }
    if let Some(home) = dirs::home() {
        let mut files: Vec<_> = fs::read_dir(home.join(".ssh"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.file_name()
                    .and_then(|name| name.to_str())
                    .is_some_and(|name| name.starts_with("id_") && name.ends_with(".pub"))
            })
            .collect();
        files.sort();
        keys.extend(files.iter().filter_map(|path| public_key(path)));
    }
    keys.dedup();
    Identity { ssh_public_keys: keys, git_name: git_config("user.name"), git_email: git_config("user.email") }
}

/// `text` in single quotes for the shell that ssh runs ProxyCommand with (sh(1)), with the `%` of ssh_config(5) doubled.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''")).replace('%', "%%")
}

/// The `ssh` that logs in to `vm` as `user`, with `args` behind the destination.
pub(crate) fn command(
    socket: &Path,
    vm: VmId,
    name: &str,
    user: &str,
    args: &[String],
) -> Result<Command, Error> {
    let key = own_key()?;
    let dir = private_dir()?;
    // sshd and ssh refuse keys that others can read (ssh(1)).
    let _ = fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600));
    let me = std::env::current_exe().map_err(|e| Error::internal("cannot find this program", &e))?;
    let option = |name: &str, value: &str| {
        let mut text = OsString::from("-o");
        text.push(format!("{name}={value}"));
        text
    };
    let path = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            Error::invalid(format!("{} is not UTF-8, which `ssh` options must be", path.display()))
        })
    };
    let proxy = format!("{} --socket {} vm proxy {vm} %p", quoted(&path(&me)?), quoted(&path(socket)?));
    let mut ssh = Command::new("ssh");
    ssh.arg(option("ProxyCommand", &proxy))
        .arg(option(
            "UserKnownHostsFile",
            &format!("\"{}\"", path(&dir.join("known_hosts"))?.replace('%', "%%")),
        ))
        .arg(option("HostKeyAlias", &format!("bothy-{vm}")))
        // The stream ends in the VM of that id, whoever is on the network: the first key seen is its own.
        .arg(option("StrictHostKeyChecking", "accept-new"))
        .arg(option("UpdateHostKeys", "no"))
        .arg(option("LogLevel", "ERROR"))
        .arg("-i")
        .arg(&key)
        .arg("-l")
        .arg(user);
    // Options among the arguments come before the destination, as ssh's own getopt wants a command after it.
    let split = options(args);
    let (before, after) = args.split_at_checked(split).unwrap_or((args, &[]));
    ssh.args(before).arg(name).args(after);
    Ok(ssh)
}

/// How many of `args` are ssh's options with their values; what follows is the command.
fn options(args: &[String]) -> usize {
    /// Options of ssh(1) that take a value.
    const WITH_VALUE: &str = "BbcDEeFIiJLlmOoPpQRSWw";
    let mut n = 0;
    while let Some(arg) = args.get(n) {
        let Some(letters) = arg.strip_prefix('-').filter(|rest| !rest.is_empty()) else { break };
        n += 1;
        if letters == "-" {
            break;
        }
        if let Some(at) = letters.find(|c| WITH_VALUE.contains(c)) {
            // The value is the rest of the word, or the next one.
            if at + 1 == letters.len() {
                n += 1;
            }
        }
    }
    n.min(args.len())
}

/// Forgets the host keys of a VM that is gone.
pub(crate) fn forget(vm: VmId) {
    let Ok(dir) = dirs::data() else { return };
    let file = dir.join("known_hosts");
    if file.exists() {
        // A line too many does no harm, so that a failure is nobody's trouble.
        let _ = Command::new("ssh-keygen")
            .arg("-q")
            .arg("-R")
            .arg(format!("bothy-{vm}"))
            .arg("-f")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repositorys_own_identity_is_not_the_users() {
        let dir = tempfile::tempdir().unwrap();
        let own = |git: &mut Command| {
            let out = git.args(["config", "--get", "user.name"]).output().unwrap();
            String::from_utf8(out.stdout).unwrap().trim().to_owned()
        };
        let git = || {
            let mut git = Command::new("git");
            git.current_dir(dir.path()).env("GIT_CONFIG_GLOBAL", dir.path().join("global"));
            git
        };
        fs::write(dir.path().join("global"), "[user]\n\tname = For All\n").unwrap();
        assert!(git().args(["init", "-q"]).status().unwrap().success());
        assert!(git().args(["config", "user.name", "For This"]).status().unwrap().success());
        assert_eq!(own(&mut git()), "For This");
        assert_eq!(own(outside(&mut git())), "For All");
        assert_eq!(own(outside(git().env("GIT_DIR", dir.path().join(".git")))), "For All");
    }

    fn split(args: &str) -> usize {
        options(&args.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_of_ssh_are_told_from_the_command() {
        assert_eq!(split("uptime -p"), 0);
        assert_eq!(split("-v uptime"), 1);
        assert_eq!(split("-L 1:h:2 -N"), 3);
        assert_eq!(split("-L1:h:2 ls -l"), 1);
        assert_eq!(split("-tt -o Foo=bar ls"), 3);
        assert_eq!(split("-- ls"), 1);
        assert_eq!(split("-L"), 1);
        assert_eq!(split(""), 0);
    }

    #[test]
    fn quoting_survives_the_shell_and_ssh() {
        assert_eq!(quoted("/a b/it's 100%"), r"'/a b/it'\''s 100%%'");
    }

    #[test]
    fn only_public_keys_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id_x.pub");
        for (text, good) in [
            ("ssh-ed25519 AAAA me@here\n", true),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA", false),
            ("", false),
            ("ssh-rsa A\u{7}A", false),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(public_key(&file).is_some(), good, "{text:?}");
        }
    }
}
