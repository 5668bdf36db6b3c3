//! Packs of real repositories, made by real git.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::Code;
use bothy_pack::{FORMAT, Meta, Mode, PackOptions, Repository, entry};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::Read,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
    process::Command,
};

fn git(dir: &Path, args: &[&str]) -> Vec<u8> {
    let out = Command::new("git")
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs([
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ALLOW_PROTOCOL", "file"),
        ])
        .envs([("GIT_AUTHOR_NAME", "t"), ("GIT_AUTHOR_EMAIL", "t@t")])
        .envs([("GIT_COMMITTER_NAME", "t"), ("GIT_COMMITTER_EMAIL", "t@t")])
        .args(args)
        .output()
        .unwrap();
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn text(dir: &Path, args: &[&str]) -> String {
    String::from_utf8(git(dir, args)).unwrap().trim().to_owned()
}

/// A repository with a commit and an odd file.
fn repository(dir: &Path) {
    fs_err::create_dir_all(dir).unwrap();
    git(dir, &["init", "-q", "-b", "main"]);
    fs_err::write(dir.join("a"), "one\ntwo\n").unwrap();
    fs_err::write(dir.join(".gitignore"), "*.ignored\n").unwrap();
    fs_err::write(dir.join(OsStr::from_bytes(b"new\nline \xff")), "odd\n").unwrap();
    git(dir, &["add", "-A"]);
    git(dir, &["commit", "-qm", "first"]);
}

/// The entries of a pack, in order.
fn entries(pack: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut archive = tar::Archive::new(pack);
    let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if let Some(target) = entry.link_name_bytes() {
            content = target.into_owned();
        }
        (entry.path_bytes().into_owned(), content)
    };
    archive.entries().unwrap().map(read).collect()
}

fn of(pack: &[u8], name: &str) -> Option<Vec<u8>> {
    entries(pack).into_iter().find(|(n, _)| n == name.as_bytes()).map(|(_, content)| content)
}

fn everything(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    use std::os::unix::fs::MetadataExt;
    let (mut found, mut todo) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(path) = todo.pop() {
        let meta = fs_err::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs_err::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        let content = if meta.is_file() { fs_err::read(&path).unwrap() } else { Vec::new() };
        found.insert(path, (meta.mode(), meta.mtime(), meta.mtime_nsec(), content));
    }
    found
}

#[test]
fn what_cannot_be_packed_is_refused_with_what_to_do() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    for dir in ["none", "bare", "empty"] {
        fs_err::create_dir(at(dir)).unwrap();
    }
    fs_err::write(at("file"), "").unwrap();
    git(&at("bare"), &["init", "-q", "--bare"]);
    git(&at("empty"), &["init", "-q"]);
    repository(&at("good"));
    for (path, code, message) in [
        ("none", Code::FailedPrecondition, "not inside a git repository"),
        ("bare", Code::FailedPrecondition, "bare repository"),
        ("empty", Code::FailedPrecondition, "no commit yet"),
        ("good/.git", Code::FailedPrecondition, "inside a repository's `.git`"),
        ("file", Code::InvalidArgument, "not a directory"),
    ] {
        let e = Repository::open(&at(path)).unwrap_err();
        assert_eq!(e.code, code, "{path}: {e}");
        assert!(e.message.contains(message) && e.hint.is_some(), "{path}: {e}");
    }
    assert_eq!(Repository::open(&at("missing")).unwrap_err().code, Code::NotFound);
}

