//! Errors on the way out: the contract's envelope as JSON, with the status that fits its code.

use crate::api;
use axum::{
    Json,
    extract::{
        FromRequest, FromRequestParts, Request,
        rejection::{JsonRejection, QueryRejection},
    },
    http::{Method, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
};
use bothy_contract::{Code, Error};
use serde::de::DeserializeOwned;

/// The error of a handler.
#[derive(Debug)]
pub struct ApiError(pub Error);

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(api::status(self.0.code)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(code = %self.0.code, error = %self.0.message, "a request failed");
        }
        (status, Json(self.0)).into_response()
    }
}

/// A JSON body whose faults are told in the envelope, too. An empty body is `null`.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(e @ JsonRejection::MissingJsonContentType(_)) => {
                Err(Error::invalid(e.body_text()).hint("send `content-type: application/json`").into())
            }
            Err(e) => {
                Err(Error::invalid(format!("the body is not what it should be: {}", e.body_text())).into())
            }
        }
    }
}

/// A query whose faults are told in the envelope, too.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Query::<T>::from_request_parts(parts, state).await.map(|q| Self(q.0)).map_err(
            |e: QueryRejection| {
                Error::invalid(format!("the query is not what it should be: {}", e.body_text())).into()
            },
        )
    }
}

/// Nothing is at this path.
pub(crate) async fn no_route(uri: Uri) -> ApiError {
    Error::not_found(format!("there is nothing at {}", uri.path())).into()
}

/// Something is at this path, but it does not know the method.
pub(crate) async fn no_method(method: Method, uri: Uri) -> Response {
    let error = Error::new(Code::InvalidArgument, format!("{} does not know {method}", uri.path()));
    (StatusCode::METHOD_NOT_ALLOWED, Json(error)).into_response()
}
