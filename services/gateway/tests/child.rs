//! How `host up` starts services.

use std::process::Command;

#[test]
fn a_service_may_open_as_many_files_as_it_has_streams() {
    // The shell becomes `bothy`, whose parent is then this process.
    let script = format!(
        "ulimit -Sn 256; exec {} host child --parent {} -- sh -c 'ulimit -Sn; ulimit -Hn'",
        env!("CARGO_BIN_EXE_bothy"),
        std::process::id()
    );
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let limits: Vec<u64> = text.lines().map(|line| line.parse().unwrap_or(u64::MAX)).collect();
    let [soft, hard] = limits.as_slice() else {
        unreachable!("{text} {}", String::from_utf8_lossy(&out.stderr))
    };
    assert_eq!(*soft, 65_536.min(*hard), "{text}");
}
