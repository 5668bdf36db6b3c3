//! What a guest or a tool makes an operation say never grows beyond what the bus takes, so that it holds up nobody's events.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::{
    Code, Error, Service,
    op::{OpEvent, OpEventKind, OpList, OpState},
};
use bothy_db::{Db, rusqlite::Transaction};
use bothy_ops::{End, Graph, Kinds, New, Op, Ops, Resume, SCHEMA, Sink};
use futures::future::BoxFuture;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// `max_payload` of the bus.
const MAX_PAYLOAD: usize = 1 << 20;

/// Operations that say too much: a control character takes six bytes of JSON.
struct Talkers;

impl Kinds for Talkers {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        let mut g = Graph::new();
        let text = "\u{1b}".repeat(MAX_PAYLOAD);
        let fails = op.kind == "talk.fail";
        let said = g.undoable(
            "say",
            (),
            move |cx, ()| async move {
                cx.note(text.clone());
                cx.progress(1, None, text.clone());
                if fails { Err(Error::not_found(text.clone()).hint(text)) } else { Ok(text) }
            },
            |_| async { Err(Error::not_found("\u{1b}".repeat(MAX_PAYLOAD))) },
        );
        g.result(said);
        Ok(g)
    }

    fn resume(&self, _: &Op) -> Resume {
        Resume::Undo
    }

    fn settle(&self, _: &Transaction<'_>, _: &Op, _: &mut End) -> Result<(), bothy_db::Error> {
        Ok(())
    }
}

/// Takes what the bus takes.
#[derive(Default)]
struct Bus(Mutex<Vec<OpEvent>>);

impl Sink for Bus {
    fn publish<'a>(&'a self, event: &'a OpEvent) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async {
            if serde_json::to_vec(event).unwrap().len() > MAX_PAYLOAD {
                return Err(Error::new(Code::ResourceExhausted, "too large"));
            }
            self.0.lock().unwrap().push(event.clone());
            Ok(())
        })
    }
}

#[tokio::test]
async fn an_operation_that_says_too_much_holds_up_nobody() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let db = Db::open(dir.path().join("x.db"), &[SCHEMA]).unwrap();
    let ops = Ops::new(db, Service::Vm, Arc::new(Talkers));
    let bus = Arc::new(Bus::default());
    ops.publish_to(Arc::clone(&bus) as Arc<dyn Sink>);
    let begin = |kind| {
        let new = New {
            kind,
            subject: "a".into(),
            vm: None,
            owner: 0,
            request: None,
            input: serde_json::Value::Null,
        };
        ops.begin(new, |_, _| Ok(()))
    };
    let failed = begin("talk.fail").await.unwrap().op.id;
    let record = ops.wait(failed).await.unwrap();
    assert_eq!(record.state, OpState::Failed);
    let error = record.error.unwrap();
    assert!(error.message.starts_with("stage say failed: \u{1b}"), "the start of it is kept");
    let succeeded = begin("talk.on").await.unwrap().op.id;
    let record = ops.wait(succeeded).await.unwrap();
    assert_eq!((record.state, record.result), (OpState::Succeeded, None));

    // The last event of the second operation comes behind all of the first.
    let last = async {
        let is_last = |e: &OpEvent| e.op == succeeded && matches!(e.what, OpEventKind::Finished { .. });
        while !bus.0.lock().unwrap().iter().any(is_last) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), last).await.unwrap();

    for _ in 0..20 {
        let op = begin("talk.fail").await.unwrap().op.id;
        ops.wait(op).await.unwrap();
    }
    let list = ops.list(OpList { limit: 200 }).await.unwrap();
    assert!(list.len() > 1 && serde_json::to_vec(&list).unwrap().len() < MAX_PAYLOAD, "{}", list.len());
    ops.shutdown().await;
}
