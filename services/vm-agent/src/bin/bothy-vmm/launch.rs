//! Launching a holder: the part that still has the agent's rights, and gives them up.

use crate::{files::Files, jail, os_error, tap::Tap, user};
use bothy_contract::{Code, Error};
use bothy_vm_agent::vmm::{
    jail::PLACE,
    launching,
    wire::{self, LaunchSpec, Launched, MAX_LINE},
};
use fs_err::os::unix::fs::OpenOptionsExt;
use nix::unistd::{Uid, chown, getegid};
use std::{
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Command, Stdio},
};

/// Does all of it; what went wrong is in the outcome.
pub(crate) fn run(parent: i32) -> Launched {
    launch(parent).unwrap_or_else(Launched::Failed)
}

fn launch(parent: i32) -> Result<Launched, Error> {
    let mut text = Vec::new();
    std::io::stdin()
        .take(MAX_LINE as u64)
        .read_to_end(&mut text)
        .map_err(os_error("cannot read the launch specification"))?;
    let mut spec: LaunchSpec = serde_json::from_slice(&text)
        .map_err(|e| Error::invalid(format!("standard input is not a launch specification: {e}")))?;
    spec.check()?;
    let lock = launching::take(&spec.dir, parent)?;
    let tap = spec.tap.is_some().then(Tap::open).transpose()?;
    let files = Files::open(&spec)?;
    make_directory(&spec)?;
    enter_cgroup(&spec)?;
    if let Some(jail) = &spec.jail {
        jail::make(&spec, jail)?;
    }
    hand_over(&spec.dir, &spec)?;
    if spec.jail.is_none() {
        user::become_user(&spec)?;
    }
    let mut numbers = files.passed_on()?;
    if let (Some(tap), Some(name)) = (tap, &spec.tap) {
        numbers.push((wire::TAP_FD, tap.attach(name)?));
    }
    for (placeholder, number) in numbers {
        fill_in(&mut spec, placeholder, &number.to_string());
    }
    let text = serde_json::to_vec(&spec)
        .map_err(|e| Error::internal("cannot write the launch specification", &e))?;
    start(&spec, &text, &lock, files.state())
}

/// Puts a descriptor's number where the command line, or a request, waits for it.
fn fill_in(spec: &mut LaunchSpec, placeholder: &str, number: &str) {
    for arg in &mut spec.argv {
        *arg = arg.replace(placeholder, number);
    }
    if let wire::Monitor::Api { requests } = &mut spec.monitor {
        requests
            .iter_mut()
            .filter_map(|request| request.body.as_mut())
            .for_each(|body| put(body, placeholder, number));
    }
}

fn put(value: &mut serde_json::Value, placeholder: &str, number: &str) {
    use serde_json::Value;
    match value {
        Value::String(text) if text.contains(placeholder) => *text = text.replace(placeholder, number),
        Value::Array(values) => values.iter_mut().for_each(|value| put(value, placeholder, number)),
        Value::Object(fields) => fields.values_mut().for_each(|value| put(value, placeholder, number)),
        _ => {}
    }
}

/// Makes the directory anew, for the VM's user and the agent's group: others may nothing.
fn make_directory(spec: &LaunchSpec) -> Result<(), Error> {
    let dir = &spec.dir;
    match fs_err::symlink_metadata(dir) {
        Ok(_) => clear(dir)?,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
        Err(err) => return Err(os_error("cannot look at the holder's directory")(err)),
    }
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(os_error(format!("cannot make the holder's directory {}", dir.display())))?;
    // Set-group-id: what the holder makes in it belongs to the agent's group, which the holder is not in. Before the
    // change of owner, since only an owner may; a directory keeps the bit through it (chown(2)).
    fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o2770))
        .map_err(os_error("cannot set the mode of the holder's directory"))?;
    for (serial, file) in &spec.disks {
        fs_err::os::unix::fs::symlink(file, dir.join(wire::disk_link(serial)))
            .map_err(os_error("cannot make the link to a disk"))?;
    }
    Ok(())
}

