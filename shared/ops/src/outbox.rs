//! From the journal to the bus: the one task that publishes events.

use bothy_contract::{Error, op::OpEvent};
use bothy_db::Db;
use futures::future::BoxFuture;
use std::{sync::Arc, time::Duration};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// How many events are read at a time.
const BATCH: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Where events go: the bus, or a test's list.
pub trait Sink: Send + Sync + 'static {
    /// Takes one event for good. An event may come twice (its id and `seq` say so); never out of order.
    ///
    /// # Errors
    /// Where it was not taken, or nobody knows: it is sent again.
    fn publish<'a>(&'a self, event: &'a OpEvent) -> BoxFuture<'a, Result<(), Error>>;
}

impl Sink for bothy_bus::Client {
    fn publish<'a>(&'a self, event: &'a OpEvent) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.publish_op_event(event))
    }
}

/// Publishes what is in the outbox, and whatever gets in, until `halt`.
pub(crate) async fn publish(db: Db, sink: Arc<dyn Sink>, wake: Arc<Notify>, halt: CancellationToken) {
    let work = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match batch(&db, &*sink).await {
                Ok(0) => {
                    pause = FIRST_PAUSE;
                    wake.notified().await;
                }
                Ok(_) => pause = FIRST_PAUSE,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot publish the events of operations yet");
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    };
    halt.run_until_cancelled(work).await;
}

/// Publishes the oldest events and removes those that were taken; says how many.
async fn batch(db: &Db, sink: &dyn Sink) -> Result<usize, Error> {
    let events: Vec<(i64, OpEvent)> = db
        .read(|c| {
            let mut select = c.prepare_cached("SELECT n, event FROM op_outbox ORDER BY n LIMIT ?1")?;
            let rows = select.query_map([BATCH as i64], |r| Ok((r.get(0)?, r.get::<_, String>(1)?)))?;
            rows.map(|row| {
                let (n, json) = row?;
                Ok((n, serde_json::from_str(&json)?))
            })
            .collect()
        })
        .await?;
    let mut last = None;
    let mut failure = None;
    let mut count = 0;
    for (n, event) in &events {
        match sink.publish(event).await {
            Ok(()) => {
                last = Some(*n);
                count += 1;
            }
            Err(e) => {
                failure = Some(e);
                break;
            }
        }
    }
    if let Some(last) = last {
        db.write(move |tx| Ok(tx.execute("DELETE FROM op_outbox WHERE n <= ?1", [last])?)).await?;
    }
    failure.map_or(Ok(count), Err)
}
