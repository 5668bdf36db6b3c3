//! Turning what the operating system says into the one error that leaves this process.

use bothy_contract::{Code, Error, error::chain};
use std::{fmt::Display, io};

/// The error for `what` having failed with `err`. A full disk is told apart, since a person can do something about it.
pub(crate) fn io(what: impl Display, err: &io::Error) -> Error {
    let message = format!("{what}: {}", chain(err));
    match root_kind(err) {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::new(Code::ResourceExhausted, message)
                .hint("free some space where the state directory is (`df -h`), then try again")
        }
        io::ErrorKind::PermissionDenied => Error::new(Code::PermissionDenied, message)
            .hint("the image-agent needs root's rights over its directory and to change owners of disks"),
        io::ErrorKind::NotFound => Error::new(Code::NotFound, message),
        _ => Error::new(Code::Internal, message),
    }
}

/// The kind of the innermost I/O error: `fs_err` and others wrap the one that the kernel gave.
fn root_kind(err: &io::Error) -> io::ErrorKind {
    let inner = err.get_ref().and_then(|e| e.source()).and_then(|e| e.downcast_ref::<io::Error>());
    inner.map_or_else(|| err.kind(), root_kind)
}

/// Runs file work where it does not hold up the others.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .unwrap_or_else(|e| Err(Error::internal("the work ended early", &e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart_from_a_defect() {
        let full = || io::Error::from_raw_os_error(28); // ENOSPC
        let err = io("cannot clone x", &full());
        assert_eq!(err.code, Code::ResourceExhausted);
        assert!(err.hint.is_some() && err.message.starts_with("cannot clone x: No space left"));
        let other = io("cannot clone x", &io::Error::from_raw_os_error(5));
        assert_eq!(other.code, Code::Internal);
        let wrapped = fs_err::write("/dev/full", [0; 1]).unwrap_err();
        assert_eq!(io("cannot write", &wrapped).code, Code::ResourceExhausted);
    }
}
