//! Operations of all services that run any, as one list; and their events, from the first on, as server-sent events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use super::{ApiError, Gateway, Peer, error::Query};
use axum::{
    Json,
    extract::{Path, State},
    http::HeaderMap,
    response::sse::{Event, KeepAlive, Sse},
};
use bothy_contract::{
    Code, Error, OpId, Service,
    methods::{ImageOpCancel, ImageOpList, ImageOpShow, VmOpCancel, VmOpList, VmOpShow},
    op::{OpEventKind, OpList, OpRecord, OpRef},
};
use futures::{
    Stream, StreamExt,
    future::{Either, select},
};
use serde::Deserialize;
use std::{pin::pin, time::Duration};

/// How often a quiet event stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
pub(crate) struct ListQuery {
    #[serde(default = "default_limit")]
    limit: u32,
}

fn default_limit() -> u32 {
    50
}

pub(crate) async fn list(
    State(gateway): State<Gateway>,
    peer: Peer,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<OpRecord>>, ApiError> {
    // A caller's own operations may be behind others', so the services are asked for all that they give.
    let request = OpList { limit: 200 };
    let (vm, image) = tokio::join!(gateway.call::<VmOpList>(&request), gateway.call::<ImageOpList>(&request));
    let mut ops = vm?;
    ops.append(&mut image?);
    ops.retain(|op| peer.owns(op.owner));
    ops.sort_by_key(|op| std::cmp::Reverse(op.id));
    ops.truncate(usize::try_from(query.limit).unwrap_or(usize::MAX));
    Ok(Json(ops))
}

/// The operation, whoever runs it, if it is the caller's.
async fn find(gateway: &Gateway, peer: &Peer, text: &str) -> Result<OpRecord, Error> {
    let missing = || {
        Error::not_found(format!("there is no operation {text:?}"))
            .hint("`bothy op list` shows the newest ones")
    };
    let op: OpId = text.parse().map_err(|_| missing())?;
    let request = OpRef { op };
    let (vm, image) = (pin!(gateway.call::<VmOpShow>(&request)), pin!(gateway.call::<ImageOpShow>(&request)));
    // The first that has it: a service that hangs keeps nobody from another's operations.
    let found = match select(vm, image).await {
        Either::Left((Ok(op), _)) | Either::Right((Ok(op), _)) => Ok(op),
        Either::Left((Err(e), other)) => other.await.map_err(|also| graver(e, also)),
        Either::Right((Err(e), other)) => other.await.map_err(|also| graver(e, also)),
    };
    let found = found.map_err(|e| if e.code == Code::NotFound { missing() } else { e })?;
    if peer.owns(found.owner) { Ok(found) } else { Err(missing()) }
}

/// The one that says more than that there is no such operation.
fn graver(a: Error, b: Error) -> Error {
    if a.code == Code::NotFound { b } else { a }
}

pub(crate) async fn show(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(op): Path<String>,
) -> Result<Json<OpRecord>, ApiError> {
    Ok(Json(find(&gateway, &peer, &op).await?))
}

pub(crate) async fn cancel(
    State(gateway): State<Gateway>,
    peer: Peer,
    headers: HeaderMap,
    Path(op): Path<String>,
) -> Result<Json<OpRecord>, ApiError> {
    let op = find(&gateway, &peer, &op).await?;
    let request = OpRef { op: op.id };
    Ok(Json(match op.service {
        Service::Image => gateway.change::<ImageOpCancel>(&peer, &headers, &request).await?,
        _ => gateway.change::<VmOpCancel>(&peer, &headers, &request).await?,
    }))
}

/// Each event's `id` is its sequence number, its `event` the kind's token, its `data` the `OpEvent`. The stream ends
/// after `finished`. An `event: error` with an `Error` ends it early: watch again.
pub(crate) async fn events(
    State(gateway): State<Gateway>,
    peer: Peer,
    Path(op): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, axum::Error>>>, ApiError> {
    let op = find(&gateway, &peer, &op).await?;
    let events = gateway.bus.watch_op(op.id).await?;
    let mut over = false;
    let events = events
        .take_while(move |event| {
            let more = !over;
            over |= match event {
                Ok(event) => matches!(event.what, OpEventKind::Finished { .. }),
                Err(_) => true,
            };
            std::future::ready(more)
        })
        .map(|event| match event {
            Ok(event) => {
                Event::default().id(event.seq.to_string()).event(event.what.token()).json_data(&event)
            }
            Err(error) => Event::default().event("error").json_data(&error),
        });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}
