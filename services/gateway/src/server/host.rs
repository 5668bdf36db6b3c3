//! How the host's services stand, and taking the network down.

use super::{ApiError, Gateway, Peer};
use crate::api::{HostReport, ServiceReport};
use axum::{Json, extract::State, http::HeaderMap};
use bothy_contract::{
    Error, Service,
    image::ListImages,
    methods::{ImageListAll, NetHostShow, NetHostTeardown, VmHostShow, WorkspaceHostShow},
    net::{Done, GetNetHost, TeardownNet},
    vm::GetVmHost,
    workspace::GetWorkspaceHost,
};

fn report<T>(service: Service, answer: &Result<T, Error>) -> ServiceReport {
    ServiceReport { service, up: answer.is_ok(), error: answer.as_ref().err().cloned() }
}

pub(crate) async fn show(State(gateway): State<Gateway>, _: Peer) -> Json<HostReport> {
    let (vm, net, images, workspace) = tokio::join!(
        gateway.call::<VmHostShow>(&GetVmHost {}),
        gateway.call::<NetHostShow>(&GetNetHost {}),
        gateway.call::<ImageListAll>(&ListImages {}),
        gateway.call::<WorkspaceHostShow>(&GetWorkspaceHost {}),
    );
    let uses = Some(gateway.uses.as_ref().clone());
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
        uses,
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
