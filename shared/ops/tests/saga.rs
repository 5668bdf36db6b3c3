//! A graph with a fork and a join, and for every stage every way in which it can end: well, failing, panicking, cancelled,
//! or with the death of the process before, in or after its effect. Whatever happens, each begun stage is undone in reverse
//! order of beginning, or the operation goes on to its end; nothing is left in between.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use bothy_contract::{
    Code, Error, OpId, RequestId, Service,
    op::{OpEvent, OpEventKind, OpList, OpRef, OpState, StageState},
};
use bothy_db::{Db, rusqlite::Transaction};
use bothy_ops::{End, Graph, Kinds, New, Op, Ops, Resume, SCHEMA, Sink, StageCx, UndoCx};
use futures::future::BoxFuture;
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex},
};
use tokio::sync::Notify;

const STAGES: [&str; 5] = ["image", "net", "root", "work", "launch"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    Fail,
    FailAfterEffect,
    Panic,
    Cancel,
    DieBefore,
    DieAfterEffect,
}

/// What stages do outside; it outlives "processes".
#[derive(Default)]
struct World {
    things: Mutex<BTreeSet<&'static str>>,
    begun: Mutex<Vec<&'static str>>,
    undone: Mutex<Vec<&'static str>>,
    settled: Mutex<Vec<(OpState, bool)>>,
    reached: Notify,
}

struct Service1 {
    world: Arc<World>,
    fault: Fault,
    at: &'static str,
    resume: Resume,
    /// An undo that fails, for good or once.
    bad_undo: Option<(&'static str, bool)>,
    tried: Arc<Mutex<u32>>,
}

impl Service1 {
    fn stage(
        &self,
        name: &'static str,
    ) -> impl FnOnce(StageCx) -> BoxFuture<'static, Result<String, Error>> + Send + use<> {
        let (world, fault) =
            (Arc::clone(&self.world), if self.at == name { self.fault } else { Fault::None });
        move |cx| {
            Box::pin(async move {
                world.begun.lock().unwrap().push(name);
                let die = || async {
                    world.reached.notify_one();
                    std::future::pending::<()>().await;
                };
                match fault {
                    Fault::Fail => return Err(Error::not_found("no such thing")),
                    Fault::Panic => panic!("on purpose"),
                    Fault::DieBefore => die().await,
                    Fault::Cancel => {
                        world.reached.notify_one();
                        cx.stop().cancelled().await;
                    }
                    _ => {}
                }
                // Siblings interleave.
                tokio::task::yield_now().await;
                world.things.lock().unwrap().insert(name);
                match fault {
                    Fault::FailAfterEffect => return Err(Error::not_found("half done")),
                    Fault::DieAfterEffect => die().await,
                    _ => {}
                }
                cx.note(format!("{name} is there"));
                Ok(name.to_owned())
            })
        }
    }

    fn undo(
        &self,
        name: &'static str,
    ) -> impl Fn(UndoCx) -> BoxFuture<'static, Result<(), Error>> + Send + Sync + use<> {
        let (world, tried) = (Arc::clone(&self.world), Arc::clone(&self.tried));
        let bad = self.bad_undo.filter(|(bad, _)| *bad == name);
        move |_| {
            let (world, tried) = (Arc::clone(&world), Arc::clone(&tried));
            Box::pin(async move {
                if let Some((_, once)) = bad {
                    let mut tried = tried.lock().unwrap();
                    *tried += 1;
                    if !once {
                        return Err(Error::new(Code::Internal, "it will not go"));
                    }
                    if *tried == 1 {
                        return Err(Error::new(Code::Unavailable, "not now"));
                    }
                }
                world.things.lock().unwrap().remove(name);
                world.undone.lock().unwrap().push(name);
                Ok(())
            })
        }
    }
}

