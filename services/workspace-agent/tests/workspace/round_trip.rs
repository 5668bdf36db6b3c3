//! Import, change, export, apply: the tree is the same, whatever changed. The scripts are the real ones, run on the host.

use crate::support::{assert_untouched, export_repo, fingerprint, git, git_with, import_repo, tree_of};
use proptest::prelude::*;
use std::{
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::Path,
};

/// Names with all that a name can have; some are directories of others.
const NAMES: [&[u8]; 14] = [
    b"a",
    b"dir/b",
    b"dir/sub/c",
    b"with blank",
    b"new\nline",
    b"not\xffutf8",
    b"\"quoted\"",
    b"tab\tand \\",
    b" lead and trail ",
    "ä/ö".as_bytes(),
    b"dir2/b => c",
    b"-dash",
    b"x/a b/x",
    b"deep/er/and/deep/er",
];

#[derive(Debug, Clone)]
enum Change {
    Write(usize, u8, u16),
    Append(usize),
    Delete(usize),
    Link(usize, u8),
    Mode(usize),
    Rename(usize, usize),
    Empty(usize),
    Binary(usize, u8),
    Stage(usize),
    StageAll,
    Commit,
    Ignored(u8),
}

fn changes(most: usize) -> impl Strategy<Value = Vec<Change>> {
    let name = 0..NAMES.len();
    let change = prop_oneof![
        4 => (name.clone(), any::<u8>(), 0..60_u16).prop_map(|(n, s, l)| Change::Write(n, s, l)),
        2 => name.clone().prop_map(Change::Append),
        2 => name.clone().prop_map(Change::Delete),
        1 => (name.clone(), any::<u8>()).prop_map(|(n, t)| Change::Link(n, t)),
        2 => name.clone().prop_map(Change::Mode),
        2 => (name.clone(), name.clone()).prop_map(|(a, b)| Change::Rename(a, b)),
        1 => name.clone().prop_map(Change::Empty),
        2 => (name.clone(), any::<u8>()).prop_map(|(n, s)| Change::Binary(n, s)),
        1 => name.prop_map(Change::Stage),
        1 => Just(Change::StageAll),
        1 => Just(Change::Commit),
        1 => any::<u8>().prop_map(Change::Ignored),
    ];
    proptest::collection::vec(change, 0..most)
}

/// Makes room for a file at `path`: what is in its way goes.
fn clear(root: &Path, path: &Path) {
    for above in path.ancestors().skip(1).take_while(|p| *p != root) {
        if fs_err::symlink_metadata(above).is_ok_and(|m| !m.is_dir()) {
            fs_err::remove_file(above).unwrap();
        }
    }
    match fs_err::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs_err::remove_dir_all(path).unwrap(),
        Ok(_) => fs_err::remove_file(path).unwrap(),
        Err(_) => {}
    }
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
}

fn apply(root: &Path, change: &Change) {
    let at = |n: usize| root.join(OsStr::from_bytes(NAMES[n]));
    let is_file = |p: &Path| fs_err::symlink_metadata(p).is_ok_and(|m| m.is_file());
    match change {
        Change::Write(n, seed, lines) => {
            clear(root, &at(*n));
            let text: String =
                (0..*lines).map(|i| format!("line {} of {}\n", i, u16::from(*seed) * i % 7)).collect();
            fs_err::write(at(*n), text).unwrap();
        }
        Change::Append(n) if is_file(&at(*n)) => {
            let mut content = fs_err::read(at(*n)).unwrap();
            content.extend_from_slice(b"\nno newline at the end\r");
            fs_err::write(at(*n), content).unwrap();
        }
        Change::Delete(n) => clear(root, &at(*n)),
        Change::Link(n, target) => {
            clear(root, &at(*n));
            symlink(["a", "../x", "/nowhere", "dir/"][usize::from(*target) % 4], at(*n)).unwrap();
        }
        Change::Mode(n) if is_file(&at(*n)) => {
            let mode = fs_err::metadata(at(*n)).unwrap().permissions().mode();
            fs_err::set_permissions(at(*n), PermissionsExt::from_mode(mode ^ 0o111)).unwrap();
        }
        Change::Rename(a, b) if a != b && is_file(&at(*a)) => {
            let (content, mode) =
                (fs_err::read(at(*a)).unwrap(), fs_err::metadata(at(*a)).unwrap().permissions());
            fs_err::remove_file(at(*a)).unwrap();
            clear(root, &at(*b));
            fs_err::write(at(*b), content).unwrap();
            fs_err::set_permissions(at(*b), mode).unwrap();
        }
        Change::Empty(n) => {
            clear(root, &at(*n));
            fs_err::write(at(*n), b"").unwrap();
        }
        Change::Binary(n, seed) => {
            clear(root, &at(*n));
            let content: Vec<u8> =
                (0..3000_u32).map(|i| (i.wrapping_mul(u32::from(*seed) + 7) >> 3) as u8).collect();
            fs_err::write(at(*n), content).unwrap();
        }
        Change::Stage(n) => drop(git_with(root, &["add", "-A", "--", at(*n).to_str().unwrap_or(".")], b"")),
        Change::StageAll => drop(git(root, &["add", "-A"])),
        Change::Commit => drop(git_with(root, &["commit", "-qam", "work"], b"")),
        Change::Ignored(n) => fs_err::write(root.join(format!("{n}.ignored")), b"x").unwrap(),
        _ => {}
    }
}