/// Makes `path` the VM's user's and the agent's group's.
fn hand_over(path: &Path, spec: &LaunchSpec) -> Result<(), Error> {
    chown(path, Some(Uid::from_raw(spec.uid)), Some(getegid()))
        .map_err(|err| Error::internal(format!("cannot hand over {}", path.display()), &err))
}

/// Removes what an earlier holder left, if it is one's directory and nobody lives in it.
fn clear(dir: &Path) -> Result<(), Error> {
    let socket = dir.join(wire::HOLDER_SOCKET);
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        return Err(Error::new(Code::AlreadyExists, format!("a holder answers on {}", socket.display())));
    }
    // A mistaken path must not cost anybody a directory: only what holders make is removed.
    let known = [
        wire::CONSOLE_LOG,
        wire::VMM_LOG,
        wire::METRICS_LOG,
        wire::EXIT_RECORD,
        wire::STATE_SPOOL,
        wire::MEMORY_SPOOL,
    ];
    for entry in fs_err::read_dir(dir).map_err(os_error("cannot read the holder's directory"))? {
        let entry = entry.map_err(os_error("cannot read the holder's directory"))?;
        let kind = entry.file_type().map_err(os_error("cannot look into the holder's directory"))?;
        let name = entry.file_name();
        if name == PLACE {
            // Where it is not empty, this fails.
            fs_err::remove_dir(entry.path()).map_err(os_error("cannot remove what an earlier jail left"))?;
            continue;
        }
        let ours = kind.is_socket()
            || (kind.is_symlink() && name.to_string_lossy().ends_with(wire::DISK_LINK))
            || kind.is_fifo()
            || known.iter().any(|known| name.to_string_lossy().starts_with(known));
        if !ours || kind.is_dir() {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{} holds {}, which no holder made", dir.display(), name.display()),
            ));
        }
    }
    fs_err::remove_dir_all(dir).map_err(os_error("cannot remove an earlier holder's directory"))
}

/// Moves this process, and with it all that it starts, into the VM's control group (cgroups(7)).
fn enter_cgroup(spec: &LaunchSpec) -> Result<(), Error> {
    let Some(procs) = &spec.cgroup else { return Ok(()) };
    fs_err::write(procs, std::process::id().to_string()).map_err(os_error("cannot enter the VM's cgroup"))
}

/// Starts `hold`, which gets the lock and a saved guest's state as well, and passes on its first word.
fn start(
    spec: &LaunchSpec,
    text: &[u8],
    lock: &fs_err::File,
    state: Option<&fs_err::File>,
) -> Result<Launched, Error> {
    let log = spec.dir.join(wire::VMM_LOG);
    let stderr = fs_err::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(&log)
        .map_err(os_error("cannot open the VMM's log"))?;
    if spec.jail.is_some() {
        hand_over(&log, spec)?;
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    // A duplicate is not closed by exec(2); and should this process die here, the lock lives on in the other.
    let lock = nix::unistd::dup(lock).map_err(|e| Error::internal("cannot pass on the launch's lock", &e))?;
    let state = state
        .map(nix::unistd::dup)
        .transpose()
        .map_err(|e| Error::internal("cannot pass on a saved guest", &e))?;
    let mut hold = Command::new("/proc/self/exe")
        .arg0("bothy-vmm")
        .arg("hold")
        .arg(format!("--lock={}", lock.as_raw_fd()))
        .args(state.iter().map(|state| format!("--state={}", state.as_raw_fd())))
        .env_clear()
        .env("PATH", path)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr.into_parts().0)
        .spawn()
        .map_err(os_error("cannot start the holder"))?;
    let (Some(mut stdin), Some(stdout)) = (hold.stdin.take(), hold.stdout.take()) else {
        return Err(Error::new(Code::Internal, "cannot start the holder: no pipes"));
    };
    // A holder that died at once says why below.
    drop(stdin.write_all(text));
    drop(stdin);
    let mut word = Vec::new();
    stdout.take(MAX_LINE as u64).read_to_end(&mut word).map_err(os_error("cannot hear the holder"))?;
    serde_json::from_slice(&word).map_err(|_| {
        let said = wire::read_untrusted(&log, 64 << 10).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        Error::new(Code::Internal, format!("the holder ended without a word: {}", said.trim()))
    })
}
