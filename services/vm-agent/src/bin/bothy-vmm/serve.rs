//! Answering on `holder.sock`: one request line per connection.

use crate::{link::Link, socket::HolderSocket};
use bothy_contract::{VmId, vm::ExitRecord};
use bothy_vm_agent::vmm::{
    Save,
    passing::{self, MAX_FDS},
    wire::{HolderHandle, MAX_LINE, SaveRequest, State, Status},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncWriteExt, net::UnixStream, sync::Semaphore};

/// Connections that may be open at once: every stream of both ports, and some requests.
const MAX_CONNECTIONS: usize = 2 * bothy_channel::MAX_STREAMS + 32;
/// How long a caller may take to send its line.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the holder knows of its VM.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) id: VmId,
    pub(crate) vmm_version: String,
    pub(crate) handle: HolderHandle,
    /// The VMM's process id as this process has it.
    pub(crate) child: u32,
    pub(crate) link: Link,
    pub(crate) exit: RefCell<Option<ExitRecord>>,
    pub(crate) opened: Cell<u64>,
    /// Whether the guest's memory is a file that outlives it.
    pub(crate) memory_apart: bool,
    /// Whether the guest is being saved.
    pub(crate) saving: Cell<bool>,
}

/// Serves for ever; needs a `LocalSet`.
pub(crate) async fn serve(mut socket: HolderSocket, vm: Rc<Vm>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match socket.accept().await {
            Ok(stream) => {
                let vm = vm.clone();
                tokio::task::spawn_local(async move {
                    // A caller that went away is nobody's error.
                    drop(answer(stream, &vm).await);
                    drop(permit);
                });
            }
            // Out of descriptors: those that are open must end first.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn answer(mut stream: UnixStream, vm: &Vm) -> io::Result<()> {
    let mut fds = Vec::new();
    let line = match tokio::time::timeout(PATIENCE, line(&stream, &mut fds)).await {
        Ok(line) => line?,
        Err(_) => return Ok(()),
    };
    let (verb, rest) = line.split_once(' ').unwrap_or((line.as_str(), ""));
    let reply = match verb {
        "CONNECT" => match rest.parse() {
            Ok(port) => return connect(stream, vm, port).await,
            Err(_) => format!("ERR `{}` is not a port", rest.escape_default()),
        },
        "STATUS" => status(vm),
        "KILL" => signal(vm, rest),
        "QMP" => match serde_json::from_str(rest) {
            Ok(command) => told(vm.link.qmp(command).await),
            Err(err) => format!("ERR not a JSON command: {err}"),
        },
        "SAVE" => match serde_json::from_str(rest) {
            Ok(request) => save(&stream, vm, &request, fds).await,
            Err(err) => format!("ERR not a request to save a guest: {err}"),
        },
        "API" => match serde_json::from_str(rest) {
            Ok(request) => told(vm.link.api(request).await),
            Err(err) => format!("ERR not a request: {err}"),
        },
        _ => "ERR not one of CONNECT, STATUS, KILL, QMP, API, SAVE".into(),
    };
    stream.write_all(format!("{reply}\n").as_bytes()).await
}

/// One line, and not a byte more: what follows belongs to the stream. The descriptors that come with it go into `fds`.
async fn line(stream: &UnixStream, fds: &mut Vec<OwnedFd>) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        if passing::receive(stream, &mut byte, fds).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let [byte] = byte;
        if byte == b'\n' {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte);
        if line.len() > MAX_LINE || fds.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request without an end"));
        }
    }
}

async fn connect(mut stream: UnixStream, vm: &Vm, port: u32) -> io::Result<()> {
    let mut early = None;
    let opened = tokio::select! {
        opened = vm.link.open(port) => opened,
        // The caller gave up before the guest's session was there.
        () = gone(&stream, &mut early) => return Ok(()),
    };
    match opened {
        Ok(mut guest) => {
            let number = vm.opened.get() + 1;
            vm.opened.set(number);
            stream.write_all(format!("OK {number}\n").as_bytes()).await?;
            if let Some(byte) = early {
                guest.write_u8(byte).await?;
            }
            tokio::io::copy_bidirectional(&mut stream, &mut guest).await.map(|_| ())
        }
        Err(err) => stream.write_all(format!("ERR {err}\n").as_bytes()).await,
    }
}

/// Waits until the caller has hung up. Only reading tells, so a byte that it sent ahead of its `OK` is kept in `early`;
/// from then on its hanging up shows only once the stream is open.
async fn gone(stream: &UnixStream, early: &mut Option<u8>) {
    let mut byte = [0];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut byte) {
            Ok(0) => return,
            Ok(_) => {
                *early = Some(byte[0]);
                return std::future::pending().await;
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

fn status(vm: &Vm) -> String {
    let exit = vm.exit.borrow().clone();
    let (control_up, bulk_up) = vm.link.up();
    let status = Status {
        vm: vm.id,
        vmm_version: vm.vmm_version.clone(),
        handle: vm.handle,
        state: if exit.is_some() { State::Exited } else { State::Running },
        exit,
        control_up,
        bulk_up,
    };
    serde_json::to_string(&status).unwrap_or_else(|err| format!("ERR {err}"))
}

fn signal(vm: &Vm, number: &str) -> String {
    // Between its end and its being reaped here the id is still its own; after that it may be anybody's.
    if vm.exit.borrow().is_some() {
        return "ERR the VMM has ended".into();
    }
    let Some(signal) = number.parse().ok().and_then(|number: i32| Signal::try_from(number).ok()) else {
        return format!("ERR `{}` is not a signal", number.escape_default());
    };
    // By the number that it has for this process, which is not the host's where it is jailed.
    let Ok(pid) = i32::try_from(vm.child) else { return "ERR no such process".into() };
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) => "OK".into(),
        Err(err) => format!("ERR {err}"),
    }
}

/// Saves the guest, unless the caller hangs up before it is done.
async fn save(stream: &UnixStream, vm: &Vm, request: &SaveRequest, files: Vec<OwnedFd>) -> String {
    if request.what == Save::Devices && vm.link.keeps_memory() && !vm.memory_apart {
        return "ERR the guest's memory is its VMM's own, and only a whole save has it".into();
    }
    if vm.saving.replace(true) {
        return "ERR the guest is being saved already".into();
    }
    let saved = vm.link.save(request, files, gone(stream, &mut None)).await;
    vm.saving.set(false);
    told(match saved {
        Ok(reply) => Ok(serde_json::json!({ "return": reply })),
        Err(why) => Ok(serde_json::json!({ "error": { "class": "NotSaved", "desc": why } })),
    })
}

/// The VMM's answer, or why there is none, as one line.
fn told(answer: Result<serde_json::Value, String>) -> String {
    match answer {
        Ok(answer) => answer.to_string(),
        Err(err) => format!("ERR {}", err.replace('\n', " ")),
    }
}
