//! How much a VMM uses, as the host sees it: two small files of `/proc` per VMM and one for all TAPs, so that it can be
//! asked often.

use crate::vmm::wire::Process;
use bothy_contract::VmId;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// The processor time and memory of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessUsage {
    /// Processor time that it has used, user and system.
    pub cpu: Duration,
    /// Memory that it holds, in bytes.
    pub resident: u64,
    /// How long it has run.
    pub uptime: Duration,
}

impl ProcessUsage {
    /// Of `process`; `None` where it has ended.
    pub fn read(process: Process) -> Option<Self> {
        let stat = fs_err::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
        let uptime = fs_err::read_to_string("/proc/uptime").ok()?;
        if !process.is_alive() {
            return None;
        }
        Self::parse(&stat, &uptime, ticks_per_second(), page_size())
    }

    /// From the texts of `/proc/<pid>/stat` (proc_pid_stat(5)) and `/proc/uptime` (proc_uptime(5)).
    fn parse(stat: &str, uptime: &str, hz: u64, page: u64) -> Option<Self> {
        // The name, in parentheses, may hold anything; what follows its last closing one is fields 3 and on.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
        let ticks = |ticks: u64| Some(Duration::from_millis(ticks.checked_mul(1000)?.checked_div(hz)?));
        let up = uptime.split_ascii_whitespace().next()?.parse::<f64>().ok()?;
        Some(Self {
            cpu: ticks(field(14)?.checked_add(field(15)?)?)?,
            resident: field(24)?.checked_mul(page)?,
            uptime: Duration::try_from_secs_f64(up).ok()?.saturating_sub(ticks(field(22)?)?),
        })
    }
}

fn ticks_per_second() -> u64 {
    rustix::param::clock_ticks_per_second()
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// What went over a TAP, as its guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that the guest has received.
    pub received: u64,
    /// Bytes that the guest has sent.
    pub sent: u64,
}

/// The traffic of all network devices by name, in the network namespace of this thread (proc_pid_net(5)).
pub fn traffic() -> HashMap<String, Traffic> {
    fs_err::read_to_string("/proc/thread-self/net/dev").map(|text| parse_traffic(&text)).unwrap_or_default()
}

fn parse_traffic(text: &str) -> HashMap<String, Traffic> {
    let line = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<&str> = counters.split_ascii_whitespace().collect();
        let number = |at: usize| counters.get(at)?.parse::<u64>().ok();
        // What the host receives from a TAP its guest has sent.
        Some((name.trim().to_owned(), Traffic { received: number(8)?, sent: number(0)? }))
    };
    text.lines().filter_map(line).collect()
}

/// Remembers the last reading of each VM, which makes processor time a rate.
#[derive(Debug, Default)]
pub struct Sampler(Mutex<HashMap<VmId, Reading>>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    cpu: Duration,
    percent: Option<f64>,
}

/// A rate over less than this says nothing: the kernel counts in hundredths of a second.
const SHORTEST: Duration = Duration::from_millis(500);
/// The most VMs that are remembered.
const MOST: usize = 10_000;

impl Sampler {
    /// Processor time per wall time of `vm` since the reading before, in percent of one processor, now that it has used
    /// `cpu`. `None` at its first reading.
    pub fn percent(&self, vm: VmId, cpu: Duration) -> Option<f64> {
        self.percent_at(vm, cpu, Instant::now())
    }

    fn percent_at(&self, vm: VmId, cpu: Duration, at: Instant) -> Option<f64> {
        let mut readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = readings.get(&vm).copied();
        if let Some(before) = before
            && before.cpu <= cpu
        {
            let wall = at.saturating_duration_since(before.at);
            if wall < SHORTEST {
                return before.percent;
            }
            let percent = 100.0 * (cpu - before.cpu).as_secs_f64() / wall.as_secs_f64();
            readings.insert(vm, Reading { at, cpu, percent: Some(percent) });
            return Some(percent);
        }
        // A new VM, or a new VMM of one.
        if readings.len() < MOST || before.is_some() {
            readings.insert(vm, Reading { at, cpu, percent: None });
        }
        None
    }

    /// Forgets a VM that is gone.
    pub fn forget(&self, vm: VmId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 9 0 0 0 250 50 0 0 20 0 4 0 100 1000000 2560 18446744073709551615 1";
        let usage = ProcessUsage::parse(stat, "61.00 100.00\n", 100, 4096).unwrap();
        assert_eq!(usage.cpu, Duration::from_secs(3));
        assert_eq!(usage.resident, 2560 * 4096);
        assert_eq!(usage.uptime, Duration::from_secs(60));
        assert_eq!(ProcessUsage::parse("42 (a) S 1", "1.0 1.0", 100, 4096), None);
    }

    #[test]
    fn a_process_at_work_uses_processor_time() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        let used = (0..500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            ProcessUsage::read(process).filter(|usage| usage.cpu >= Duration::from_millis(50))
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(used.unwrap().resident > 0);
        assert_eq!(ProcessUsage::read(process), None);
    }

    #[test]
    fn what_the_host_receives_the_guest_has_sent() {
        let text = "Inter-|   Receive                |  Transmit\n face |bytes    packets errs\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
            bothy-tap-0: 700 5 0 0 0 0 0 0 9000 8 0 0 0 0 0 0\nbroken: x\n";
        let traffic = parse_traffic(text);
        assert_eq!(traffic["bothy-tap-0"], Traffic { received: 9000, sent: 700 });
        assert_eq!(traffic.len(), 2);
        assert!(super::traffic().contains_key("lo"));
    }

    #[test]
    fn a_rate_needs_two_readings_and_a_new_vmm_begins_anew() {
        let (sampler, vm, start) = (Sampler::default(), VmId::new(), Instant::now());
        let at = |s: f64| start + Duration::from_secs_f64(s);
        assert_eq!(sampler.percent_at(vm, Duration::from_secs(1), at(0.0)), None);
        assert_eq!(sampler.percent_at(vm, Duration::from_secs(2), at(2.0)), Some(50.0));
        assert_eq!(
            sampler.percent_at(vm, Duration::from_secs(2), at(2.1)),
            Some(50.0),
            "too soon to tell anew"
        );
        assert_eq!(sampler.percent_at(vm, Duration::from_secs(5), at(4.0)), Some(150.0));
        assert_eq!(sampler.percent_at(vm, Duration::from_secs(1), at(5.0)), None, "another process");
        sampler.forget(vm);
        assert_eq!(sampler.percent_at(vm, Duration::from_secs(9), at(9.0)), None);
    }
}
