//! The main job: `bothy run` in a git repository, and the patch that comes back.

use bothy_e2e::{host::Host, repo};
use bothy_testkit::require_root;

#[test]
fn run_takes_the_repository_in_and_brings_the_work_back() {
    require_root!();
    let host = Host::start();
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
    let again = host.bothy(["workspace", "prepare", "stay", dir.to_str().unwrap()]);
    assert_eq!(again.status, 125, "a second import onto a tree that is there is refused: {again:?}");
    assert!(again.stderr.contains("hint"), "{}", again.stderr);

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
    repo::git(&dir, &["apply", patch.to_str().unwrap()]);
    assert_eq!(fs_err::read_to_string(dir.join("s")).unwrap(), "staged\nmore\n");
    assert_eq!(fs_err::read_to_string(dir.join("u")).unwrap(), "u\n");

    host.bothy(["vm", "delete", "stay", "--force"]).ok();
    host.finish();
}
