//! Names that people choose. Each is valid by construction: a value of these types has been checked.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Whether `s` is a DNS label as RFC 1123 section 2.1 allows: 1 to 63 of `a-z 0-9 -`, no `-` at either end.
fn is_label(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with('-')
        && !s.ends_with('-')
}

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident, $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self, Error> {
                if is_label(s) {
                    Ok(Self(s.to_owned()))
                } else {
                    Err(Error::invalid(format!(concat!("{:?} is not a valid ", $what), s))
                        .hint("use 1 to 63 of `a-z`, `0-9` and `-`, with no `-` at the start or the end"))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(s: String) -> Result<Self, Error> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    )*};
}

labels! {
    /// The name of a VM: a DNS label, since it becomes `<name>.vm`.
    VmName, "VM name";
    /// The name of an image.
    ImageName, "image name";
    /// The name of a group of VMs that reach each other.
    GroupName, "group name";
    /// The host's token in every subject.
    HostToken, "host token";
}

/// The name of a kernel in the catalogue: mostly its release, `6.1.0-56-cloud-amd64`, so it may have dots and more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KernelName(String);

impl KernelName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KernelName {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let good = (1..=128).contains(&s.len())
            && s.bytes().all(|b| plain(b) || b"-._+~".contains(&b))
            && s.bytes().next().is_some_and(plain);
        if good {
            return Ok(Self(s.to_owned()));
        }
        Err(Error::invalid(format!("{s:?} is not a valid kernel name"))
            .hint("use 1 to 128 of `a-z`, `0-9` and `-._+~`, a letter or a digit first"))
    }
}

impl TryFrom<String> for KernelName {
    type Error = Error;
    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<KernelName> for String {
    fn from(n: KernelName) -> String {
        n.0
    }
}

impl fmt::Display for KernelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl ImageName {
    /// The image that is used where none is named.
    pub fn default_image() -> Self {
        Self("debian".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kernels_never_leave_their_directory() {
        for good in ["6.1.0-56-cloud-amd64", "a", "6.12+deb13", "x_y~1"] {
            assert!(good.parse::<KernelName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "-a", "A", "a/b", "a b", "a\n", &"x".repeat(129)] {
            assert!(bad.parse::<KernelName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn labels_are_checked() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", "a b", "a\n", "../x", &"x".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<VmName>(bad.into()).is_err(), "{bad:?}");
        }
    }
}