#[test]
fn a_pack_holds_history_staged_and_other_changes_and_leaves_the_repository_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("my repo");
    repository(&dir);
    git(&dir, &["config", "user.email", "own@x"]);
    fs_err::write(dir.join("a"), "one\nstaged\n").unwrap();
    git(&dir, &["add", "a"]);
    fs_err::write(dir.join("a"), "one\nwork\n").unwrap();
    fs_err::create_dir(dir.join("sub")).unwrap();
    fs_err::write(dir.join("sub/un\ntracked"), "u").unwrap();
    symlink("/nowhere", dir.join("link")).unwrap();
    fs_err::write(dir.join("x.ignored"), "i").unwrap();
    // Content as it was, another time: git would refresh its index, if it were let.
    let odd = dir.join(OsStr::from_bytes(b"new\nline \xff"));
    fs_err::write(&odd, fs_err::read(&odd).unwrap()).unwrap();
    // A hook and settings of the user's that would change what git writes or runs.
    fs_err::write(dir.join(".git/hooks/post-index-change"), "#!/bin/sh\ntouch hooked\n").unwrap();
    for (key, value) in [
        ("diff.noprefix", "true"),
        ("color.ui", "always"),
        ("diff.external", "false"),
        ("core.fsmonitor", "true"),
        ("diff.context", "0"),
        ("diff.mnemonicPrefix", "true"),
    ] {
        git(&dir, &["config", key, value]);
    }

    // Touched, with the same content: git would like to note that in the index.
    let same = fs_err::read(dir.join(".gitignore")).unwrap();
    fs_err::write(dir.join(".gitignore"), same).unwrap();
    let before = everything(&dir);
    let repo = Repository::open(&dir.join("sub")).unwrap();
    let mut pack = Vec::new();
    let summary = repo.pack(&PackOptions::default(), &mut pack).unwrap();
    let mut full = Vec::new();
    let with_untracked =
        repo.pack(&PackOptions { include_untracked: true, ..PackOptions::default() }, &mut full).unwrap();
    let now = everything(&dir);
    assert!(now == before, "the repository was touched");

    let names: Vec<_> =
        entries(&pack).into_iter().map(|(name, _)| String::from_utf8(name).unwrap()).collect();
    let history: Vec<_> = names.iter().filter(|name| name.starts_with("history/pack-")).collect();
    assert_eq!(history.len(), 2);
    assert_eq!(names, [entry::META, history[0], history[1], entry::STAGED, entry::TRACKED, entry::END]);
    assert_eq!(history[0].strip_suffix(".pack").unwrap(), history[1].strip_suffix(".idx").unwrap());
    let meta = Meta::read(pack.as_slice()).unwrap();
    assert_eq!((meta.name.as_str(), meta.branch.as_deref()), ("my repo", Some("main")));
    assert_eq!(meta.head, text(&dir, &["rev-parse", "HEAD"]));
    assert_eq!((meta.git_name, meta.git_email.as_deref()), (None, Some("own@x")));
    let lines = |name| String::from_utf8(of(&pack, name).unwrap()).unwrap();
    assert!(lines(entry::STAGED).contains("\n+staged\n") && !lines(entry::STAGED).contains("work"));
    assert!(
        lines(entry::TRACKED).starts_with("diff --git a/a b/a\n")
            && lines(entry::TRACKED).contains("\n+work\n")
    );
    assert_eq!((summary.changed, summary.untracked_out, summary.untracked_in), (1, 2, 0));
    assert_eq!(summary.untracked_names, ["link", "sub/un\\ntracked"]);
    assert_eq!((summary.bytes, summary.warnings.len()), (pack.len() as u64, 0));

    assert_eq!((with_untracked.untracked_in, with_untracked.untracked_out), (2, 0));
    assert_eq!(of(&full, "untracked/link").unwrap(), b"/nowhere");
    assert_eq!(of(&full, "untracked/sub/un\ntracked").unwrap(), b"u");
    assert!(of(&full, "untracked/x.ignored").is_none());

    whole(&pack, &summary.head);
}

