//! What the guest agent does not offer yet; gone with the calls themselves.

use super::guest::Guest;
use bothy_contract::{
    Code, Error,
    usage::{GuestPort, GuestStats},
};
impl Guest {
    pub(crate) async fn metrics(&self) -> Result<GuestStats, Error> {
        Err(Error::new(Code::Internal, "this guest agent cannot do that yet"))
    }
    pub(crate) async fn ports(&self) -> Result<Vec<GuestPort>, Error> {
        Err(Error::new(Code::Internal, "this guest agent cannot do that yet"))
    }
    pub(crate) async fn grow_disks(&self) -> Result<(), Error> {
        Err(Error::new(Code::Internal, "this guest agent cannot do that yet"))
    }
}
