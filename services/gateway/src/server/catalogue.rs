//! Keeping images and kernels: what everybody boots, so only root may.

use super::{ApiError, Gateway, Peer, error::Query};
use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use bothy_contract::{
    ImageName,
    catalogue::{PruneImages, Pruned, VerifyImages},
    image::ImageRef,
    methods::{ImagePrune, ImageRemove, ImageVerify},
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