/// The history of `pack` is all that a new repository needs; gives how many packs it is.
fn whole(pack: &[u8], head: &str) -> usize {
    let tmp = tempfile::tempdir().unwrap();
    let packs = tmp.path().join(".git/objects/pack");
    git(tmp.path(), &["init", "-q"]);
    fs_err::create_dir_all(&packs).unwrap();
    let history = entries(pack).into_iter().filter_map(|(name, content)| {
        Some((String::from_utf8(name).ok()?.strip_prefix("history/")?.to_owned(), content))
    });
    let mut number = 0;
    for (name, content) in history {
        fs_err::write(packs.join(&name), content).unwrap();
        if name.ends_with(".idx") {
            git(tmp.path(), &["verify-pack", packs.join(&name).to_str().unwrap()]);
            number += 1;
        }
    }
    git(tmp.path(), &["update-ref", "HEAD", head]);
    git(tmp.path(), &["fsck", "--full", "--strict"]);
    git(tmp.path(), &["rev-list", "--objects", head]);
    number
}

#[test]
fn a_large_history_goes_in_several_packs() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("r");
    repository(&dir);
    // Of such that cannot be compressed: 24 MiB, in packs of 8.
    let mut state = 1_u64;
    for n in 0..12 {
        let content: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(2 << 20)
        .collect();
        fs_err::write(dir.join(format!("big{n}")), content).unwrap();
    }
    git(&dir, &["add", "."]);
    git(&dir, &["commit", "-q", "-m", "large"]);
    let mut pack = Vec::new();
    let options = PackOptions { part: Some(8 << 20), ..PackOptions::default() };
    let summary = Repository::open(&dir).unwrap().pack(&options, &mut pack).unwrap();
    assert!(whole(&pack, &summary.head) >= 3);
    assert!(summary.history_bytes > 24 << 20);
}

#[test]
fn how_much_goes_and_what_is_listed_is_the_users_to_say() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("r");
    repository(&dir);
    for n in 0..bothy_pack::RECENT {
        git(&dir, &["commit", "-q", "--allow-empty", "-m", &n.to_string()]);
    }
    git(&dir, &["branch", "other", "HEAD~3"]);
    git(&dir, &["tag", "-m", "t", "v1", "HEAD~2"]);
    fs_err::write(dir.join("a"), "changed\n").unwrap();
    fs_err::write(dir.join("new"), "untracked").unwrap();
    fs_err::create_dir_all(dir.join("deep/er")).unwrap();
    fs_err::write(dir.join("deep/er/x.ignored"), "ignored file").unwrap();
    let repo = Repository::open(&dir).unwrap();
    let pack = |options: &PackOptions| {
        let mut out = Vec::new();
        repo.pack(options, &mut out).map(|summary| (out, summary))
    };
    let (shallow, summary) = pack(&PackOptions::default()).unwrap();
    assert_eq!(summary.commits, bothy_pack::RECENT as u64);
    let boundary = String::from_utf8(of(&shallow, entry::SHALLOW).unwrap()).unwrap();
    assert_eq!(boundary.trim(), text(&dir, &["rev-parse", &format!("HEAD~{}", bothy_pack::RECENT - 1)]));

    let full = PackOptions { mode: Mode::Full, ..PackOptions::default() };
    let (full, summary) = pack(&full).unwrap();
    assert_eq!((summary.commits, of(&full, entry::SHALLOW)), (bothy_pack::RECENT as u64 + 1, None));
    let refs = String::from_utf8(of(&full, entry::REFS).unwrap()).unwrap();
    for name in ["refs/heads/main", "refs/heads/other", "refs/tags/v1"] {
        let line = format!("create {name} {}", text(&dir, &["rev-parse", name]));
        assert!(refs.lines().any(|l| l == line), "{refs}");
    }

    let all = PackOptions {
        include_untracked: true,
        include: vec!["**/*.ignored".into()],
        list: true,
        ..PackOptions::default()
    };
    let (with, summary) = pack(&all).unwrap();
    let listed: Vec<_> = summary.files.iter().map(|f| (f.name.as_str(), f.bytes, f.kind)).collect();
    assert_eq!(listed, [("a", 8, "changed"), ("new", 9, "untracked"), ("deep/er/x.ignored", 12, "ignored")]);
    assert_eq!(
        (of(&with, "untracked/new").unwrap(), summary.bytes),
        (b"untracked".to_vec(), with.len() as u64)
    );

    let copy = PackOptions { mode: Mode::Copy, list: true, ..PackOptions::default() };
    let (copied, summary) = pack(&copy).unwrap();
    assert_eq!(of(&copied, "files/a").unwrap(), b"changed\n");
    assert_eq!((summary.files.len(), of(&copied, "files/new"), of(&copied, entry::STAGED)), (3, None, None));

    let branch =
        PackOptions { branch: Some("only-there".into()), from: Some("v1".into()), ..PackOptions::default() };
    let (other, summary) = pack(&branch).unwrap();
    let meta = Meta::read(other.as_slice()).unwrap();
    assert_eq!(
        (meta.branch.as_deref(), meta.head),
        (Some("only-there"), text(&dir, &["rev-parse", "v1^{commit}"]))
    );
    assert_eq!(of(&other, entry::TRACKED).unwrap(), b"");
    assert!(summary.warnings[0].contains("changes stay here") && summary.warnings[0].contains('a'));
    for (name, from, code) in [
        ("other", "HEAD", Code::AlreadyExists),
        ("-x", "HEAD", Code::InvalidArgument),
        ("a..b", "HEAD", Code::InvalidArgument),
        ("new", "nowhere", Code::NotFound),
        ("new", "--all", Code::NotFound),
    ] {
        let bad =
            PackOptions { branch: Some(name.into()), from: Some(from.into()), ..PackOptions::default() };
        let e = pack(&bad).unwrap_err();
        assert!(e.code == code && e.hint.is_some(), "{name} {from}: {e}");
    }
}

