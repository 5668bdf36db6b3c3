//! The real command line, alone: what it says and how it ends where no gateway is.
#![expect(clippy::unwrap_used, reason = "a test stops with the line that failed")]

use std::process::Command;

/// Exit status and all that was printed.
fn bothy(args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_bothy"))
        .args(args)
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", dir.path())
        .env("BOTHY_SOCKET", "/nowhere/gateway.sock")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(dir.path().to_str().unwrap(), "[DIR]");
    format!("{}\n{}{}", out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn without_a_gateway() {
    insta::assert_snapshot!(bothy(&["vm", "list"]), @r"
    125
    error: no gateway answers on /nowhere/gateway.sock: No such file or directory (os error 2)
      hint: start the services with `bothy host up`, or name the socket with `--socket`
    ");
    insta::assert_snapshot!(bothy(&["version"]), @r"
    0
    bothy 0.1.0, no gateway on /nowhere/gateway.sock
    ");
    insta::assert_snapshot!(bothy(&["--json", "vm", "show", "web"]), @r#"
    125
    {"error":{"code":"unavailable","hint":"start the services with `bothy host up`, or name the socket with `--socket`","message":"no gateway answers on /nowhere/gateway.sock: No such file or directory (os error 2)","retryable":true}}
    "#);
}

#[test]
fn bad_input_is_refused_before_anything_is_asked() {
    insta::assert_snapshot!(bothy(&["vm", "create", "--cpus", "0"]), @r"
    125
    error: 0 is not a valid number of cpus
      hint: give 1 to 64
    ");
    let repo = bothy(&["run", ".", "--", "true"]);
    assert!(repo.starts_with("125\nerror: ") && repo.contains("git"), "{repo}");
    insta::assert_snapshot!(bothy(&["run", "nowhere", "--", "true"]), @r"
    125
    error: there is no directory nowhere
      hint: name a directory inside a git repository
    ");
    let path = bothy(&["run", ".", "--guest-path", "repo", "--", "true"]);
    assert!(path.contains("\"repo\" is not an absolute path"), "{path}");
    for args in
        [["vm", "create", "--name", "Web"], ["vm", "create", "--memory", "1.5G"], ["vm", "proxy", "web", "0"]]
    {
        assert!(bothy(&args).starts_with("125\n"), "{args:?}");
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    insta::assert_snapshot!(bothy(&["vm", "kill", "web", "--signal", "stop"]), @r"
    125
    error: invalid value 'stop' for '--signal <SIGNAL>': SIGSTOP does not end a process

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(bothy(&["vm", "set", "web"]), @r"
    125
    error: the following required arguments were not provided:
      <--cpus <N>|--memory <SIZE>|--disk <SIZE>|--system-disk <SIZE>|--nat <WHETHER>|--egress <POLICY>|--publish <[ADDR:]HOSTPORT:GUESTPORT>|--unpublish <[ADDR:]HOSTPORT>|--group <NAME>|--no-group <NAME>|--idle <WHAT>|--after <TIME>>

    Usage: bothy vm set --socket <PATH> <--cpus <N>|--memory <SIZE>|--disk <SIZE>|--system-disk <SIZE>|--nat <WHETHER>|--egress <POLICY>|--publish <[ADDR:]HOSTPORT:GUESTPORT>|--unpublish <[ADDR:]HOSTPORT>|--group <NAME>|--no-group <NAME>|--idle <WHAT>|--after <TIME>> <VM>...

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(bothy(&["vm", "delete"]), @r"
    125
    error: the following required arguments were not provided:
      <VM>...

    Usage: bothy vm delete --socket <PATH> <VM>...

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(bothy(&["vm", "stop", "web", "--all"]), @r"
    125
    error: the argument '[VM]...' cannot be used with '--all'

    Usage: bothy vm stop --socket <PATH> <VM>...

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(bothy(&["vm", "prune", "--older-than", "7"]), @r#"
    125
    error: invalid value '7' for '--older-than <AGE>': "7" is not a duration

    For more information, try '--help'.
    "#);
}

#[test]
fn completions_are_printed() {
    assert!(bothy(&["completions", "bash"]).contains("_bothy()"));
}
