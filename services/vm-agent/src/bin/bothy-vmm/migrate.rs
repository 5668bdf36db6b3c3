//! QEMU's saving and loading of guests: its migration, from and to a file.
//!
//! The file is handed to QEMU as an open descriptor: it need not be one that the VM's user could open. There are two ways, of
//! which each version knows at least one: `fd:` took files until it was deprecated for them in 9.1 and then removed, and
//! `file:` with a descriptor set is what took its place (docs/about/removed-features.rst). `x-ignore-shared`
//! leaves out memory that is a shared mapping of a file; the loading side must say the same, or it refuses.
//!
//! <https://www.qemu.org/docs/master/devel/migration/main.html>

use crate::{
    gate::{Gate, Held},
    qmp::Qmp,
};
use bothy_vm_agent::vmm::{
    Save,
    wire::{SaveReply, SaveRequest},
};
use serde_json::{Value, json};
use std::{os::fd::OwnedFd, time::Duration};
use tokio::time::{Instant, sleep};

/// What QEMU calls the descriptor.
const NAME: &str = "bothy-saved";
/// The set of descriptors that it is in, where it takes a set.
const SET: u32 = 1;
/// The first QEMU that wants a set.
const SETS: (u64, u64) = (9, 1);
/// QEMU holds itself back without this, as on a network: bytes in a second.
const BANDWIDTH: u64 = 1 << 40;
/// How often QEMU is asked how far it is, at first and later.
const LOOK: Duration = Duration::from_millis(1);
const LOOK_LATER: Duration = Duration::from_millis(20);
/// How long QEMU may take to give a save up.
const CANCEL: Duration = Duration::from_secs(5);

/// Lets a QEMU that waits for it go on from `state`, paused.
pub(crate) async fn load(qmp: &Qmp, state: OwnedFd, memory_apart: bool) -> Result<(), String> {
    capability(qmp, memory_apart).await?;
    let uri = hand_over(qmp, &state).await?;
    drop(state);
    told(qmp, json!({ "execute": "migrate-incoming", "arguments": { "uri": uri } })).await?;
    let mut pause = LOOK;
    loop {
        match progress(qmp).await? {
            Progress::Done => break,
            Progress::Failed(why) => return Err(why),
            Progress::Moving => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_LATER);
    }
    take_back(qmp).await;
    match run_state(qmp).await?.as_str() {
        "paused" => Ok(()),
        other => Err(format!("it is `{other}` after the load, and not paused")),
    }
}

/// Saves the guest of a QEMU into `state`. Given up once `gone` is ready. Where this fails, the guest is as it was before.
pub(crate) async fn save(
    qmp: &Qmp,
    ports: &[Gate],
    request: &SaveRequest,
    state: OwnedFd,
    gone: impl Future<Output = ()>,
) -> Result<SaveReply, String> {
    let ran = match run_state(qmp).await?.as_str() {
        "running" => true,
        "paused" => false,
        // Saved before, and nobody knows what became of that: QEMU takes another save only from a guest that ran since.
        "postmigrate" => {
            told(qmp, json!({ "execute": "cont" })).await?;
            told(qmp, json!({ "execute": "stop" })).await?;
            false
        }
        other => return Err(format!("the guest is `{other}`, neither running nor paused")),
    };
    if ran {
        told(qmp, json!({ "execute": "stop" })).await?;
    }
    let done = match written(qmp, ports, request, &state, gone).await {
        Ok(()) => sync(state).await,
        Err(why) => Err(why),
    };
    let goes_on = match (&done, request.what) {
        (Ok(()), Save::Whole { resume }) => resume,
        (Ok(()), Save::Devices) => false,
        (Err(_), _) => ran,
    };
    if goes_on {
        let resumed = told(qmp, json!({ "execute": "cont" })).await;
        resumed.map_err(|err| match &done {
            Ok(()) => format!("the guest is saved, and does not go on: {err}"),
            Err(why) => format!("{why}; and the guest does not go on: {err}"),
        })?;
    }
    done.map(|()| SaveReply { memory_written: false, ran })
}

async fn written(
    qmp: &Qmp,
    ports: &[Gate],
    request: &SaveRequest,
    state: &OwnedFd,
    gone: impl Future<Output = ()>,
) -> Result<(), String> {
    let _held = Held::quiet(ports).await?;
    capability(qmp, request.what == Save::Devices).await?;
    let fast = json!({ "max-bandwidth": BANDWIDTH });
    told(qmp, json!({ "execute": "migrate-set-parameters", "arguments": fast })).await?;
    let uri = hand_over(qmp, state).await?;
    let migrate = json!({ "execute": "migrate", "arguments": { "uri": uri } });
    let done = match told(qmp, migrate).await {
        Ok(_) => finished(qmp, request, gone).await,
        Err(why) => Err(why),
    };
    take_back(qmp).await;
    done
}