#[test]
fn a_detached_head_a_worktree_a_shallow_clone_and_sha256_are_fine() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("r");
    repository(&dir);
    git(&dir, &["commit", "-q", "--allow-empty", "-m", "second"]);
    git(&dir, &["worktree", "add", "-q", "--detach", "../linked"]);
    let url = format!("file://{}", dir.display());
    git(tmp.path(), &["clone", "-q", "--depth=1", &url, "shallow"]);
    let sha256 = tmp.path().join("sha256");
    fs_err::create_dir(&sha256).unwrap();
    git(&sha256, &["init", "-q", "--object-format=sha256"]);
    git(&sha256, &["commit", "-q", "--allow-empty", "-m", "first"]);
    for (name, branch, shallow) in
        [("linked", false, false), ("shallow", true, true), ("sha256", true, false)]
    {
        let mut pack = Vec::new();
        let repo = Repository::open(&tmp.path().join(name)).unwrap();
        repo.pack(&PackOptions::default(), &mut pack).unwrap();
        assert_eq!(Meta::read(pack.as_slice()).unwrap().branch.is_some(), branch, "{name}");
        assert_eq!(of(&pack, entry::SHALLOW).is_some(), shallow, "{name}");
    }
}

#[test]
fn submodules_conflicts_and_inner_repositories_are_named() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, other) = (tmp.path().join("r"), tmp.path().join("other"));
    repository(&dir);
    repository(&other);
    git(
        &dir,
        &["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", other.to_str().unwrap(), "mod"],
    );
    git(&dir, &["commit", "-qm", "module"]);
    fs_err::write(dir.join("mod/a"), "changed in the module").unwrap();
    repository(&dir.join("inner"));
    git(&dir, &["checkout", "-q", "-b", "side"]);
    fs_err::write(dir.join("a"), "side\n").unwrap();
    git(&dir, &["commit", "-qam", "side"]);
    git(&dir, &["checkout", "-q", "main"]);
    fs_err::write(dir.join("a"), "main\n").unwrap();
    git(&dir, &["commit", "-qam", "main"]);
    let merge = Command::new("git").current_dir(&dir).args(["merge", "-q", "side"]).output().unwrap();
    assert!(!merge.status.success());
    let mut pack = Vec::new();
    let repo = Repository::open(&dir).unwrap();
    let summary =
        repo.pack(&PackOptions { include_untracked: true, ..PackOptions::default() }, &mut pack).unwrap();
    let warnings = summary.warnings.join("\n");
    for expected in
        ["left empty: mod", "unmerged files go as they are in the working tree: a", "stay out: inner/"]
    {
        assert!(warnings.contains(expected), "{warnings}");
    }
    let patch = String::from_utf8(of(&pack, entry::TRACKED).unwrap()).unwrap();
    assert!(patch.contains("<<<<<<<") && !patch.contains("module"), "{patch}");
}

