//! Templates: a sandbox is a resumed guest.
//!
//! A **template** is a disposable VM of an image, booted until it was ready, quiesced, paused and saved: its memory and its
//! devices in files of this agent's, its system overlay frozen at the image-agent's. A create whose [`key`] has one resumes
//! that memory over a clone of that overlay, instead of booting.
//!
//! ```text
//!   a create booted, and did well --> wanted --> template.make --> there --> creates are resumed from it
//!   `bothy image warm` ---------------------------^                 |  |
//!                                                                  |  '-- a restore failed: set aside, its files go
//!                                                                  '----- least recently used, too many: removed
//! ```
//! [`make`] has the stages of making one, [`resume`] how a create is resumed, [`store`] the rows. What is wanted is
//! made one after the other, in the background ([`Templates`]), with a memory that the host can spare, and never twice.
//! A template may go at any moment: VMs that were resumed from it hold its file open, and a create that finds a part of it
//! gone boots.

pub(crate) mod files;
mod key;
pub(crate) mod make;
pub(crate) mod resume;
pub(crate) mod store;

pub(crate) use key::key;

use super::{Agent, boot::BootInput, machine};
use crate::{
    phase::Phase,
    store::{self as vms, Facts, Vm},
};
use bothy_contract::{
    Code, Error, ImageName, OpId, RequestId, VmId,
    image::{ForgetTemplate, ImageRef, ListFrozen},
    methods::{ImageResolve, ImageTemplateForget, ImageTemplateList},
    net::Egress,
    op::Begun,
    vm::{MakeTemplate, Shape, TemplateList, TemplateMade, TemplateRecord, VmSpec},
    workspace::Identity,
};
use bothy_db::{Error as DbError, rusqlite::Transaction};
use bothy_ops::Ops;
use bothy_vm_agent::vmm::SealedMemory;
use jiff::{SignedDuration, Timestamp};
use make::MakeInput;
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OnceCell, mpsc},
    time::Instant,
};

/// Makes a template.
pub(crate) const MAKE: &str = "template.make";

/// What may wait to be made; more is forgotten, and wanted again by the next create.
const QUEUE: usize = 16;
/// How long a create that has booted has the host to itself before its template is begun.
const CALM: Duration = Duration::from_secs(3);
/// How long a template that was set aside is not made again by itself.
const ASIDE: SignedDuration = SignedDuration::from_hours(1);
/// How long the memory of a template that nobody uses is kept at hand, and how often that is looked at.
const AT_HAND: (Duration, Duration) = (Duration::from_mins(10), Duration::from_mins(1));
/// How often it is looked for templates that no create finds any more.
const COLLECT: Duration = Duration::from_mins(10);
/// How long one of those is kept that may be found again, by a host that is as it was.
const STALE: SignedDuration = SignedDuration::from_hours(1);
/// The pause before a sweep that failed is tried again.
const PAUSE: Duration = Duration::from_secs(5);
/// The longest reason that is kept of why one was set aside, in characters.
const MAX_WHY: usize = 300;

/// An image and a shape whose template would have been of use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) image: ImageName,
    pub(crate) shape: Shape,
}

/// What is wanted, and the memory of templates in use.
#[derive(Debug)]
pub(crate) struct Templates {
    wanted: mpsc::Sender<Want>,
    queue: Mutex<Option<mpsc::Receiver<Want>>>,
    at_hand: Mutex<HashMap<VmId, AtHand>>,
}

/// A template's memory, or its place while it is loaded, and when it was used last.
#[derive(Debug)]
struct AtHand {
    memory: Arc<OnceCell<Arc<SealedMemory>>>,
    used: Instant,
}

impl Default for Templates {
    fn default() -> Self {
        let (wanted, queue) = mpsc::channel(QUEUE);
        Self { wanted, queue: Mutex::new(Some(queue)), at_hand: Default::default() }
    }
}

impl Templates {
    /// A create of that would have been faster with a template. Never waits.
    pub(crate) fn want(&self, want: Want) {
        // A full queue has enough to do.
        drop(self.wanted.try_send(want));
    }