impl Kinds for Service1 {
    fn graph(&self, op: &Op) -> Result<Graph, Error> {
        assert_eq!(op.input::<u32>()?, 7);
        let mut g = Graph::new();
        let (image, net, root, work, launch) = (
            self.stage("image"),
            self.stage("net"),
            self.stage("root"),
            self.stage("work"),
            self.stage("launch"),
        );
        let image = g.undoable("image", (), move |cx, ()| image(cx), self.undo("image"));
        let net = g.undoable("net", image, move |cx, _: String| net(cx), self.undo("net"));
        let root = g.undoable("root", (image, net), move |cx, _| root(cx), self.undo("root"));
        let work = g.undoable("work", net, move |cx, _| work(cx), self.undo("work"));
        let launch = g.undoable(
            "launch",
            (root, work),
            move |cx, (r, w): (String, String)| async move {
                assert_eq!((r.as_str(), w.as_str()), ("root", "work"));
                launch(cx).await
            },
            self.undo("launch"),
        );
        g.result(launch);
        Ok(g)
    }

    fn resume(&self, _: &Op) -> Resume {
        self.resume
    }

    fn settle(&self, tx: &Transaction<'_>, op: &Op, end: &mut End) -> Result<(), bothy_db::Error> {
        if end.state != OpState::Succeeded {
            tx.execute("DELETE FROM name WHERE op = ?1", [op.id.to_string()])?;
        }
        self.world.settled.lock().unwrap().push((end.state, end.leftovers));
        Ok(())
    }
}

#[derive(Default)]
struct List {
    events: Mutex<Vec<OpEvent>>,
    refuse: Mutex<u32>,
}

impl Sink for List {
    fn publish<'a>(&'a self, event: &'a OpEvent) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async {
            let mut refuse = self.refuse.lock().unwrap();
            if *refuse > 0 {
                *refuse -= 1;
                return Err(Error::new(Code::Unavailable, "no bus"));
            }
            self.events.lock().unwrap().push(event.clone());
            Ok(())
        })
    }
}

fn open(dir: &Path) -> Db {
    let names = "CREATE TABLE name(name TEXT PRIMARY KEY, op TEXT NOT NULL) STRICT;";
    Db::open(dir.join("x.db"), &[SCHEMA, names]).unwrap()
}

async fn begin(ops: &Ops, request: RequestId) -> Result<bothy_ops::Begun, Error> {
    let new = New {
        kind: "thing.make",
        subject: "a".into(),
        vm: None,
        owner: 1000,
        request: Some(request),
        input: 7.into(),
    };
    ops.begin(new, |tx, op| {
        let inserted = tx.execute("INSERT OR IGNORE INTO name VALUES ('a', ?1)", [op.id.to_string()])?;
        if inserted == 0 {
            return Err(Error::new(Code::AlreadyExists, "the name is taken").into());
        }
        Ok(())
    })
    .await
}

fn service(world: &Arc<World>, fault: Fault, at: &'static str, resume: Resume) -> Service1 {
    Service1 { world: Arc::clone(world), fault, at, resume, bad_undo: None, tried: Arc::default() }
}

async fn names(db: &Db) -> i64 {
    db.read(|c| Ok(c.query_row("SELECT count(*) FROM name", [], |r| r.get(0))?)).await.unwrap()
}

/// The undone stages are the begun ones, backwards, each once.
fn assert_undone(world: &World, what: &str) {
    let mut begun = Vec::new();
    for stage in world.begun.lock().unwrap().iter() {
        if !begun.contains(stage) {
            begun.push(*stage);
        }
    }
    begun.reverse();
    let undone = world.undone.lock().unwrap();
    assert_eq!(BTreeSet::from_iter(undone.iter()), BTreeSet::from_iter(begun.iter()), "{what}");
    assert_eq!(undone.len(), begun.len(), "{what}: {undone:?}");
    let place = |s: &str| undone.iter().position(|u| *u == s);
    for (later, earlier) in
        [("launch", "root"), ("launch", "work"), ("root", "net"), ("work", "net"), ("net", "image")]
    {
        if let Some(later) = place(later) {
            assert!(Some(later) < place(earlier), "{what}: {undone:?}");
        }
    }
    assert!(world.things.lock().unwrap().is_empty(), "{what}");
}

