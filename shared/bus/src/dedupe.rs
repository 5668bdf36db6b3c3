//! Exactly one effect of a mutating request: its reply is kept under its request id, and a repeat gets that reply; a
//! repeat that comes while the first is still running waits for it.

use bothy_contract::{Code, Error, RequestId, Service};
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

/// The reply of a mutating request, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredReply {
    /// The method that was called, `<service>.<noun>.<verb>`.
    pub method: String,
    /// Who called it.
    pub caller: Option<Service>,
    /// The reply's JSON, or the error.
    pub reply: Result<String, Error>,
}

/// Where replies of mutating requests are kept. A service that must answer repeats over its own restart gives the
/// server a store in its database ([`crate::Server::reply_store`]).
///
/// Both functions may block for as long as a row in SQLite takes: they are called on a thread for that.
pub trait ReplyStore: Send + Sync + 'static {
    /// The reply that is kept under `id`, if any.
    ///
    /// # Errors
    /// Where the store cannot be read. The request is then refused rather than executed twice.
    fn get(&self, id: RequestId) -> Result<Option<StoredReply>, Error>;

    /// Keeps a reply for a day or more, or until there are some thousand newer ones.
    ///
    /// # Errors
    /// Where the store cannot be written. The caller gets its reply all the same; the failure is logged.
    fn put(&self, id: RequestId, reply: &StoredReply) -> Result<(), Error>;
}

/// Keeps the newest replies in memory, up to a number; forgets all of them with the process.
#[derive(Debug)]
pub struct MemoryReplies {
    capacity: usize,
    kept: Mutex<(HashMap<RequestId, StoredReply>, VecDeque<RequestId>)>,
}

impl MemoryReplies {
    /// A store of at most `capacity` replies.
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), kept: Mutex::default() }
    }
}

impl Default for MemoryReplies {
    fn default() -> Self {
        Self::new(4096)
    }
}

impl ReplyStore for MemoryReplies {
    fn get(&self, id: RequestId) -> Result<Option<StoredReply>, Error> {
        Ok(locked(&self.kept).0.get(&id).cloned())
    }

    fn put(&self, id: RequestId, reply: &StoredReply) -> Result<(), Error> {
        let mut kept = locked(&self.kept);
        let (replies, order) = &mut *kept;
        if replies.insert(id, reply.clone()).is_none() {
            order.push_back(id);
        }
        while order.len() > self.capacity {
            if let Some(oldest) = order.pop_front() {
                replies.remove(&oldest);
            }
        }
        Ok(())
    }
}

/// The lock's content; a panic while it was held cannot leave it half changed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Outcome = watch::Receiver<Option<Arc<StoredReply>>>;

/// The requests that are running, and the store of those that have run.
pub(crate) struct Dedupe {
    store: Arc<dyn ReplyStore>,
    running: Mutex<HashMap<RequestId, Outcome>>,
}

/// What to do with a request.
enum Turn {
    First(watch::Sender<Option<Arc<StoredReply>>>),
    Repeat(Outcome),
}

impl Dedupe {
    pub(crate) fn new(store: Arc<dyn ReplyStore>) -> Self {
        Self { store, running: Mutex::default() }
    }

    /// Executes `work` for the request `id`, or gives the reply of its first execution. `work` must not panic.
    pub(crate) async fn once(
        &self,
        id: RequestId,
        method: &str,
        caller: Option<Service>,
        work: impl Future<Output = Result<String, Error>>,
    ) -> Result<String, Error> {
        let turn = {
            let mut running = locked(&self.running);
            match running.get(&id) {
                Some(outcome) => Turn::Repeat(outcome.clone()),
                None => {
                    let (sender, outcome) = watch::channel(None);
                    running.insert(id, outcome);
                    Turn::First(sender)
                }
            }
        };
        match turn {
            Turn::First(sender) => {
                // Removed also when this future is dropped, so that a repeat is not left waiting.
                let _entry = Entry { running: &self.running, id };
                let stored = self.first(id, method, caller, work).await;
                let reply = same_request(&stored, id, method, caller);
                sender.send_replace(Some(Arc::new(stored)));
                reply
            }
            Turn::Repeat(mut outcome) => match outcome.wait_for(Option::is_some).await.as_deref() {
                Ok(Some(stored)) => same_request(stored, id, method, caller),
                _ => Err(Error::new(
                    Code::Unavailable,
                    format!("the first {method} with this request id was aborted"),
                )),
            },
        }
    }