    /// The memory of a template, as VMMs of any user can map it; loaded once for many, and one's loading holds up nobody who
    /// wants another's.
    async fn memory(&self, state: &Path, template: VmId) -> Result<Arc<SealedMemory>, Error> {
        let memory = {
            let mut at_hand = self.at_hand();
            let place = at_hand
                .entry(template)
                .or_insert_with(|| AtHand { memory: Default::default(), used: Instant::now() });
            place.used = Instant::now();
            Arc::clone(&place.memory)
        };
        let path = files::snapshot(state, template).memory;
        let load = || async {
            let load = tokio::task::spawn_blocking(move || SealedMemory::load(&path));
            let loaded = load.await.map_err(|e| Error::internal("cannot load a template's memory", &e))??;
            Ok(Arc::new(loaded))
        };
        memory.get_or_try_init(load).await.cloned()
    }

    /// Lets go of the memory of a template, or of all that nobody has used for long. VMs that were resumed from one keep what
    /// they have of it.
    fn let_go(&self, gone: Option<VmId>) {
        self.at_hand().retain(|id, place| match gone {
            Some(gone) => *id != gone,
            None => place.used.elapsed() < AT_HAND.0,
        });
    }

    fn at_hand(&self) -> MutexGuard<'_, HashMap<VmId, AtHand>> {
        self.at_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes what is wanted, one after the other, and keeps order among what is there. To be started once, when the operations
/// are resumed; it ends with the agent.
pub(crate) async fn run(agent: Agent, ops: Ops) {
    let queue = agent.templates.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut queue) = queue else { return };
    while let Err(error) = agent.sweep_templates().await {
        tracing::debug!(%error, "cannot sweep templates yet");
        tokio::time::sleep(PAUSE).await;
    }
    let mut tidy = tokio::time::interval(AT_HAND.1);
    let mut collect = tokio::time::interval(COLLECT);
    collect.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            want = queue.recv() => match want {
                Some(want) => in_background(&agent, &ops, want).await,
                None => return,
            },
            _ = tidy.tick() => agent.templates.let_go(None),
            _ = collect.tick() => if let Err(error) = agent.collect_templates().await {
                tracing::info!(%error, "templates that are of no use may stay for a while");
            },
        }
    }
}

/// Makes what a create wanted, and waits for it. What stands against it is no error of anybody's.
async fn in_background(agent: &Agent, ops: &Ops, Want { image, shape }: Want) {
    tokio::time::sleep(CALM).await;
    let ask = MakeTemplate { image, shape, owner: 0, force: false };
    match make(agent, ops, ask, None).await {
        Ok(TemplateMade::There(_)) => {}
        Ok(TemplateMade::Begun(begun)) => drop(ops.wait(begun.op).await),
        Err(error) => tracing::info!(%error, "no template is made"),
    }
}

