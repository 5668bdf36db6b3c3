//! VMs: list, show, create, start, stop, delete.

use super::{
    ApiError, Gateway, Peer,
    error::{Body, Query},
};
use crate::api;
use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use bothy_contract::{
    methods::{VmCreate, VmDelete, VmStart, VmStop},
    op::Begun,
    vm::{CreateVm, DeleteVm, StartVm, StopVm, VmList, VmRecord, VmSpec},
};
use serde::Deserialize;

type Accepted = (StatusCode, Json<Begun>);

fn accepted(begun: Begun) -> Accepted {
    (StatusCode::ACCEPTED, Json(begun))
}

pub(crate) async fn list(State(gateway): State<Gateway>, peer: Peer) -> Result<Json<VmList>, ApiError> {
    Ok(Json(VmList { vms: gateway.visible(&peer).await? }))
}

pub(crate) async fn show(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
) -> Result<Json<VmRecord>, ApiError> {
    Ok(Json(gateway.vm(&peer, &vm).await?))
}

pub(crate) async fn create(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Body(spec): Body<VmSpec>,
) -> Result<Accepted, ApiError> {
    spec.shape.check()?;
    let request = CreateVm { spec, owner: peer.uid, force: false };
    Ok(accepted(gateway.change::<VmCreate>(&peer, &headers, &request).await?))
}

#[derive(Deserialize)]
pub(crate) struct DeleteQuery {
    #[serde(default)]
    force: bool,
}

pub(crate) async fn delete(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = DeleteVm { vm: vm.id, force: query.force };
    Ok(accepted(gateway.change::<VmDelete>(&peer, &headers, &request).await?))
}

pub(crate) async fn start(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::StartBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = StartVm { vm: vm.id, identity: body.identity, force: false };
    Ok(accepted(gateway.change::<VmStart>(&peer, &headers, &request).await?))
}

pub(crate) async fn stop(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::StopBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = StopVm { vm: vm.id, grace_ms: body.grace_ms };
    Ok(accepted(gateway.change::<VmStop>(&peer, &headers, &request).await?))
}
