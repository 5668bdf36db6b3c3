//! The image-agent's methods on the bus. Each is one call of what [`Agent`] owns, made where file work holds up nobody.

use crate::{
    agent::Agent, builds, fault::blocking, kernels, oci::Intake, promote, register, remove, seeds, verify,
};
use bothy_bus::{Client, Server};
use bothy_contract::{
    Error,
    catalogue::KernelList,
    image::{DiskList, DiskUsageList, FrozenList, ImageList},
    methods::{
        ImageBuild, ImageDisksGrow, ImageDisksList, ImageDisksRelease, ImageDisksUsage, ImageIntakeOpen,
        ImageListAll, ImageOpCancel, ImageOpList, ImageOpShow, ImagePromote, ImagePrune, ImageRegister,
        ImageRemove, ImageResolve, ImageRootfsPrepare, ImageShow, ImageTemplateForget, ImageTemplateFreeze,
        ImageTemplateList, ImageVerify, ImageWorkDiskPrepare, KernelImport, KernelListAll, KernelRemove,
        KernelShow,
    },
    net::Done,
};
use bothy_ops::Ops;
use tokio_util::sync::CancellationToken;

/// Requests that are worked on at once: disk work of more than this many would only queue at the disk.
const AT_ONCE: usize = 16;

/// Answers until `stop`; `ready` is called once every method is there.
pub(crate) async fn run(
    client: Client,
    agent: Agent,
    ops: Ops,
    stop: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    /// A handler that does its work, given the agent and the request, on a thread for such.
    macro_rules! on {
        (|$agent:ident, $ask:ident| $work:expr) => {{
            let agent = agent.clone();
            move |_, $ask| {
                let $agent = agent.clone();
                blocking(move || $work)
            }
        }};
    }
    /// A handler that asks the operations.
    macro_rules! op {
        ($method:ident) => {{
            let ops = ops.clone();
            move |_, ask| {
                let ops = ops.clone();
                async move { ops.$method(ask).await }
            }
        }};
    }
    /// A handler that begins an operation.
    macro_rules! begin {
        ($work:ident) => {{
            let (agent, ops) = (agent.clone(), ops.clone());
            move |context, ask| {
                let (agent, ops) = (agent.clone(), ops.clone());
                async move { Ok($work::begin(&ops, &agent, context, ask).await?.into()) }
            }
        }};
    }
    /// A handler that asks other services, too.
    macro_rules! with_client {
        (|$client:ident, $agent:ident, $ask:ident| $work:expr) => {{
            let (agent, client) = (agent.clone(), client.clone());
            move |_, $ask| {
                let ($agent, $client) = (agent.clone(), client.clone());
                async move { $work.await }
            }
        }};
    }
    let streams = Intake::serve(agent.clone(), ops.clone(), stop.clone());
    let server = Server::new(client.clone(), AT_ONCE)
        .serve::<ImageListAll, _, _>(on!(|a, _ask| Ok(ImageList { images: a.store.list()? })))
        .serve::<ImageShow, _, _>(on!(|a, ask| a.store.show(&ask.image)))
        .serve::<ImageResolve, _, _>(on!(|a, ask| a.resolve(&ask.image)))
        .serve::<ImageRootfsPrepare, _, _>(on!(|a, ask| {
            let _use = a.using.blocking_read();
            match ask.template {
                None => a.disks.rootfs(&a.store, ask.vm, &ask.image, ask.uid, ask.system_mib),
                Some(template) => a.disks.rootfs_of_template(template, ask.vm, ask.uid, ask.system_mib),
            }
        }))
        .serve::<ImageTemplateFreeze, _, _>(on!(|a, ask| a.disks.freeze(ask.vm)))
        .serve::<ImageTemplateForget, _, _>(on!(|a, ask| {
            a.disks.forget_template(ask.template).map(|()| Done {})
        }))
        .serve::<ImageTemplateList, _, _>(on!(|a, _ask| { Ok(FrozenList { templates: a.disks.frozen()? }) }))
        .serve::<ImageWorkDiskPrepare, _, _>(on!(|a, ask| {
            let _use = a.using.blocking_read();
            if ask.placeholder {
                return a.disks.placeholder(ask.vm, ask.uid);
            }
            seeds::work(&a, &ask)
        }))
        .serve::<ImageDisksRelease, _, _>(on!(|a, ask| a.disks.release(ask.vm).map(|()| Done {})))
        .serve::<ImageDisksList, _, _>(on!(|a, _ask| Ok(DiskList { vms: a.disks.list()? })))
        .serve::<ImageDisksGrow, _, _>(on!(|a, ask| {
            a.disks.grow(ask.vm, ask.work_mib, ask.system_mib).map(|()| Done {})
        }))
        .serve::<ImageDisksUsage, _, _>(on!(|a, ask| {
            Ok(DiskUsageList { disks: a.disks.usage(&ask.vms)? })
        }))
        .serve::<ImageBuild, _, _>(begin!(builds))
        .serve::<ImageVerify, _, _>(begin!(verify))
        .serve::<ImageRegister, _, _>(begin!(register))
        .serve::<ImagePromote, _, _>(begin!(promote))
        .serve::<ImageIntakeOpen, _, _>({
            let agent = agent.clone();
            move |_, ask| {
                let agent = agent.clone();
                async move { agent.intake.clone().open(agent, ask).await }
            }
        })
        .serve::<KernelImport, _, _>(begin!(kernels))
        .serve::<KernelListAll, _, _>(on!(|a, _ask| Ok(KernelList { kernels: a.store.kernels()? })))
        .serve::<KernelShow, _, _>(on!(|a, ask| a.kernel(&ask.kernel)))
        .serve::<KernelRemove, _, _>(on!(|a, ask| a.store.remove_kernel(&ask.kernel)))
        .serve::<ImageRemove, _, _>(with_client!(|client, a, ask| remove::remove(&client, &a, ask.image)))
        .serve::<ImagePrune, _, _>(with_client!(|client, a, ask| remove::prune(&client, &a, ask)))
        .serve::<ImageOpShow, _, _>(op!(show))
        .serve::<ImageOpList, _, _>(op!(list))
        .serve::<ImageOpCancel, _, _>(op!(cancel))
        .on_ready(ready);
    // Whichever ends takes the other along.
    let serve = async {
        let served = server.run(stop.clone()).await;
        stop.cancel();
        served
    };
    let take = async {
        let taken = streams.await;
        stop.cancel();
        taken
    };
    let (served, taken) = tokio::join!(serve, take);
    served.and(taken)
}
