//! Talking to a guest's agent: health, services, power-off; its clock is in [`clock`], who it is in [`personalise`].

mod clock;
mod personalise;

pub(crate) use personalise::{Identity, Resumed};

use bothy_contract::{
    Code, Error,
    guest::BootStep,
    image::WaitService,
    usage::{GuestPort, GuestStats},
};
use bothy_guest_proto::{
    CONTROL_PORT, GuestClient,
    v1::{
        GrowDisksRequest, HealthReply, HealthRequest, MetricsReply, MetricsRequest, Port, PortsRequest,
        QuiesceRequest, ShutdownRequest, SyncRequest, TimelineRequest, WaitServiceRequest,
    },
};
use bothy_vm_agent::{
    host::usage::ProcessUsage,
    vmm::{
        holder::Holder,
        wire::{self, HolderHandle},
    },
};
use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::{Instant, sleep, timeout};

/// The pause before a guest whose channel broke is tried again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long after a call broke off its VMM may take to be seen to have ended.
const BREAK: Duration = Duration::from_millis(300);
/// How long a short call may take: an emulated guest under load is slow.
const CALL: Duration = Duration::from_secs(60);
/// How much of the console's end an error shows.
const LAST_LINES: usize = 15;
/// How long one of its lines, or a guest's reason, may be, in letters.
const MAX_LINE: usize = 200;
/// How many steps of its boot a guest may tell, and how long their names may be: they are kept and shown.
const MAX_STEPS: usize = 64;
const MAX_STEP_NAME: usize = 40;
const CONSOLE_LIMIT: u64 = 4 << 20;
/// How long a guest may take to find out why a service is not up, after the service's own time.
const AFTERWORD: Duration = Duration::from_secs(25);
/// How many things a guest may tell that it could not make quiet.
const MAX_LEFT: usize = 8;
/// How many sockets a guest may tell of, and how long the name of a process may be.
const MAX_PORTS: usize = 256;
const MAX_PROCESS: usize = 32;
/// The largest number a guest may tell of itself: what a reader of JSON still gets exactly.
const MAX_NUMBER: u64 = 1 << 53;

/// A guest of a living VMM.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    holder: Holder,
    handle: HolderHandle,
}

impl Guest {
    pub(crate) fn new(holder: Holder, handle: HolderHandle) -> Self {
        Self { holder, handle }
    }

    /// `work`'s result; or, as soon as the VMM ends, an error with the last lines of the console; or a deadline's.
    pub(crate) async fn alive_within<T>(
        &self,
        what: &str,
        limit: Duration,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let done = tokio::select! {
            biased;
            done = timeout(limit, work) => done,
            gone = Holder::gone(self.handle.vmm) => {
                gone?;
                return Err(self.ended_during(what));
            }
        };
        let Ok(done) = done else {
            let message =
                format!("{what} took longer than {} s{}{}", limit.as_secs(), self.busy(), self.last_words());
            return Err(Error::new(Code::DeadlineExceeded, message).hint(
                "see `bothy vm logs`; slow hosts may need a higher `vm.boot_timeout_s` in bothy.toml",
            ));
        };
        // A call that breaks off is mostly the first to tell of a VMM's end.
        let Err(e) = done else { return done };
        match timeout(BREAK, Holder::gone(self.handle.vmm)).await {
            Ok(Ok(())) => Err(self.ended_during(what)),
            _ => Err(e),
        }
    }

    fn ended_during(&self, what: &str) -> Error {
        let message = format!("the VMM ended during {what}{}", self.last_words());
        Error::new(Code::StageFailed, message).hint("`bothy vm logs` shows all it said")
    }

    /// What its VMM has computed, for an error's message: a guest that hangs idle and one that is only slow look the same
    /// on the console.
    pub(super) fn busy(&self) -> String {
        ProcessUsage::read(self.handle.vmm).map_or_else(String::new, |usage| {
            let (cpu, uptime) = (usage.cpu.as_secs_f64(), usage.uptime.as_secs_f64());
            format!("; its VMM has used {cpu:.1} s of processor time in {uptime:.1} s")
        })
    }

    /// The end of the console, for an error's message.
    fn last_words(&self) -> String {
        let console = wire::read_untrusted(&self.holder.dir().join(wire::CONSOLE_LOG), CONSOLE_LIMIT);
        let vmm = wire::read_untrusted(&self.holder.dir().join(wire::VMM_LOG), CONSOLE_LIMIT);
        [("the console's last lines", console), ("the VMM's last lines", vmm)]
            .into_iter()
            .filter_map(|(what, log)| last_lines(&log.ok()?).map(|lines| format!("; {what}:\n{lines}")))
            .collect()
    }

