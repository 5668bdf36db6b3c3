//! The agent's methods on the bus.

use crate::{
    channel::{self, StreamTickets},
    lifecycle::{
        Agent,
        boot::BootInput,
        end::MAX_GRACE_MS,
        kinds::{CREATE, DELETE, START, STOP},
        state::{self, Wish},
    },
    store::{self, Vm},
};
use bothy_bus::{Client, Context, Server};
use bothy_config::Accelerator;
use bothy_contract::{
    Error, VmId, VmName,
    methods::{
        VmChannelOpen, VmCreate, VmDelete, VmHostShow, VmListAll, VmLogOpen, VmOpCancel, VmOpList, VmOpShow,
        VmShow, VmStart, VmStop,
    },
    op::Begun,
    vm::{CreateVm, DeleteVm, StartVm, StopVm, VmHost, VmList, VmRecord, VmSpec},
};
use bothy_ops::{New, Ops};
use bothy_vm_agent::vmm::Driver;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

/// Requests that are executed at once; the others wait.
const CONCURRENCY: usize = 64;

#[derive(Clone)]
struct Service {
    agent: Agent,
    ops: Ops,
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
    let service = Service { agent: agent.clone(), ops: ops.clone() };
    let server = Server::new(client, CONCURRENCY).on_ready(ready);
    let s = service.clone();
    let server = server.serve::<VmCreate, _, _>(move |cx, ask| {
        let s = s.clone();
        async move { s.create(cx, ask).await }
    });
    let s = service.clone();
    let server = server.serve::<VmStart, _, _>(move |cx, ask| {
        let s = s.clone();
        async move { s.start(cx, ask).await }
    });
    let s = service.clone();
    let server = server.serve::<VmStop, _, _>(move |cx, ask| {
        let s = s.clone();
        async move { s.stop(cx, ask).await }
    });
    let s = service.clone();
    let server = server.serve::<VmDelete, _, _>(move |cx, ask| {
        let s = s.clone();
        async move { s.delete(cx, ask).await }
    });
    let a = agent.clone();
    let server = server.serve::<VmListAll, _, _>(move |_, _| {
        let a = a.clone();
        async move {
            let vms = a.db.read(store::all).await?;
            Ok(VmList { vms: vms.into_iter().map(|vm| vm.record).collect() })
        }
    });
    let a = agent.clone();
    let server = server.serve::<VmShow, _, _>(move |_, ask| {
        let a = a.clone();
        async move { Ok(a.vm(ask.vm).await?.record) }
    });
    let (a, t) = (agent.clone(), tickets.clone());
    let server = server.serve::<VmChannelOpen, _, _>(move |_, ask| {
        let (a, t) = (a.clone(), t.clone());
        async move { channel::open_channel(&a, &t, ask).await }
    });
    let (a, t) = (agent.clone(), tickets);
    let server = server.serve::<VmLogOpen, _, _>(move |_, ask| {
        let (a, t) = (a.clone(), t.clone());
        async move { channel::open_log(&a, &t, ask).await }
    });
    let server = server.serve::<VmHostShow, _, _>(move |_, _| {
        let a = agent.clone();
        async move { host(&a).await }
    });
    let o = ops.clone();
    let server = server.serve::<VmOpShow, _, _>(move |_, ask| {
        let o = o.clone();
        async move { o.show(ask).await }
    });
    let o = ops.clone();
    let server = server.serve::<VmOpList, _, _>(move |_, ask| {
        let o = o.clone();
        async move { o.list(ask).await }
    });
    let server = server.serve::<VmOpCancel, _, _>(move |_, ask| {
        let o = ops.clone();
        async move { o.cancel(ask).await }
    });
    server.run(shutdown).await
}

impl Service {
    async fn create(&self, cx: Context, ask: CreateVm) -> Result<Begun, Error> {
        ask.spec.shape.check()?;
        let vm = VmId::new();
        let name = match &ask.spec.name {
            Some(name) => name.clone(),
            None => free_name(vm)?,
        };
        let machine_id = uuid::Uuid::new_v4().as_simple().to_string();
        let row = Vm { record: new_record(vm, &name, &ask), machine_id: machine_id.clone(), handle: None };
        let input = BootInput { name: name.clone(), spec: ask.spec, machine_id };
        let new = new(CREATE, vm, &name, ask.owner, &cx, &input)?;
        let most = self.agent.config.vm.max_per_user;
        let begun = self.ops.begin(new, move |tx, _| store::insert(tx, &row, most)).await?;
        Ok(begun.into())
    }

