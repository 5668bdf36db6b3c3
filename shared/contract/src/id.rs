//! Typed identifiers: a [`VmId`] cannot be passed where an [`OpId`] is wanted. All are UUID v7 (RFC 9562), so that
//! sorting by id is sorting by time.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new, unique id.
            #[expect(clippy::new_without_default, reason = "a default id would be a new one each time")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_simple().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(s).map(Self)
            }
        }
    )*};
}

ids! {
    /// One virtual machine, from create to delete, whatever it is named.
    VmId;
    /// One operation.
    OpId;
    /// One request on the bus; a repeated mutating request carries the first one's id and gets the first one's reply.
    RequestId;
}

/// A one-time secret that opens one bulk stream. Random (UUID v4), since whoever holds it may use it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TicketId(Uuid);

impl TicketId {
    /// A new secret with 122 random bits.
    #[expect(clippy::new_without_default, reason = "a default secret would be a new one each time")]
    pub fn new() -> Self {
        Self(Uuid::new_v4())
    }

    /// The secret's text form, to be sent to the process that issued it.
    pub fn reveal(&self) -> String {
        self.0.as_simple().to_string()
    }

    /// The secret from its text form.
    pub fn parse(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}

impl fmt::Debug for TicketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketId(secret)")
    }
}
