//! The agent's methods on the bus.

use crate::{
    channel::{self, StreamTickets},
    lifecycle::{
        Agent,
        ask::{Ask, KillInput, StopInput},
        boot::BootInput,
        end::MAX_GRACE_MS,
        kinds::CREATE,
        machine, template,
    },
    phase::Phase,
    stats,
    store::{self, Facts, Vm},
};
use bothy_bus::{Client, Context, Server};
use bothy_config::Accelerator;
use bothy_contract::{
    Error, RequestId, VmId, VmName,
    methods::{
        VmChannelOpen, VmCreate, VmDelete, VmHostShow, VmKill, VmListAll, VmLogOpen, VmOpCancel, VmOpList,
        VmOpShow, VmPause, VmPortsList, VmRestart, VmResume, VmSet, VmShow, VmStart, VmStatsShow, VmStop,
        VmSuspend, VmTemplateList, VmTemplateMake, VmTouch,
    },
    net::Done,
    net_group::check_groups,
    op::Begun,
    vm::{CreateVm, VmHost, VmList, VmState},
};
use bothy_ops::Ops;
use tokio_util::sync::CancellationToken;

/// Requests that are executed at once; the others wait.
const CONCURRENCY: usize = 64;
/// The signals that may be sent to a VMM: those that end a process by default and that a user sends by hand (signal(7)).
const SIGNALS: [(i32, &str); 6] =
    [(1, "HUP"), (2, "INT"), (3, "QUIT"), (6, "ABRT"), (9, "KILL"), (15, "TERM")];

/// What every method works with.
#[derive(Clone)]
struct Service {
    agent: Agent,
    ops: Ops,
    tickets: StreamTickets,
}

/// Answers until `shutdown`. `ready` is called once the methods are there.
///
/// # Errors
/// Where the methods cannot be registered on the bus.
pub(crate) async fn run(
    client: Client,
    agent: Agent,
    ops: Ops,
    tickets: StreamTickets,
    shutdown: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    let service = Service { agent, ops, tickets };
    // A method as a closure over the service: `|service, context, request| future`.
    macro_rules! on {
        (|$s:ident, $cx:ident, $ask:ident| $body:expr) => {{
            let service = service.clone();
            move |$cx, $ask| {
                let $s = service.clone();
                async move { $body }
            }
        }};
    }
    Server::new(client, CONCURRENCY)
        .on_ready(ready)
        .serve::<VmCreate, _, _>(on!(|s, cx, ask| s.create(cx, ask).await))
        .serve::<VmStart, _, _>(on!(|s, cx, ask| {
            s.begin(cx, ask.vm, Ask::Start { identity: ask.identity, force: ask.force }).await
        }))
        .serve::<VmRestart, _, _>(on!(|s, cx, ask| {
            let stop = stop_input(ask.grace_ms)?;
            s.begin(cx, ask.vm, Ask::Restart { stop, identity: ask.identity }).await
        }))
        .serve::<VmStop, _, _>(on!(|s, cx, ask| {
            s.begin(cx, ask.vm, Ask::Stop(stop_input(ask.grace_ms)?)).await
        }))
        .serve::<VmKill, _, _>(on!(|s, cx, ask| {
            s.begin(cx, ask.vm, Ask::Kill(kill_input(ask.signal)?)).await
        }))
        .serve::<VmPause, _, _>(on!(|s, cx, ask| s.begin(cx, ask.vm, Ask::Pause).await))
        .serve::<VmSuspend, _, _>(on!(|s, cx, ask| s.begin(cx, ask.vm, Ask::Suspend).await))
        .serve::<VmResume, _, _>(on!(|s, cx, ask| {
            s.begin(cx, ask.vm, Ask::Resume { force: ask.force }).await
        }))
        .serve::<VmTouch, _, _>(on!(|s, _cx, ask| s.touch(ask.vm).await))
        .serve::<VmSet, _, _>(on!(|s, cx, ask| s.begin(cx, ask.vm, Ask::Set(ask.into())).await))
        .serve::<VmDelete, _, _>(on!(|s, cx, ask| {
            s.begin(cx, ask.vm, Ask::Delete { force: ask.force }).await
        }))
        .serve::<VmListAll, _, _>(on!(|s, _cx, _ask| {
            let vms = s.agent.db.read(store::all).await?;
            let shown = vms.iter().filter(|vm| vm.facts.template.is_none());
            Ok(VmList { vms: shown.map(Vm::record).collect() })
        }))
        .serve::<VmShow, _, _>(on!(|s, _cx, ask| Ok(s.agent.vm(ask.vm).await?.record())))
        .serve::<VmStatsShow, _, _>(on!(|s, _cx, ask| stats::show(&s.agent, ask).await))
        .serve::<VmPortsList, _, _>(on!(|s, _cx, ask| stats::ports(&s.agent, ask.vm).await))
        .serve::<VmChannelOpen, _, _>(on!(|s, _cx, ask| {
            channel::open_channel(&s.agent, &s.tickets, ask).await
        }))
        .serve::<VmLogOpen, _, _>(on!(|s, _cx, ask| channel::open_log(&s.agent, &s.tickets, ask).await))
        .serve::<VmHostShow, _, _>(on!(|s, _cx, _ask| host(&s.agent).await))
        .serve::<VmTemplateMake, _, _>(on!(|s, cx, ask| {
            template::make(&s.agent, &s.ops, ask, Some(cx.request_id)).await
        }))
        .serve::<VmTemplateList, _, _>(on!(|s, _cx, _ask| s.agent.templates().await))
        .serve::<VmOpShow, _, _>(on!(|s, _cx, ask| s.ops.show(ask).await))
        .serve::<VmOpList, _, _>(on!(|s, _cx, ask| s.ops.list(ask).await))
        .serve::<VmOpCancel, _, _>(on!(|s, _cx, ask| s.ops.cancel(ask).await))
        .run(shutdown)
        .await
}

