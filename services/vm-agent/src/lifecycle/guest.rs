//! Talking to a guest's agent: health, identity, services, power-off.

use super::files::HostKey;
use bothy_contract::{
    Code, Error,
    guest::BootStep,
    image::{BootSet, InitStyle, WaitService},
    net::Lease,
};
use bothy_guest_proto::{
    CONTROL_PORT, GuestClient,
    v1::{
        File, HealthReply, HealthRequest, Nic, PersonaliseRequest, ShutdownRequest, SyncRequest,
        TimelineRequest, WaitPortRequest,
    },
};
use bothy_vm_agent::vmm::{
    holder::Holder,
    wire::{self, HolderHandle},
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{sleep, timeout};

/// The pause before a guest whose channel broke is tried again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a short call may take: an emulated guest under load is slow.
const CALL: Duration = Duration::from_secs(60);
/// Random bytes for the guest's pool.
const ENTROPY: usize = 64;
/// How much of the console's end an error shows.
const LAST_LINES: usize = 15;
/// How many steps of its boot a guest may tell, and how long their names may be: they are kept and shown.
const MAX_STEPS: usize = 64;
const MAX_STEP_NAME: usize = 40;
const CONSOLE_LIMIT: u64 = 4 << 20;

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
        tokio::select! {
            biased;
            done = timeout(limit, work) => done.unwrap_or_else(|_| {
                let message = format!("{what} took longer than {} s{}", limit.as_secs(), self.last_words());
                Err(Error::new(Code::DeadlineExceeded, message)
                    .hint("see `bothy vm logs`; slow hosts may need a higher `vm.boot_timeout_s` in bothy.toml"))
            }),
            gone = Holder::gone(self.handle.vmm) => {
                gone?;
                let message = format!("the VMM ended during {what}{}", self.last_words());
                Err(Error::new(Code::StageFailed, message).hint("`bothy vm logs` shows all it said"))
            }
        }
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
        loop {
            let answer =
                async { self.client().await?.health(HealthRequest {}).await.map_err(|s| fail("health", &s)) };
            match answer.await {
                Ok(reply) => return reply.into_inner(),
                Err(e) => tracing::debug!(error = %e, "the guest does not answer yet"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Gives the guest its identity.
    pub(crate) async fn personalise(
        &self,
        hostname: &str,
        machine_id: &str,
        lease: &Lease,
        boot: &BootSet,
        key: HostKey,
    ) -> Result<(), Error> {
        let mut entropy = vec![0; ENTROPY];
        getrandom::fill(&mut entropy).map_err(|e| Error::internal("no random bytes", &e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let file = |path: &str, content, mode| File { path: path.to_owned(), content, mode };
        let request = PersonaliseRequest {
            hostname: hostname.to_owned(),
            machine_id: machine_id.to_owned(),
            nic: Some(Nic {
                mac: lease.mac.clone(),
                address: lease.address.to_string(),
                prefix: lease.prefix.into(),
                gateway: lease.gateway.to_string(),
                dns: lease.dns.iter().map(ToString::to_string).collect(),
            }),
            unix_time_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX),
            entropy,
            files: vec![
                file("/etc/ssh/ssh_host_ed25519_key", key.private, 0o600),
                file("/etc/ssh/ssh_host_ed25519_key.pub", key.public, 0o644),
            ],
            home: boot.home.clone(),
            init_systemd: boot.init == InitStyle::Systemd,
        };
        let mut client = self.client().await?;
        client.personalise(request).await.map_err(|s| fail("personalise", &s))?;
        Ok(())
    }

    /// Waits until every service accepts connections; says how long each took.
    pub(crate) async fn wait_services(&self, services: &[WaitService]) -> Result<String, Error> {
        let client = self.client().await?;
        let waits = services.iter().map(|service| {
            let mut client = client.clone();
            async move {
                let request = WaitPortRequest {
                    port: service.port.unwrap_or_default().into(),
                    timeout_ms: u64::from(service.timeout_s) * 1000,
                };
                let answer = client.wait_port(request).await.map_err(|s| fail("wait_port", &s))?.into_inner();
                if !answer.open {
                    return Err(Error::new(
                        Code::DeadlineExceeded,
                        format!(
                            "{} ({}) is not up after {} s",
                            service.name,
                            service.what(),
                            service.timeout_s
                        ),
                    )
                    .hint("see `bothy vm logs`"));
                }
                Ok(format!("{} after {} ms", service.name, answer.waited_us / 1000))
            }
        });
        Ok(futures::future::try_join_all(waits).await?.join(", "))
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
        _ => Code::Internal,
    };
    Error::new(code, format!("the guest's agent failed at {call}: {}", status.message()))
}

/// The last lines of a log that a guest wrote: made harmless, for it ends on a terminal.
fn last_lines(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<String> = text
        .lines()
        .rev()
        .map(|l| l.chars().filter(|c| !c.is_control()).take(200).collect::<String>())
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
