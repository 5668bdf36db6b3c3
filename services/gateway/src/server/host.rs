//! How the host's services stand, and taking the network down.

use super::{ApiError, Gateway, Peer};
use crate::api::{HostReport, ServiceReport};
use axum::{Json, extract::State, http::HeaderMap};
use bothy_contract::{
    Code, Error, Service, VmId,
    image::ListImages,
    methods::{ImageListAll, NetHostShow, NetHostTeardown, VmHostShow, WorkspaceExportOpen},
    net::{Done, GetNetHost, TeardownNet},
    vm::GetVmHost,
    workspace::OpenExport,
};

fn report<T>(service: Service, answer: &Result<T, Error>) -> ServiceReport {
    ServiceReport { service, up: answer.is_ok(), error: answer.as_ref().err().cloned() }
}

pub(crate) async fn show(State(gateway): State<Gateway>, _: Peer) -> Json<HostReport> {
    let probe = OpenExport { vm: VmId::new(), guest_path: String::new() };
    let (vm, net, images, workspace) = tokio::join!(
        gateway.call::<VmHostShow>(&GetVmHost {}),
        gateway.call::<NetHostShow>(&GetNetHost {}),
        gateway.call::<ImageListAll>(&ListImages {}),
        gateway.call::<WorkspaceExportOpen>(&probe),
    );
    // The workspace-agent has nothing to show. It is there if it refuses what cannot be: a new id names no VM.
    let workspace = match workspace {
        Err(e) if matches!(e.code, Code::Unavailable | Code::DeadlineExceeded | Code::Internal) => Err(e),
        _ => Ok(()),
    };
    let gateway = ServiceReport { service: Service::Gateway, up: true, error: None };
    Json(HostReport {
        services: vec![
            gateway,
            report(Service::Vm, &vm),
            report(Service::Net, &net),
            report(Service::Image, &images),
            report(Service::Workspace, &workspace),
        ],
        vm: vm.ok(),
        net: net.ok(),
        images: images.ok().map(|list| list.images),
    })
}

pub(crate) async fn teardown(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Json<Done>, ApiError> {
    peer.must_be_root("take the network down")?;
    Ok(Json(gateway.change::<NetHostTeardown>(&peer, &headers, &TeardownNet {}).await?))
}
