//! SHA-256 of whole files, with a beat for those who wait: hundreds of MiB take a moment, and may be stopped.

use crate::fault;
use bothy_contract::Error;
use sha2::{Digest as _, Sha256};
use std::{io::Read as _, path::Path};

/// Told of bytes that were gone through. Its error stops the work.
pub(crate) type Beat<'a> = &'a (dyn Fn(u64) -> Result<(), Error> + Send + Sync);

/// A beat that goes on for ever.
pub(crate) fn on(_: u64) -> Result<(), Error> {
    Ok(())
}

/// What is read at once.
const CHUNK: usize = 1 << 20;

/// The SHA-256 of the file at `path`, in lower-case hex.
pub(crate) fn of_file(path: &Path, beat: Beat<'_>) -> Result<String, Error> {
    let failed =
        |e: std::io::Error| fault::io(format!("cannot compute the digest of {}", path.display()), &e);
    let mut file = fs_err::File::open(path).map_err(failed)?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = file.read(&mut buffer).map_err(failed)?;
        if n == 0 {
            return Ok(hex::encode(sha.finalize()));
        }
        sha.update(buffer.get(..n).unwrap_or_default());
        beat(n as u64)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_digest_tells_how_far_it_is_and_can_be_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs_err::write(&path, b"abc").unwrap();
        // FIPS 180, appendix A.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_file(&path, &on).unwrap(), abc);
        fs_err::write(&path, vec![0; 3 * CHUNK]).unwrap();
        let told = AtomicU64::new(0);
        let beat = |n| {
            if told.fetch_add(n, Ordering::Relaxed) < CHUNK as u64 {
                Ok(())
            } else {
                Err(Error::invalid("stop"))
            }
        };
        assert_eq!(of_file(&path, &beat).unwrap_err().message, "stop");
        assert_eq!(told.into_inner(), 2 * CHUNK as u64);
    }
}
