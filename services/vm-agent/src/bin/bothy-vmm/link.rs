//! The holder's connections to its VMM and, through that, to the guest, whichever VMM it is.

use crate::{
    firecracker::Firecracker,
    gate::{self, Gate},
    migrate,
    qmp::Qmp,
};
use bothy_channel::host::Connector;
use bothy_vm_agent::vmm::{
    firecracker::{api::Request, client},
    wire::{SaveReply, SaveRequest},
};
use serde_json::{Value, json};
use std::{io, os::fd::OwnedFd};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

/// The guest port that rides QEMU's first virtio-serial port; all others ride the second.
const CONTROL_PORT: u32 = 1;

/// The connections that must not break.
#[derive(Debug)]
pub(crate) enum Link {
    /// QEMU's, which it has made.
    Qemu { qmp: Qmp, control: Connector, bulk: Connector, gates: [Gate; 2] },
    /// Firecracker's are made for each use.
    Firecracker(Firecracker),
}

/// Any stream to a guest.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

impl Link {
    /// A link to a QEMU that has connected all its sockets.
    pub(crate) fn qemu(qmp: Qmp, control: UnixStream, bulk: UnixStream) -> Self {
        let ((control, one), (bulk, two)) = (gate::new(control), gate::new(bulk));
        Self::Qemu { qmp, control: Connector::new(control), bulk: Connector::new(bulk), gates: [one, two] }
    }

    /// A stream to `port` of the guest; waits for the guest as long as that takes.
    pub(crate) async fn open(&self, port: u32) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Qemu { control, .. } if port == CONTROL_PORT => Ok(Box::new(control.open(port).await?)),
            Self::Qemu { bulk, .. } => Ok(Box::new(bulk.open(port).await?)),
            Self::Firecracker(vmm) => Ok(Box::new(vmm.open(port).await?)),
        }
    }

    /// Whether the guest's agent can be reached on its control port and on its bulk port.
    pub(crate) fn up(&self) -> (bool, bool) {
        match self {
            Self::Qemu { control, bulk, .. } => (control.is_ready(), bulk.is_ready()),
            Self::Firecracker(vmm) => (vmm.is_up(), vmm.is_up()),
        }
    }

    /// The answer to a QMP command, as QEMU gives it.
    pub(crate) async fn qmp(&self, command: Value) -> Result<Value, String> {
        match self {
            Self::Qemu { qmp, .. } => qmp.call(command).await.map_err(|e| e.to_string()),
            Self::Firecracker(_) => Err("this VMM has an API and no QMP monitor".into()),
        }
    }

    /// Whether the VMM leaves the guest's memory where it is, in a file, when its devices are saved.
    pub(crate) fn keeps_memory(&self) -> bool {
        matches!(self, Self::Qemu { .. })
    }

    /// Saves the guest into `files`: where its state goes, and where its memory.
    pub(crate) async fn save(
        &self,
        request: &SaveRequest,
        files: Vec<OwnedFd>,
        gone: impl Future<Output = ()>,
    ) -> Result<SaveReply, String> {
        let mut files = files.into_iter();
        let (Some(state), Some(memory), None) = (files.next(), files.next(), files.next()) else {
            return Err("a request to save a guest takes two descriptors".into());
        };
        match self {
            Self::Qemu { qmp, gates, .. } => migrate::save(qmp, gates, request, state, gone).await,
            Self::Firecracker(vmm) => vmm.save(request, state, memory).await,
        }
    }

    /// The answer to a request, in the shape of QEMU's.
    pub(crate) async fn api(&self, request: Request) -> Result<Value, String> {
        match self {
            Self::Qemu { .. } => Err("this VMM has a QMP monitor and no API".into()),
            Self::Firecracker(vmm) => Ok(match vmm.call(request).await {
                Ok(value) => json!({ "return": value }),
                Err(err) => json!({ "error": { "class": "ApiError", "desc": client::chain(&err) } }),
            }),
        }
    }
}