    async fn client(&self) -> Result<GuestClient, Error> {
        let stream = self.holder.connect(CONTROL_PORT).await?;
        bothy_guest_proto::client(stream)
            .await
            .map_err(|e| Error::new(Code::Unavailable, format!("cannot talk to the guest: {}", chain(&e))))
    }

    /// The agent's first answer, however long it takes; whoever calls sets the deadline.
    pub(crate) async fn first_answer(&self) -> HealthReply {
        self.first_client().await.1
    }

    /// The same, with the connection that it came by.
    async fn first_client(&self) -> (GuestClient, HealthReply) {
        loop {
            let answer = async {
                let mut client = self.client().await?;
                let reply = client.health(HealthRequest {}).await.map_err(|s| fail("health", &s))?;
                Ok::<_, Error>((client, reply.into_inner()))
            };
            match answer.await {
                Ok(answer) => return answer,
                Err(e) => tracing::debug!(error = %e, "the guest does not answer yet"),
            }
            sleep(PAUSE).await;
        }
    }

    /// What `say` comes to on a connection of its own to a guest that was resumed: all of it again on another one as long as
    /// nobody answers; whoever calls sets the deadline.
    async fn until_heard<T, F>(&self, say: impl Fn(GuestClient) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        loop {
            let said = async { say(self.client().await?).await };
            match said.await {
                Err(error) if error.code == Code::Unavailable => {
                    tracing::debug!(%error, "the guest does not answer yet");
                }
                said => return said,
            }
            sleep(PAUSE).await;
        }
    }

    /// Has the guest stand still so that it can be saved. What could not be made quiet, by its own word.
    pub(crate) async fn quiesce(&self) -> Result<Vec<String>, Error> {
        let told = self.client().await?.quiesce(QuiesceRequest {}).await.map_err(|s| fail("quiesce", &s))?;
        Ok(told.into_inner().left.iter().take(MAX_LEFT).map(|left| plain(left, MAX_LINE)).collect())
    }

    /// Waits until every service is up; says how long each took. One that is not up in its own time, or has failed before it is
    /// over, is an error.
    pub(crate) async fn wait_services(&self, services: &[WaitService]) -> Result<String, Error> {
        let client = self.client().await?;
        let waits = services.iter().map(|service| wait_service(client.clone(), service));
        Ok(futures::future::try_join_all(waits).await?.join(", "))
    }

    /// How the guest stands, by its own word.
    pub(crate) async fn metrics(&self) -> Result<GuestStats, Error> {
        let reply = self.client().await?.metrics(MetricsRequest {}).await.map_err(|s| fail("metrics", &s))?;
        Ok(stats(&reply.into_inner()))
    }

    /// The sockets on which the guest listens, by its own word.
    pub(crate) async fn ports(&self) -> Result<Vec<GuestPort>, Error> {
        let work = async {
            let reply = self.client().await?.ports(PortsRequest {}).await.map_err(|s| fail("ports", &s))?;
            Ok(reply.into_inner().ports.into_iter().filter_map(port).take(MAX_PORTS).collect())
        };
        self.alive_within("asking for the guest's ports", CALL, work).await
    }

    /// Has the guest's file systems grow to their disks, which have these sizes by now.
    pub(crate) async fn grow_disks(&self, work_mib: u64, system_mib: u64) -> Result<(), Error> {
        let work = async {
            let bytes = |mib: u64| mib.saturating_mul(1 << 20);
            let request = GrowDisksRequest { work_bytes: bytes(work_mib), system_bytes: bytes(system_mib) };
            self.client().await?.grow_disks(request).await.map_err(|s| fail("grow_disks", &s))?;
            Ok(())
        };
        self.alive_within("growing the guest's file systems", CALL, work).await
    }

    /// The steps of the guest's boot, and when its kernel started.
    pub(crate) async fn timeline(&self) -> Result<(SystemTime, Vec<BootStep>), Error> {
        let work = async {
            let mut client = self.client().await?;
            let up =
                client.health(HealthRequest {}).await.map_err(|s| fail("health", &s))?.into_inner().uptime_us;
            let kernel = SystemTime::now().checked_sub(Duration::from_micros(up)).unwrap_or(UNIX_EPOCH);
            let steps = client
                .timeline(TimelineRequest {})
                .await
                .map_err(|s| fail("timeline", &s))?
                .into_inner()
                .steps;
            Ok((kernel, steps.into_iter().take(MAX_STEPS).map(step).collect()))
        };
        self.alive_within("asking for the boot's times", CALL, work).await
    }

