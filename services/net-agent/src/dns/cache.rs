//! Answers from upstream, kept for their time to live. Bounded in number and size.

use hickory_proto::{
    op::ResponseCode,
    rr::{RData, Record, RecordType},
};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How many answers are kept.
const MAX_ANSWERS: usize = 4096;
/// How many bytes an answer that is kept may have had.
const MAX_BYTES: usize = 4096;
/// How long, at most, it is remembered that something is there, or is not.
const MAX_TTL: u32 = 3600;
/// See [`MAX_TTL`].
const MAX_NEGATIVE_TTL: u32 = 300;

/// What upstream said.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// That the name is there or is not; nothing else is an answer.
    pub code: ResponseCode,
    /// The records asked for, with the aliases that lead to them.
    pub records: Vec<Record>,
    /// The SOA of a zone in which something is not.
    pub soa: Option<Record>,
}

impl Answer {
    /// How long it may be kept; none for one that may not.
    fn ttl(&self) -> Option<Duration> {
        let found = self.records.iter().map(|r| r.ttl.min(MAX_TTL)).min();
        let missing = self.soa.as_ref().and_then(|record| match &record.data {
            RData::SOA(soa) => Some(record.ttl.min(soa.minimum).min(MAX_NEGATIVE_TTL)),
            _ => None,
        });
        let ttl = if self.code == ResponseCode::NoError { found.or(missing) } else { missing };
        ttl.filter(|ttl| *ttl > 0).map(|ttl| Duration::from_secs(ttl.into()))
    }

    fn older_by(mut self, age: Duration) -> Self {
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        self.records.iter_mut().chain(&mut self.soa).for_each(|record| {
            record.decrement_ttl(age.min(record.ttl));
        });
        self
    }
}

#[derive(Debug)]
struct Kept {
    answer: Answer,
    since: Instant,
    until: Instant,
}

#[derive(Debug, Default)]
struct Answers {
    generation: u64,
    by_question: HashMap<(String, RecordType), Kept>,
}

/// The cache.
#[derive(Debug, Default)]
pub struct Cache(Mutex<Answers>);

impl Cache {
    /// The answer to a question, its times to live shortened by its age; none for one that is not known, or was given by
    /// resolvers of another `generation`.
    pub fn get(&self, name: &str, kind: RecordType, generation: u64) -> Option<Answer> {
        let now = Instant::now();
        let answers = self.answers(generation);
        let kept = answers.by_question.get(&(name.to_owned(), kind)).filter(|kept| kept.until > now)?;
        Some(kept.answer.clone().older_by(now.saturating_duration_since(kept.since)))
    }

    /// Keeps an answer of so many `bytes`.
    pub fn put(&self, name: &str, kind: RecordType, generation: u64, answer: &Answer, bytes: usize) {
        let Some(ttl) = answer.ttl().filter(|_| bytes <= MAX_BYTES) else { return };
        let now = Instant::now();
        let mut answers = self.answers(generation);
        if answers.generation != generation {
            return;
        }
        let all = &mut answers.by_question;
        if all.len() >= MAX_ANSWERS {
            all.retain(|_, kept| kept.until > now);
        }
        if all.len() >= MAX_ANSWERS {
            // The half that would go soonest, so that this is rare.
            let mut times: Vec<Instant> = all.values().map(|kept| kept.until).collect();
            times.sort_unstable();
            let middle = times.get(times.len() / 2).copied().unwrap_or(now);
            all.retain(|_, kept| kept.until > middle);
        }
        let kept = Kept { answer: answer.clone(), since: now, until: now + ttl };
        all.insert((name.to_owned(), kind), kept);
    }

    fn answers(&self, generation: u64) -> MutexGuard<'_, Answers> {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if generation > answers.generation {
            *answers = Answers { generation, by_question: HashMap::new() };
        }
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::{Name, rdata};

    fn answer(ttls: &[u32]) -> Answer {
        let name = Name::from_ascii("a.test.").unwrap();
        let record =
            |ttl: &u32| Record::from_rdata(name.clone(), *ttl, RData::A(rdata::A::new(192, 0, 2, 1)));
        Answer { code: ResponseCode::NoError, records: ttls.iter().map(record).collect(), soa: None }
    }

    fn nothing(minimum: u32) -> Answer {
        let name = Name::from_ascii("test.").unwrap();
        let soa = rdata::SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, minimum);
        let soa = Record::from_rdata(name, 900, RData::SOA(soa));
        Answer { code: ResponseCode::NXDomain, records: vec![], soa: Some(soa) }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_kept_for_their_time() {
        let cache = Cache::default();
        let get = |name| cache.get(name, RecordType::A, 1);
        let put = |name, answer: &Answer| cache.put(name, RecordType::A, 1, answer, 100);
        put("a", &answer(&[60, 30]));
        put("none", &nothing(60));
        put("never", &answer(&[0]));
        put("no soa", &Answer { soa: None, ..nothing(60) });
        cache.put("long", RecordType::A, 1, &answer(&[60]), MAX_BYTES + 1);
        assert!(get("never").is_none() && get("no soa").is_none() && get("long").is_none());
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(get("a").unwrap(), answer(&[40, 10]));
        assert_eq!(get("none").unwrap().soa.unwrap().ttl, 880);
        assert!(cache.get("a", RecordType::AAAA, 1).is_none());
        tokio::time::advance(Duration::from_secs(11)).await;
        assert!(get("a").is_none() && get("none").is_some());
        assert!(cache.get("none", RecordType::A, 2).is_none(), "other resolvers");
        put("late", &answer(&[60]));
        assert!(
            cache.get("late", RecordType::A, 2).is_none(),
            "an answer of resolvers that are not any more"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_is_bounded() {
        let cache = Cache::default();
        for n in 0..3 * MAX_ANSWERS {
            tokio::time::advance(Duration::from_millis(1)).await;
            cache.put(&format!("n{n}"), RecordType::A, 1, &answer(&[600]), 100);
        }
        assert!(cache.answers(1).by_question.len() <= MAX_ANSWERS);
        assert!(cache.get(&format!("n{}", 3 * MAX_ANSWERS - 1), RecordType::A, 1).is_some());
    }
}
