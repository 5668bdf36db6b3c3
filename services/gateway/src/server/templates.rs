//! Templates: everybody may see them and have one made, for nobody's data is in one.

use super::{ApiError, Gateway, Peer, error::Body};
use crate::api::WarmBody;
use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use bothy_contract::{
    ImageName,
    methods::{VmTemplateList, VmTemplateMake},
    vm::{ListTemplates, MakeTemplate, TemplateList, TemplateMade},
};

pub(crate) async fn list(State(gateway): State<Gateway>, _: Peer) -> Result<Json<TemplateList>, ApiError> {
    Ok(Json(gateway.call::<VmTemplateList>(&ListTemplates {}).await?))
}

/// To make one anew takes away what others' creates are resumed from, so only root may.
pub(crate) async fn warm(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(image): Path<String>,
    Body(WarmBody { shape, force }): Body<WarmBody>,
) -> Result<(StatusCode, Json<TemplateMade>), ApiError> {
    let image: ImageName = image.parse()?;
    shape.check()?;
    if force {
        peer.must_be_root("make a template anew")?;
    }
    let request = MakeTemplate { image, shape, owner: peer.uid, force };
    let made = gateway.change::<VmTemplateMake>(&peer, &headers, &request).await?;
    let status = match made {
        TemplateMade::There(_) => StatusCode::OK,
        TemplateMade::Begun(_) => StatusCode::ACCEPTED,
    };
    Ok((status, Json(made)))
}