/// Begins to make a template, unless it is there, or being made already.
///
/// # Errors
/// Templates are turned off, there is no such image, the host's memory does not hold one more guest, or the template was set
/// aside not long ago.
pub(crate) async fn make(
    agent: &Agent,
    ops: &Ops,
    ask: MakeTemplate,
    request: Option<RequestId>,
) -> Result<TemplateMade, Error> {
    let MakeTemplate { image, shape, owner, force } = ask;
    shape.check()?;
    if agent.config.template.max == 0 {
        return Err(Error::new(Code::FailedPrecondition, "templates are turned off on this host")
            .hint("root can set `max` of `[template]` in bothy.toml above 0"));
    }
    let boot = agent.bus.call::<ImageResolve>(&ImageRef { image: image.clone() }).await?;
    let choice = agent.choice(&boot).await?;
    if !choice.driver.capabilities().snapshot {
        let no = format!("{} {} cannot save a guest", choice.driver.name(), choice.driver.version());
        return Err(Error::new(Code::FailedPrecondition, no));
    }
    if !boot.root_disk.can_be_frozen() {
        let no = format!("no template can be made of VMs whose root disk is {}", boot.root_disk.word());
        return Err(Error::new(Code::FailedPrecondition, no)
            .hint("root can set `root_disk` of `[image]` in bothy.toml to another one"));
    }
    let key = key(&boot, choice, agent.tsc_khz, &shape);
    // Its work disk is the user's own, whatever size that will have.
    let shape = Shape { work_mib: Shape::default().work_mib, ..shape };
    let vm = VmId::new();
    let id = vm.to_string();
    let name = format!("template-{}", id.get(id.len().saturating_sub(8)..).unwrap_or(&id)).parse()?;
    let facts =
        Facts { template: Some(key.clone()), ..Facts::new(vm, name, owner, image.clone(), shape.clone()) };
    let spec = VmSpec {
        name: Some(facts.name.clone()),
        image,
        shape: shape.clone(),
        nat: false,
        egress: Some(Egress::None),
        publish: Vec::new(),
        groups: BTreeSet::new(),
        identity: Identity::default(),
        idle: None,
    };
    let boot = BootInput { name: facts.name.clone(), spec, machine_id: facts.machine_id.clone(), cold: true };
    let input = serde_json::to_value(MakeInput { boot, key: key.clone() })
        .map_err(|e| Error::internal("cannot keep the request", &e))?;
    let new = machine::new(MAKE, vm, &facts.name, owner, request, input);
    let there = Arc::new(Mutex::new(None));
    let (host, found) = (agent.clone(), Arc::clone(&there));
    let begun = ops
        .begin(new, move |tx, op| {
            if let Some(made) = already(tx, &key, force)? {
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
                return Err(Error::new(Code::AlreadyExists, "there is such a template").into());
            }
            host.admit(tx, vm, shape.memory_mib)?;
            let row = Vm { facts: Facts { busy: Some(op.id), ..facts }, phase: Phase::Reserved };
            // The host's, whoever asks.
            vms::insert(tx, &row, u32::MAX)
        })
        .await;
    if let Some(made) = there.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Ok(made);
    }
    let begun = begun?;
    if !begun.repeated {
        agent.machines.start(agent, ops, vm);
        tokio::spawn(tidy_after(agent.clone(), ops.clone(), begun.op.id, vm));
    }
    Ok(TemplateMade::Begun(begun.into()))
}

/// Removes what the end of a make leaves of others: the template whose place it took, those that are too many by now. Then loads
/// the memory of what was made: who has a template made mostly wants a machine of it soon, and loading takes longer than all the rest
/// of a resume.
async fn tidy_after(agent: Agent, ops: Ops, op: OpId, made: VmId) {
    drop(ops.wait(op).await);
    if let Err(error) = agent.sweep_templates().await {
        tracing::warn!(%error, "something of a template may stay for a while");
    }
    let is_made = agent.db.read(move |c| Ok(store::all(c)?.iter().any(|(_, template)| template.id == made)));
    if matches!(is_made.await, Ok(true))
        && let Err(error) = agent.templates.memory(&agent.state_dir(), made).await
    {
        tracing::info!(%error, template = %made, "the first create of a template has to load its memory itself");
    }
}

/// The template of `key` that is there, or the operation that makes it.
fn already(tx: &Transaction<'_>, key: &str, force: bool) -> Result<Option<TemplateMade>, DbError> {
    let making = vms::all(tx)?.into_iter().find(|vm| vm.facts.template.as_deref() == Some(key));
    if let Some(Vm { facts: Facts { id, busy: Some(op), .. }, .. }) = making {
        return Ok(Some(TemplateMade::Begun(Begun { op, vm: Some(id) })));
    }
    match store::find(tx, key)? {
        Some(template) if !force => match &template.set_aside {
            None => Ok(Some(TemplateMade::There(template))),
            Some(why) if Timestamp::now().duration_since(template.created) < ASIDE => Err(Error::new(
                Code::FailedPrecondition,
                format!("the template of image {} was set aside: {why}", template.image),
            )
            .hint("it is made again in an hour; root can do so now with `bothy image warm --force`")
            .into()),
            Some(_) => Ok(None),
        },
        _ => Ok(None),
    }
}

