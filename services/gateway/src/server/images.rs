//! Images: everybody may see them; a build belongs to whoever asked for it.

use super::{ApiError, Gateway, Peer, error::Query};
use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use bothy_contract::{
    ImageName,
    image::{BuildImage, ImageList, ImageManifest, ImageRef, ListImages},
    methods::{ImageBuild, ImageListAll, ImageShow},
    op::Begun,
};
use serde::Deserialize;

pub(crate) async fn list(State(gateway): State<Gateway>, _: Peer) -> Result<Json<ImageList>, ApiError> {
    Ok(Json(gateway.call::<ImageListAll>(&ListImages {}).await?))
}

pub(crate) async fn show(
    State(gateway): State<Gateway>,
    _: Peer,
    Path(image): Path<String>,
) -> Result<Json<ImageManifest>, ApiError> {
    let image: ImageName = image.parse()?;
    Ok(Json(gateway.call::<ImageShow>(&ImageRef { image }).await?))
}

#[derive(Deserialize)]
pub(crate) struct BuildQuery {
    #[serde(default)]
    force: bool,
}

/// A build runs as root on the host and replaces what everybody boots, so only root may ask for one.
pub(crate) async fn build(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(image): Path<String>,
    Query(query): Query<BuildQuery>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    let recipe: ImageName = image.parse()?;
    peer.must_be_root("build images")?;
    let request = BuildImage { recipe, force: query.force, owner: peer.uid };
    Ok((StatusCode::ACCEPTED, Json(gateway.change::<ImageBuild>(&peer, &headers, &request).await?)))
}
