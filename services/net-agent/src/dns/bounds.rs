//! How much one guest, and all of them, may have of the name server. What is beyond is dropped without an answer, as a
//! network drops packets; a guest that is within its own bounds is never dropped for what others do.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;

/// Questions of one guest per second, and how many at once after a pause.
pub const RATE: f64 = 500.0;
/// See [`RATE`].
pub const BURST: f64 = 1000.0;

/// Something that is in use for a while: questions being answered, connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// A question that is being answered.
    Question,
    /// A TCP connection.
    Connection,
}

impl Use {
    /// How many one guest may have, how many all together, and how many each may have whatever the others do.
    const fn most(self) -> (usize, usize, usize) {
        match self {
            Self::Question => (32, 256, 4),
            Self::Connection => (8, 128, 1),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    tokens: HashMap<u32, (f64, Instant)>,
    by_guest: HashMap<(u32, Use), usize>,
    all: HashMap<Use, usize>,
}

/// The bounds. Clones are the same ones. Guests go by their slot; the host is slot 0.
#[derive(Debug, Clone, Default)]
pub struct Bounds(Arc<Mutex<State>>);

/// One thing in use, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    bounds: Bounds,
    slot: u32,
    what: Use,
}

impl Bounds {
    /// Counts one question against `slot`'s rate; false where it is beyond.
    pub fn may_ask(&self, slot: u32) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        let (tokens, at) = state.tokens.entry(slot).or_insert((BURST, now));
        *tokens = (*tokens + now.saturating_duration_since(*at).as_secs_f64() * RATE).min(BURST);
        *at = now;
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }

    /// One more of `what` for `slot`; none where that is too many.
    pub fn take(&self, slot: u32, what: Use) -> Option<Permit> {
        let (each, together, always) = what.most();
        let mut state = self.state();
        let all = state.all.get(&what).copied().unwrap_or_default();
        let own = state.by_guest.entry((slot, what)).or_default();
        if *own >= always && (*own >= each || all >= together) {
            return None;
        }
        *own += 1;
        *state.all.entry(what).or_default() += 1;
        drop(state);
        Some(Permit { bounds: self.clone(), slot, what })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.bounds.state();
        let key = (self.slot, self.what);
        if let Some(own) = state.by_guest.get_mut(&key) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                state.by_guest.remove(&key);
            }
        }
        if let Some(all) = state.all.get_mut(&self.what) {
            *all = all.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn nobody_is_dropped_for_what_others_do() {
        let bounds = Bounds::default();
        for what in [Use::Question, Use::Connection] {
            let (each, together, always) = what.most();
            let mut held = Vec::new();
            for slot in 1..=200 {
                held.extend(std::iter::from_fn(|| bounds.take(slot, what)));
                assert!(bounds.take(slot, what).is_none());
            }
            assert_eq!(held.iter().filter(|permit| permit.slot == 1).count(), each);
            assert_eq!(held.iter().filter(|permit| permit.slot == 200).count(), always);
            assert!(held.len() <= together + 200 * always);
            held.clear();
            let again: Vec<_> = std::iter::from_fn(|| bounds.take(200, what)).collect();
            assert_eq!(again.len(), each, "what is not used any more is for others");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_cut_to_the_rate() {
        let bounds = Bounds::default();
        let asked = |slot| (0..10_000).filter(|_| bounds.may_ask(slot)).count();
        assert_eq!((asked(1), asked(1), asked(2)), (1000, 0, 1000));
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(asked(1), 50);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(asked(1), 1000);
    }
}
