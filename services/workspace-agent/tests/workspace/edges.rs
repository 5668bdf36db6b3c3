//! What a round trip does not meet: refusals, clean-up, hostile configuration, shallow clones, identity.

use crate::support::{
    HostGuest, assert_untouched, export_as, export_repo, fingerprint, framed, git, git_with, import_frames,
    import_repo, packed, tree_of,
};
use bothy_contract::{
    Code, VmId,
    workspace::{ExportFormat, Identity, SyncIdentity},
};
use bothy_workspace_agent::identity::sync;
use std::{os::unix::fs::PermissionsExt, path::Path};

fn repository(dir: &Path) {
    fs_err::create_dir_all(dir).unwrap();
    git(dir, &["init", "-q", "-b", "main"]);
    fs_err::write(dir.join("a"), "one\ntwo\n").unwrap();
    git(dir, &["add", "-A"]);
    git(dir, &["commit", "-qm", "first"]);
}

/// All names below `dir`.
fn names(dir: &Path) -> Vec<std::path::PathBuf> {
    fingerprint(dir).into_keys().collect()
}

#[tokio::test]
async fn a_place_that_is_taken_is_refused_and_stays_as_it_is() {
    let tmp = tempfile::tempdir().unwrap();
    let host = tmp.path().join("host");
    repository(&host);
    let frames = framed(&packed(&host, false).0, true).await;
    let guest = tmp.path().join("guest");
    fs_err::create_dir_all(guest.join("full")).unwrap();
    fs_err::write(guest.join("full/x"), "x").unwrap();
    fs_err::write(guest.join("file"), "x").unwrap();
    fs_err::create_dir(guest.join("empty")).unwrap();
    std::os::unix::fs::symlink("empty", guest.join("link")).unwrap();
    let before = fingerprint(&guest);
    for (place, code) in [
        ("full", Code::AlreadyExists),
        ("file", Code::AlreadyExists),
        ("link", Code::AlreadyExists),
        ("file/below", Code::FailedPrecondition),
    ] {
        let e = import_frames(&guest.join(place), &frames).await.unwrap_err();
        assert_eq!(e.code, code, "{place}: {e}");
        assert!(e.hint.is_some(), "{place}: {e}");
        assert_untouched(&guest, &before);
    }
    assert_eq!(import_frames(Path::new("relative"), &frames).await.unwrap_err().code, Code::InvalidArgument);
    let report = import_frames(&guest.join("empty"), &frames).await.unwrap();
    assert_eq!((report.branch.as_deref(), report.head), (Some("main"), git(&host, &["rev-parse", "HEAD"])));
    assert_eq!(git(&guest.join("empty"), &["status", "--porcelain"]), "");
}