    async fn first(
        &self,
        id: RequestId,
        method: &str,
        caller: Option<Service>,
        work: impl Future<Output = Result<String, Error>>,
    ) -> StoredReply {
        let stored = |reply| StoredReply { method: method.to_owned(), caller, reply };
        match self.blocking(move |store| store.get(id)).await {
            Ok(Some(kept)) => return kept,
            Ok(None) => {}
            Err(e) => return stored(Err(e.context("cannot look for an earlier reply"))),
        }
        let reply = stored(work.await);
        // A retryable error says that nothing was done, so the next try must be a real one.
        if !reply.reply.as_ref().is_err_and(|e| e.retryable) {
            let kept = reply.clone();
            if let Err(e) = self.blocking(move |store| store.put(id, &kept)).await {
                tracing::error!("cannot keep the reply of {method}, a repeat would execute it again: {e}");
            }
        }
        reply
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn ReplyStore) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&*store))
            .await
            .unwrap_or_else(|e| Err(Error::internal("the store of replies failed", &e)))
    }
}

struct Entry<'a> {
    running: &'a Mutex<HashMap<RequestId, Outcome>>,
    id: RequestId,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        locked(self.running).remove(&self.id);
    }
}

/// The kept reply, if it is one to the same request: else a caller could read another's reply by guessing ids.
fn same_request(
    stored: &StoredReply,
    id: RequestId,
    method: &str,
    caller: Option<Service>,
) -> Result<String, Error> {
    if stored.method == method && stored.caller == caller {
        stored.reply.clone()
    } else {
        Err(Error::invalid(format!("the request id {id} was used for another request"))
            .hint("use a new request id for each request"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(n: usize) -> StoredReply {
        StoredReply { method: "a.b.c".into(), caller: None, reply: Ok(n.to_string()) }
    }

    #[test]
    fn the_oldest_replies_go_first() {
        let store = MemoryReplies::new(2);
        let ids = [RequestId::new(), RequestId::new(), RequestId::new()];
        for (n, id) in ids.iter().enumerate() {
            store.put(*id, &reply(n)).unwrap();
            store.put(*id, &reply(n)).unwrap();
        }
        assert_eq!(store.get(ids[0]).unwrap(), None);
        assert_eq!(store.get(ids[1]).unwrap(), Some(reply(1)));
        assert_eq!(store.get(ids[2]).unwrap(), Some(reply(2)));
    }

    #[tokio::test]
    async fn a_retryable_error_is_not_kept_but_others_are() {
        let dedupe = Dedupe::new(Arc::new(MemoryReplies::default()));
        let id = RequestId::new();
        let busy = || async { Err(Error::new(Code::Unavailable, "busy")) };
        let gone = || async { Err(Error::not_found("gone")) };
        let done = || async { Ok("1".to_owned()) };
        assert!(dedupe.once(id, "m", None, busy()).await.is_err());
        assert_eq!(dedupe.once(id, "m", None, gone()).await.unwrap_err().code, Code::NotFound);
        assert_eq!(dedupe.once(id, "m", None, done()).await.unwrap_err().code, Code::NotFound);
        assert_eq!(dedupe.once(id, "other", None, done()).await.unwrap_err().code, Code::InvalidArgument);
        let other = Some(Service::Vm);
        assert_eq!(dedupe.once(id, "m", other, done()).await.unwrap_err().code, Code::InvalidArgument);
    }

    #[tokio::test]
    async fn a_repeat_is_not_left_waiting_for_an_aborted_first() {
        let dedupe = Arc::new(Dedupe::new(Arc::new(MemoryReplies::default())));
        let id = RequestId::new();
        let (started, begun) = tokio::sync::oneshot::channel();
        let first = tokio::spawn({
            let dedupe = Arc::clone(&dedupe);
            async move {
                let work = async {
                    started.send(()).unwrap();
                    std::future::pending().await
                };
                dedupe.once(id, "m", None, work).await
            }
        });
        begun.await.unwrap();
        let repeat = tokio::spawn({
            let dedupe = Arc::clone(&dedupe);
            async move { dedupe.once(id, "m", None, async { Ok("2".into()) }).await }
        });
        tokio::task::yield_now().await;
        first.abort();
        // Either it had begun to wait, and is told, or it came after, and is the first itself.
        match repeat.await.unwrap() {
            Ok(reply) => assert_eq!(reply, "2"),
            Err(e) => assert_eq!(e.code, Code::Unavailable),
        }
    }
}
