//! What comes back from a hostile guest, onto a real repository by real git.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::Code;
use bothy_pack::{EXPORT_REF, Repository};
use std::{
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

fn try_git(dir: &Path, args: &[&str]) -> std::process::Output {
    Command::new("git")
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs([("GIT_CONFIG_NOSYSTEM", "1"), ("GIT_CONFIG_GLOBAL", "/dev/null")])
        .envs([("GIT_AUTHOR_NAME", "t"), ("GIT_AUTHOR_EMAIL", "t@t")])
        .envs([("GIT_COMMITTER_NAME", "t"), ("GIT_COMMITTER_EMAIL", "t@t")])
        .args(args)
        .output()
        .unwrap()
}

fn git(dir: &Path, args: &[&str]) -> String {
    let out = try_git(dir, args);
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A repository with files, and a clone of it that plays the guest's.
fn two(tmp: &Path) -> (PathBuf, PathBuf) {
    let (host, guest) = (tmp.join("host"), tmp.join("guest"));
    fs_err::create_dir_all(host.join("dir")).unwrap();
    git(&host, &["init", "-q", "-b", "main"]);
    fs_err::write(host.join("a"), "1\n2\n3\n4\n5\n6\n7\n8\n").unwrap();
    fs_err::write(host.join("dir/b"), "b\n").unwrap();
    git(&host, &["add", "-A"]);
    git(&host, &["commit", "-qm", "first"]);
    git(tmp, &["clone", "-q", host.to_str().unwrap(), "guest"]);
    (host, guest)
}

/// What an export of `guest` would be.
fn patch_of(guest: &Path) -> fs_err::File {
    git(guest, &["add", "-A"]);
    let diff = ["diff", "--cached", "--binary", "--full-index", "-M", "origin/main"];
    file(&try_git(guest, &diff).stdout)
}

fn file(content: &[u8]) -> fs_err::File {
    let mut file = fs_err::File::from_parts(tempfile::tempfile().unwrap(), "patch");
    file.write_all(content).unwrap();
    file
}

fn new_file(name: &str) -> String {
    format!(
        "diff --git a/{name} b/{name}\nnew file mode 100644\nindex 0..1\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+x\n"
    )
}

#[test]
fn work_is_applied_without_hooks_or_filters() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest) = two(tmp.path());
    // Programs of the user's own configuration, which a patch's attributes could aim at any file.
    let (ran, program) = (tmp.path().join("ran"), tmp.path().join("program"));
    fs_err::write(&program, format!("#!/bin/sh\necho \"$0 $*\" >>{}\ncat\n", ran.display())).unwrap();
    fs_err::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let path = program.to_str().unwrap();
    for key in
        ["filter.f=x.clean", "filter.f=x.smudge", "filter.p.process", "merge.m.driver", "diff.d.command"]
    {
        git(&host, &["config", key, path]);
    }
    git(&host, &["config", "filter.p.required", "true"]);
    git(&host, &["config", "apply.whitespace", "fix"]);
    for hook in ["post-index-change", "pre-applypatch", "post-checkout"] {
        fs_err::create_dir_all(host.join(".git/hooks")).unwrap();
        fs_err::copy(&program, host.join(".git/hooks").join(hook)).unwrap();
    }
    fs_err::write(guest.join(".gitattributes"), "* filter=f=x merge=m diff=d\nb filter=p\n").unwrap();
    fs_err::write(guest.join("a"), "1\n2\n3 \n4\n5\n6\n7\n8\n").unwrap();
    fs_err::write(guest.join("dir/b"), "b2\n").unwrap();
    fs_err::write(guest.join("bin"), [0, 255, 1, 254]).unwrap();
    symlink("/etc", guest.join("link")).unwrap();
    let mut patch = patch_of(&guest);
    for merge in [false, true] {
        let applied = Repository::open(&host).unwrap().apply(&mut patch, merge).unwrap();
        assert_eq!((applied.patch.files, applied.conflicts.len()), (5, 0));
        assert!(applied.warnings[0].contains(".gitattributes"));
        assert!(!ran.exists(), "{}", fs_err::read_to_string(&ran).unwrap());
        assert_eq!(fs_err::read_to_string(host.join("a")).unwrap(), "1\n2\n3 \n4\n5\n6\n7\n8\n");
        assert_eq!(fs_err::read(host.join("bin")).unwrap(), [0, 255, 1, 254]);
        assert_eq!(fs_err::read_link(host.join("link")).unwrap().to_str(), Some("/etc"));
        drop(try_git(
            &host,
            &[
                "-c",
                "core.hooksPath=/dev/null",
                "-c",
                "filter.p.required=no",
                "-c",
                "filter.p.process=",
                "reset",
                "-q",
                "--hard",
            ],
        ));
        git(&host, &["clean", "-qfd"]);
        drop(fs_err::remove_file(&ran));
    }
}