#[tokio::test]
async fn a_pack_that_is_cut_broken_or_too_long_leaves_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest) = (tmp.path().join("host"), tmp.path().join("guest"));
    repository(&host);
    fs_err::write(host.join("a"), "changed\n").unwrap();
    fs_err::create_dir(&guest).unwrap();
    let (pack, _) = packed(&host, false);
    let place = guest.join("new/deeper/repo");

    let cut = framed(&pack, false).await;
    for n in [0, 100, 700, 1600, cut.len()] {
        let e = import_frames(&place, cut.get(..n).unwrap()).await.unwrap_err();
        assert_eq!(e.code, Code::Unavailable, "{n}: {e}");
        assert_eq!(names(&guest).len(), 1, "{n}: {:?}", names(&guest));
    }
    // The whole stream, but a pack that is not what its first entry says.
    let short = framed(pack.get(..2048).unwrap(), true).await;
    let mut wrong = pack.clone();
    let at = wrong.windows(6).position(|w| w == b"-one\n-").unwrap();
    wrong.get_mut(at..at + 4).unwrap().copy_from_slice(b"-ONE");
    let wrong = framed(&wrong, true).await;
    let other = framed(b"no tar at all", true).await;
    for frames in [short, wrong, other] {
        let e = import_frames(&place, &frames).await.unwrap_err();
        assert!(!matches!(e.code, Code::Unavailable), "{e}");
        assert_eq!(names(&guest).len(), 1, "{e}: {:?}", names(&guest));
    }
    // What a killed agent left is swept by the next import.
    fs_err::create_dir_all(guest.join("new/deeper/.bothy-import-0/pack/x")).unwrap();
    import_frames(&place, &framed(&pack, true).await).await.unwrap();
    assert_eq!(fs_err::read_dir(guest.join("new/deeper")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_shallow_clone_comes_in_with_its_boundary_and_own_identity() {
    let tmp = tempfile::tempdir().unwrap();
    let (origin, host, guest) =
        (tmp.path().join("origin"), tmp.path().join("host"), tmp.path().join("guest"));
    repository(&origin);
    for n in 0..5 {
        git(&origin, &["commit", "-q", "--allow-empty", "-m", &n.to_string()]);
    }
    git(tmp.path(), &["clone", "-q", "--depth=2", &format!("file://{}", origin.display()), "host"]);
    git(&host, &["config", "user.name", "Own \"Name\""]);
    import_repo(&host, &guest, false).await;
    assert_eq!(git(&guest, &["rev-list", "--count", "HEAD"]), "2");
    assert_eq!(git(&guest, &["config", "--local", "user.name"]), "Own \"Name\"");
    git(&guest, &["fsck", "--strict"]);
    let head = git(&host, &["rev-parse", "HEAD"]);
    assert_eq!(
        git(&guest, &["rev-parse", "refs/bothy/base", "refs/bothy/import^"]),
        format!("{head}\n{head}")
    );
}

#[tokio::test]
async fn commits_and_all_else_come_out_whatever_the_guests_configuration_says() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) =
        (tmp.path().join("host"), tmp.path().join("guest"), tmp.path().join("scratch"));
    repository(&host);
    fs_err::create_dir(&scratch).unwrap();
    import_repo(&host, &guest, false).await;
    let (patch, report) = export_repo(&guest, &scratch).await.unwrap();
    assert_eq!((patch.len(), report.bytes, report.files, report.commits), (0, 0, 0, 0));

    fs_err::write(guest.join("a"), "one\nin a commit\n").unwrap();
    git(&guest, &["commit", "-qam", "in the guest"]);
    fs_err::write(guest.join("b"), "new\n").unwrap();
    fs_err::write(guest.join(".gitattributes"), "* filter=evil diff=evil text merge=evil\n").unwrap();
    fs_err::write(guest.join("mine.tmp"), "excluded\n").unwrap();
    fs_err::create_dir_all(guest.join(".git/info")).unwrap();
    fs_err::write(guest.join(".git/info/exclude"), "*.tmp\n").unwrap();
    // A repository without a commit inside the repository: git add would stop at it.
    fs_err::create_dir(guest.join("inner")).unwrap();
    git(&guest.join("inner"), &["init", "-q"]);
    let evil = tmp.path().join("evil.sh");
    let ran = tmp.path().join("ran");
    fs_err::write(&evil, format!("#!/bin/sh\necho \"$0 $*\" >>{}\ncat\n", ran.display())).unwrap();
    fs_err::set_permissions(&evil, PermissionsExt::from_mode(0o755)).unwrap();
    fs_err::create_dir_all(guest.join(".git/hooks")).unwrap();
    fs_err::copy(&evil, guest.join(".git/hooks/post-index-change")).unwrap();
    let evil = evil.to_str().unwrap();
    for key in [
        "filter.evil.clean",
        "filter.evil.process",
        "diff.evil.textconv",
        "diff.evil.command",
        "diff.external",
    ] {
        git(&guest, &["config", key, evil]);
    }
    for (key, value) in [
        ("core.fsmonitor", evil),
        ("core.worktree", "/"),
        ("core.bare", "true"),
        ("diff.noprefix", "true"),
        ("color.ui", "always"),
        ("core.autocrlf", "true"),
    ] {
        drop(git_with(&guest, &["config", "-f", ".git/config", key, value], b""));
    }
    let before = fingerprint(&guest);
    let (patch, report) = export_repo(&guest, &scratch).await.unwrap();
    assert_untouched(&guest, &before);
    assert!(!ran.exists(), "{}", fs_err::read_to_string(&ran).unwrap());
    assert_eq!((report.files, report.commits), (3, 1));
    bothy_pack::inspect_patch(patch.as_slice()).unwrap();
    assert!(git_with(&host, &["apply", "-"], &patch).status.success());
    assert_eq!(fs_err::read_to_string(host.join("a")).unwrap(), "one\nin a commit\n");
    assert_eq!(fs_err::read_to_string(host.join("b")).unwrap(), "new\n");
    assert!(!host.join("mine.tmp").exists());
}