    async fn start(&self, cx: Context, ask: StartVm) -> Result<Begun, Error> {
        let row = self.agent.vm(ask.vm).await?;
        let VmRecord { name, image, shape, nat, .. } = row.record.clone();
        let spec = VmSpec { name: Some(name.clone()), image, shape, nat, identity: ask.identity };
        let input = BootInput { name, spec, machine_id: row.machine_id.clone() };
        self.begin(START, &row, cx, &input, Wish::Start).await
    }

    async fn stop(&self, cx: Context, ask: StopVm) -> Result<Begun, Error> {
        if ask.grace_ms > MAX_GRACE_MS {
            return Err(Error::invalid(format!("{} ms is not a valid grace", ask.grace_ms))
                .hint(format!("give at most {MAX_GRACE_MS} ms")));
        }
        let row = self.agent.vm(ask.vm).await?;
        self.begin(STOP, &row, cx, &ask, Wish::Stop).await
    }

    async fn delete(&self, cx: Context, ask: DeleteVm) -> Result<Begun, Error> {
        let row = self.agent.vm(ask.vm).await?;
        let wish = Wish::Delete { force: ask.force };
        self.begin(DELETE, &row, cx, &ask, wish).await
    }

    /// Begins an operation on a VM that is there, if its state allows it at that moment.
    async fn begin<T: Serialize>(
        &self,
        kind: &'static str,
        row: &Vm,
        cx: Context,
        input: &T,
        wish: Wish,
    ) -> Result<Begun, Error> {
        let id = row.record.id;
        let new = new(kind, id, &row.record.name, row.record.owner, &cx, input)?;
        let begun = self
            .ops
            .begin(new, move |tx, _| {
                store::update(tx, id, |vm| {
                    let to = state::grant(&vm.record.name, vm.record.state, wish)?;
                    store::set_state(vm, to, None);
                    Ok(())
                })
            })
            .await?;
        Ok(begun.into())
    }
}

fn new<T: Serialize>(
    kind: &'static str,
    vm: VmId,
    name: &VmName,
    owner: u32,
    cx: &Context,
    input: &T,
) -> Result<New, Error> {
    let input = serde_json::to_value(input).map_err(|e| Error::internal("cannot keep the request", &e))?;
    Ok(New { kind, subject: name.to_string(), vm: Some(vm), owner, request: Some(cx.request_id), input })
}

fn new_record(vm: VmId, name: &VmName, ask: &CreateVm) -> VmRecord {
    let CreateVm { spec, owner, .. } = ask;
    VmRecord {
        nat: spec.nat,
        ..VmRecord::new(vm, name.clone(), *owner, spec.image.clone(), spec.shape.clone())
    }
}

/// A name that is as good as unique: from the random end of the id.
fn free_name(vm: VmId) -> Result<VmName, Error> {
    let id = vm.to_string();
    let tail = id.split_at_checked(id.len().saturating_sub(8)).map_or(id.as_str(), |(_, tail)| tail);
    format!("vm-{tail}").parse()
}

async fn host(agent: &Agent) -> Result<VmHost, Error> {
    let vms = agent.db.read(store::all).await?;
    let (accelerator, accelerator_reason) = match (agent.known_accel(), agent.config.vm.accelerator) {
        (Some(found), _) => (found.accel.to_string(), found.reason.clone()),
        (None, Accelerator::Tcg) => ("tcg".into(), "set by `vm.accelerator`".into()),
        (None, Accelerator::Kvm) => ("kvm".into(), "set by `vm.accelerator`; tried with the first VM".into()),
        (None, Accelerator::Auto) => ("auto".into(), "KVM is tried with the first VM".into()),
    };
    Ok(VmHost {
        driver: agent.driver.name().to_owned(),
        vmm_version: agent.driver.version().to_owned(),
        accelerator,
        accelerator_reason,
        driver_reason: String::new(),
        limits: String::new(),
        running: u32::try_from(vms.iter().filter(|vm| vm.handle.is_some()).count()).unwrap_or(u32::MAX),
        total: u32::try_from(vms.len()).unwrap_or(u32::MAX),
    })
}
