//! The main job: `bothy run` in a git repository, and the patch that comes back.
#![expect(clippy::unwrap_used, reason = "what both tests share: a failed step is a failed test")]

use bothy_e2e::{host::Host, repo};
use bothy_testkit::require_root;

#[test]
fn run_takes_the_repository_in_and_brings_the_work_back() {
    require_root!();
    in_and_back(Host::start());
}

#[test]
fn run_does_the_same_in_a_machine_that_was_resumed() {
    require_root!();
    let mut host = Host::start_with(&[], |config| config.template.max = 1);
    host.warm(&[]);
    in_and_back(host);
}

/// The command has the user's ssh agent for as long as it runs; without one nothing is made.
#[test]
fn run_lends_its_command_the_users_ssh_agent() {
    require_root!();
    let keys = bothy_testkit::temp_dir();
    let socket = keys.path().join("agent");
    let name = socket.to_str().unwrap().to_owned();
    let mut host = Host::start_with(&[("SSH_AUTH_SOCK", &name)], |config| config.template.max = 1);
    let dir = repo::sample(&host.scratch());
    let args = ["run", ".", "--rm", "--ssh-agent", "--", "sh", "-c", "ssh-add -l; echo $SSH_AUTH_SOCK > s"];
    let refused = host.bothy_in(&dir, args);
    assert!(refused.status == 125 && refused.stderr.contains("there is no agent"), "{refused:?}");
    let mut agent = std::process::Command::new("ssh-agent");
    let agent = host.spawn(agent.args(["-D", "-a", &name]).stdout(std::process::Stdio::null()));
    let key = keys.path().join("key");
    let line = format!(
        "ssh-keygen -q -t ed25519 -N '' -C lent -f {0} && until ssh-add -q {0}; do sleep 0.1; done",
        key.display()
    );
    assert_eq!(host.run_bash(&format!("timeout 30 sh -c \"{line}\"")).status, 0);
    host.warm(&[]);
    let ran = host.bothy_in(&dir, args).ok();
    assert!(ran.stdout.contains(" lent (ED25519)"), "{ran:?}");
    drop(agent);
    host.finish();
}

fn in_and_back(host: Host) {
    let scratch = host.scratch();
    let dir = repo::sample(&scratch);
    let before = repo::git(&dir, &["status", "--porcelain=v2"]);
    let patch = scratch.join("work.patch");

    let line = r#"
        set -e
        test "$(git log --oneline | wc -l)" = 2
        test "$(git log -1 --format=%s)" = second
        grep -q 'changed on the host' 'src/with space.txt'
        test ! -e secret.env
        test "$(git branch --show-current)" = main
        echo three >> README
        git -c user.name=g -c user.email=g@g commit -qam 'in the guest'
        echo new > "new file"; chmod +x "new file"
        ln -s README link
        git rm -q binary
        : > empty
        echo 'to the terminal'; exit 7"#;
    let args =
        ["run", ".", "--rm", "--name", "job", "--patch", patch.to_str().unwrap(), "--", "sh", "-c", line];
    let ran = host.bothy_in(&dir, args);
    assert_eq!(
        (ran.status, ran.stdout.as_str()),
        (7, "to the terminal\n"),
        "{}\n{}",
        ran.stderr,
        host.logs()
    );
    for stage in ["resolve_image", "acquire_network", "launch_vmm", "wait_guest", "personalise"] {
        assert!(ran.stderr.contains(stage), "{stage} is not shown:\n{}", ran.stderr);
    }
    assert!(ran.stderr.contains("secret.env"), "untracked files are named:\n{}", ran.stderr);
    assert!(ran.stderr.contains("apply it: git"), "says how to use the patch:\n{}", ran.stderr);

    assert_eq!(repo::git(&dir, &["status", "--porcelain=v2"]), before, "the host's repository is untouched");
    repo::git(&dir, &["apply", "--check", patch.to_str().unwrap()]);
    repo::git(&dir, &["apply", patch.to_str().unwrap()]);
    assert_eq!(fs_err::read_to_string(dir.join("README")).unwrap(), "one\ntwo\nthree\n");
    assert_eq!(fs_err::read_to_string(dir.join("new file")).unwrap(), "new\n");
    assert_eq!(fs_err::read_link(dir.join("link")).unwrap().to_str(), Some("README"));
    assert!(!dir.join("binary").exists());
    assert_eq!(fs_err::metadata(dir.join("empty")).unwrap().len(), 0);
    let mode = repo::git(&dir, &["ls-files", "--others", "--exclude-standard"]);
    assert!(mode.contains("new file"));

    // --rm took the VM away; the leak check of `finish` sees the rest.
    assert_eq!(host.bothy(["vm", "list", "--json"]).json().as_array().unwrap().len(), 0);
    host.finish();
}

