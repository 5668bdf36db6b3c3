//! Keeping images and kernels: what everybody boots, so only root may.

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
    ImageName, KernelName,
    catalogue::{
        ImportKernel, KernelInfo, KernelList, KernelRef, ListKernels, PromoteImage, PruneImages, Pruned,
        RegisterImage, VerifyImages,
    },
    image::ImageRef,
    methods::{
        ImagePromote, ImagePrune, ImageRegister, ImageRemove, ImageVerify, KernelImport, KernelListAll,
        KernelRemove, KernelShow,
    },
    op::Begun,
};
use serde::Deserialize;

#[derive(Deserialize)]
pub(crate) struct VerifyQuery {
    image: Option<ImageName>,
}

pub(crate) async fn verify(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Query(query): Query<VerifyQuery>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    peer.must_be_root("verify images")?;
    let request = VerifyImages { image: query.image, owner: peer.uid };
    Ok((StatusCode::ACCEPTED, Json(gateway.change::<ImageVerify>(&peer, &headers, &request).await?)))
}

pub(crate) async fn remove(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(image): Path<String>,
) -> Result<Json<Pruned>, ApiError> {
    let image: ImageName = image.parse()?;
    peer.must_be_root("remove images")?;
    Ok(Json(gateway.change::<ImageRemove>(&peer, &headers, &ImageRef { image }).await?))
}

#[derive(Deserialize)]
pub(crate) struct PruneQuery {
    #[serde(default)]
    all: bool,
    #[serde(default)]
    dry_run: bool,
}

pub(crate) async fn prune(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Query(query): Query<PruneQuery>,
) -> Result<Json<Pruned>, ApiError> {
    peer.must_be_root("remove images")?;
    let request = PruneImages { dry_run: query.dry_run, all: query.all };
    Ok(Json(gateway.change::<ImagePrune>(&peer, &headers, &request).await?))
}

/// Registers files of the host by their paths: the image-agent opens them with its own rights, so this is root's alone.
pub(crate) async fn register(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(image): Path<String>,
    Body(body): Body<api::RegisterBody>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    let image: ImageName = image.parse()?;
    peer.must_be_root("register images")?;
    let api::RegisterBody { rootfs, kernel, initrd, init, wait, force } = body;
    let request = RegisterImage { image, rootfs, kernel, initrd, init, wait, force, owner: peer.uid };
    Ok((StatusCode::ACCEPTED, Json(gateway.change::<ImageRegister>(&peer, &headers, &request).await?)))
}

pub(crate) async fn promote(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(image): Path<String>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    let image: ImageName = image.parse()?;
    peer.must_be_root("promote images")?;
    let request = PromoteImage { image, owner: peer.uid };
    Ok((StatusCode::ACCEPTED, Json(gateway.change::<ImagePromote>(&peer, &headers, &request).await?)))
}

pub(crate) async fn kernels(State(gateway): State<Gateway>, _: Peer) -> Result<Json<KernelList>, ApiError> {
    Ok(Json(gateway.call::<KernelListAll>(&ListKernels {}).await?))
}

pub(crate) async fn kernel(
    State(gateway): State<Gateway>,
    _: Peer,
    Path(kernel): Path<String>,
) -> Result<Json<KernelInfo>, ApiError> {
    let kernel: KernelName = kernel.parse()?;
    Ok(Json(gateway.call::<KernelShow>(&KernelRef { kernel }).await?))
}

pub(crate) async fn import_kernel(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Body(body): Body<api::KernelBody>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    peer.must_be_root("import kernels")?;
    let request = ImportKernel { name: body.name, file: body.file, modules: body.modules, owner: peer.uid };
    Ok((StatusCode::ACCEPTED, Json(gateway.change::<KernelImport>(&peer, &headers, &request).await?)))
}

pub(crate) async fn remove_kernel(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(kernel): Path<String>,
) -> Result<Json<Pruned>, ApiError> {
    let kernel: KernelName = kernel.parse()?;
    peer.must_be_root("remove kernels")?;
    Ok(Json(gateway.change::<KernelRemove>(&peer, &headers, &KernelRef { kernel }).await?))
}
