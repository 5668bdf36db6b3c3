//! Lines to the kernel log, which is the guest's console log: the only place to speak to before the channel is up.

use std::io::Write;

/// Writes a line at level "error", which also shows on a console that was booted with `quiet`.
pub fn error(text: &str) {
    write(3, text);
}

/// Writes a line at level "info": in `dmesg`, not on a quiet console.
pub fn info(text: &str) {
    write(6, text);
}

/// For a person who started the program by hand.
#[expect(clippy::print_stderr, reason = "there is no guest and no kernel log to speak to")]
pub fn say_or_stderr(text: &str) {
    eprintln!("{text}");
}

/// One write is one record (Documentation/ABI/testing/dev-kmsg). Where it fails there is nobody left to tell.
fn write(level: u8, text: &str) {
    let open = |path: &str| fs_err::OpenOptions::new().write(true).open(path);
    // For a moment of the boot, /dev is in the new root already and PID 1 is not.
    if let Ok(mut kmsg) = open("/dev/kmsg").or_else(|_| open("/newroot/dev/kmsg")) {
        let line = format!("<{level}>bothy-guest: {}\n", text.replace('\n', "; "));
        let _ = kmsg.write(line.as_bytes());
    }
}
