//! Channels to guest ports: raw streams both ways.

use super::{ApiError, Gateway, Peer};
use crate::api::CHANNEL_PROTOCOL;
use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{CONNECTION, UPGRADE},
    },
    response::Response,
};
use bothy_contract::{Error, methods::VmChannelOpen, vm::OpenChannel};
use hyper_util::rt::TokioIo;
use tracing::Instrument;

/// The size of one piece of a stream, in bytes.
pub(super) const CHUNK: usize = 64 << 10;

fn wants_channel(headers: &HeaderMap) -> bool {
    let has = |name, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    };
    has(CONNECTION, "upgrade") && has(UPGRADE, CHANNEL_PROTOCOL)
}

/// `101 Switching Protocols`, then the caller and the guest port speak to one another.
pub(crate) async fn channel(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path((vm, port)): Path<(String, String)>,
    mut request: Request,
) -> Result<Response, ApiError> {
    if !wants_channel(request.headers()) {
        return Err(Error::invalid("a channel is an upgraded connection")
            .hint(format!("send `connection: upgrade` and `upgrade: {CHANNEL_PROTOCOL}`"))
            .into());
    }
    let port = port.parse().map_err(|_| Error::invalid(format!("{port:?} is not a port of a guest")))?;
    let vm = gateway.vm(&peer, &vm).await?;
    let ticket = gateway.call::<VmChannelOpen>(&OpenChannel { vm: vm.id, port }).await?;
    // Connected before the 101, so that what is wrong is said as an error and not as a stream that ends.
    let mut guest = bothy_tickets::connect(&ticket).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    let splice = async move {
        match upgrade.await {
            Ok(caller) => {
                let mut caller = TokioIo::new(caller);
                let moved =
                    tokio::io::copy_bidirectional_with_sizes(&mut caller, &mut guest, CHUNK, CHUNK).await;
                tracing::debug!(?moved, "a channel ended");
            }
            Err(error) => tracing::debug!(%error, "a channel's caller went before it began"),
        }
    };
    tokio::spawn(splice.instrument(tracing::debug_span!("gateway.channel", vm = %vm.id, port)));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(CHANNEL_PROTOCOL));
    Ok(response)
}
