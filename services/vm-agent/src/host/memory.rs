//! Admission: whether the host's memory holds one more VM.
//!
//! A VM takes its memory page by page as its guest touches it, so that much is free now says little: what is promised to
//! VMs and not taken yet is spoken for. Refused is what would need more than that leaves. The decision is pure; only
//! [`HostMemory::read`] looks at the host.

use super::MIB;
use crate::vmm::Accel;
use bothy_contract::{Code, Error};

/// The host's memory, in bytes (proc_meminfo(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: u64,
    /// What can be had without swapping.
    pub available: u64,
}

impl HostMemory {
    /// As it is now.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read or says nothing of it.
    pub fn read() -> Result<Self, Error> {
        let text = fs_err::read_to_string("/proc/meminfo")
            .map_err(|e| Error::internal("cannot read the host's memory", &e))?;
        Self::parse(&text).ok_or_else(|| {
            Error::new(Code::Internal, "/proc/meminfo does not say how much memory the host has")
        })
    }

    /// From the text of `/proc/meminfo`.
    pub fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }
}

/// What a VMM needs beside its guest's memory, in MiB: its own code and buffers, and under TCG the translated code of a
/// guest at work. A guest of 256 MiB that has booted Debian under TCG has touched about half of its memory, and its QEMU
/// holds 210 MiB in all.
pub fn overhead_mib(accel: Accel) -> u64 {
    match accel {
        Accel::Kvm => 48,
        Accel::Tcg => 128,
    }
}

/// What one VM was promised and what it holds already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Its memory and its VMM's, in MiB.
    pub promised_mib: u64,
    /// What its VMM holds, in bytes; 0 before it is launched.
    pub resident: u64,
}

impl Claim {
    fn outstanding(&self) -> u64 {
        self.promised_mib.saturating_mul(MIB).saturating_sub(self.resident)
    }
}

/// Whether `host` can promise `asked_mib` more, beside `claims`, and keep `reserve_mib` for itself.
///
/// # Errors
/// [`Code::ResourceExhausted`], with the numbers.
pub fn admit(host: HostMemory, reserve_mib: u64, claims: &[Claim], asked_mib: u64) -> Result<(), Error> {
    let promised = claims.iter().fold(0_u64, |sum, claim| sum.saturating_add(claim.outstanding()));
    let spoken_for = promised.saturating_add(reserve_mib.saturating_mul(MIB));
    let left = host.available.saturating_sub(spoken_for);
    if asked_mib.saturating_mul(MIB) <= left {
        return Ok(());
    }
    let message = format!(
        "the host's memory does not hold it: it takes {asked_mib} MiB with its VMM, and {} MiB are left ({} MiB available, \
         {} MiB of it promised to VMs, {reserve_mib} MiB kept for the host)",
        left / MIB,
        host.available / MIB,
        promised / MIB,
    );
    Err(Error::new(Code::ResourceExhausted, message)
        .hint("stop other VMs, ask for less with `--memory`, or take the risk with `--force`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOST: HostMemory = HostMemory { total: 8192 * MIB, available: 4096 * MIB };

    #[test]
    fn what_is_promised_is_spoken_for_and_what_is_taken_is_not_counted_twice() {
        let untouched = Claim { promised_mib: 1024, resident: 0 };
        let touched = Claim { promised_mib: 1024, resident: 2048 * MIB };
        admit(HOST, 512, &[untouched, touched], 2560).unwrap();
        let e = admit(HOST, 512, &[untouched, touched], 2561).unwrap_err();
        assert_eq!(e.code, Code::ResourceExhausted);
        for number in
            ["2561 MiB", "2560 MiB are left", "4096 MiB available", "1024 MiB of it promised", "512 MiB kept"]
        {
            assert!(e.message.contains(number), "{number}: {e}");
        }
        assert!(e.hint.unwrap().contains("--force"));
    }

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24605252 kB\nMemFree:        1 kB\nMemAvailable:   21000000 kB\nSwapTotal: 0 kB\n";
        let memory = HostMemory::parse(text).unwrap();
        assert_eq!(memory, HostMemory { total: 24_605_252 * 1024, available: 21_000_000 * 1024 });
        assert_eq!(HostMemory::parse("MemTotal: x kB"), None);
        let here = HostMemory::read().unwrap();
        assert!(here.available > 0 && here.available <= here.total);
    }

    proptest! {
        /// Whatever is admitted one after the other fits: no order of creates promises more than there is.
        #[test]
        fn admitted_vms_fit(asked in prop::collection::vec(1..4096_u64, 1..40), reserve in 0..2048_u64) {
            let mut claims = Vec::new();
            for promised_mib in asked {
                if admit(HOST, reserve, &claims, promised_mib).is_ok() {
                    claims.push(Claim { promised_mib, resident: 0 });
                }
            }
            let sum: u64 = claims.iter().map(|claim| claim.promised_mib).sum();
            prop_assert!(sum + reserve <= 4096 || claims.is_empty());
        }
    }
}