#[test]
fn a_writer_that_fails_ends_the_pack_with_an_error() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(buf.len()).ok_or(std::io::ErrorKind::StorageFull)?;
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let tmp = tempfile::tempdir().unwrap();
    repository(tmp.path());
    let repo = Repository::open(tmp.path()).unwrap();
    for room in [0, 600, 3000] {
        assert!(repo.pack(&PackOptions::default(), Full(room)).is_err());
    }
}

#[test]
fn only_the_beginning_of_a_pack_is_taken_for_one() {
    let tmp = tempfile::tempdir().unwrap();
    repository(tmp.path());
    let mut pack = Vec::new();
    Repository::open(tmp.path()).unwrap().pack(&PackOptions::default(), &mut pack).unwrap();
    assert!(Meta::from_start(pack.get(..511).unwrap()).unwrap().is_none());
    assert!(Meta::from_start(&pack).unwrap().is_some());
    assert!(Meta::from_start(&[0; 512]).is_err());
    assert!(Meta::from_start(&[b'x'; 4096]).is_err());
    assert!(Meta::read(pack.get(..520).unwrap()).is_err());
    let good = Meta::read(pack.as_slice()).unwrap();
    for bad in [
        Meta { format: FORMAT - 1, ..good.clone() },
        Meta { head: "HEAD".into(), ..good.clone() },
        Meta { head: good.head.to_uppercase(), ..good.clone() },
        Meta { branch: Some("-x".into()), ..good.clone() },
        Meta { branch: Some("a\nb".into()), ..good.clone() },
        Meta { git_name: Some(String::new()), ..good.clone() },
    ] {
        assert!(bad.check().is_err(), "{bad:?}");
    }
}

#[test]
fn tools_are_pinned_by_tracked_files_at_the_top_the_first_of_which_counts() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("r");
    repository(&dir);
    fs_err::create_dir(dir.join("sub")).unwrap();
    let repo = Repository::open(&dir.join("sub")).unwrap();
    assert_eq!(repo.pins().unwrap(), []);
    fs_err::write(dir.join(".tool-versions"), "nodejs 22.1.0\nruby 3.4.1\n").unwrap();
    fs_err::write(dir.join("package.json"), r#"{"engines":{"node":"20"},"packageManager":"pnpm@9.1.0"}"#)
        .unwrap();
    fs_err::write(dir.join("sub/go.mod"), "go 1.25\n").unwrap();
    assert_eq!(repo.pins().unwrap(), [], "what is not tracked does not go");
    git(&dir, &["add", "-A"]);
    // A link may lead to what is no part of the repository.
    fs_err::write(tmp.path().join("outside"), "3.13\n").unwrap();
    std::os::unix::fs::symlink("../outside", dir.join(".python-version")).unwrap();
    git(&dir, &["add", ".python-version"]);
    let pins = repo.pins().unwrap();
    let pins: Vec<_> = pins.iter().map(|pin| (pin.tool.as_str(), pin.version.as_str(), pin.file)).collect();
    assert_eq!(
        pins,
        [
            ("node", "22.1.0", ".tool-versions"),
            ("ruby", "3.4.1", ".tool-versions"),
            ("pnpm", "9.1.0", "package.json")
        ]
    );
}