    /// Has everything written to disk, then begins the power-off.
    pub(crate) async fn shut_down(&self) -> Result<(), Error> {
        let mut client = self.client().await?;
        client.sync(SyncRequest {}).await.map_err(|s| fail("sync", &s))?;
        client.shutdown(ShutdownRequest { reboot: false }).await.map_err(|s| fail("shutdown", &s))?;
        Ok(())
    }
}

/// Waits for one service, and says how long it took.
async fn wait_service(mut client: GuestClient, service: &WaitService) -> Result<String, Error> {
    let limit = Duration::from_secs(service.timeout_s.into());
    let request = WaitServiceRequest {
        port: service.port.unwrap_or_default().into(),
        unit: service.unit.clone().unwrap_or_default(),
        timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    };
    let begun = Instant::now();
    let (code, why, log) = match timeout(limit + AFTERWORD, client.wait_service(request)).await {
        Ok(answer) => {
            let told = answer.map_err(|s| fail("wait_service", &s))?.into_inner();
            if told.ready {
                return Ok(format!("{} after {} ms", service.name, told.waited_us / 1000));
            }
            // The guest's clock is the guest's word.
            let code = if begun.elapsed() < limit { Code::StageFailed } else { Code::DeadlineExceeded };
            (code, plain(&told.why, MAX_LINE), last_lines(told.log.as_bytes()))
        }
        Err(_) => (Code::DeadlineExceeded, "the guest's agent does not answer".to_owned(), None),
    };
    let log = log.map(|lines| format!("; its last lines:\n{lines}")).unwrap_or_default();
    let (name, what, after) = (&service.name, service.what(), begun.elapsed().as_millis());
    let error = Error::new(code, format!("{name} ({what}) is not up after {after} ms: {why}{log}"));
    Err(error.hint(
        "see `bothy vm logs`; slow hosts may need a higher `timeout_s` of `[[wait]]` in the image's recipe",
    ))
}

/// What a guest says of itself, as numbers that a reader can take.
fn stats(told: &MetricsReply) -> GuestStats {
    let bounded = |number: u64| number.min(MAX_NUMBER);
    let part = |part: u64, whole: u64| part.min(whole).min(MAX_NUMBER);
    GuestStats {
        uptime_s: bounded(told.uptime_us / 1_000_000),
        memory_total: bounded(told.memory_total),
        memory_available: part(told.memory_available, told.memory_total),
        // NaN is no number that JSON has.
        load_1m: if told.load_1m.is_finite() { told.load_1m.clamp(0.0, 1e6) } else { 0.0 },
        home_size: bounded(told.home_size),
        home_used: part(told.home_used, told.home_size),
        root_size: bounded(told.root_size),
        root_used: part(told.root_used, told.root_size),
    }
}

/// A socket as the guest tells it; `None` where that makes no sense.
fn port(told: Port) -> Option<GuestPort> {
    let known = ["tcp", "tcp6", "udp", "udp6"].into_iter().find(|known| *known == told.protocol)?;
    let address: IpAddr = told.address.parse().ok()?;
    let port = u16::try_from(told.port).ok().filter(|port| *port != 0)?;
    let process = plain(&told.process, MAX_PROCESS);
    Some(GuestPort {
        protocol: known.to_owned(),
        address: address.to_string(),
        port,
        process: (!process.is_empty()).then_some(process),
    })
}

/// The boot id that a guest tells: whatever it is, it is short and plain.
pub(crate) fn plain_id(told: &str) -> String {
    told.chars().filter(char::is_ascii_graphic).take(64).collect()
}

/// A guest's words without what moves a terminal's cursor, and not more than `most` letters of them.
fn plain(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control() && !reorders(*c)).take(most).collect::<String>().trim().to_owned()
}

/// Whether `c` changes the order or presence of the letters around it: a text with such reads as another.
fn reorders(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// A step as the guest tells it, with a name that is short and plain.
fn step(told: bothy_guest_proto::v1::Step) -> BootStep {
    let name = told.name.chars().filter(char::is_ascii_graphic).take(MAX_STEP_NAME).collect();
    BootStep { name, started_us: told.started_us, took_us: told.took_us }
}

fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    bothy_contract::error::chain(e)
}

