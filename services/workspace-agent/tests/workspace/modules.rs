//! Submodules, also within one another: in as they are, and what was done in them out again.

use crate::support::*;
use bothy_contract::{
    Code,
    workspace::{ExportFormat, Inner, InnerState},
};
use bothy_pack::{Mode, PackOptions, Repository};
use std::{
    io::{Seek, Write},
    path::{Path, PathBuf},
};

fn repository(dir: &Path) {
    fs_err::create_dir_all(dir).unwrap();
    git(dir, &["init", "-q", "-b", "main"]);
    for name in ["a", "b", "gone"] {
        fs_err::write(dir.join(name), format!("{name}\n").repeat(20)).unwrap();
    }
    git(dir, &["add", "-A"]);
    git(dir, &["commit", "-qm", "first"]);
}

fn write(dir: &Path, name: &str, content: &str) {
    fs_err::write(dir.join(name), content).unwrap();
}

/// A repository with a submodule `lib s`, which has one `deep/er`, and one `empty` that is not checked out.
struct World {
    _tmp: tempfile::TempDir,
    host: PathBuf,
    guest: PathBuf,
    scratch: PathBuf,
}

const FULL: PackOptions = PackOptions {
    mode: Mode::Full,
    include_untracked: false,
    include: Vec::new(),
    branch: None,
    from: None,
    list: true,
    part: None,
};

impl World {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        for name in ["deep", "lib", "other", "host"] {
            repository(&at(name));
        }
        let add = |to: &str, what: &str, path: &str| {
            git(&at(to), &["submodule", "--quiet", "add", at(what).to_str().unwrap(), path]);
            git(&at(to), &["commit", "-qm", "a submodule"]);
        };
        add("lib", "deep", "deep/er");
        add("host", "lib", "lib s");
        add("host", "other", "empty");
        let host = at("host");
        git(&host, &["submodule", "--quiet", "update", "--init", "--recursive"]);
        git(&host, &["submodule", "--quiet", "deinit", "-f", "empty"]);
        fs_err::create_dir(at("scratch")).unwrap();
        let (guest, scratch) = (at("guest/repo"), at("scratch"));
        Self { _tmp: tmp, host, guest, scratch }
    }

    async fn import(&self, options: &PackOptions) -> bothy_pack::PackSummary {
        let (pack, summary) = packed_as(&self.host, options);
        import_frames(&self.guest, &framed(&pack, true).await).await.unwrap();
        summary
    }

    async fn export(&self) -> (Vec<u8>, Vec<Inner>) {
        let (patch, report) = export_repo(&self.guest, &self.scratch).await.unwrap();
        assert_eq!(report.inner_count, report.inner.len() as u64);
        (patch, report.inner)
    }

    fn apply(&self, patch: &[u8], merge: bool) -> Result<bothy_pack::Applied, bothy_contract::Error> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(patch).unwrap();
        file.rewind().unwrap();
        let mut file = fs_err::File::from_parts(file, "patch");
        Repository::open(&self.host).unwrap().apply(&mut file, merge)
    }
}

fn inner(path: &str, state: InnerState) -> Inner {
    Inner { path: path.to_owned(), state }
}

const MODULES: [&str; 3] = ["", "lib s", "lib s/deep/er"];

