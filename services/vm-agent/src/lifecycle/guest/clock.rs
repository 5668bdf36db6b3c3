//! The guest's clock. What the host's clock said when a request was made is late by as long as the request took to be heard,
//! which on a loaded host is seconds: so it is looked at afterwards, as a network's clocks are (RFC 5905).

use super::{CALL, Guest, fail, personalise::entropy, plain_id};
use bothy_contract::Error;
use bothy_guest_proto::{
    GuestClient,
    v1::{HealthRequest, ResumedRequest},
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// How often a guest's clock is set; how far it may be off, in microseconds, beside what cannot be known; and how long the way
/// of a question may take that is taken to tell enough.
const TRIES: usize = 6;
const OFF_US: u64 = 5000;
const WAY: Duration = Duration::from_millis(60);

impl Guest {
    /// Tells a guest that goes on after a rest what it has missed. Its boot id, and how far its clock was behind.
    pub(crate) async fn greet(&self) -> Result<(String, Duration), Error> {
        let (mut client, _) = self.first_client().await;
        let ask = ResumedRequest { unix_time_us: unix_time_us(), entropy: entropy()? };
        let told = client.resumed(ask).await.map_err(|s| fail("resumed", &s))?.into_inner();
        let behind = Duration::from_micros(u64::try_from(told.clock_was_off_us).unwrap_or_default());
        adjust(&mut client).await?;
        Ok((plain_id(&told.boot_id), behind))
    }

    /// Looks at the guest's clock, and sets it until it is right: what the host's clock said when a request was made is
    /// late by as long as that took, which on a loaded host is seconds.
    pub(crate) async fn set_clock(&self) -> Result<(), Error> {
        let work = async { adjust(&mut self.client().await?).await };
        self.alive_within("setting the guest's clock", CALL, work).await
    }
}

/// Looks at the guest's clock, and sets it until it is right.
pub(super) async fn adjust(client: &mut GuestClient) -> Result<(), Error> {
    for _ in 0..TRIES {
        let (asked, begun) = (unix_time_us(), Instant::now());
        let told = client.health(HealthRequest {}).await.map_err(|s| fail("health", &s))?.into_inner();
        let way = begun.elapsed();
        // The guest looked at its clock somewhere on that way (RFC 5905 has the same for a network).
        let half = u64::try_from(way.as_micros() / 2).unwrap_or(u64::MAX);
        let off = told.unix_time_us.abs_diff(asked.saturating_add(half)).saturating_sub(half);
        if off <= OFF_US {
            if way < WAY {
                break;
            }
            continue;
        }
        let ask = ResumedRequest { unix_time_us: unix_time_us().saturating_add(half), entropy: entropy()? };
        client.resumed(ask).await.map_err(|s| fail("resumed", &s))?;
    }
    Ok(())
}

/// The host's clock, for a guest's.
pub(super) fn unix_time_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
