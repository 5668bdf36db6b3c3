//! Bounds on what operations say.
//!
//! Notes, errors and results hold what guests and tools said. The bus takes no message above a size, and the events of
//! all operations leave by one queue in order: a single one that is too large would hold up those of everybody. So what
//! is too long is cut before it is written.

use bothy_contract::Error;
use serde_json::Value;

/// The longest note, in bytes.
const MAX_NOTE: usize = 1 << 10;
/// The longest message or hint of an error, in bytes: some screens full.
const MAX_MESSAGE: usize = 16 << 10;
/// The largest result, in bytes of JSON.
pub(crate) const MAX_RESULT: usize = 256 << 10;
/// The most that one list of operations says, in bytes of JSON: below what the bus takes as one message.
pub(crate) const MAX_LISTED: usize = 768 << 10;

/// `text` itself, or as much of its start as there is room for, with a mark that it was cut.
fn cut(mut text: String, most: usize) -> String {
    const MARK: &str = "…";
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most.saturating_sub(MARK.len())));
        text.push_str(MARK);
    }
    text
}

/// A note of bounded length.
pub(crate) fn note(text: String) -> String {
    cut(text, MAX_NOTE)
}

/// An error of bounded length.
pub(crate) fn error(error: Error) -> Error {
    Error {
        message: cut(error.message, MAX_MESSAGE),
        hint: error.hint.map(|hint| cut(hint, MAX_MESSAGE)),
        ..error
    }
}

/// The result, unless it is too large: the operation succeeded all the same.
pub(crate) fn result(value: Value) -> Option<Value> {
    let size = value.to_string().len();
    if size <= MAX_RESULT {
        return Some(value);
    }
    tracing::error!(size, most = MAX_RESULT, "the result of an operation is too large and is left out");
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(note("short".to_owned()), "short");
        let long = note("ä".repeat(MAX_NOTE));
        assert!(long.len() <= MAX_NOTE && long.ends_with("ä…"), "{long}");
        let long = error(Error::not_found("x".repeat(1 << 20)).hint("y".repeat(1 << 20)));
        assert_eq!(long.message.len(), MAX_MESSAGE);
        assert_eq!(long.hint.map(|h| h.len()), Some(MAX_MESSAGE));
    }

    #[test]
    fn results_are_whole_or_not_there() {
        assert_eq!(result(Value::from("x")), Some(Value::from("x")));
        assert_eq!(result(Value::from("x".repeat(MAX_RESULT))), None);
    }
}