#[test]
fn a_tree_with_changes_is_left_alone_unless_they_are_merged() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest) = two(tmp.path());
    fs_err::write(guest.join("a"), "1\n2\n3\n4\n5\n6\n7\neight\n").unwrap();
    let mut patch = patch_of(&guest);
    let repo = Repository::open(&host).unwrap();
    fs_err::write(host.join("dir/b"), "mine\n").unwrap();
    let e = repo.apply(&mut patch, false).unwrap_err();
    assert!(e.code == Code::FailedPrecondition && e.message.contains("dir/b") && e.hint.is_some(), "{e}");
    assert!(git(&host, &["diff", "--name-only"]) == "dir/b");
    // Other files than those of the patch may have changes, and the same file may have commits.
    fs_err::write(host.join("a"), "one\n2\n3\n4\n5\n6\n7\n8\n").unwrap();
    git(&host, &["commit", "-qm", "mine", "a"]);
    assert_eq!(repo.apply(&mut patch, true).unwrap().conflicts, Vec::<String>::new());
    assert_eq!(fs_err::read_to_string(host.join("a")).unwrap(), "one\n2\n3\n4\n5\n6\n7\neight\n");
    assert_eq!(fs_err::read_to_string(host.join("dir/b")).unwrap(), "mine\n");
    git(&host, &["reset", "-q", "--hard"]);
    // What cannot be merged is left as a conflict, and said so.
    fs_err::write(host.join("a"), "1\n2\n3\n4\n5\n6\n7\nacht\n").unwrap();
    git(&host, &["commit", "-qam", "mine again"]);
    assert_eq!(repo.apply(&mut patch, true).unwrap().conflicts, ["a"]);
    let e = repo.apply(&mut patch, true).unwrap_err();
    assert!(e.message.contains("unmerged files: a"), "{e}");
    git(&host, &["reset", "-q", "--hard"]);
    let e = repo.apply(&mut patch, false).unwrap_err();
    assert!(e.message.contains("nothing was applied") && e.hint.unwrap().contains("--3way"));
    assert_eq!(git(&host, &["status", "--porcelain"]), "");
}

#[test]
fn a_patch_never_leads_out_of_the_repository() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest) = two(tmp.path());
    let outside = tmp.path().join("outside");
    fs_err::create_dir_all(outside.join("sub")).unwrap();
    // Links of the user's: one that git knows, one that it ignores; and a repository inside the repository.
    symlink(&outside, host.join("known")).unwrap();
    fs_err::write(host.join(".gitignore"), "ignored\ninner\n").unwrap();
    git(&host, &["add", "-A"]);
    git(&host, &["commit", "-qm", "link"]);
    symlink(&outside, host.join("ignored")).unwrap();
    fs_err::create_dir_all(host.join("inner/.git")).unwrap();
    let repo = Repository::open(&host).unwrap();
    for (name, why) in [
        ("known/x", "symbolic link known"),
        ("ignored/sub/x", "symbolic link ignored"),
        ("inner/x", "another repository, inner"),
        (".git/hooks/x", "`.git`"),
        ("dir/../../x", "not inside"),
    ] {
        for merge in [false, true] {
            let e = repo.apply(&mut file(new_file(name).as_bytes()), merge).unwrap_err();
            assert!(e.message.contains(why), "{name}: {e}");
        }
    }
    // One that the patch makes first; also where only a file system that folds case would follow it.
    for (link, below) in [("l", "l/x"), ("L", "l/x"), ("\u{c4}", "\u{e4}/x")] {
        let link = format!(
            "diff --git a/{link} b/{link}\nnew file mode 120000\nindex 0..1\n--- /dev/null\n+++ b/{link}\n@@ -0,0 +1 @@\n+{}\n\\ No newline at end of file\n",
            outside.display()
        );
        let e = repo.apply(&mut file(format!("{link}{}", new_file(below)).as_bytes()), false).unwrap_err();
        assert!(e.message.contains("below the symbolic link"), "{e}");
    }
    let claims = "diff --git a/big b/big\nnew file mode 100644\nindex 0..1\nGIT binary patch\nliteral 3000000000\nKcmZQzU|?Wi00IC20RR91\n\n";
    let e = repo.apply(&mut file(claims.as_bytes()), false).unwrap_err();
    assert_eq!(e.code, Code::ResourceExhausted, "{e}");
    assert_eq!(fs_err::read_dir(outside.join("sub")).unwrap().count(), 0);
    assert_eq!(fs_err::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(git(&host, &["status", "--porcelain"]), "");
    // A link that the patch takes away is no danger.
    git(&guest, &["pull", "-q"]);
    fs_err::remove_file(guest.join("known")).unwrap();
    fs_err::create_dir(guest.join("known")).unwrap();
    fs_err::write(guest.join("known/x"), "x\n").unwrap();
    repo.apply(&mut patch_of(&guest), false).unwrap();
    assert!(host.join("known/x").exists() && !outside.join("x").exists());
}