fn fail(call: &str, status: &tonic::Status) -> Error {
    let code = match status.code() {
        tonic::Code::InvalidArgument => Code::InvalidArgument,
        tonic::Code::FailedPrecondition => Code::FailedPrecondition,
        tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
        tonic::Code::Unavailable | tonic::Code::Cancelled => Code::Unavailable,
        // A guest is as new as the host was when it booted.
        tonic::Code::Unimplemented => {
            return Error::new(Code::FailedPrecondition, format!("the guest's agent is too old for {call}"))
                .hint("`bothy vm restart` gives the guest this host's agent");
        }
        _ => Code::Internal,
    };
    let said = plain(status.message(), 2 * MAX_LINE);
    Error::new(code, format!("the guest's agent failed at {call}: {said}"))
}

/// The last lines of a log that a guest wrote: made harmless, for it ends on a terminal.
fn last_lines(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<String> = text
        .lines()
        .rev()
        .map(|l| l.chars().filter(|c| !c.is_control() && !reorders(*c)).take(MAX_LINE).collect::<String>())
        .filter(|l| !l.trim().is_empty())
        .take(LAST_LINES)
        .collect();
    (!lines.is_empty())
        .then(|| lines.into_iter().rev().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_names_its_steps_shortly_and_plainly() {
        let told = bothy_guest_proto::v1::Step {
            name: "\u{1b}[2Jmo unts".repeat(1000),
            started_us: u64::MAX,
            took_us: u64::MAX,
        };
        let step = step(told);
        assert!(step.name.starts_with("[2Jmounts[2J") && step.name.len() == MAX_STEP_NAME, "{}", step.name);
    }

    #[test]
    fn a_guests_numbers_are_bounded_and_finite() {
        let told = MetricsReply {
            uptime_us: u64::MAX,
            memory_total: 100,
            memory_available: u64::MAX,
            load_1m: f64::NAN,
            home_size: u64::MAX,
            home_used: u64::MAX,
            root_size: 10,
            root_used: 3,
        };
        let stats = stats(&told);
        assert_eq!((stats.memory_total, stats.memory_available), (100, 100));
        assert_eq!((stats.home_size, stats.home_used), (MAX_NUMBER, MAX_NUMBER));
        assert_eq!((stats.root_size, stats.root_used, stats.load_1m), (10, 3, 0.0));
        assert!(stats.uptime_s <= MAX_NUMBER);
        assert_eq!(super::stats(&MetricsReply { load_1m: f64::INFINITY, ..told }).load_1m, 0.0);
        assert_eq!(super::stats(&MetricsReply { load_1m: -1.0, ..told }).load_1m, 0.0);
    }

    #[test]
    fn a_guests_sockets_are_real_ones_with_plain_names() {
        let good = Port {
            protocol: "tcp".into(),
            address: "0.0.0.0".into(),
            port: 22,
            pid: 1,
            process: "ss\u{1b}[2J\u{202e}hd\n".into(),
        };
        let told = port(good.clone()).unwrap();
        assert_eq!((told.process.as_deref(), told.port), (Some("ss[2Jhd"), 22));
        let long = port(Port { process: "x".repeat(1 << 20), ..good.clone() }).unwrap();
        assert_eq!(long.process.unwrap().len(), MAX_PROCESS);
        assert_eq!(port(Port { process: String::new(), ..good.clone() }).unwrap().process, None);
        for bad in [
            Port { protocol: "\u{1b}".into(), ..good.clone() },
            Port { address: "here".into(), ..good.clone() },
            Port { port: 0, ..good.clone() },
            Port { port: 70_000, ..good },
        ] {
            assert_eq!(port(bad.clone()), None, "{bad:?}");
        }
    }

    #[test]
    fn the_last_lines_are_few_in_order_and_harmless() {
        let log: String = (0..40).map(|n| format!("line {n}\r\n\n")).collect();
        let shown = last_lines(log.as_bytes()).unwrap();
        assert_eq!(shown.lines().count(), LAST_LINES);
        assert!(shown.starts_with("  line 25\n") && shown.ends_with("  line 39"), "{shown}");
        let evil = last_lines(b"\x1b]0;evil\x07\xff").unwrap();
        assert!(!evil.contains('\x1b') && !evil.contains('\x07'), "{evil:?}");
        assert_eq!(last_lines(b"\n \n"), None);
    }
}