/// Waits until a save is done, or gives it up.
async fn finished(qmp: &Qmp, request: &SaveRequest, gone: impl Future<Output = ()>) -> Result<(), String> {
    let deadline = Instant::now() + request.limit;
    let mut pause = LOOK;
    tokio::pin!(gone);
    loop {
        match progress(qmp).await? {
            Progress::Done => return Ok(()),
            Progress::Failed(why) => return Err(why),
            Progress::Moving => {}
        }
        let why = tokio::select! {
            () = sleep(pause) => match Instant::now() < deadline {
                true => None,
                false => Some(format!("it is not done after {} s", request.limit.as_secs())),
            },
            () = &mut gone => Some("whoever asked for it is gone".to_owned()),
        };
        if let Some(why) = why {
            cancel(qmp).await.map_err(|err| format!("{why}; and it cannot be given up: {err}"))?;
            return Err(why);
        }
        pause = (pause * 2).min(LOOK_LATER);
    }
}

/// Brings the file to the disk: only then is the guest saved.
async fn sync(file: OwnedFd) -> Result<(), String> {
    let synced = tokio::task::spawn_blocking(move || rustix::fs::fsync(file)).await;
    let synced = synced.map_err(std::io::Error::other).and_then(|synced| synced.map_err(Into::into));
    synced.map_err(|err| format!("the saved guest does not get to the disk: {err}"))
}

async fn cancel(qmp: &Qmp) -> Result<(), String> {
    told(qmp, json!({ "execute": "migrate_cancel" })).await?;
    let deadline = Instant::now() + CANCEL;
    while matches!(progress(qmp).await?, Progress::Moving) {
        if Instant::now() > deadline {
            return Err("QEMU goes on with it".into());
        }
        sleep(LOOK).await;
    }
    Ok(())
}

enum Progress {
    Moving,
    Done,
    Failed(String),
}

async fn progress(qmp: &Qmp) -> Result<Progress, String> {
    let answer = told(qmp, json!({ "execute": "query-migrate" })).await?;
    Ok(match answer.get("status").and_then(Value::as_str) {
        Some("completed") => Progress::Done,
        Some(status @ ("failed" | "cancelled")) => {
            let why = answer.get("error-desc").and_then(Value::as_str);
            Progress::Failed(why.map_or_else(|| format!("QEMU says `{status}` and no more"), str::to_owned))
        }
        _ => Progress::Moving,
    })
}

async fn capability(qmp: &Qmp, ignore_shared: bool) -> Result<(), String> {
    let set = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": ignore_shared }] });
    told(qmp, json!({ "execute": "migrate-set-capabilities", "arguments": set })).await.map(drop)
}

/// Gives QEMU the descriptor, and says what QEMU calls it.
async fn hand_over(qmp: &Qmp, state: &OwnedFd) -> Result<String, String> {
    let (command, uri) = if qmp.version() >= SETS {
        let add = json!({ "execute": "add-fd", "arguments": { "fdset-id": SET } });
        (add, format!("file:/dev/fdset/{SET}"))
    } else {
        (json!({ "execute": "getfd", "arguments": { "fdname": NAME } }), format!("fd:{NAME}"))
    };
    understood(qmp.call_with(command, state).await).map(|_| uri)
}

/// Has QEMU close what is left of the descriptor. That there is nothing is no error: some take it with the command.
async fn take_back(qmp: &Qmp) {
    let command = if qmp.version() >= SETS {
        json!({ "execute": "remove-fd", "arguments": { "fdset-id": SET } })
    } else {
        json!({ "execute": "closefd", "arguments": { "fdname": NAME } })
    };
    drop(told(qmp, command).await);
}

async fn run_state(qmp: &Qmp) -> Result<String, String> {
    let answer = told(qmp, json!({ "execute": "query-status" })).await?;
    Ok(answer.get("status").and_then(Value::as_str).unwrap_or("of an unknown state").to_owned())
}

async fn told(qmp: &Qmp, command: Value) -> Result<Value, String> {
    understood(qmp.call(command).await)
}

fn understood(answer: std::io::Result<Value>) -> Result<Value, String> {
    let mut answer = answer.map_err(|err| format!("its monitor failed: {err}"))?;
    if let Some(value) = answer.get_mut("return") {
        return Ok(value.take());
    }
    let said = answer.pointer("/error/desc").and_then(Value::as_str);
    Err(said.unwrap_or("it gave no reason").to_owned())
}
