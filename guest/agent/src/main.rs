//! `bothy-guest`: PID 1 of the initramfs, and with `agent` as its argument, the agent.

use std::process::ExitCode;

use bothy_guest::{agent, boot, kmsg};

fn main() -> ExitCode {
    let mode = std::env::args_os().nth(1);
    match mode.as_ref().and_then(|mode| mode.to_str()) {
        Some("agent") => match agent::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                kmsg::error(&format!("the agent ends: {error}"));
                ExitCode::FAILURE
            }
        },
        _ if std::process::id() == 1 => boot::run(),
        _ => {
            kmsg::say_or_stderr(
                "bothy-guest is /init of a guest; it does nothing on a machine that runs already",
            );
            ExitCode::from(2)
        }
    }
}
