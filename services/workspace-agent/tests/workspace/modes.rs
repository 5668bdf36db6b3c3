//! How much of a repository goes in, and what becomes of one that is there already.

use crate::support::{
    assert_untouched, export_repo, fingerprint, framed, git, import_frames, import_with, packed, packed_as,
};
use bothy_contract::Code;
use bothy_pack::{Mode, PackOptions, RECENT};
use std::path::{Path, PathBuf};

fn repository(tmp: &Path, commits: usize) -> (PathBuf, PathBuf, PathBuf) {
    let (host, guest, scratch) = (tmp.join("host"), tmp.join("guest/repo"), tmp.join("scratch"));
    fs_err::create_dir_all(&host).unwrap();
    fs_err::create_dir_all(&scratch).unwrap();
    git(&host, &["init", "-q", "-b", "main"]);
    fs_err::write(host.join("a"), "one\n").unwrap();
    fs_err::write(host.join(".gitignore"), "*.ignored\n").unwrap();
    git(&host, &["add", "-A"]);
    for n in 0..commits {
        git(&host, &["commit", "-q", "--allow-empty", "-m", &n.to_string()]);
    }
    (host, guest, scratch)
}

async fn import_as(host: &Path, guest: &Path, options: &PackOptions) {
    import_frames(guest, &framed(&packed_as(host, options).0, true).await).await.unwrap();
}

#[tokio::test]
async fn recent_history_all_of_it_or_none() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) = repository(tmp.path(), RECENT + 5);
    git(&host, &["branch", "other", "HEAD~2"]);
    git(&host, &["tag", "-m", "t", "v1", "HEAD~1"]);
    fs_err::write(host.join("a"), "one\ndirty\n").unwrap();
    fs_err::write(host.join("x.ignored"), "secret\n").unwrap();
    let options = |mode| PackOptions { mode, ..PackOptions::default() };

    import_as(&host, &guest, &options(Mode::Shallow)).await;
    assert_eq!(git(&guest, &["rev-list", "--count", "HEAD"]), RECENT.to_string());
    git(&guest, &["fsck", "--strict"]);
    assert_eq!(git(&guest, &["status", "--porcelain"]), " M a");
    fs_err::write(guest.join("b"), "new\n").unwrap();
    git(&guest, &["add", "-A"]);
    git(&guest, &["commit", "-qm", "work"]);
    let (patch, report) = export_repo(&guest, &scratch).await.unwrap();
    assert_eq!((report.files, report.commits), (1, 1), "{}", String::from_utf8_lossy(&patch));

    let full = tmp.path().join("full");
    import_as(&host, &full, &PackOptions { include: vec!["*.ignored".into()], ..options(Mode::Full) }).await;
    for name in ["HEAD", "other", "v1"] {
        assert_eq!(git(&full, &["rev-parse", name]), git(&host, &["rev-parse", name]));
    }
    assert_eq!(git(&full, &["rev-list", "--count", "HEAD"]), (RECENT + 5).to_string());
    git(&full, &["fsck", "--strict"]);
    // What came although it is ignored is watched like the rest, and what is the same again loses nothing.
    let pack = PackOptions { include: vec!["*.ignored".into()], ..options(Mode::Full) };
    import_as(&host, &full, &pack).await;
    fs_err::write(full.join("x.ignored"), "changed\n").unwrap();
    assert_eq!(export_repo(&full, &scratch).await.unwrap().1.files, 1);

    let copy = tmp.path().join("copy");
    import_as(&host, &copy, &options(Mode::Copy)).await;
    assert_eq!(fs_err::read_to_string(copy.join("a")).unwrap(), "one\ndirty\n");
    assert!(!copy.join(".git").exists() && !copy.join("x.ignored").exists());
    assert_eq!(export_repo(&copy, &scratch).await.unwrap_err().code, Code::NotFound);
    assert_eq!(fs_err::read_dir(tmp.path()).unwrap().count(), 5, "nothing is left beside them");
}