#[test]
fn names_that_differ_by_case_only_are_counted() {
    let patch = [new_file("a/B"), new_file("A/b"), new_file("c")].concat();
    assert_eq!(bothy_pack::inspect_patch(patch.as_bytes()).unwrap().collisions, 1);
    let twice = [new_file("a"), new_file("a")].concat();
    assert_eq!(bothy_pack::inspect_patch(twice.as_bytes()).unwrap().collisions, 0);
}

fn bundle(guest: &Path, args: &[&str]) -> fs_err::File {
    let path = guest.with_extension("bundle");
    let mut all = vec!["bundle", "create", "-q", path.to_str().unwrap()];
    all.extend(args);
    git(guest, &all);
    fs_err::File::open(path).unwrap()
}

#[test]
fn a_bundle_is_unpacked_elsewhere_and_judged() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest) = two(tmp.path());
    for n in 0..3 {
        fs_err::write(guest.join("new"), n.to_string()).unwrap();
        git(&guest, &["add", "-A"]);
        git(&guest, &["commit", "-qm", "work"]);
    }
    git(&guest, &["update-ref", EXPORT_REF, "HEAD"]);
    let repo = Repository::open(&host).unwrap();
    let objects = git(&host, &["count-objects", "-v"]);
    let mut good = bundle(&guest, &[EXPORT_REF, "^origin/main"]);
    let sum = repo.check_bundle(&mut good).unwrap();
    assert_eq!((sum.commits, sum.patch.files, sum.head), (3, 1, git(&guest, &["rev-parse", "HEAD"])));
    assert_eq!(git(&host, &["count-objects", "-v"]), objects, "nothing came into the repository");

    // Not ours, not whole, not on what we have.
    for bad in [bundle(&guest, &["HEAD", "^origin/main"]), bundle(&guest, &["--all"])] {
        let e = repo.check_bundle(&mut { bad }).unwrap_err();
        assert!(e.message.contains("refused") && e.message.contains("not ours"), "{e}");
    }
    let mut whole = fs_err::read(guest.with_extension("bundle")).unwrap();
    assert!(repo.check_bundle(&mut file(b"")).is_err() && repo.check_bundle(&mut file(b"PACK")).is_err());
    bundle(&guest, &[EXPORT_REF, "^origin/main"]);
    whole.clone_from(&fs_err::read(guest.with_extension("bundle")).unwrap());
    whole.truncate(whole.len() - 30);
    let e = repo.check_bundle(&mut file(&whole)).unwrap_err();
    assert!(e.message.contains("not sound"), "{e}");
    let e = repo.check_bundle(&mut bundle(&guest, &[EXPORT_REF, "^HEAD~1"])).unwrap_err();
    assert!(e.message.contains("which") && e.message.contains("does not have"), "{e}");

    // A tree that no working tree should have: made by hand, as `git add` would not.
    let blob = git(&guest, &["rev-parse", "HEAD:new"]);
    for (path, why) in [(".GIT", "not sound"), ("..", "not sound")] {
        let line = format!("100644 blob {blob}\t{path}\n");
        let mut mktree = Command::new("git")
            .current_dir(&guest)
            .args(["mktree"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        mktree.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
        let tree = String::from_utf8(mktree.wait_with_output().unwrap().stdout).unwrap();
        let commit = git(&guest, &["commit-tree", "-p", "origin/main", "-m", "evil", tree.trim()]);
        git(&guest, &["update-ref", EXPORT_REF, &commit]);
        let e = repo.check_bundle(&mut bundle(&guest, &[EXPORT_REF, "^origin/main"])).unwrap_err();
        assert!(e.message.contains(why), "{path}: {e}");
    }
}

#[test]
fn how_the_repository_stands_to_an_import_is_told() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, _) = two(tmp.path());
    let repo = Repository::open(&host).unwrap();
    let (base, tree) = (git(&host, &["rev-parse", "HEAD"]), git(&host, &["rev-parse", "HEAD^{tree}"]));
    let now = || repo.standing(&base, Some(&tree)).unwrap();
    assert_eq!((now().known, now().ahead, now().files_differ), (true, 0, Some(false)));
    fs_err::write(host.join("a"), "changed\n").unwrap();
    fs_err::write(host.join("untracked"), "x\n").unwrap();
    assert_eq!((now().ahead, now().files_differ, now().changed), (0, Some(true), vec!["a".to_owned()]));
    git(&host, &["commit", "-qam", "second"]);
    assert_eq!((now().ahead, now().behind), (1, 0));
    git(&host, &["checkout", "-q", "--orphan", "other"]);
    git(&host, &["commit", "-qm", "other"]);
    assert_eq!((now().ahead, now().behind), (1, 1));
    let unknown = repo.standing(&"1".repeat(40), None).unwrap();
    assert!(!unknown.known && unknown.files_differ.is_none());
    assert!(repo.standing("--all", None).is_err());
}
