//! The guest's clock. What the host's clock said when a request was made is late by as long as the request took to be heard,
//! which on a loaded host is seconds: so what the guest says of its clock is looked at, and it is moved by the difference, as
//! clocks are in a network (RFC 5905).

use super::{CALL, Guest, fail, personalise::entropy, plain_id};
use bothy_contract::Error;
use bothy_guest_proto::{
    GuestClient,
    v1::{ResumedRequest, StepClockRequest},
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// How often a guest's clock is moved; how far it may be off, in microseconds, beside what cannot be known; and how long the
/// way of a question may take that is taken to tell enough.
const TRIES: usize = 6;
const OFF_US: u64 = 5000;
const WAY: Duration = Duration::from_millis(60);

impl Guest {
    /// Tells a guest that goes on after a rest what it has missed. Its boot id, and how far its clock was behind.
    pub(crate) async fn greet(&self) -> Result<(String, Duration), Error> {
        self.until_heard(|mut client| async move {
            let ask = ResumedRequest { unix_time_us: unix_time_us(), entropy: entropy()? };
            let told = client.resumed(ask).await.map_err(|s| fail("resumed", &s))?.into_inner();
            adjust(&mut client, behind(told.unix_time_us)).await?;
            let missed = Duration::from_micros(u64::try_from(told.clock_was_off_us).unwrap_or_default());
            Ok((plain_id(&told.boot_id), missed))
        })
        .await
    }

    /// Looks at the guest's clock, and moves it until it is right.
    pub(crate) async fn set_clock(&self) -> Result<(), Error> {
        let work = async { adjust(&mut self.client().await?, 0).await };
        self.alive_within("setting the guest's clock", CALL, work).await
    }
}

/// Moves the guest's clock by `by` microseconds, looks at it, and moves it again until it is right.
pub(super) async fn adjust(client: &mut GuestClient, mut by: i64) -> Result<(), Error> {
    for _ in 0..TRIES {
        let (asked, begun) = (unix_time_us(), Instant::now());
        let ask = StepClockRequest { by_us: by };
        let told = client.step_clock(ask).await.map_err(|s| fail("step clock", &s))?.into_inner();
        let way = begun.elapsed();
        // The guest looked at its clock somewhere on that way, most likely in its middle.
        let half = u64::try_from(way.as_micros() / 2).unwrap_or(u64::MAX);
        let off = difference(asked.saturating_add(half), told.unix_time_us);
        let right = off.unsigned_abs() <= half.saturating_add(OFF_US);
        if right && way < WAY {
            break;
        }
        by = if right { 0 } else { off };
    }
    Ok(())
}

/// How far a clock is behind that was looked at for a reply which has just come.
pub(super) fn behind(told_us: u64) -> i64 {
    difference(unix_time_us(), told_us)
}

fn difference(a_us: u64, b_us: u64) -> i64 {
    let signed = |us| i64::try_from(us).unwrap_or(i64::MAX);
    signed(a_us).saturating_sub(signed(b_us))
}

/// The host's clock, for a guest's.
pub(super) fn unix_time_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
