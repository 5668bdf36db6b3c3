//! What changed on the user's side since the import, into the guest's working tree: both sides are at work in all of these.

use crate::support::{
    TOOLS, assert_untouched, export_repo, fingerprint, framed, git, import_repo, import_with, sync_repo,
    tree_of,
};
use bothy_contract::{Code, Error, workspace::SyncReport};
use bothy_pack::Repository;
use std::{
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

struct Sides {
    tmp: tempfile::TempDir,
    host: PathBuf,
    guest: PathBuf,
}

impl Sides {
    /// A repository with a few files, imported.
    async fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let (host, guest) = (tmp.path().join("host"), tmp.path().join("guest/repo"));
        fs_err::create_dir_all(host.join("dir/deep")).unwrap();
        git(&host, &["init", "-q", "-b", "main"]);
        for name in ["a", "b", "c", "run.sh", "dir/one", "dir/deep/two", "odd\nname"] {
            fs_err::write(host.join(name), format!("{name}: one\n{name}: two\n")).unwrap();
        }
        fs_err::write(host.join(".gitignore"), "*.out\n").unwrap();
        git(&host, &["add", "-A"]);
        git(&host, &["commit", "-qm", "first"]);
        import_repo(&host, &guest, false).await;
        Self { tmp, host, guest }
    }

    /// A directory with a `git` that does `line` first where it is called for `what`.
    fn tools(&self, what: &str, line: &str) -> PathBuf {
        let dir = self.tmp.path().join("tools");
        fs_err::create_dir_all(&dir).unwrap();
        let real = git_path();
        let text = format!("#!/bin/sh\ncase \"$*\" in *'{what}'*) {line} ;; esac\nexec {real} \"$@\"\n");
        fs_err::write(dir.join("git"), text).unwrap();
        fs_err::set_permissions(dir.join("git"), std::fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    async fn sync(&self, force: bool) -> Result<SyncReport, Error> {
        sync_repo(&self.host, &self.guest, self.tmp.path(), force).await
    }

    /// What an export would bring back.
    async fn patch(&self) -> String {
        String::from_utf8(export_repo(&self.guest, self.tmp.path()).await.unwrap().0).unwrap()
    }

    fn host(&self, name: &str, content: &str) {
        fs_err::write(self.host.join(name), content).unwrap();
    }

    fn guest(&self, name: &str, content: &str) {
        fs_err::write(self.guest.join(name), content).unwrap();
    }

    fn in_guest(&self, name: &str) -> String {
        fs_err::read_to_string(self.guest.join(name)).unwrap()
    }
}

fn git_path() -> String {
    let out = std::process::Command::new("sh").args(["-c", "command -v git"]).output().unwrap();
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

fn clean(changed: u64) -> SyncReport {
    SyncReport { changed, ..SyncReport::default() }
}

#[tokio::test]
async fn edits_new_files_deletions_modes_and_renames_arrive_beside_what_the_guest_does() {
    let sides = Sides::new().await;
    assert_eq!(sides.sync(false).await.unwrap(), clean(0));
    let head = git(&sides.guest, &["rev-parse", "HEAD"]);

    sides.guest("c", "the guest's\n");
    sides.guest("mine", "the guest's own\n");
    git(&sides.guest, &["add", "mine"]);
    let index = fs_err::read(sides.guest.join(".git/index")).unwrap();
    sides.host("a", "edited here\n");
    sides.host("new", "new here\n");
    sides.host("not tracked", "stays here\n");
    git(&sides.host, &["add", "new"]);
    fs_err::remove_file(sides.host.join("b")).unwrap();
    fs_err::set_permissions(sides.host.join("run.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    fs_err::remove_dir_all(sides.host.join("dir")).unwrap();
    git(&sides.host, &["mv", "odd\nname", "plain"]);
    symlink("a", sides.host.join("dir")).unwrap();
    git(&sides.host, &["add", "dir"]);
    git(&sides.host, &["commit", "-qm", "a commit that stays here"]);
    // a, new, b, run.sh, dir, dir/one, dir/deep/two, odd, plain
    assert_eq!(sides.sync(false).await.unwrap(), clean(9));
    assert_eq!(sides.in_guest("a"), "edited here\n");
    assert_eq!(sides.in_guest("new"), "new here\n");
    assert!(!sides.guest.join("b").exists() && !sides.guest.join("not tracked").exists());
    assert!(!sides.guest.join("odd\nname").exists() && sides.guest.join("plain").exists());
    assert_eq!(fs_err::metadata(sides.guest.join("run.sh")).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(fs_err::read_link(sides.guest.join("dir")).unwrap(), Path::new("a"));
    assert_eq!(
        (sides.in_guest("c"), sides.in_guest("mine")),
        ("the guest's\n".into(), "the guest's own\n".into())
    );
    // Commits, HEAD and index are the guest's.
    assert_eq!(git(&sides.guest, &["rev-parse", "HEAD"]), head);
    assert_eq!(fs_err::read(sides.guest.join(".git/index")).unwrap(), index);

    // Nothing of it comes back, and all of the guest's does.
    let patch = sides.patch().await;
    let files: Vec<_> = patch.lines().filter(|line| line.starts_with("diff --git")).collect();
    assert_eq!(files, ["diff --git a/c b/c", "diff --git a/mine b/mine"]);
    let before = fingerprint(&sides.guest);
    assert_eq!(sides.sync(false).await.unwrap(), clean(0));
    assert_untouched(&sides.guest, &before);
}

#[tokio::test]
async fn a_file_that_both_sides_changed_stays_and_is_told_until_it_is_forced() {
    let sides = Sides::new().await;
    sides.host("a", "edited here\n");
    sides.host("b", "edited here\n");
    sides.host("c", "edited here\n");
    sides.guest("a", "edited there\n");
    sides.guest("c", "edited here\n");
    fs_err::remove_file(sides.guest.join("b")).unwrap();
    let conflicts = SyncReport { changed: 0, conflicts: 2, names: vec!["a".into(), "b".into()] };
    assert_eq!(sides.sync(false).await.unwrap(), conflicts, "what both changed alike is none");
    assert_eq!(sides.in_guest("a"), "edited there\n");
    assert!(!sides.guest.join("b").exists());
    // It is the same the next time, whatever else comes in; and the guest's side of it is still an export's.
    sides.host("run.sh", "edited here\n");
    assert_eq!(sides.sync(false).await.unwrap(), SyncReport { changed: 1, ..conflicts.clone() });
    assert_eq!(sides.sync(false).await.unwrap(), conflicts);
    let patch = sides.patch().await;
    assert!(
        patch.contains("+edited there") && patch.contains("deleted file") && !patch.contains("edited here"),
        "{patch}"
    );

    let forced = sides.sync(true).await.unwrap();
    assert_eq!((forced.changed, forced.conflicts), (2, 2));
    assert_eq!((sides.in_guest("a"), sides.in_guest("b")), ("edited here\n".into(), "edited here\n".into()));
    assert_eq!(sides.patch().await, "");
    assert_eq!(sides.sync(false).await.unwrap(), clean(0));
}

#[tokio::test]
async fn files_in_the_way_are_conflicts_also_where_the_guest_ignores_them() {
    let sides = Sides::new().await;
    sides.guest("kept.out", "built there\n");
    sides.guest("note", "written there\n");
    fs_err::create_dir(sides.guest.join("place")).unwrap();
    sides.guest("place/file", "written there\n");
    for name in ["kept.out", "note", "place"] {
        sides.host(name, "written here\n");
    }
    git(&sides.host, &["add", "-f", "kept.out", "note", "place"]);
    let report = sides.sync(false).await.unwrap();
    assert_eq!((report.changed, report.conflicts), (0, 3), "{report:?}");
    assert_eq!(report.names, ["kept.out", "note", "place"]);
    assert_eq!(
        (sides.in_guest("kept.out"), sides.in_guest("place/file")),
        ("built there\n".into(), "written there\n".into())
    );
    let report = sides.sync(true).await.unwrap();
    assert_eq!(report.conflicts, 3);
    for name in ["kept.out", "note", "place"] {
        assert_eq!(sides.in_guest(name), "written here\n", "{name}");
    }
}

#[tokio::test]
async fn work_that_went_out_does_not_come_back_as_a_conflict() {
    let sides = Sides::new().await;
    sides.guest("a", "done there\n");
    sides.guest("made", "there\n");
    let patch = sides.tmp.path().join("patch");
    fs_err::write(&patch, sides.patch().await).unwrap();
    git(&sides.host, &["apply", "--index", patch.to_str().unwrap()]);
    sides.host("b", "edited here\n");
    assert_eq!(sides.sync(false).await.unwrap(), clean(1));
    assert_eq!(sides.patch().await, "");
    let trees = [&sides.host, &sides.guest].map(|side| tree_of(side, sides.tmp.path()));
    assert_eq!(trees[0], trees[1]);
}

#[tokio::test]
async fn a_directory_that_the_guest_made_a_link_is_left_alone() {
    let sides = Sides::new().await;
    let outside = sides.tmp.path().join("outside");
    fs_err::create_dir_all(outside.join("deep")).unwrap();
    fs_err::write(outside.join("one"), "not the repository's\n").unwrap();
    fs_err::remove_dir_all(sides.guest.join("dir")).unwrap();
    symlink(&outside, sides.guest.join("dir")).unwrap();
    sides.host("dir/one", "edited here\n");
    sides.host("a", "edited here\n");
    let report = sides.sync(false).await.unwrap();
    assert_eq!((report.changed, report.conflicts), (1, 2), "{report:?}");
    assert_eq!(report.names, ["dir", "dir/one"]);
    assert_eq!(fs_err::read_to_string(outside.join("one")).unwrap(), "not the repository's\n");
    assert!(sides.patch().await.contains("deleted file"), "an export sees the link, too");
}

#[tokio::test]
async fn what_cannot_be_synced_is_refused_and_nothing_changes() {
    let sides = Sides::new().await;
    sides.host("a", "edited here\n");
    let repository = Repository::open(&sides.host).unwrap();
    let now = repository.tracked().unwrap();
    for base in ["", "HEAD", "--all", &"0".repeat(40)] {
        let e = repository.sync(&now, base, None).unwrap_err();
        assert!(matches!(e.code, Code::InvalidArgument | Code::FailedPrecondition), "{base}: {e}");
    }
    let before = fingerprint(&sides.guest);
    let base = git(&sides.host, &["rev-parse", "HEAD"]);
    let mut pack = Vec::new();
    repository.sync(&now, &base, None).unwrap().unwrap().write(&mut pack).unwrap();
    let half = framed(&pack[..pack.len() / 2], true).await;
    assert!(import_with(&sides.guest, &half, false).await.is_err());
    assert_untouched(&sides.guest, &before);
    let frames = framed(&pack, true).await;
    let elsewhere = import_with(&sides.tmp.path().join("nowhere"), &frames, false).await.unwrap_err();
    assert_eq!(elsewhere.code, Code::NotFound, "{elsewhere}");
    git(&sides.guest, &["update-ref", "-d", "refs/bothy/tracked"]);
    let lost = import_with(&sides.guest, &frames, false).await.unwrap_err();
    assert_eq!(lost.code, Code::FailedPrecondition, "{lost}");
    assert_eq!(sides.in_guest("a"), "a: one\na: two\n");
}

#[tokio::test]
async fn a_file_that_is_written_to_meanwhile_is_not_overwritten() {
    let sides = Sides::new().await;
    sides.host("a", "edited here\n");
    sides.host("b", "edited here\n");
    let writes = format!("echo meanwhile > {}", sides.guest.join("b").display());
    let tools = sides.tools("read-tree -m -u", &writes);
    let e = TOOLS.scope(tools, sides.sync(false)).await.unwrap_err();
    assert!(e.retryable && e.message.contains("changed while it was synced"), "{e}");
    assert_eq!((sides.in_guest("a"), sides.in_guest("b")), ("a: one\na: two\n".into(), "meanwhile\n".into()));
    let again = SyncReport { changed: 1, conflicts: 1, names: vec!["b".into()] };
    assert_eq!(sides.sync(false).await.unwrap(), again);
}

/// The files are there and the references are not moved yet: a crash at that moment is no loss, and no conflict.
#[tokio::test]
async fn a_sync_that_is_killed_before_it_ends_is_mended_by_the_next() {
    let sides = Sides::new().await;
    sides.host("a", "edited here\n");
    sides.guest("c", "the guest's\n");
    let tools = sides.tools("update-ref --stdin", "kill -9 $PPID; exit 1");
    assert!(TOOLS.scope(tools, sides.sync(false)).await.is_err());
    assert_eq!(sides.in_guest("a"), "edited here\n");
    sides.host("b", "edited here, too\n");
    assert_eq!(sides.sync(false).await.unwrap(), clean(1));
    let patch = sides.patch().await;
    let files: Vec<_> = patch.lines().filter(|line| line.starts_with("diff --git")).collect();
    assert_eq!(files, ["diff --git a/c b/c"]);
}

/// A tracked file that git cannot read is a reason to look again, not to give up.
#[tokio::test]
async fn files_that_cannot_be_read_are_tried_again() {
    let sides = Sides::new().await;
    fs_err::remove_file(sides.host.join("a")).unwrap();
    nix::unistd::mkfifo(&sides.host.join("a"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let e = sides.sync(false).await.unwrap_err();
    assert!(e.retryable && e.hint.is_some(), "{e}");
}

/// What a guest says was imported chooses only what is left out: no object of the history goes but those of the present tree.
#[tokio::test]
async fn a_guest_that_names_another_commit_gets_nothing_of_the_history() {
    let sides = Sides::new().await;
    sides.host("a", "a secret that was taken out again\n");
    git(&sides.host, &["commit", "-qam", "secret"]);
    let secret = git(&sides.host, &["rev-parse", "HEAD:a"]);
    sides.host("a", "now\n");
    git(&sides.host, &["commit", "-qam", "no secret"]);
    for base in ["HEAD", "HEAD~1", "HEAD~2"] {
        let base = git(&sides.host, &["rev-parse", base]);
        let mut pack = Vec::new();
        let repository = Repository::open(&sides.host).unwrap();
        let now = repository.tracked().unwrap();
        repository.sync(&now, &base, None).unwrap().unwrap().write(&mut pack).unwrap();
        let mut tar = tar::Archive::new(pack.as_slice());
        let mut entry = tar.entries().unwrap().nth(1).unwrap().unwrap();
        assert!(entry.path().unwrap().starts_with("history"));
        let other = sides.tmp.path().join(&base);
        git(sides.tmp.path(), &["init", "-q", other.to_str().unwrap()]);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        assert!(crate::support::git_with(&other, &["unpack-objects", "-q"], &bytes).status.success());
        let has = crate::support::git_with(&other, &["cat-file", "-e", &secret], b"").status.success();
        assert!(!has, "{base}");
    }
}

#[tokio::test]
async fn applied_work_and_a_sync_are_one_tree() {
    let sides = Sides::new().await;
    sides.guest("dir/one", "done there\n");
    sides.host("b", "done here\n");
    sides.sync(false).await.unwrap();
    git(&sides.host, &["commit", "-qam", "here"]);
    let patch = sides.patch().await;
    let file = sides.tmp.path().join("work.patch");
    fs_err::write(&file, &patch).unwrap();
    let repository = Repository::open(&sides.host).unwrap();
    repository.apply(&mut fs_err::File::open(&file).unwrap(), false).unwrap();
    let trees = [&sides.host, &sides.guest].map(|side| tree_of(side, sides.tmp.path()));
    assert_eq!(trees[0], trees[1]);
}