#[tokio::test]
async fn they_go_in_as_they_are_and_their_work_comes_out() {
    let world = World::new();
    // As somebody works with them: edits, staged and not, a commit that the repository above does not name yet.
    write(&world.host, "lib s/a", "edited here\n");
    write(&world.host, "lib s/deep/er/new", "staged here\n");
    git(&world.host.join("lib s/deep/er"), &["add", "new"]);
    git(&world.host.join("lib s/deep/er"), &["commit", "-qm", "of its own"]);
    write(&world.host, "lib s/deep/er/b", "staged\n");
    git(&world.host.join("lib s/deep/er"), &["add", "b"]);
    let before = fingerprint(&world.host);
    let summary = world.import(&FULL).await;
    assert_untouched(&world.host, &before);
    let named: Vec<_> = summary.files.iter().map(|f| (f.kind, f.name.as_str())).collect();
    assert!(
        named.contains(&("submodule", "lib s")) && named.contains(&("changed", "lib s/deep/er/b")),
        "{named:?}"
    );
    assert!(summary.warnings.iter().any(|w| w.contains("left empty: empty")), "{:?}", summary.warnings);
    for module in MODULES {
        let (host, guest) = (world.host.join(module), world.guest.join(module));
        for what in [
            ["status", "--porcelain=v2"].as_slice(),
            &["rev-parse", "HEAD"],
            &["rev-parse", "main"],
            &["write-tree"],
        ] {
            assert_eq!(git(&host, what), git(&guest, what), "{module:?} {what:?}");
        }
        assert_eq!(tree_of(&host, &world.scratch), tree_of(&guest, &world.scratch), "{module:?}");
    }
    // To git they are set up, as here; what it names the commits by is another matter.
    let standing = |dir: &Path| {
        let told = git(dir, &["submodule", "status", "--recursive"]);
        told.lines().map(|line| line.split(" (").next().unwrap().trim_end().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(standing(&world.host), standing(&world.guest));
    let clean = fingerprint(&world.guest);
    assert_eq!(world.export().await, (Vec::new(), Vec::new()));
    assert_untouched(&world.guest, &clean);

    // Work in the guest, then out and onto a tree in the state of the import.
    let deep = world.guest.join("lib s/deep/er");
    write(&world.guest, "a", "the guest's\n");
    write(&world.guest, "lib s/b", "the guest's too\n");
    fs_err::remove_file(deep.join("gone")).unwrap();
    fs_err::write(deep.join("bin"), [0, 1, 2, 255]).unwrap();
    git(&deep, &["add", "-A"]);
    git(&deep, &["commit", "-qm", "in the guest"]);
    write(&deep, "later", "not committed\n");
    let before = fingerprint(&world.guest);
    let (patch, told) = world.export().await;
    assert_untouched(&world.guest, &before);
    assert_eq!(told, [inner("lib s", InnerState::Changed), inner("lib s/deep/er", InnerState::Commits)]);
    // It is for a clean tree.
    let e = world.apply(&patch, false).unwrap_err();
    assert!(e.message.contains("lib s has changes of its own"), "{e}");
    for module in ["lib s", "lib s/deep/er"] {
        git(&world.host.join(module), &["commit", "-qam", "what was imported"]);
    }
    git(&world.host, &["commit", "-qam", "what was imported"]);
    let e = world.apply(&patch, true).unwrap_err();
    assert!(e.code == Code::InvalidArgument && e.message.contains("submodule"), "{e}");
    let applied = world.apply(&patch, false).unwrap();
    assert_eq!(applied.patch.files, 5);
    for module in MODULES {
        let trees = [&world.host, &world.guest].map(|top| tree_of_files(&top.join(module)));
        assert_eq!(trees[0], trees[1], "{module:?}");
    }
}

/// The files of a working tree, without what is inside submodules and git's own.
fn tree_of_files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let listed = git(dir, &["ls-files", "--cached", "--others", "--exclude-standard"]);
    let mut files: Vec<_> = listed.lines().filter(|f| dir.join(f).is_file()).collect();
    files.sort_unstable();
    files.dedup();
    files.into_iter().map(|f| (f.to_owned(), fs_err::read(dir.join(f)).unwrap())).collect()
}

#[tokio::test]
async fn what_cannot_come_out_is_told() {
    let world = World::new();
    world.import(&FULL).await;
    repository(&world.guest.join("empty"));
    repository(&world.guest.join("cloned"));
    fs_err::remove_dir_all(world.guest.join("lib s/deep/er")).unwrap();
    let (patch, told) = world.export().await;
    assert!(patch.is_empty(), "{}", String::from_utf8_lossy(&patch));
    assert_eq!(
        told,
        [
            inner("lib s/deep/er", InnerState::Gone),
            inner("empty", InnerState::Left),
            inner("cloned", InnerState::Left)
        ]
    );
    let (_, report) = export_as(&world.guest, &world.scratch, ExportFormat::Status, None).await.unwrap();
    assert!(report.inner.contains(&inner("empty", InnerState::Left)), "{:?}", report.inner);
}

#[tokio::test]
async fn a_second_import_gives_up_no_work_in_them() {
    let world = World::new();
    world.import(&FULL).await;
    let frames = framed(&packed_as(&world.host, &FULL).0, true).await;
    import_frames(&world.guest, &frames).await.unwrap();
    let deep = world.guest.join("lib s/deep/er");
    let steps: [(&str, &dyn Fn()); 3] = [
        ("1 changed file (lib s/deep/er/work)", &|| write(&deep, "work", "x\n")),
        ("1 commit", &|| {
            git(&deep, &["add", "-A"]);
            git(&deep, &["commit", "-qm", "work"]);
        }),
        ("1 changed file (cloned/)", &|| {
            git(&deep, &["reset", "-q", "--hard", "refs/bothy/base"]);
            git(&deep, &["reflog", "expire", "--expire=now", "--all"]);
            repository(&world.guest.join("cloned"));
        }),
    ];
    for (why, work) in steps {
        work();
        let before = fingerprint(&world.guest);
        let e = import_frames(&world.guest, &frames).await.unwrap_err();
        assert!(e.message.contains(why), "{why}: {e}");
        assert_untouched(&world.guest, &before);
    }
    // A stream that ends in the middle of the last of them takes nothing away, also with force.
    let whole = packed_as(&world.host, &FULL).0;
    let cut = framed(&whole[..whole.len() - 2048], true).await;
    let before = fingerprint(&world.guest);
    import_with(&world.guest, &cut, true).await.unwrap_err();
    assert_untouched(&world.guest, &before);
    import_with(&world.guest, &frames, true).await.unwrap();
    assert!(!world.guest.join("cloned").exists());
}

#[tokio::test]
async fn elsewhere_means_the_commits_that_are_named_there() {
    let world = World::new();
    let lib = world.host.join("lib s");
    let first = git(&lib, &["rev-parse", "HEAD"]);
    write(&lib, "a", "a second commit\n");
    git(&lib, &["commit", "-qam", "second"]);
    git(&world.host, &["commit", "-qam", "moves it"]);
    // Nothing that is not committed comes from elsewhere, also where a submodule is at the commit that is named.
    write(&world.host, "lib s/deep/er/a", "not committed\n");
    let from = PackOptions { from: Some("HEAD~1".into()), branch: Some("old".into()), ..FULL };
    world.import(&from).await;
    assert_eq!(git(&world.guest.join("lib s"), &["rev-parse", "HEAD"]), first);
    assert_eq!(git(&world.guest, &["status", "--porcelain"]), "");
    assert_eq!(world.export().await, (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn one_of_them_is_exported_by_itself_with_its_commits() {
    let world = World::new();
    world.import(&FULL).await;
    let (lib, here) = (world.guest.join("lib s"), world.host.join("lib s"));
    write(&lib, "a", "the guest's\n");
    git(&lib, &["commit", "-qam", "in the guest"]);
    let (bundle, report) = export_as(&lib, &world.scratch, ExportFormat::Bundle, None).await.unwrap();
    assert_eq!(report.commits, 1);
    let file = world.scratch.join("bundle");
    fs_err::write(&file, bundle).unwrap();
    let checked =
        Repository::open(&here).unwrap().check_bundle(&mut fs_err::File::open(&file).unwrap()).unwrap();
    assert_eq!((checked.head, checked.commits), (git(&lib, &["rev-parse", "HEAD"]), 1));
}

#[tokio::test]
async fn one_that_moves_on_here_is_no_conflict_with_the_one_there() {
    let world = World::new();
    world.import(&FULL).await;
    let lib = world.guest.join("lib s");
    write(&lib, "a", "the guest's\n");
    git(&lib, &["commit", "-qam", "in the guest"]);
    let before = fingerprint(&lib);
    for n in ["one", "two"] {
        write(&world.host, "lib s/b", n);
        git(&world.host.join("lib s"), &["commit", "-qam", n]);
        write(&world.host, "a", n);
        let report = sync_repo(&world.host, &world.guest, &world.scratch, false).await.unwrap();
        assert_eq!((report.changed, report.names), (1, Vec::new()), "{n}");
        let report = sync_repo(&world.host, &world.guest, &world.scratch, false).await.unwrap();
        assert_eq!((report.changed, report.conflicts), (0, 0), "{n}");
    }
    assert_untouched(&lib, &before);
    let (patch, told) = world.export().await;
    assert!(patch.starts_with(b"diff --git a/lib s/a"), "{}", String::from_utf8_lossy(&patch));
    assert_eq!(told, [inner("lib s", InnerState::Commits)]);
}
