//! The VMM's monitor: one command at a time, events skipped.
//!
//! <https://www.qemu.org/docs/master/interop/qmp-spec.html>

use bothy_vm_agent::vmm::{passing, wire::MAX_LINE};
use serde_json::{Value, json};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::Mutex,
};

/// How long the VMM may take to answer a command.
const PATIENCE: Duration = Duration::from_secs(10);

/// The monitor's connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    // Held across a whole exchange: QEMU answers commands in their order.
    stream: Mutex<BufReader<UnixStream>>,
    version: (u64, u64),
}

impl Qmp {
    /// Takes the greeting and negotiates. The VMM answers only once its machine is complete, so this is the sign that its
    /// command line was right.
    pub(crate) async fn negotiate(stream: UnixStream) -> io::Result<Self> {
        let mut stream = BufReader::new(stream);
        let greeting = line(&mut stream).await?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the monitor did not greet"));
        }
        let number = |name| greeting.pointer(&format!("/QMP/version/qemu/{name}")).and_then(Value::as_u64);
        let version = (number("major").unwrap_or(0), number("minor").unwrap_or(0));
        let qmp = Self { stream: Mutex::new(stream), version };
        let answer = qmp.exchange(json!({ "execute": "qmp_capabilities" })).await?;
        match answer.get("return") {
            Some(_) => Ok(qmp),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the monitor refused to talk: {answer}"),
            )),
        }
    }

    /// The first two numbers of the version.
    pub(crate) fn version(&self) -> (u64, u64) {
        self.version
    }

    /// Sends `command` and gives the answer to it: an object with `return` or `error`.
    pub(crate) async fn call(&self, command: Value) -> io::Result<Value> {
        tokio::time::timeout(PATIENCE, self.exchange(command))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the VMM does not answer")))
    }

    /// The same for a command that takes a descriptor with it.
    pub(crate) async fn call_with(&self, command: Value, fd: &OwnedFd) -> io::Result<Value> {
        tokio::time::timeout(PATIENCE, self.exchange_with(command, Some(fd)))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the VMM does not answer")))
    }

    async fn exchange(&self, command: Value) -> io::Result<Value> {
        self.exchange_with(command, None).await
    }

    async fn exchange_with(&self, mut command: Value, fd: Option<&OwnedFd>) -> io::Result<Value> {
        let mut stream = self.stream.lock().await;
        let id = rand_id()?;
        let Some(object) = command.as_object_mut() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a command is a JSON object"));
        };
        object.insert("id".into(), json!(id));
        if let Some(fd) = fd {
            // It comes with the first byte, which may as well be white space (RFC 8259, 2).
            passing::send(stream.get_ref(), b" ", &[fd.as_fd()]).await?;
        }
        stream.write_all(format!("{command}\n").as_bytes()).await?;
        loop {
            let mut answer = line(&mut stream).await?;
            // An answer to a command that was given up on has another id; an event has none.
            if answer.get("id").and_then(Value::as_u64) == Some(id) {
                if let Some(object) = answer.as_object_mut() {
                    object.remove("id");
                }
                return Ok(answer);
            }
        }
    }
}

fn rand_id() -> io::Result<u64> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u32::from_ne_bytes(bytes).into())
}

async fn line(stream: &mut BufReader<UnixStream>) -> io::Result<Value> {
    let mut line = Vec::new();
    stream.take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the monitor's connection ended"));
    }
    serde_json::from_slice(&line).map_err(io::Error::other)
}
