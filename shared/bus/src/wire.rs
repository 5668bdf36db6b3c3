//! What is on the wire beside the payload: header names, the error envelope, and their parsing.

use async_nats::{
    HeaderMap, HeaderValue,
    service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, error::Error as ServiceError},
};
use bothy_contract::{Code, Error, RequestId};
use bothy_telemetry::{TRACEPARENT, TRACESTATE};
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DEADLINE: &str = "bothy-deadline";
const REQUEST_ID: &str = "bothy-request-id";
const ERROR: &str = "bothy-error";

/// A message that is longer is cut: headers count towards the server's payload limit.
const LONGEST_MESSAGE: usize = 16 * 1024;

/// The payload of a request, reply or event.
pub(crate) fn encode<T: Serialize>(what: &str, value: &T) -> Result<Bytes, Error> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|e| Error::internal(format!("cannot encode the {what}"), &e))
}

/// A value from a payload; `code` is that of the error: who sent it decides whose fault it is.
pub(crate) fn decode<T: DeserializeOwned>(what: &str, payload: &[u8], code: Code) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|e| Error::new(code, format!("the {what} cannot be read: {e}")))
}

fn put(headers: &mut HeaderMap, name: &str, value: &str) {
    // A value with a line break cannot be sent; nothing of ours has one.
    if let Ok(value) = value.parse::<HeaderValue>() {
        headers.insert(name, value);
    }
}

fn get<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers.and_then(|h| h.get(name)).map(HeaderValue::as_str)
}

/// Puts the current span's trace context into `headers`.
pub(crate) fn put_trace(headers: &mut HeaderMap) {
    bothy_telemetry::inject(&mut |name, value| put(headers, name, &value));
}

/// Makes `span` a child of the span that `headers` name.
pub(crate) fn set_parent(span: &tracing::Span, headers: Option<&HeaderMap>) {
    bothy_telemetry::set_parent(span, get(headers, TRACEPARENT), get(headers, TRACESTATE));
}

/// The headers of a request.
pub(crate) fn request_headers(id: RequestId, deadline: SystemTime) -> HeaderMap {
    let mut headers = HeaderMap::new();
    put(&mut headers, REQUEST_ID, &id.to_string());
    let ms = deadline.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    put(&mut headers, DEADLINE, &ms.to_string());
    put_trace(&mut headers);
    headers
}

/// The request id that a request carries, if it does.
pub(crate) fn request_id(headers: Option<&HeaderMap>) -> Result<Option<RequestId>, Error> {
    get(headers, REQUEST_ID)
        .map(|text| text.parse())
        .transpose()
        .map_err(|e| Error::invalid(format!("the header `{REQUEST_ID}` is not a UUID: {e}")))
}

/// The deadline that a request carries, if it does.
pub(crate) fn deadline(headers: Option<&HeaderMap>) -> Result<Option<SystemTime>, Error> {
    let Some(text) = get(headers, DEADLINE) else { return Ok(None) };
    text.parse()
        .ok()
        .and_then(|ms| UNIX_EPOCH.checked_add(Duration::from_millis(ms)))
        .map(Some)
        .ok_or_else(|| Error::invalid(format!("the header `{DEADLINE}` is not a time in Unix milliseconds")))
}

/// The parts of an error reply: what NATS' tools show, and our envelope as a header.
pub(crate) fn error_reply(error: &Error) -> (ServiceError, HeaderMap) {
    let mut error = error.clone();
    if error.message.len() > LONGEST_MESSAGE {
        let end = error.message.floor_char_boundary(LONGEST_MESSAGE);
        error.message.truncate(end);
        error.message.push_str(" ...");
    }
    let mut headers = HeaderMap::new();
    // JSON has no raw line breaks.
    if let Ok(json) = serde_json::to_string(&error) {
        put(&mut headers, ERROR, &json);
    }
    (ServiceError { status: error.code.to_string(), code: http_status(error.code) }, headers)
}

/// The error in a reply, where it is one.
pub(crate) fn error_of(headers: Option<&HeaderMap>) -> Option<Error> {
    let status = get(headers, NATS_SERVICE_ERROR);
    if status.is_none() && get(headers, NATS_SERVICE_ERROR_CODE).is_none() {
        return None;
    }
    Some(get(headers, ERROR).and_then(|json| serde_json::from_str(json).ok()).unwrap_or_else(|| {
        Error::new(Code::Unknown, format!("the service failed: {}", status.unwrap_or("no reason given")))
    }))
}

/// The number beside a code, as HTTP has it: what `nats` shows in its statistics.
fn http_status(code: Code) -> usize {
    match code {
        Code::InvalidArgument => 400,
        Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::AlreadyExists => 409,
        Code::FailedPrecondition => 412,
        Code::ResourceExhausted => 429,
        Code::Cancelled => 499,
        Code::Unavailable => 503,
        Code::DeadlineExceeded => 504,
        Code::StageFailed | Code::Internal | Code::Unknown => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire_whatever_is_in_it() {
        let error = Error::new(Code::NotFound, "no VM \"ä\"\r\nX: y\n").hint("try `bothy vm list`");
        let (service, headers) = error_reply(&error);
        assert_eq!((service.code, service.status.as_str()), (404, "not_found"));
        assert!(error_of(Some(&headers)).is_none(), "only the service-error headers make it an error");
        let mut headers = headers;
        put(&mut headers, NATS_SERVICE_ERROR, &service.status);
        assert_eq!(error_of(Some(&headers)).unwrap(), error);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let error = Error::invalid("ä".repeat(LONGEST_MESSAGE));
        let (_, mut headers) = error_reply(&error);
        put(&mut headers, NATS_SERVICE_ERROR, "x");
        let back = error_of(Some(&headers)).unwrap();
        assert!(back.message.len() < LONGEST_MESSAGE + 8 && back.message.ends_with("ä ..."));
    }

    #[test]
    fn a_foreign_service_error_is_still_an_error() {
        let mut headers = HeaderMap::new();
        put(&mut headers, NATS_SERVICE_ERROR, "boom");
        assert_eq!(error_of(Some(&headers)).unwrap().code, Code::Unknown);
    }

    #[test]
    fn headers_are_read_back_and_bad_ones_refused() {
        let id = RequestId::new();
        let at = UNIX_EPOCH + Duration::from_millis(1_800_000_000_123);
        let headers = request_headers(id, at);
        assert_eq!(request_id(Some(&headers)).unwrap(), Some(id));
        assert_eq!(deadline(Some(&headers)).unwrap(), Some(at));
        for bad in ["", "-1", "x", "99999999999999999999999"] {
            let mut headers = HeaderMap::new();
            put(&mut headers, DEADLINE, bad);
            assert!(deadline(Some(&headers)).is_err(), "{bad:?}");
            put(&mut headers, REQUEST_ID, bad);
            assert!(request_id(Some(&headers)).is_err(), "{bad:?}");
        }
    }
}