/// What the end of a make means for the templates: a success is one, and those that are too many by now are none any more.
pub(crate) fn settle(
    tx: &Transaction<'_>,
    agent: &Agent,
    input: &MakeInput,
    made: &TemplateRecord,
) -> Result<(), DbError> {
    store::put(tx, &input.key, made)?;
    let limits = &agent.config.template;
    for surplus in store::surplus(&store::all(tx)?, limits.max, limits.max_mib.saturating_mul(1 << 20)) {
        store::remove(tx, surplus)?;
    }
    Ok(())
}

impl Agent {
    /// The templates, the last used first.
    pub(crate) async fn templates(&self) -> Result<TemplateList, Error> {
        let all = self.db.read(store::all).await?;
        Ok(TemplateList { templates: all.into_iter().map(|(_, template)| template).collect() })
    }

    /// No create is resumed from `template` any more.
    pub(super) async fn set_aside(&self, template: VmId, why: &Error) {
        let why: String = why.message.chars().take(MAX_WHY).collect();
        let kept = self.db.write(move |tx| store::set_aside(tx, template, why)).await.map_err(Error::from);
        self.templates.let_go(Some(template));
        let swept = async {
            kept?;
            self.sweep_templates().await
        };
        if let Err(error) = swept.await {
            tracing::warn!(%template, %error, "something of a template that was set aside stays for a while");
        }
    }

    /// Removes the templates that no create finds any more: of an image that is gone at once, those of another image or VMM
    /// under the same names when they have been of no use for a while.
    async fn collect_templates(&self) -> Result<(), Error> {
        let mut gone = Vec::new();
        for (of, template) in self.db.read(store::all).await? {
            let image = ImageRef { image: template.image };
            let found = match self.bus.call::<ImageResolve>(&image).await {
                Ok(boot) => Some(key(&boot, self.choice(&boot).await?, self.tsc_khz, &template.shape)),
                Err(error) if error.code == Code::NotFound => None,
                Err(error) => return Err(error),
            };
            let last = template.used.unwrap_or(template.created);
            let stale = Timestamp::now().duration_since(last) > STALE;
            if found.is_none_or(|found| found != of && stale) {
                tracing::info!(template = %template.id, image = %image.image, "no create finds it any more");
                gone.push(template.id);
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        self.db.write(move |tx| gone.into_iter().try_for_each(|id| store::remove(tx, id))).await?;
        self.sweep_templates().await
    }

    /// Removes the files and disks of what is no template, nor is being made into one.
    async fn sweep_templates(&self) -> Result<(), Error> {
        // What is there first, what is known then: what is begun in between is not there yet, or known.
        let here = files::list(&self.state_dir())?;
        let frozen = self.bus.call::<ImageTemplateList>(&ListFrozen {}).await?.templates;
        let known: HashSet<VmId> = self
            .db
            .read(|c| {
                let making = vms::all(c)?.into_iter().map(|vm| vm.facts.id);
                let good = store::all(c)?.into_iter().filter(|(_, t)| t.set_aside.is_none());
                Ok(making.chain(good.map(|(_, template)| template.id)).collect())
            })
            .await?;
        for id in here.into_iter().filter(|id| !known.contains(id)) {
            self.templates.let_go(Some(id));
            files::remove(&self.state_dir(), id)?;
        }
        for template in frozen.into_iter().filter(|id| !known.contains(id)) {
            self.bus.call::<ImageTemplateForget>(&ForgetTemplate { template }).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_is_loaded_once_for_many_and_again_after_it_was_let_go_or_missing() {
        let state = tempfile::tempdir_in("/tmp").unwrap();
        let (templates, id) = (Templates::default(), VmId::new());
        assert!(templates.memory(state.path(), id).await.is_err());
        files::make(state.path(), id).unwrap();
        fs_err::write(files::snapshot(state.path(), id).memory, vec![1; 8192]).unwrap();
        let load = || async { templates.memory(state.path(), id).await.unwrap() };
        let (one, two) = tokio::join!(load(), load());
        assert!(Arc::ptr_eq(&one, &two));
        templates.let_go(None);
        assert!(Arc::ptr_eq(&one, &load().await), "it was used a moment ago");
        templates.let_go(Some(id));
        assert!(!Arc::ptr_eq(&one, &load().await));
    }
}
