//! Tests that need root: run as root, they run; otherwise they say that they were skipped and how to run them.

use nix::unistd::geteuid;
use std::io::Write;

/// The variable that turns a skip into a failure, for CI.
const NO_SKIP: &str = "BOTHY_TEST_NO_SKIP";

/// Whether the process is root. If not, says on stderr that `test` was skipped. Use [`require_root!`](crate::require_root).
///
/// # Panics
/// Without root where `BOTHY_TEST_NO_SKIP=1`: there a skipped test is a failed one.
pub fn have_root(test: &str) -> bool {
    if geteuid().is_root() {
        return true;
    }
    let test = test.trim_end_matches("::here").trim_end_matches("::{{closure}}");
    let message = format!("SKIPPED {test}: needs root; run the tests as root");
    assert!(std::env::var_os(NO_SKIP).is_none_or(|v| v != "1"), "{message}");
    // Not `eprintln!`: the test runner swallows what a passing test prints through the macros, and a skip must be seen.
    let _ = writeln!(std::io::stderr(), "{message}");
    false
}

/// Returns from the test, with a message, where the process is not root; panics there if `BOTHY_TEST_NO_SKIP=1`.
#[macro_export]
macro_rules! require_root {
    () => {
        fn here() {}
        if !$crate::have_root(::std::any::type_name_of_val(&here)) {
            return;
        }
    };
}