impl Service {
    async fn create(&self, cx: Context, ask: CreateVm) -> Result<Begun, Error> {
        ask.spec.shape.check()?;
        check_groups(&ask.spec.groups)?;
        ask.spec.idle.map_or(Ok(()), |idle| idle.check())?;
        let vm = VmId::new();
        let name = match &ask.spec.name {
            Some(name) => name.clone(),
            None => free_name(vm)?,
        };
        let CreateVm { spec, owner, force, cold } = ask;
        let facts = Facts {
            egress: spec.reaches(),
            publish: spec.publish.clone(),
            groups: spec.groups.clone(),
            idle: spec.idle,
            ..Facts::new(vm, name.clone(), owner, spec.image.clone(), spec.shape.clone())
        };
        let (asked_mib, machine_id) = (spec.shape.memory_mib, facts.machine_id.clone());
        let input = serde_json::to_value(BootInput { name: name.clone(), spec, machine_id, cold })
            .map_err(|e| Error::internal("cannot keep the request", &e))?;
        let new = machine::new(CREATE, vm, &name, owner, Some(cx.request_id), input);
        let host = self.agent.clone();
        let begun = self
            .ops
            .begin(new, move |tx, op| {
                if !force {
                    host.admit(tx, vm, asked_mib)?;
                }
                let row = Vm { facts: Facts { busy: Some(op.id), ..facts }, phase: Phase::Reserved };
                store::insert(tx, &row, host.config.vm.max_per_user)
            })
            .await?;
        if !begun.repeated {
            self.agent.machines.start(&self.agent, &self.ops, vm);
        }
        Ok(begun.into())
    }

    /// Has a VM that rests go on, while whoever reaches for it waits at its network.
    async fn touch(&self, vm: VmId) -> Result<Done, Error> {
        let row = self.agent.vm(vm).await?;
        if matches!(row.facts.state, VmState::Paused | VmState::Suspended) && row.facts.busy.is_none() {
            self.agent.machines.begin(vm, Ask::Resume { force: false }, None).await?;
        }
        Ok(Done {})
    }

    /// Begins an operation on a VM that is there.
    async fn begin(&self, cx: Context, vm: VmId, ask: Ask) -> Result<Begun, Error> {
        let request: Option<RequestId> = Some(cx.request_id);
        Ok(self.agent.machines.begin(vm, ask, request).await?.into())
    }
}

fn stop_input(grace_ms: u64) -> Result<StopInput, Error> {
    if grace_ms > MAX_GRACE_MS {
        return Err(Error::invalid(format!("{grace_ms} ms is not a valid grace"))
            .hint(format!("give at most {MAX_GRACE_MS} ms")));
    }
    Ok(StopInput { grace_ms, why: None })
}

fn kill_input(signal: i32) -> Result<KillInput, Error> {
    if SIGNALS.iter().any(|(number, _)| *number == signal) {
        return Ok(KillInput { signal });
    }
    let known: Vec<_> = SIGNALS.iter().map(|(number, name)| format!("{name} ({number})")).collect();
    Err(Error::invalid(format!("signal {signal} is not one that ends a VMM"))
        .hint(format!("give one of {}", known.join(", "))))
}

/// A name that is as good as unique: from the random end of the id.
fn free_name(vm: VmId) -> Result<VmName, Error> {
    let id = vm.to_string();
    let tail = id.split_at_checked(id.len().saturating_sub(8)).map_or(id.as_str(), |(_, tail)| tail);
    format!("vm-{tail}").parse()
}

async fn host(agent: &Agent) -> Result<VmHost, Error> {
    let vms = agent.db.read(store::all).await?;
    let choice = agent.known_choice();
    let (accelerator, accelerator_reason) = match (&choice.finding, agent.config.vm.accelerator) {
        (Some(found), _) => (found.accel.to_string(), found.reason.clone()),
        (None, Accelerator::Tcg) => ("tcg".into(), "set by `vm.accelerator`".into()),
        (None, Accelerator::Kvm) => ("kvm".into(), "set by `vm.accelerator`; tried with the first VM".into()),
        (None, Accelerator::Auto) => ("auto".into(), "KVM is tried with the first VM".into()),
    };
    Ok(VmHost {
        driver: choice.driver.name().to_owned(),
        vmm_version: choice.driver.version().to_owned(),
        accelerator,
        accelerator_reason,
        driver_reason: choice.reason.clone(),
        limits: match &agent.cgroups {
            Ok(groups) => groups.describe(),
            Err(why) => format!("none: {why}"),
        },
        running: u32::try_from(vms.iter().filter(|vm| vm.phase.live().is_some()).count()).unwrap_or(u32::MAX),
        total: u32::try_from(vms.len()).unwrap_or(u32::MAX),
    })
}
