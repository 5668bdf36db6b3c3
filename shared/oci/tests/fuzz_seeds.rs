//! The fuzz targets' seeds, which findings are kept among, through the very functions that the targets call.

#![expect(clippy::unwrap_used, reason = "a failed step of a replay is a failed test")]

#[path = "../../../fuzz/src/lib.rs"]
pub mod entry;

use std::path::Path;

/// Those of `target`, and how many of them became an image.
fn replay(target: &str, with: fn(&[u8], bool) -> bool) -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    let mut made = Vec::new();
    for seed in fs_err::read_dir(dir).unwrap() {
        let seed = seed.unwrap();
        if with(&fs_err::read(seed.path()).unwrap(), true) {
            made.push(seed.file_name().into_string().unwrap());
        }
    }
    made.sort();
    made
}

#[test]
fn archives() {
    let made = replay("tar", entry::tar);
    for name in ["gzip", "large", "long-names", "pax", "plain", "root", "whiteouts", "zstd"] {
        assert!(made.iter().any(|m| m == name), "{name} became no image; these did: {made:?}");
    }
    assert!(!made.iter().any(|m| m == "upwards" || m == "links"), "{made:?}");
}

#[test]
fn layouts() {
    let made = replay("oci", entry::oci);
    for name in ["gzip-root", "image", "nested", "root", "two-layers"] {
        assert!(made.iter().any(|m| m == name), "{name} became no image; these did: {made:?}");
    }
    assert!(!made.iter().any(|m| m == "none-of-ours" || m == "not-whole"), "{made:?}");
}