/// What the journal says of an operation that was undone.
async fn assert_record(ops: &Ops, op: OpId, state: OpState, what: &str) {
    let record = ops.show(OpRef { op }).await.unwrap();
    assert_eq!(record.state, state, "{what}");
    assert!(record.finished.is_some() && record.error.is_some(), "{what}");
    assert!(record.stages.iter().all(|s| s.state == StageState::Undone), "{what}: {:?}", record.stages);
}

/// Events are complete, in order, and agree with the record.
fn assert_events(events: &[OpEvent], what: &str) {
    let seqs: Vec<u64> = events.iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (0..events.len() as u64).collect::<Vec<_>>(), "{what}");
    assert!(matches!(events.first().unwrap().what, OpEventKind::Accepted { .. }), "{what}");
    assert!(matches!(events.last().unwrap().what, OpEventKind::Finished { .. }), "{what}");
}

async fn all_events(sink: &List) -> Vec<OpEvent> {
    loop {
        let events = sink.events.lock().unwrap().clone();
        if events.last().is_some_and(|e| matches!(e.what, OpEventKind::Finished { .. })) {
            return events;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn every_fault_at_every_stage_leaves_nothing() {
    for at in STAGES {
        for fault in [Fault::Fail, Fault::FailAfterEffect, Fault::Panic, Fault::Cancel] {
            let what = format!("{fault:?} at {at}");
            let dir = tempfile::tempdir_in("/tmp").unwrap();
            let world = Arc::new(World::default());
            let db = open(dir.path());
            let ops =
                Ops::new(db.clone(), Service::Vm, Arc::new(service(&world, fault, at, Resume::Continue)));
            let sink = Arc::new(List::default());
            *sink.refuse.lock().unwrap() = 2;
            ops.publish_to(sink.clone());
            let op = begin(&ops, RequestId::new()).await.unwrap().op.id;
            if fault == Fault::Cancel {
                world.reached.notified().await;
                assert!(ops.cancel(OpRef { op }).await.unwrap().cancel_requested);
            }
            ops.wait(op).await.unwrap();
            assert_undone(&world, &what);
            let state = if fault == Fault::Cancel { OpState::Cancelled } else { OpState::Failed };
            assert_record(&ops, op, state, &what).await;
            let error = ops.show(OpRef { op }).await.unwrap().error.unwrap();
            let code = match fault {
                Fault::Cancel => Code::Cancelled,
                Fault::Panic => Code::StageFailed,
                _ => Code::NotFound,
            };
            assert_eq!(error.code, code, "{what}");
            assert!(fault == Fault::Cancel || error.message.contains(at), "{what}: {error}");
            assert_eq!(names(&db).await, 0, "{what}");
            assert_eq!(*world.settled.lock().unwrap(), [(state, false)], "{what}");
            assert_events(&all_events(&sink).await, &what);
            ops.shutdown().await;
        }
    }
}

#[tokio::test]
async fn every_death_at_every_stage_is_finished_or_undone_by_the_next_process() {
    for at in STAGES {
        for fault in [Fault::DieBefore, Fault::DieAfterEffect] {
            for resume in [Resume::Continue, Resume::Undo] {
                let what = format!("{fault:?} at {at}, then {resume:?}");
                let dir = tempfile::tempdir_in("/tmp").unwrap();
                let world = Arc::new(World::default());
                let first =
                    Ops::new(open(dir.path()), Service::Vm, Arc::new(service(&world, fault, at, resume)));
                let op = begin(&first, RequestId::new()).await.unwrap().op.id;
                world.reached.notified().await;
                first.shutdown().await;
                drop(first);
                let db = open(dir.path());
                let second =
                    Ops::new(db.clone(), Service::Vm, Arc::new(service(&world, Fault::None, at, resume)));
                let sink = Arc::new(List::default());
                second.publish_to(sink.clone());
                assert_eq!(second.resume().await.unwrap(), 1);
                let record = second.wait(op).await.unwrap();
                if resume == Resume::Continue {
                    assert_eq!(record.state, OpState::Succeeded, "{what}");
                    assert_eq!(record.result, Some("launch".into()), "{what}");
                    assert!(record.stages.iter().all(|s| s.state == StageState::Done), "{what}");
                    assert_eq!(world.things.lock().unwrap().len(), STAGES.len(), "{what}");
                    assert!(world.undone.lock().unwrap().is_empty(), "{what}");
                    assert_eq!(names(&db).await, 1, "{what}");
                } else {
                    assert_undone(&world, &what);
                    assert_record(&second, op, OpState::Failed, &what).await;
                    assert_eq!(names(&db).await, 0, "{what}");
                }
                // The journal of the first process, told by the second.
                assert_events(&all_events(&sink).await, &what);
                assert_eq!(second.resume().await.unwrap(), 0, "{what}");
                second.shutdown().await;
            }
        }
    }
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_ones_operation_and_a_refusal_writes_nothing() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let world = Arc::new(World::default());
    let ops = Ops::new(
        open(dir.path()),
        Service::Vm,
        Arc::new(service(&world, Fault::None, "image", Resume::Continue)),
    );
    let request = RequestId::new();
    let first = begin(&ops, request).await.unwrap();
    let again = begin(&ops, request).await.unwrap();
    assert_eq!((first.op.id, false, true), (again.op.id, first.repeated, again.repeated));
    let refused = begin(&ops, RequestId::new()).await.unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
    ops.wait(first.op.id).await.unwrap();
    let all = ops.list(OpList { limit: 10 }).await.unwrap();
    assert_eq!(all.len(), 1);
    let notes: Vec<_> = all.iter().flat_map(|o| &o.stages).filter_map(|s| s.note.clone()).collect();
    assert_eq!(notes.len(), STAGES.len());
    let missing = ops.show(OpRef { op: OpId::new() }).await.unwrap_err();
    assert_eq!(missing.code, Code::NotFound);
    // A cancel that comes too late changes nothing.
    let late = ops.cancel(OpRef { op: first.op.id }).await.unwrap();
    assert!(!late.cancel_requested && late.state == OpState::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_failing_undo_is_told_and_does_not_keep_the_others_from_running() {
    for once in [false, true] {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let world = Arc::new(World::default());
        let mut bad = service(&world, Fault::Fail, "launch", Resume::Continue);
        bad.bad_undo = Some(("root", once));
        let ops = Ops::new(open(dir.path()), Service::Vm, Arc::new(bad));
        let op = begin(&ops, RequestId::new()).await.unwrap().op.id;
        let record = ops.wait(op).await.unwrap();
        let error = record.error.unwrap();
        let left: Vec<_> = world.things.lock().unwrap().iter().copied().collect();
        assert_eq!(left, if once { vec![] } else { vec!["root"] });
        assert_eq!(error.message.contains("undoing root failed: it will not go"), !once, "{error}");
        assert!(error.message.starts_with("stage launch failed: no such thing"), "{error}");
        assert_eq!(*world.settled.lock().unwrap(), [(OpState::Failed, !once)]);
    }
}

#[tokio::test]
async fn only_the_newest_finished_operations_are_kept() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let world = Arc::new(World::default());
    let kinds = Arc::new(service(&world, Fault::Fail, "image", Resume::Continue));
    let ops = Ops::keeping(open(dir.path()), Service::Vm, kinds, 2);
    let mut all = Vec::new();
    for _ in 0..4 {
        let op = begin(&ops, RequestId::new()).await.unwrap().op.id;
        ops.wait(op).await.unwrap();
        all.insert(0, op);
    }
    all.truncate(2);
    let kept: Vec<_> = ops.list(OpList { limit: 10 }).await.unwrap().iter().map(|o| o.id).collect();
    assert_eq!(kept, all);
}
