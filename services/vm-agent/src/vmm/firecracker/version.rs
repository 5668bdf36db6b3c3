//! Which Firecrackers this driver is made for.
//!
//! From 1.10 up to, not including, 2.0. Below: Debian's kernels find virtio devices only where ACPI describes them, which
//! Firecracker's early versions do not do (1.8 was the first), and of those that do, 1.10 is the oldest of which every field
//! that a launch sends is known to be taken. Above: the API is promised to stay compatible within one major version, and
//! another may be anything.

use bothy_contract::{Code, Error};

const OLDEST: Version = Version { major: 1, minor: 10, patch: 0 };
/// The first that is too new.
const BEYOND: Version = Version { major: 2, minor: 0, patch: 0 };
/// The first that lets a resumed guest have another TAP than the one it was saved with.
const NETWORK_OVERRIDES: Version = Version { major: 1, minor: 12, patch: 0 };
/// Its guests' vsock is silent for ever after a restore, which 1.16.1 mended.
const MUTE_AFTER_RESTORE: Version = Version { major: 1, minor: 16, patch: 0 };

/// A version of Firecracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub patch: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Version {
    /// That of a Firecracker of which no version is known.
    pub const UNKNOWN: Version = Version { major: 0, minor: 0, patch: 0 };

    /// Reads what the program `name` prints for `--version`, `Firecracker v1.16.1` first. What follows the numbers, as in
    /// `-dev`, does not count.
    pub fn parse(name: &str, text: &str) -> Option<Self> {
        let after = |line: &'_ str| line.trim().strip_prefix(name)?.strip_prefix(' ').map(str::to_owned);
        let word = text.lines().find_map(after)?;
        let word = word.split_ascii_whitespace().next()?;
        Self::from_words(word.strip_prefix('v').unwrap_or(word))
    }

    /// Reads `1.16.1`.
    pub fn from_words(word: &str) -> Option<Self> {
        let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
        let mut numbers = word.get(..end)?.split('.').map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        Some(Self { major: next()?, minor: next()?, patch: next()? })
    }

    /// Whether this driver is made for it.
    ///
    /// # Errors
    /// It is too old or too new.
    pub fn check(&self) -> Result<(), Error> {
        if *self >= OLDEST && *self < BEYOND {
            return Ok(());
        }
        Err(Error::new(
            Code::FailedPrecondition,
            format!("Firecracker {self} is not one from {OLDEST} up to {BEYOND}, for which bothy is made"),
        )
        .hint("install another and set `vm.firecracker` in bothy.toml, or set `vm.driver` to `qemu-microvm`"))
    }

    /// Whether guests can be saved and resumed with it.
    ///
    /// # Errors
    /// It is the one of which resumed guests do not answer, too old, or none that this driver is made for.
    pub fn snapshots(&self) -> Result<(), Error> {
        self.check()?;
        if *self < NETWORK_OVERRIDES {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("guests that Firecracker {self} resumes have the TAP that they were saved with"),
            )
            .hint(format!("install {NETWORK_OVERRIDES} or newer")));
        }
        if *self != MUTE_AFTER_RESTORE {
            return Ok(());
        }
        Err(Error::new(
            Code::FailedPrecondition,
            format!("guests that Firecracker {self} resumes do not answer on their vsock"),
        )
        .hint("install 1.16.1 or newer, which mended it"))
    }
}
