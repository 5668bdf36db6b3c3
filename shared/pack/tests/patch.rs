//! Patches of a hostile guest.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_pack::inspect_patch;

fn refused(patch: &str) -> String {
    inspect_patch(patch.as_bytes()).unwrap_err().message
}

fn new_file(name: &str) -> String {
    format!(
        "diff --git a/{name} b/{name}\nnew file mode 100644\nindex 0..1\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+x\n"
    )
}

#[test]
fn good_patches_are_counted() {
    let rename = "diff --git a/old b/new name\nsimilarity index 90%\nrename from old\nrename to new name\n";
    let mode = "diff --git a/m b/m\nold mode 100644\nnew mode 100755\n";
    let gone = "diff --git a/g b/g\ndeleted file mode 120000\nindex 1..0\n--- a/g\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n\\ No newline at end of file\n";
    let binary = "diff --git a/b b/b\nindex 1..2 100644\nGIT binary patch\nliteral 3\nKcmZQzU|?Wi00IC20RR91\n\nliteral 0\nHcmV?d00001\n\n";
    let patch = [&new_file("a b"), rename, mode, gone, binary, &new_file("dir/diff --git")].concat();
    let sum = inspect_patch(patch.as_bytes()).unwrap();
    assert_eq!((sum.files, sum.created, sum.deleted, sum.renamed, sum.binary), (6, 2, 1, 1, 1));
    assert_eq!(sum.bytes, patch.len() as u64);
    assert_eq!(inspect_patch(&b""[..]).unwrap().files, 0);
}

#[test]
fn names_outside_or_inside_dot_git_are_refused() {
    for name in [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "./a",
        "a/./b",
        ".git/hooks/pre-commit",
        "sub/.GIT/config",
        ".Git/x",
        "git~1/x",
        ".git./x",
        ".git /x",
        ".g\u{200c}it/x",
        "a\\.git\\x",
        ".git::$INDEX_ALLOCATION/x",
        ".git",
    ] {
        let message = refused(&new_file(name));
        assert!(message.contains("the name"), "{name}: {message}");
        let rename =
            format!("diff --git a/x b/{name}\nsimilarity index 100%\nrename from x\nrename to {name}\n");
        assert!(refused(&rename).contains("the name"), "{name}");
        let delete = format!("diff --git a/{name} b/{name}\ndeleted file mode 100644\nindex 1..0\n");
        assert!(refused(&delete).contains("the name"), "{name}");
    }
    let quoted = "diff --git \"a/.gi\\164/x\" \"b/.gi\\164/x\"\nnew file mode 100644\n";
    assert!(refused(quoted).contains("`.git`"));
    for name in [".gitignore", ".github/x", "a.git/x", "git/x", "..x/y", "x..", ".git-x"] {
        inspect_patch(new_file(name).as_bytes()).unwrap();
    }
}

#[test]
fn what_git_apply_might_read_in_another_way_is_refused() {
    let header = "diff --git a/a b/a\n";
    for (patch, why) in [
        ("--- a/.git/x\n+++ b/.git/x\n@@ -0,0 +1 @@\n+x\n", "belongs to no file"),
        ("Hello\n", "belongs to no file"),
        (&format!("{header}--- a/a\n+++ b/.git/x\n@@ -1 +1 @@\n-x\n+y\n"), "two names"),
        (&format!("{header}--- a/../a\n+++ b/a\n@@ -1 +1 @@\n-x\n+y\n"), "two names"),
        (&format!("{header}--- a/a\n@@ -1 +1 @@\n-x\n+y\n"), "without `+++`"),
        ("diff --git a/a b/b\nnew file mode 100644\n", "not clear"),
        (&format!("{header}rename from b\n"), "not clear"),
        (&format!("{header}new file mode 160000\n"), "mode"),
        (&format!("{header}new file mode 104755\n"), "mode"),
        (&format!("{header}index 1..2 040000\n"), "mode"),
        (&format!("{header}--- a/a\n+++ b/a\n"), "hunk"),
        (&format!("{header}--- a/a\n+++ b/a\n@@ -1 +1 @@\n-x\n+y\n+z\n"), "belongs to no file"),
        (&format!("{header}--- a/a\n+++ b/a\n@@ -1,2 +1 @@\n-x\n+y\n+z\n"), "more lines"),
        (&format!("{header}--- a/a\n+++ b/a\n@@ -1,2 +1 @@\n-x\n+y\n"), "not a line"),
        (&format!("{header}GIT binary patch\nliteral x\n"), "no number"),
        (&format!("{header}GIT binary patch\nliteral 99999999999\n\n"), "claim"),
        (&format!("{header}GIT binary patch\nliteral 3\n@@ -1 +1 @@\n\n"), "binary content"),
        (&format!("{header}Binary files a/a and b/a differ\n"), "belongs to no file"),
        ("diff --git a/a b/a", "belongs to no file"),
    ] {
        assert!(refused(patch).contains(why), "{patch}: {}", refused(patch));
    }
}

#[test]
fn files_below_a_new_link_are_refused_in_any_order() {
    let link = "diff --git a/d/l b/d/l\nnew file mode 120000\nindex 0..1\n--- /dev/null\n+++ b/d/l\n@@ -0,0 +1 @@\n+/etc\n\\ No newline at end of file\n";
    let below = new_file("d/l/passwd");
    assert!(refused(&format!("{link}{below}")).contains("below the symbolic link d/l"));
    assert!(refused(&format!("{below}{link}")).contains("below the symbolic link d/l"));
    let gone = "diff --git a/d/l/x b/d/l/x\ndeleted file mode 100644\nindex 1..0\n";
    assert_eq!(inspect_patch(format!("{gone}{link}{}", new_file("d/lx")).as_bytes()).unwrap().symlinks, 1);
}

#[test]
fn lines_without_end_need_no_memory_and_headers_must_be_short() {
    use std::io::Read;
    let head = "diff --git a/a b/a\nnew file mode 100644\n--- /dev/null\n+++ b/a\n@@ -0,0 +1 @@\n+";
    let long = head.as_bytes().chain(std::io::repeat(b'x').take(64 << 20)).chain(&b"\n"[..]);
    assert_eq!(inspect_patch(long).unwrap().files, 1);
    let name = "n/".repeat(30_000);
    assert!(refused(&new_file(&name)).contains("belongs to no file"));
    assert!(refused(&new_file(&"n/n".repeat(2000))).contains("too long"));
}