#[test]
fn workspace_prepare_and_export_work_on_a_vm_that_stays() {
    require_root!();
    let host = Host::start();
    let dir = repo::sample(&host.scratch());
    host.create("stay");
    host.bothy(["workspace", "prepare", "stay", dir.to_str().unwrap()]).ok();
    // Once more: nothing is lost by it. Then work is done, and it is refused.
    host.bothy(["workspace", "prepare", "stay", dir.to_str().unwrap()]).ok();
    let status = host.bothy(["workspace", "status", "stay", dir.to_str().unwrap()]).ok().stdout;
    assert!(status.contains("has not moved on"), "{status}");

    // Nothing changed: an empty patch, said so.
    let patch = host.scratch().join("p");
    let nothing = host.bothy(["workspace", "export", "stay", "--output", patch.to_str().unwrap()]).ok();
    assert!(nothing.stdout.contains("nothing changed"), "{nothing:?}");

    // The guest's index and tree are the same before and after an export.
    host.sh("stay", "cd /root/repo && echo staged > s && git add s && echo more >> s && echo u > u").ok();
    let state = "cd /root/repo && git status --porcelain=v2 && sha256sum .git/index && git rev-parse HEAD && git for-each-ref && find .git/objects | sort | sha256sum";
    let before = host.sh("stay", state).ok().stdout;
    host.bothy(["workspace", "export", "stay", "--output", patch.to_str().unwrap()]).ok();
    assert_eq!(host.sh("stay", state).ok().stdout, before);
    let again = host.bothy(["workspace", "prepare", "stay", dir.to_str().unwrap()]);
    assert_eq!(again.status, 125, "a second import onto work is refused: {again:?}");
    assert!(again.stderr.contains("would lose 2 changed files (s, u)"), "{}", again.stderr);
    let here = dir.to_str().unwrap();
    let apply = ["workspace", "export", "stay", "--apply", "--repository", here];
    let dirty = host.bothy(apply);
    assert!(dirty.status == 125 && dirty.stderr.contains("changes of its own"), "{dirty:?}");
    repo::git(&dir, &["stash", "-q"]);
    host.bothy(apply).ok();
    assert_eq!(fs_err::read_to_string(dir.join("s")).unwrap(), "staged\nmore\n");
    assert_eq!(fs_err::read_to_string(dir.join("u")).unwrap(), "u\n");

    // Commits as a bundle, which is looked at before it is recommended.
    host.sh("stay", "cd /root/repo && git -c user.name=g -c user.email=g@g commit -qam work").ok();
    let bundle = host.scratch().join("work.bundle");
    let form = ["workspace", "export", "stay", "--format", "bundle", "--repository", here, "-o"];
    let made = host.bothy(form.into_iter().chain([bundle.to_str().unwrap()])).ok();
    assert!(made.stdout.contains("1 commit that change"), "{made:?}");
    repo::git(&dir, &["fetch", "-q", bundle.to_str().unwrap(), "refs/bothy/export:refs/heads/from-bothy"]);
    assert_eq!(repo::git(&dir, &["log", "-1", "--format=%s", "from-bothy"]), "work\n");

    // With force it is replaced, here by a tree that nobody there may write to.
    host.bothy(["workspace", "prepare", "stay", here, "--force", "--readonly", "--branch", "there"]).ok();
    let wrote = host.sh("stay", "cd /root/repo && git branch --show-current && test ! -e u && touch x");
    assert!(wrote.status != 0 && wrote.stdout == "there\n", "{wrote:?}");
    fs_err::write(dir.join("README"), "for nobody\n").unwrap();
    let sync = host.bothy(["workspace", "sync", "stay", here]);
    assert!(sync.status == 125 && sync.stderr.contains("read-only"), "{sync:?}");
    host.bothy(["workspace", "prepare", "stay", here]).ok();
    host.sh("stay", "cd /root/repo && touch x").ok();

    // What the repository pins is installed by what the machine has, if it reaches anything.
    fs_err::write(dir.join("mise.toml"), "[tools]\nnode = '22'\n").unwrap();
    repo::git(&dir, &["add", "mise.toml"]);
    let bootstrap = ["workspace", "prepare", "stay", here, "--force", "--bootstrap"];
    let refused = host.bothy(bootstrap);
    assert!(refused.status == 125 && refused.stderr.contains("bothy vm egress stay open"), "{refused:?}");
    host.sh("stay", "ls /root/repo/x").ok();
    let mise = "printf '#!/bin/sh\\nsleep 1; echo \"$@\" >/root/asked\\n' >/usr/local/bin/mise && chmod +x /usr/local/bin/mise";
    host.sh("stay", mise).ok();
    host.bothy(["vm", "egress", "stay", "open"]).ok();
    let hinted = host.bothy(["workspace", "prepare", "stay", here, "--force"]).ok();
    assert!(hinted.stderr.contains("pinned: node 22 (mise.toml); `--bootstrap` installs that"), "{hinted:?}");
    host.bothy(bootstrap).ok();
    let installed = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(200));
        host.bothy(["workspace", "status", "stay", here]).ok().stdout.contains("tools:  installed")
    });
    assert!(installed && host.sh("stay", "cat /root/asked").ok().stdout == "install -y node@22\n");

    // What changes here goes there; what both changed does not.
    host.sh("stay", "cd /root/repo && echo there > README").ok();
    fs_err::write(dir.join("README"), "here\n").unwrap();
    fs_err::write(dir.join("later"), "new\n").unwrap();
    repo::git(&dir, &["add", "later"]);
    let sync = host.bothy(["workspace", "sync", "stay", here]);
    assert!(sync.status == 1 && sync.stdout.contains("stays as it is there:\n  README"), "{sync:?}");
    assert_eq!(host.sh("stay", "cat /root/repo/README /root/repo/later").ok().stdout, "there\nnew\n");
    let mut watch = host.command("bothy");
    watch.args(["workspace", "sync", "stay", here, "--watch", "--force"]);
    let mut watch = host.spawn(&mut watch);
    let arrived = |content: &str| {
        for _ in 0..300 {
            if host.sh("stay", "cat /root/repo/README").stdout == content {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("{content:?} does not arrive\n{}", host.logs());
    };
    arrived("here\n");
    // Where there is nothing to read for a moment, it looks again.
    fs_err::remove_file(dir.join("README")).unwrap();
    nix::unistd::mkfifo(&dir.join("README"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    fs_err::remove_file(dir.join("README")).unwrap();
    fs_err::write(dir.join("README"), "here again\n").unwrap();
    arrived("here again\n");
    let pid = nix::unistd::Pid::from_raw(watch.inner().id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(watch.inner().wait().unwrap().success());

    host.bothy(["vm", "delete", "stay", "--force"]).ok();
    host.finish();
}
