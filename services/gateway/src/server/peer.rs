//! Who calls: the kernel's word (SO_PEERCRED, unix(7)), taken when the connection was made.

use axum::{
    extract::connect_info::Connected,
    extract::{ConnectInfo, FromRequestParts},
    http::request::Parts,
    serve::IncomingStream,
};
use bothy_contract::Error;
use tokio::net::UnixStream;

use super::{ApiError, listener::PerUser};

/// The user at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Their effective uid when they connected.
    pub uid: u32,
}

/// What `SO_PEERCRED` gives where the kernel does not know: nobody's uid, the kernel's overflow value.
const UNKNOWN: u32 = u32::MAX;

impl Peer {
    /// Who is at the other end of `stream`.
    pub(super) fn of(stream: &UnixStream) -> Self {
        Peer { uid: stream.peer_cred().map_or(UNKNOWN, |cred| cred.uid()) }
    }

    /// Whether they may see and touch what belongs to `owner`.
    pub fn owns(&self, owner: u32) -> bool {
        self.uid == 0 || (self.uid == owner && self.uid != UNKNOWN)
    }

    /// Whether they may change the host itself.
    ///
    /// # Errors
    /// When they may not.
    pub fn must_be_root(&self, what: &str) -> Result<(), Error> {
        if self.uid == 0 {
            return Ok(());
        }
        Err(Error::new(bothy_contract::Code::PermissionDenied, format!("user {} may not {what}", self.uid))
            .hint("do it as root"))
    }
}

impl Connected<IncomingStream<'_, PerUser>> for Peer {
    fn connect_info(stream: IncomingStream<'_, PerUser>) -> Self {
        stream.io().peer()
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match parts.extensions.get::<ConnectInfo<Peer>>() {
            Some(ConnectInfo(peer)) if peer.uid != UNKNOWN => Ok(*peer),
            _ => Err(ApiError(Error::new(
                bothy_contract::Code::PermissionDenied,
                "the kernel does not say who is calling",
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_owns_all_and_others_their_own() {
        assert!(Peer { uid: 0 }.owns(1000) && Peer { uid: 1000 }.owns(1000));
        assert!(!Peer { uid: 1001 }.owns(1000) && !Peer { uid: 1000 }.owns(0));
        assert!(!Peer { uid: UNKNOWN }.owns(UNKNOWN));
        assert!(Peer { uid: 1000 }.must_be_root("x").is_err());
    }
}