#[tokio::test]
async fn an_imported_file_that_is_ignored_by_now_is_no_deletion() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) =
        (tmp.path().join("host"), tmp.path().join("guest"), tmp.path().join("scratch"));
    repository(&host);
    fs_err::create_dir(&scratch).unwrap();
    // Tracked although ignored, and only intended to be added: git forgets such files easily.
    fs_err::write(host.join(".gitignore"), "*.log\n").unwrap();
    fs_err::write(host.join("x.log"), "x\n").unwrap();
    git(&host, &["add", "-f", "-N", "x.log"]);
    import_repo(&host, &guest, true).await;
    assert_eq!(tree_of(&host, &scratch), tree_of(&guest, &scratch));
    git(&guest, &["rm", "-q", "--cached", "a"]);
    fs_err::write(guest.join(".gitignore"), "*.log\na\n").unwrap();
    // And an index that cannot be read.
    let (patch, _) = export_repo(&guest, &scratch).await.unwrap();
    let text = String::from_utf8(patch.clone()).unwrap();
    assert!(!text.contains("deleted file") && text.contains("+a\n"), "{text}");
    fs_err::write(guest.join(".git/index"), "broken").unwrap();
    let (again, _) = export_repo(&guest, &scratch).await.unwrap();
    assert_eq!(again, patch);
}

#[tokio::test]
async fn a_guest_that_lost_its_import_is_told_so() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) =
        (tmp.path().join("host"), tmp.path().join("guest"), tmp.path().join("scratch"));
    repository(&host);
    fs_err::create_dir(&scratch).unwrap();
    assert_eq!(export_repo(&guest, &scratch).await.unwrap_err().code, Code::NotFound);
    import_repo(&host, &guest, false).await;
    git(&guest, &["update-ref", "-d", "refs/bothy/import"]);
    let e = export_repo(&guest, &scratch).await.unwrap_err();
    assert!(e.code == Code::FailedPrecondition && e.hint.is_some(), "{e}");
    assert_eq!(fs_err::read_dir(&scratch).unwrap().count(), 0);
}

#[tokio::test]
async fn identity_is_written_and_what_the_guest_set_itself_stays() {
    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGkuLTLnxmjmJ3tJlCrkHCGHrZ1Ehm4hwMUSjZsGXDLR a@b";
    let tmp = tempfile::tempdir().unwrap();
    let home = tmp.path();
    let request = |name: &str, keys: &[&str]| SyncIdentity {
        vm: VmId::new(),
        home: home.to_str().unwrap().into(),
        identity: Identity {
            ssh_public_keys: keys.iter().map(|k| (*k).to_owned()).collect(),
            git_name: Some(name.into()),
            git_email: Some("a@b".into()),
        },
    };
    let get = |key: &str| git(home, &["config", "-f", ".gitconfig", key]);
    let odd = r#"A "quoted" \ name # ; x"#;
    sync(&HostGuest, &request(odd, &[KEY])).await.unwrap();
    assert_eq!((get("user.name"), get("user.email")), (odd.to_owned(), "a@b".to_owned()));
    let keys = home.join(".ssh/authorized_keys");
    assert_eq!(fs_err::read_to_string(&keys).unwrap(), format!("{KEY}\n"));
    assert_eq!(fs_err::metadata(&keys).unwrap().permissions().mode() & 0o777, 0o600);

    git(home, &["config", "-f", ".gitconfig", "alias.st", "status"]);
    sync(&HostGuest, &request("$(touch x); 'New'", &[])).await.unwrap();
    assert_eq!((get("user.name").as_str(), get("alias.st").as_str()), ("$(touch x); 'New'", "status"));
    assert!(keys.exists(), "no keys in the request: those that are there stay");

    let before = fingerprint(home);
    for bad in [request("two\nlines", &[KEY]), request("", &[]), request("x", &["ssh-rsa x"])] {
        assert_eq!(sync(&HostGuest, &bad).await.unwrap_err().code, Code::InvalidArgument);
    }
    let outside = SyncIdentity { home: "/root/../etc".into(), ..request("x", &[]) };
    assert_eq!(sync(&HostGuest, &outside).await.unwrap_err().code, Code::InvalidArgument);
    assert_untouched(home, &before);
}

