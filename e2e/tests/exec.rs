//! `vm exec` as a user and a script see it: exit statuses, streams, stdin, a terminal, signals. One VM serves all.

use bothy_e2e::host::Host;
use bothy_testkit::require_root;
use std::{
    io::{Read, Write},
    process::Stdio,
};

#[test]
fn exec_carries_statuses_and_streams_exactly() {
    require_root!();
    let host = Host::start();
    host.create("exec");

    for status in [0, 1, 42, 124, 125, 255] {
        assert_eq!(host.sh("exec", &format!("exit {status}")).status, status);
    }
    assert_eq!(host.sh("exec", "kill -TERM $$").status, 128 + 15);
    assert_eq!(host.bothy(["vm", "exec", "exec", "--", "no-such-command"]).status, 127);
    assert_eq!(host.bothy(["vm", "exec", "exec", "--", "/etc/passwd"]).status, 126);

    let both = host.sh("exec", "echo out; echo err >&2; exit 3");
    assert_eq!((both.status, both.stdout.as_str(), both.stderr.as_str()), (3, "out\n", "err\n"));

    let env =
        host.bothy(["vm", "exec", "-e", "A=b c", "-w", "/tmp", "exec", "--", "sh", "-c", "echo $A; pwd"]);
    assert_eq!(env.ok().stdout, "b c\n/tmp\n");
    assert_eq!(host.bothy(["vm", "exec", "-u", "nobody", "exec", "--", "id", "-un"]).ok().stdout, "nobody\n");

    // Standard input arrives, and so does its end.
    let mut command = host.command("bothy");
    command
        .args(["vm", "exec", "-i", "exec", "--", "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = host.spawn(&mut command);
    let data: Vec<u8> = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    child.inner().stdin.take().unwrap().write_all(&data).unwrap();
    let mut sum = String::new();
    child.inner().stdout.take().unwrap().read_to_string(&mut sum).unwrap();
    let mut expected = std::process::Command::new("sha256sum");
    let mut expected = expected.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    expected.stdin.take().unwrap().write_all(&data).unwrap();
    let expected = String::from_utf8(expected.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(sum, expected);

    // Much output arrives whole and in order.
    let long = host.sh("exec", "seq 1 400000").ok();
    assert_eq!(long.stdout.lines().count(), 400_000);
    assert!(long.stdout.lines().enumerate().all(|(n, line)| line == (n + 1).to_string()));

    // A terminal: what the command sees, and `\r\n` as a terminal makes it.
    let refused = host.bothy(["vm", "exec", "-t", "exec", "--", "true"]);
    assert_eq!(refused.status, 125, "a terminal is not made up where there is none: {refused:?}");
    let bothy = bothy_testkit::binary("bothy");
    let inside = "test -t 0 && test -t 1 && tty && exit 9";
    let line = format!("script -qefc \"{} vm exec -t exec -- sh -c '{inside}'\" /dev/null", bothy.display());
    let tty = host.run_bash(&line);
    assert_eq!(tty.status, 9, "{tty:?}");
    assert!(tty.stdout.contains("/dev/pts/") && tty.stdout.contains("\r\n"), "{tty:?}");

    // A command whose client is gone is ended.
    let mut command = host.command("bothy");
    command.args(["vm", "exec", "exec", "--", "sleep", "987"]).stdout(Stdio::null());
    let mut client = host.spawn(&mut command);
    let wait = |line: &str| {
        for _ in 0..100 {
            if host.sh("exec", line).status == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("`{line}` did not come true");
    };
    wait("pgrep -x sleep");
    client.inner().kill().unwrap();
    wait("! pgrep -x sleep");

    host.bothy(["vm", "delete", "exec", "--force"]).ok();
    host.finish();
}