#[tokio::test]
async fn a_branch_of_the_guests_own_begins_where_it_is_told_to() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) = repository(tmp.path(), 2);
    fs_err::write(host.join("a"), "two\n").unwrap();
    let branch = PackOptions { branch: Some("agent/work".into()), ..PackOptions::default() };
    import_as(&host, &guest, &branch).await;
    assert_eq!(git(&guest, &["branch", "--show-current"]), "agent/work");
    assert_eq!(git(&guest, &["status", "--porcelain"]), " M a");
    assert_eq!(git(&host, &["branch", "--list"]), "* main");
    let other = tmp.path().join("other");
    import_as(&host, &other, &PackOptions { from: Some("HEAD~1".into()), ..branch }).await;
    assert_eq!(git(&other, &["rev-parse", "HEAD"]), git(&host, &["rev-parse", "HEAD~1"]));
    assert_eq!(git(&other, &["status", "--porcelain"]), "");
    assert_eq!(export_repo(&other, &scratch).await.unwrap().1.bytes, 0);
}

#[tokio::test]
async fn an_import_is_replaced_only_where_nothing_is_lost_or_that_is_wanted() {
    let tmp = tempfile::tempdir().unwrap();
    let (host, guest, scratch) = repository(tmp.path(), 1);
    let frames = framed(&packed(&host, false).0, true).await;
    import_frames(&guest, &frames).await.unwrap();
    fs_err::write(host.join("a"), "moved on\n").unwrap();
    let newer = framed(&packed(&host, false).0, true).await;
    import_frames(&guest, &newer).await.unwrap();
    assert_eq!(fs_err::read_to_string(guest.join("a")).unwrap(), "moved on\n");

    let touch = |name: &str| fs_err::write(guest.join(name), "work\n").unwrap();
    let steps: [(&str, &dyn Fn()); 4] = [
        ("1 changed file (new)", &|| touch("new")),
        ("1 commit", &|| {
            git(&guest, &["add", "-A"]);
            git(&guest, &["commit", "-qm", "work"]);
        }),
        ("1 ignored file", &|| {
            git(&guest, &["reset", "-q", "--hard", "refs/bothy/base"]);
            fs_err::write(guest.join("a"), "moved on\n").unwrap();
            touch("x.ignored");
        }),
        ("commit", &|| {
            fs_err::remove_file(guest.join("x.ignored")).unwrap();
            touch("a");
            git(&guest, &["stash", "-q"]);
            fs_err::write(guest.join("a"), "moved on\n").unwrap();
        }),
    ];
    for (why, work) in steps {
        work();
        let before = fingerprint(&guest);
        let e = import_frames(&guest, &newer).await.unwrap_err();
        assert!(e.code == Code::FailedPrecondition && e.message.contains(why), "{why}: {e}");
        assert!(e.hint.unwrap().contains("--force"));
        assert_untouched(&guest, &before);
        assert_eq!(fs_err::read_dir(guest.parent().unwrap()).unwrap().count(), 1);
    }
    // A pack that is not whole takes nothing away, also with force.
    let whole = packed(&host, false).0;
    let cut = framed(&whole[..whole.len() - 2048], true).await;
    let before = fingerprint(&guest);
    import_with(&guest, &cut, true).await.unwrap_err();
    assert_untouched(&guest, &before);
    import_with(&guest, &frames, true).await.unwrap();
    assert_eq!(fs_err::read_to_string(guest.join("a")).unwrap(), "one\n");
    assert_eq!(export_repo(&guest, &scratch).await.unwrap().1.bytes, 0);
    // What bothy did not put there is never taken away.
    let foreign = tmp.path().join("foreign");
    fs_err::create_dir(&foreign).unwrap();
    git(&foreign, &["init", "-q"]);
    assert_eq!(import_with(&foreign, &frames, true).await.unwrap_err().code, Code::AlreadyExists);
}