#[tokio::test]
async fn commits_come_as_a_bundle_and_status_says_how_the_guest_stands() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) =
        (tmp.path().join("host"), tmp.path().join("guest"), tmp.path().join("scratch"));
    repository(&host);
    fs_err::create_dir(&scratch).unwrap();
    fs_err::write(host.join("a"), "one\ntwo\ndirty\n").unwrap();
    fs_err::write(host.join("new"), "new\n").unwrap();
    import_repo(&host, &guest, true).await;
    let head = git(&host, &["rev-parse", "HEAD"]);
    let (none, report) = export_as(&guest, &scratch, ExportFormat::Bundle, None).await.unwrap();
    assert_eq!((none.len(), report.commits), (0, 0));
    // What was imported is told so that the host can compare: its own tree, without what it does not track.
    let repo = bothy_pack::Repository::open(&host).unwrap();
    let standing = repo.standing(&report.guest.base, report.guest.tracked.as_deref()).unwrap();
    assert_eq!((report.guest.base.as_str(), standing.files_differ), (head.as_str(), Some(false)));

    git(&guest, &["commit", "-qam", "one"]);
    fs_err::write(guest.join("a"), "2\n").unwrap();
    git(&guest, &["commit", "-qam", "two"]);
    fs_err::write(guest.join("a"), "3\n").unwrap();
    fs_err::write(guest.join("staged"), "x\n").unwrap();
    git(&guest, &["add", "staged"]);
    let before = fingerprint(&guest);
    let (bundle, report) = export_as(&guest, &scratch, ExportFormat::Bundle, None).await.unwrap();
    let (empty, status) = export_as(&guest, &scratch, ExportFormat::Status, None).await.unwrap();
    assert_untouched(&guest, &before);
    let found = |r: &bothy_contract::workspace::ExportReport| {
        (r.commits, r.guest.behind, r.guest.staged, r.guest.unstaged, r.guest.untracked)
    };
    assert_eq!((found(&report), found(&status)), ((2, 0, 1, 1, 1), (2, 0, 1, 1, 1)));
    assert_eq!((empty.len(), status.guest.branch.as_deref()), (0, Some("main")));
    let mut file = fs_err::File::from_parts(tempfile::tempfile().unwrap(), "bundle");
    std::io::Write::write_all(&mut file, &bundle).unwrap();
    let sum = repo.check_bundle(&mut file).unwrap();
    assert_eq!((sum.commits, sum.head), (2, git(&guest, &["rev-parse", "HEAD"])));

    // Since a revision of the guest's.
    let (patch, report) = export_as(&guest, &scratch, ExportFormat::Patch, Some("HEAD")).await.unwrap();
    let text = String::from_utf8(patch).unwrap();
    assert!(text.contains("-2\n+3\n") && report.commits == 0, "{text}");
    assert_eq!(export_as(&guest, &scratch, ExportFormat::Bundle, Some("HEAD~1")).await.unwrap().1.commits, 1);
    for (rev, code) in [("nothing", Code::NotFound), ("--all", Code::NotFound), ("", Code::InvalidArgument)] {
        let e = export_as(&guest, &scratch, ExportFormat::Patch, Some(rev)).await.unwrap_err();
        assert!(e.code == code && e.hint.is_some(), "{rev}: {e}");
    }
    git(&guest, &["reset", "-q", "--hard", "HEAD~2"]);
    git(&guest, &["commit", "-q", "--amend", "--allow-empty", "-m", "else"]);
    let (_, status) = export_as(&guest, &scratch, ExportFormat::Status, None).await.unwrap();
    assert_eq!((status.commits, status.guest.behind), (1, 1));
    assert_eq!(fs_err::read_dir(&scratch).unwrap().count(), 0);
}