fn round_trip(first: &[Change], dirty: &[Change], guest_work: &[Change], untracked: bool, detached: bool) {
    let tmp = tempfile::tempdir().unwrap();
    let (host, scratch) = (tmp.path().join("host"), tmp.path().join("scratch"));
    let guest = tmp.path().join("guest/in here/repo");
    fs_err::create_dir_all(&host).unwrap();
    fs_err::create_dir_all(&scratch).unwrap();
    git(&host, &["init", "-q", "-b", "main"]);
    fs_err::write(host.join(".gitignore"), "*.ignored\n").unwrap();
    first.iter().for_each(|c| apply(&host, c));
    git(&host, &["add", "-A"]);
    git(&host, &["commit", "-q", "--allow-empty", "-m", "first"]);
    if detached {
        git(&host, &["checkout", "-q", "--detach"]);
    }
    dirty.iter().for_each(|c| apply(&host, c));
    let before = fingerprint(&host);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(import_repo(&host, &guest, untracked));
    assert_untouched(&host, &before);
    // The guest has what the host has, but for ignored files, and for untracked ones where they were not asked for.
    let status = |dir: &Path| {
        let what = if untracked { "-uall" } else { "-uno" };
        git(dir, &["--no-optional-locks", "status", "--porcelain", "--no-renames", what])
    };
    assert_eq!(status(&guest), status(&host));

    // The host in the state of the import: what the guest got, made by hand.
    let state = tmp.path().join("state");
    let copied = std::process::Command::new("cp").arg("-a").arg(&host).arg(&state).status().unwrap();
    assert!(copied.success());
    git(&state, &["clean", "-qfdX"]);
    if !untracked {
        git(&state, &["clean", "-qfd"]);
    }
    assert_eq!(tree_of(&state, &scratch), tree_of(&guest, &scratch), "import");

    guest_work.iter().for_each(|c| apply(&guest, c));
    let before = fingerprint(&guest);
    let (patch, report) = runtime.block_on(export_repo(&guest, &scratch)).unwrap();
    assert_untouched(&guest, &before);
    let summary = bothy_pack::inspect_patch(patch.as_slice()).unwrap();
    assert_eq!((summary.files, summary.bytes), (report.files, report.bytes));

    if !patch.is_empty() {
        let out = git_with(&state, &["apply", "--whitespace=nowarn", "-"], &patch);
        assert!(
            out.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&out.stderr),
            String::from_utf8_lossy(&patch)
        );
    }
    git(&guest, &["clean", "-qfdX"]);
    git(&state, &["clean", "-qfdX"]);
    assert_eq!(tree_of(&state, &scratch), tree_of(&guest, &scratch), "export");
    let left = fs_err::read_dir(guest.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1, "nothing is left beside the repository");
    assert_eq!(fs_err::read_dir(&scratch).unwrap().count(), 1, "nor where the patch was made");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("BOTHY_ROUND_TRIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(24),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_goes_in_and_out_is_the_same(
        first in changes(20),
        dirty in changes(12),
        work in changes(16),
        untracked in any::<bool>(),
        detached in any::<bool>(),
    ) {
        round_trip(&first, &dirty, &work, untracked, detached);
    }
}
