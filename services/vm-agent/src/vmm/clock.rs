//! How fast the host's time-stamp counter runs, for guests that cannot find out.
//!
//! `/proc/cpuinfo`'s "cpu MHz" is the core's current clock on most machines, and the kernel log, which has the counter's
//! own rate, is not for everybody to read. So it is measured: the counter and the monotonic clock are read together
//! twice, a moment apart. Over 50 ms that is good to a few parts in a million.

use std::time::{Duration, Instant};

const SPAN: Duration = Duration::from_millis(50);

/// The counter's rate in kHz, or `None` where it is not constant and so of no use. Blocks for 50 ms.
#[cfg(target_arch = "x86_64")]
pub fn tsc_khz() -> Option<u32> {
    let cpuinfo = fs_err::read_to_string("/proc/cpuinfo").ok()?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    // Through frequency changes and idle states (arch/x86/include/asm/cpufeatures.h).
    if !["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|flag| flags.split_ascii_whitespace().any(|have| have == *flag))
    {
        return None;
    }
    let (clock, counter) = both();
    std::thread::sleep(SPAN);
    let (clock_later, counter_later) = both();
    let nanos = clock_later.checked_duration_since(clock)?.as_nanos();
    let ticks = u128::from(counter_later.checked_sub(counter)?);
    u32::try_from((ticks * 1_000_000).checked_div(nanos)?).ok().filter(|khz| *khz > 100_000)
}

/// The counter's rate: other processors have none.
#[cfg(not(target_arch = "x86_64"))]
pub fn tsc_khz() -> Option<u32> {
    None
}

/// Both clocks at the same moment: of several tries the one that took the least time, so that an interrupt between the
/// two readings does not count.
#[cfg(target_arch = "x86_64")]
fn both() -> (Instant, u64) {
    let mut best = (Instant::now(), rdtsc(), u64::MAX);
    for _ in 0..16 {
        let before = rdtsc();
        let clock = Instant::now();
        let after = rdtsc();
        let took = after.wrapping_sub(before);
        if took < best.2 {
            best = (clock, before + took / 2, took);
        }
    }
    (best.0, best.1)
}

#[cfg(target_arch = "x86_64")]
fn rdtsc() -> u64 {
    #[expect(unsafe_code, reason = "the standard library declares the instruction unsafe")]
    // SAFETY: RDTSC reads a counter into registers and touches no memory; every x86-64 processor has it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (Some(one), Some(two)) = (super::tsc_khz(), super::tsc_khz()) else {
            let cpuinfo = fs_err::read_to_string("/proc/cpuinfo").unwrap();
            assert!(!cpuinfo.contains(" nonstop_tsc"), "a constant counter was not measured");
            return;
        };
        assert!(one.abs_diff(two) < one / 1000, "{one} and {two} kHz");
    }
}
