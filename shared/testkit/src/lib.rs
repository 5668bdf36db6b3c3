//! Private hosts for tests: network namespaces, directories with short paths, free ports, child processes that do not
//! outlive their test, and where the workspace's binaries are. Only tests depend on this crate, so its functions panic
//! where the machine cannot give what a test needs: the test then fails, with the reason.
#![expect(clippy::expect_used, reason = "test support: a failed set-up is a failed test")]

mod child;
mod netns;
mod root;

pub use child::ChildGuard;
pub use netns::Netns;
pub use root::have_root;
pub use tempfile::TempDir;

use std::{
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
};

/// A directory of its own with a path short enough for sockets below it (unix(7): 108 bytes), removed on drop.
///
/// # Panics
/// Where `/tmp` cannot be written to.
pub fn temp_dir() -> TempDir {
    tempfile::Builder::new().prefix("bt").rand_bytes(8).tempdir_in("/tmp").expect("a directory in /tmp")
}

/// A TCP port on 127.0.0.1 that nobody listened on a moment ago, in the namespace of the calling thread.
///
/// # Panics
/// Where no port is free.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// The directory that cargo puts this build's binaries into: the one above the running test's `deps`.
///
/// # Panics
/// Where the test does not run from a target directory.
pub fn target_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    let dir = test.parent().expect("a directory");
    let dir = if dir.ends_with("deps") { dir.parent().expect("a profile directory") } else { dir };
    dir.to_owned()
}

/// The workspace binary `name`. A test of the same package should use `env!("CARGO_BIN_EXE_<name>")`, which cargo builds
/// for it; this is for binaries of other packages.
///
/// # Panics
/// Where the binary is not built, saying which command builds it.
pub fn binary(name: &str) -> PathBuf {
    let path = target_dir().join(name);
    assert!(path.is_file(), "{} is not built: run `cargo build --bin {name}` first", path.display());
    path
}
