//! Repositories in and out: HTTP bodies on the caller's side, framed ticket streams on the workspace-agent's.
//!
//! A body that ends too soon must never look whole. Towards the agent the end is an `E` frame, which is sent only
//! after the body's own end. Towards the caller the end is the trailer [`REPORT_TRAILER`] (RFC 9110 section 6.5):
//! when the agent fails midway the connection is cut without it. What fails before the first byte is a plain error.

use super::{ApiError, Gateway, Peer, error::Query};
use crate::api::REPORT_TRAILER;
use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{
        HeaderMap, HeaderValue,
        header::{CONTENT_TYPE, TRAILER},
    },
    response::Response,
};
use bothy_contract::{
    Code, Error,
    methods::{WorkspaceExportOpen, WorkspaceImportOpen},
    workspace::{ExportFormat, ExportReport, ImportReport, OpenExport, OpenImport},
};
use bothy_tickets::{Frame, FrameReader, FrameWriter};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body_util::StreamBody;
use hyper::body::Frame as BodyFrame;
use serde::Deserialize;
use std::{io, time::Duration};
use tokio::net::unix::OwnedReadHalf;

/// How long an agent that stopped reading a pack may take to say why.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Where a repository is where nothing else is said.
const DEFAULT_PATH: &str = "/root/repo";

#[derive(Deserialize)]
pub(crate) struct ImportQuery {
    #[serde(default = "default_path")]
    guest_path: String,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    readonly: bool,
}

#[derive(Deserialize)]
pub(crate) struct ExportQuery {
    #[serde(default = "default_path")]
    guest_path: String,
    #[serde(default)]
    format: ExportFormat,
    #[serde(default)]
    base: Option<String>,
}

fn default_path() -> String {
    DEFAULT_PATH.to_owned()
}

fn too_short(what: &str) -> Error {
    Error::new(Code::Unavailable, format!("the {what} ended before it was whole"))
}

pub(crate) async fn import(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Result<Json<ImportReport>, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request =
        OpenImport { vm: vm.id, guest_path: query.guest_path, force: query.force, readonly: query.readonly };
    let ticket = gateway.call::<WorkspaceImportOpen>(&request).await?;
    let (read, write) = bothy_tickets::connect(&ticket).await?.into_split();
    let mut answer = FrameReader::new(read);
    let mut pack = FrameWriter::new(write);
    let send = async {
        let mut body = body.into_data_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|e| Stopped::Caller(too_short("pack").context(e)))?;
            pack.data(&piece).await.map_err(Stopped::Agent)?;
        }
        // The end carries a report in every stream; what a pack has to say is in the pack.
        pack.end(&serde_json::json!({})).await.map_err(Stopped::Agent)
    };
    let told = answer.report::<ImportReport>();
    tokio::pin!(send, told);
    let report = tokio::select! {
        sent = &mut send => match sent {
            Ok(()) => told.await,
            Err(Stopped::Caller(e)) => Err(e),
            // The agent stopped reading. Its word is worth more than the broken pipe that follows from it.
            Err(Stopped::Agent(e)) => match tokio::time::timeout(LAST_WORD, told).await {
                Ok(told) => told,
                Err(_) => Err(Error::internal("the workspace-agent stopped taking the pack", &e)),
            },
        },
        told = &mut told => told,
    };
    Ok(Json(report?))
}

/// Who ended the sending of a pack.
enum Stopped {
    Caller(Error),
    Agent(io::Error),
}

fn parse<T: serde::de::DeserializeOwned>(report: serde_json::Value) -> Result<T, Error> {
    serde_json::from_value(report)
        .map_err(|e| Error::internal("the workspace-agent's report makes no sense", &e))
}

pub(crate) async fn export(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(vm): Path<String>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, ApiError> {
    let vm = gateway.vm(&peer, &vm).await?;
    let request =
        OpenExport { vm: vm.id, guest_path: query.guest_path, format: query.format, base: query.base };
    let ticket = gateway.call::<WorkspaceExportOpen>(&request).await?;
    // The write half is kept until the end: closing it could look like a caller that went.
    let (read, write) = bothy_tickets::connect(&ticket).await?.into_split();
    let mut frames = FrameReader::new(read);
    let first = frames.next().await?;
    let body = Body::new(StreamBody::new(patch(first, frames).map(move |frame| {
        let _keep = &write;
        frame
    })));
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/x-patch"));
    response.headers_mut().insert(TRAILER, HeaderValue::from_static(REPORT_TRAILER));
    Ok(response)
}

/// The body: data until the report, which becomes the trailer. An error ends it without one, which cuts the connection.
fn patch(
    first: Frame,
    frames: FrameReader<OwnedReadHalf>,
) -> impl Stream<Item = Result<BodyFrame<Bytes>, Error>> + Send {
    futures::stream::try_unfold(Some((Some(first), frames)), |state| async move {
        let Some((first, mut frames)) = state else { return Ok(None) };
        let frame = match first {
            Some(frame) => frame,
            None => frames.next().await.inspect_err(|error| tracing::warn!(%error, "an export broke off"))?,
        };
        match frame {
            Frame::Data(data) => Ok(Some((BodyFrame::data(data), Some((None, frames))))),
            Frame::End(report) => {
                let report: ExportReport = parse(report)?;
                let text = serde_json::to_string(&report)
                    .map_err(|e| Error::internal("cannot write the export's report", &e))?;
                let value = HeaderValue::try_from(text)
                    .map_err(|e| Error::internal("cannot send the export's report", &e))?;
                let mut trailers = HeaderMap::new();
                trailers.insert(REPORT_TRAILER, value);
                Ok(Some((BodyFrame::trailers(trailers), None)))
            }
        }
    })
}
