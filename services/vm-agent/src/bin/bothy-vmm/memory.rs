//! How much memory a holder may take. The channel counts what a guest makes it hold, but not what each piece costs
//! beside its bytes: a guest that sends one byte at a time on many streams that nobody reads could make that gigabytes. A
//! holder at its limit aborts, and with it goes the VM that did this, and nothing else.

use bothy_contract::Error;
use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};

/// Far above what an honest guest can bring about: both ports' sessions with every stream's window full.
const LIMIT: u64 = 512 << 20;

/// Bounds this process' private memory (RLIMIT_DATA, getrlimit(2)).
pub(crate) fn bound() -> Result<(), Error> {
    let bounded = getrlimit(Resource::RLIMIT_DATA)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_DATA, LIMIT.min(hard), hard));
    bounded.map_err(|e| Error::internal("cannot bound the holder's memory", &e))
}

/// Lifts the bound again, for the VMM: the guest's memory is its own affair.
pub(crate) fn unbound() -> Result<(), Errno> {
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    setrlimit(Resource::RLIMIT_DATA, hard, hard)
}
