//! Starting a command: who runs it, where, with which environment, and what exactly is wrong when it cannot start.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use bothy_guest_proto::v1::{Defaults, ExecFailed, ExecStart};
use nix::errno::Errno;
use tokio::process::{Child, Command};

use crate::pty::{self, Master};
use crate::sys::{self, Become};
use crate::users::{self, User};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command that runs.
pub(super) struct Spawned {
    pub(super) child: Child,
    /// With a terminal, its master.
    pub(super) terminal: Option<Master>,
}

/// Starts the command.
pub(super) fn spawn(start: &ExecStart, defaults: &Defaults) -> Result<Spawned, ExecFailed> {
    let user = user(start, defaults).map_err(|error| failed(Errno::EINVAL, error.to_string()))?;
    let environment = environment(start, defaults, &user);
    let directory = directory(start, defaults, &user)?;
    let (program, argv0, arguments) = match start.argv.split_first() {
        Some((name, arguments)) => {
            let path = environment.get("PATH").map_or("", String::as_str);
            (find(name, path, &directory)?, name.clone(), arguments)
        }
        // A leading dash makes it a login shell (bash(1), INVOCATION).
        None => (user.shell.clone(), format!("-{}", base_name(&user.shell)), [].as_slice()),
    };

    let mut command = std::process::Command::new(&program);
    command.arg0(&argv0).args(arguments).env_clear().envs(&environment).current_dir(&directory);
    let mut terminal = None;
    if start.tty {
        let (rows, cols) = super::window(start.window);
        let open = || -> io::Result<Master> {
            let (master, end) = pty::open(rows, cols, user.uid)?;
            command
                .stdin(Stdio::from(end.try_clone()?))
                .stdout(Stdio::from(end.try_clone()?))
                .stderr(Stdio::from(end));
            Ok(master)
        };
        terminal = Some({ open }().map_err(|error| failed_by(&error, "open a terminal"))?);
    } else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let User { uid, gid, groups, .. } = user;
    sys::on_start(&mut command, Become { uid, gid, groups, tty: start.tty });
    // `Command` holds the terminal's other end: it must be gone before the first read, or the end never comes.
    let child = Command::from(command).spawn().map_err(|error| failed_by(&error, &format!("`{argv0}`")))?;
    Ok(Spawned { child, terminal })
}

fn failed(errno: Errno, message: String) -> ExecFailed {
    ExecFailed { errno: errno as i32, message }
}

fn failed_by(error: &io::Error, what: &str) -> ExecFailed {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32));
    failed(errno, format!("{what}: {}", errno.desc()))
}

/// Who runs it.
fn user(start: &ExecStart, defaults: &Defaults) -> io::Result<User> {
    if !start.user.is_empty() || defaults.user.is_empty() {
        return users::lookup(if start.user.is_empty() { "root" } else { &start.user });
    }
    match defaults.user.split_once(':') {
        Some((name, group)) => users::lookup_in(name, group),
        None => users::lookup(&defaults.user),
    }
}

/// The user's environment, the image's on top, and the host's additions on top of that.
fn environment(start: &ExecStart, defaults: &Defaults, user: &User) -> BTreeMap<String, String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut environment = BTreeMap::from([
        ("HOME".to_owned(), text(&user.home)),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
        ("SHELL".to_owned(), text(&user.shell)),
        ("PATH".to_owned(), PATH.to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ]);
    environment.extend(defaults.env.iter().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    }));
    if start.tty {
        let term = if start.term.is_empty() { "linux" } else { &start.term };
        environment.insert("TERM".to_owned(), term.to_owned());
    }
    environment.extend(start.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    environment
}

/// Where the command starts. A home that is not there is `/`, as for login(1); a directory asked for must exist.
/// Of an image's, which nobody asked for, the same holds.
fn directory(start: &ExecStart, defaults: &Defaults, user: &User) -> Result<PathBuf, ExecFailed> {
    if start.workdir.is_empty() {
        let image = user.home.join(&defaults.workdir);
        if !defaults.workdir.is_empty() && image.is_dir() {
            return Ok(image);
        }
        return Ok(if user.home.is_dir() { user.home.clone() } else { "/".into() });
    }
    let directory = user.home.join(&start.workdir);
    match directory.metadata() {
        Ok(found) if found.is_dir() => Ok(directory),
        Ok(_) => {
            Err(failed(Errno::ENOTDIR, format!("working directory {}: not a directory", directory.display())))
        }
        Err(error) => Err(failed_by(&error, &format!("working directory {}", directory.display()))),
    }
}

/// What execvp(3) would run: a name with a slash as it is, others by PATH; "not executable" only where nothing was.
fn find(name: &str, path: &str, directory: &Path) -> Result<PathBuf, ExecFailed> {
    if name.is_empty() {
        return Err(failed(Errno::ENOENT, "an empty command".to_owned()));
    }
    if name.contains('/') {
        let program = directory.join(name);
        return executable(&program)
            .map(|()| program)
            .map_err(|errno| failed(errno, format!("`{name}`: {}", errno.desc())));
    }
    let mut worst = Errno::ENOENT;
    for part in path.split(':') {
        let program = directory.join(part).join(name);
        match executable(&program) {
            Ok(()) => return Ok(program),
            Err(Errno::EACCES) => worst = Errno::EACCES,
            Err(_) => {}
        }
    }
    let text = if worst == Errno::ENOENT { "not found in the guest's PATH" } else { "permission denied" };
    Err(failed(worst, format!("`{name}`: {text}")))
}

/// The error number is what the host wants, so none of `fs_err`, which wraps it.
fn executable(path: &Path) -> Result<(), Errno> {
    let found = fs_err::metadata(path)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(Errno::ENOENT as i32)))?;
    if found.is_file() && found.permissions().mode() & 0o111 != 0 { Ok(()) } else { Err(Errno::EACCES) }
}

fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_else(|| OsStr::new("sh")).to_string_lossy().into_owned()
}
