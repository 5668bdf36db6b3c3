//! The one error envelope. Whatever fails in one process and is told to another, or to a person, is an [`Error`].

use serde::{Deserialize, Serialize};
use std::fmt;

/// Stable machine codes. Scripts match on them, so a code is never renamed; its text form is `snake_case`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request itself is wrong: a malformed name, a size out of range. Repeating it cannot help.
    InvalidArgument,
    /// The thing that was named does not exist.
    NotFound,
    /// A thing of that name exists already.
    AlreadyExists,
    /// The thing is not in a state in which this can be done (exec in a stopped VM).
    FailedPrecondition,
    /// The caller may not do this.
    PermissionDenied,
    /// Something is used up: addresses, disk space, memory, streams.
    ResourceExhausted,
    /// A service or the guest is not there at the moment. Repeating may help.
    Unavailable,
    /// The deadline passed. Whether the work was done is unknown unless the message says so.
    DeadlineExceeded,
    /// The operation was cancelled on request and has been undone.
    Cancelled,
    /// A stage of an operation failed; the message names the stage.
    StageFailed,
    /// A defect or an unexpected answer of the operating system.
    Internal,
    /// A code of a newer peer that this build does not know.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Code::InvalidArgument => "invalid_argument",
            Code::NotFound => "not_found",
            Code::AlreadyExists => "already_exists",
            Code::FailedPrecondition => "failed_precondition",
            Code::PermissionDenied => "permission_denied",
            Code::ResourceExhausted => "resource_exhausted",
            Code::Unavailable => "unavailable",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::Cancelled => "cancelled",
            Code::StageFailed => "stage_failed",
            Code::Internal => "internal",
            Code::Unknown => "unknown",
        })
    }
}

/// An error as it crosses a process boundary.
///
/// `message` is lower case, without a full stop, and says what failed, on what, and why, the causes joined by `: `.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// For machines.
    pub code: Code,
    /// For people: what failed, on what, why.
    pub message: String,
    /// What to do about it, where that is known: one line, commands in backticks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the same request may simply be sent again.
    #[serde(default)]
    pub retryable: bool,
}

impl Error {
    /// An error with `code` and `message`, no hint; retryable only where the code says so by itself.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, retryable: matches!(code, Code::Unavailable) }
    }

    /// The same error with a line on what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error, with the message put behind `what: `.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// An [`Code::Internal`] error from any error, with its whole chain of causes in the message.
    pub fn internal(what: impl fmt::Display, err: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Code::Internal, format!("{what}: {}", chain(err)))
    }

    /// Short for [`Code::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// Short for [`Code::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }
}

/// The message of `err` and of all its sources, joined by `: `.
pub fn chain(err: &(dyn std::error::Error + 'static)) -> String {
    let mut out = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        out.push_str(": ");
        out.push_str(&cause.to_string());
        next = cause.source();
    }
    out
}
