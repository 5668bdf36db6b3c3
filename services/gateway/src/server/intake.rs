//! Images in from elsewhere. Archives: the caller's own process reads them and sends them here as a request's body; they go on to the
//! image-agent's ticket socket, whose last frame says which operation began with them. A body that ends too soon never looks whole.

use super::{
    ApiError, Gateway, Peer,
    error::{self, Query},
};
use crate::api;
use axum::{
    Json,
    body::{Body, BodyDataStream},
    extract::{Path, State},
    http::StatusCode,
};
use bothy_contract::{
    Code, Error, ImageName, KernelName,
    intake::{IntakeSource, OpenIntake},
    methods::ImageIntakeOpen,
    op::Begun,
};
use bothy_tickets::{FrameReader, FrameWriter};
use futures::StreamExt as _;
use serde::Deserialize;
use std::{io, time::Duration};

/// How long an agent that stopped reading may take to say why.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long the rest of an archive that is refused is read, so that its sender hears why.
const DRAIN: Duration = Duration::from_secs(10);
/// The longest name of an archive that is kept.
const MAX_NAME: usize = 200;

#[derive(Deserialize)]
pub(crate) struct ImportQuery {
    #[serde(default)]
    force: bool,
    kernel: Option<KernelName>,
    /// What the archive is called where it comes from.
    #[serde(default)]
    from: String,
}

/// Who ended the sending.
enum Stopped {
    Caller(Error),
    Agent(io::Error),
}

/// What everybody boots, so only root may bring it in.
pub(crate) async fn import(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(image): Path<String>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    let image: ImageName = image.parse()?;
    peer.must_be_root("import images")?;
    let name = query.from.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
    let source = IntakeSource::Archive { name };
    let request = OpenIntake { image, source, kernel: query.kernel, force: query.force, owner: peer.uid };
    let mut body = body.into_data_stream();
    let begun = forward(&gateway, &request, &mut body).await;
    if begun.is_err() {
        // A caller that still writes would see a broken pipe, and not what is wrong.
        let rest = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = tokio::time::timeout(DRAIN, rest).await;
    }
    Ok((StatusCode::ACCEPTED, Json(begun?)))
}

/// What everybody boots, so only root may have it fetched. Who asks the registry goes the way of an archive: past the bus.
pub(crate) async fn pull(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(image): Path<String>,
    error::Body(body): error::Body<api::PullBody>,
) -> Result<(StatusCode, Json<Begun>), ApiError> {
    let image: ImageName = image.parse()?;
    peer.must_be_root("pull images")?;
    let api::PullBody { reference, kernel, force, insecure_http, credentials } = body;
    let source = IntakeSource::Registry { reference, insecure_http };
    let request = OpenIntake { image, source, kernel, force, owner: peer.uid };
    let text = credentials.map(|c| serde_json::to_vec(&c)).transpose();
    let text = text.map_err(|e| Error::internal("cannot send the credentials on", &e))?;
    let mut body = Body::from(text.unwrap_or_default()).into_data_stream();
    Ok((StatusCode::ACCEPTED, Json(forward(&gateway, &request, &mut body).await?)))
}

/// Sends the body on to the image-agent.
async fn forward(gateway: &Gateway, request: &OpenIntake, body: &mut BodyDataStream) -> Result<Begun, Error> {
    let ticket = gateway.call::<ImageIntakeOpen>(request).await?;
    let (read, write) = bothy_tickets::connect(&ticket).await?.into_split();
    let mut answer = FrameReader::new(read);
    let mut archive = FrameWriter::new(write);
    let send = async {
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|e| {
                let short = Error::new(Code::Unavailable, "the archive ended before it was whole");
                Stopped::Caller(short.context(e))
            })?;
            archive.data(&piece).await.map_err(Stopped::Agent)?;
        }
        archive.end(&serde_json::json!({})).await.map_err(Stopped::Agent)
    };
    let told = answer.report::<Begun>();
    tokio::pin!(send, told);
    tokio::select! {
        sent = &mut send => match sent {
            Ok(()) => told.await,
            Err(Stopped::Caller(e)) => Err(e),
            // The agent stopped reading. Its word is worth more than the broken pipe that follows from it.
            Err(Stopped::Agent(e)) => match tokio::time::timeout(LAST_WORD, told).await {
                Ok(told) => told,
                Err(_) => Err(Error::internal("the image-agent stopped taking the archive", &e)),
            },
        },
        told = &mut told => told,
    }
}
