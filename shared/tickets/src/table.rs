//! The outstanding tickets.

use bothy_contract::TicketId;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How many tickets may be outstanding.
const MAX_OUTSTANDING: usize = 4096;

/// Tickets by their secret. The map hashes with a random key (SipHash), so the time of a look-up tells nothing about
/// which secrets are in it; comparing 122 random bits once the hashes agree helps nobody.
#[derive(Debug)]
pub(crate) struct Table<T> {
    tickets: Mutex<HashMap<TicketId, Outstanding<T>>>,
}

#[derive(Debug)]
struct Outstanding<T> {
    until: Instant,
    payload: T,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { tickets: Mutex::default() }
    }
}

impl<T> Table<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<TicketId, Outstanding<T>>> {
        // A panic cannot leave the map half changed.
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn issue(&self, payload: T, ttl: Duration) -> TicketId {
        let id = TicketId::new();
        let now = Instant::now();
        let mut tickets = self.lock();
        tickets.retain(|_, t| t.until > now);
        if tickets.len() >= MAX_OUTSTANDING {
            let first = tickets.iter().min_by_key(|(_, t)| t.until).map(|(id, _)| *id);
            first.and_then(|id| tickets.remove(&id));
        }
        tickets.insert(id, Outstanding { until: now + ttl, payload });
        id
    }

    /// The payload of `id`, which is used up by this.
    pub(crate) fn redeem(&self, id: &TicketId) -> Option<T> {
        let found = self.lock().remove(id)?;
        (found.until > Instant::now()).then_some(found.payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_outstanding_tickets_is_bounded_and_the_newest_are_kept() {
        let table = Table::default();
        let ttl = Duration::from_secs(60);
        let ids: Vec<_> = (0..MAX_OUTSTANDING + 10).map(|n| table.issue(n, ttl)).collect();
        assert_eq!(table.lock().len(), MAX_OUTSTANDING);
        assert_eq!(table.redeem(ids.last().unwrap()), Some(MAX_OUTSTANDING + 9));
        assert_eq!(table.redeem(&ids[0]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ticket_is_good_once_and_in_time() {
        let table = Table::default();
        let (a, b) = (table.issue('a', Duration::from_secs(1)), table.issue('b', Duration::from_secs(3)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(table.redeem(&a), None);
        assert_eq!(table.redeem(&b), Some('b'));
        assert_eq!(table.redeem(&b), None);
    }
}
