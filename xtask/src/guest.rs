//! The static `bothy-guest`: the same target as the host's, with the C library linked in, so that no other toolchain
//! is needed and the file runs in any image.

use crate::say::{Failure, root, step, target};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

/// Builds it; its path comes back.
pub(crate) fn run() -> Result<PathBuf, Failure> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(root())
        .args(["build", "--quiet", "--package", "bothy-guest", "--profile", "guest", "--target", &triple])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .map_err(|e| Failure(format!("cannot start cargo: {e}")))?;
    if !status.success() {
        return Err(Failure(format!("bothy-guest was not built ({status})")));
    }
    let built = target().join(&triple).join("guest/bothy-guest");
    let kib = fs_err::metadata(&built)?.len() / 1024;
    step("guest", format!("{} ({kib} KiB)", built.display()));
    Ok(built)
}
