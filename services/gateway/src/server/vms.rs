//! VMs: list, show, create, start, stop, restart, pause, suspend, resume, kill, set, delete.

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
    methods::{
        NetEgressShow, VmCreate, VmDelete, VmKill, VmPause, VmRestart, VmResume, VmSet, VmStart, VmStop,
        VmSuspend,
    },
    net::{Egress, EgressReport, GetEgress, Publish},
    net_group::check_groups,
    op::Begun,
    vm::{
        CreateVm, DeleteVm, KillVm, PauseVm, RestartVm, ResumeVm, SetVm, StartVm, StopVm, SuspendVm, VmList,
        VmRecord,
    },
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
    Body(api::CreateBody { mut spec, force, cold }): Body<api::CreateBody>,
) -> Result<Accepted, ApiError> {
    spec.shape.check()?;
    spec.egress = spec.egress.map(Egress::checked).transpose()?;
    Publish::check(&spec.publish)?;
    check_groups(&spec.groups)?;
    spec.idle.map_or(Ok(()), |idle| idle.check())?;
    let request = CreateVm { spec, owner: peer.uid, force, cold };
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
    let request = StartVm { vm: vm.id, identity: body.identity, force: body.force };
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

pub(crate) async fn restart(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::RestartBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = RestartVm { vm: vm.id, grace_ms: body.grace_ms, identity: body.identity };
    Ok(accepted(gateway.change::<VmRestart>(&peer, &headers, &request).await?))
}

pub(crate) async fn kill(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::KillBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = KillVm { vm: vm.id, signal: body.signal };
    Ok(accepted(gateway.change::<VmKill>(&peer, &headers, &request).await?))
}

pub(crate) async fn pause(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    Ok(accepted(gateway.change::<VmPause>(&peer, &headers, &PauseVm { vm: vm.id }).await?))
}

pub(crate) async fn suspend(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    Ok(accepted(gateway.change::<VmSuspend>(&peer, &headers, &SuspendVm { vm: vm.id }).await?))
}

pub(crate) async fn resume(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::ResumeBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request = ResumeVm { vm: vm.id, force: body.force };
    Ok(accepted(gateway.change::<VmResume>(&peer, &headers, &request).await?))
}

pub(crate) async fn set(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(vm): Path<String>,
    Body(body): Body<api::SetBody>,
) -> Result<Accepted, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    body.check(&vm)?;
    let api::SetBody { cpus, memory_mib, work_mib, system_mib, nat, egress, publish, groups, idle } = body;
    let egress = egress.map(Egress::checked).transpose()?;
    let request =
        SetVm { vm: vm.id, cpus, memory_mib, work_mib, system_mib, nat, egress, publish, groups, idle };
    Ok(accepted(gateway.change::<VmSet>(&peer, &headers, &request).await?))
}

pub(crate) async fn egress(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
) -> Result<Json<EgressReport>, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    Ok(Json(gateway.call::<NetEgressShow>(&GetEgress { vm: vm.id }).await?))
}
