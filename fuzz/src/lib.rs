//! What a fuzzer's bytes are given to. The fuzz targets have this file, and a plain test of `shared/oci` that replays the seeds, so
//! that neither can rot without the other.
//!
//! Bytes that a fuzzer makes up never have right checksums and digests. So these are mended here: what is behind them is what
//! is to be tried, not the arithmetic.
#![expect(clippy::expect_used, reason = "a failed set-up is a failed run, and a panic is what is looked for")]

use bothy_flatten::{Layer, Limits, Summary, flatten};
use sha2::{Digest as _, Sha256};
use std::{path::Path, process::Command};

/// The size of a block of an archive.
const BLOCK: usize = 512;
/// What parts the parts of an input to [`oci`].
const PART: &[u8] = b"\n%%\n";

/// Small: what is larger is only slower.
fn limits() -> Limits {
    Limits { bytes: 1 << 20, entries: 1000, names: 64 << 10 }
}

/// One to four layers, which the first byte says, with what else is done to them: bits 0 and 1 how many, bit 2 that names may hide
/// others, bit 3 that checksums are mended. Image files that come of it are looked at by e2fsck, all of them where `check` says
/// so, else some.
pub fn tar(data: &[u8], check: bool) -> bool {
    let Some((first, rest)) = data.split_first() else { return false };
    let dir = tempfile::tempdir().expect("a directory");
    let count = usize::from(first & 3) + 1;
    let each = (rest.len() / count / BLOCK * BLOCK).max(BLOCK);
    let mut rest = rest.to_vec();
    if first & 8 != 0 {
        mend(&mut rest);
    }
    let mut layers = Vec::new();
    for n in 0..count {
        let end = if n + 1 == count { rest.len() } else { each.min(rest.len()) };
        let behind = rest.split_off(end);
        let file = dir.path().join(format!("layer-{n}"));
        fs_err::write(&file, &rest).expect("room for a layer");
        rest = behind;
        let whiteouts = first & 4 != 0;
        layers.push(Layer { file, offset: 0, length: None, digest: None, diff_id: None, whiteouts });
    }
    make(&layers, dir.path(), check || sampled(data))
}

/// A layer, a configuration, a manifest and an index, in this order, with [`PART`] between them. In each, `$0` is the SHA-256 of
/// the first part as it has become by then, `$1` that of the second, and so on. An input of one part is the archive itself.
pub fn oci(data: &[u8], check: bool) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let archive = dir.path().join("archive");
    let bytes = if parts(data).len() > 1 { layout(data) } else { data.to_vec() };
    fs_err::write(&archive, bytes).expect("room for an archive");
    let Ok(contents) = bothy_oci::look_into(&archive, dir.path(), 4 << 20, &|_| Ok(())) else { return false };
    for layer in &contents.layers {
        // Whatever an archive says, nothing but it and what came of it is ever read.
        assert!(layer.file.starts_with(dir.path()), "{layer:?}");
    }
    make(&contents.layers(), dir.path(), check || sampled(data))
}

/// An image of `layers`, and whether it could be made; one that was made is sound.
fn make(layers: &[Layer], dir: &Path, check: bool) -> bool {
    let image = dir.join("image");
    let Ok(Summary { size, bytes, .. }) = flatten(layers, &image, &limits(), &|_| Ok(())) else {
        return false;
    };
    assert_eq!(fs_err::metadata(&image).expect("the image").len(), size);
    assert!(bytes <= limits().bytes, "{bytes} bytes");
    if check {
        let fsck = Command::new("e2fsck").arg("-fn").arg(&image).output().expect("e2fsck");
        assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
    }
    true
}

/// Whether this input's image is among those that are looked at: a process for each would be most of the time.
fn sampled(data: &[u8]) -> bool {
    let digest = Sha256::digest(data);
    digest.first().is_some_and(|byte| *byte < 4)
}

/// Gives every header that looks like one the checksum that it should have.
fn mend(archive: &mut [u8]) {
    for header in archive.chunks_exact_mut(BLOCK) {
        let (before, after) = header.split_at_mut(257);
        if !after.starts_with(b"ustar") {
            continue;
        }
        let Some(place) = before.get_mut(148..156) else { continue };
        place.fill(b' ');
        let sum: u32 = before.iter().chain(after.iter()).map(|b| u32::from(*b)).sum();
        if let Some(place) = before.get_mut(148..156) {
            place.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fn parts(data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = data;
    while let Some(at) = rest.windows(PART.len()).position(|w| w == PART) {
        let (part, behind) = rest.split_at(at);
        parts.push(part);
        rest = behind.get(PART.len()..).unwrap_or_default();
    }
    parts.push(rest);
    parts
}

/// The archive of a layout whose digests are right.
fn layout(data: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut digests: Vec<String> = Vec::new();
    let parts = parts(data);
    entry(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    for (n, part) in parts.iter().enumerate() {
        let mut text = part.to_vec();
        if n == 0 {
            mend(&mut text);
        } else {
            text = named(&text, &digests);
        }
        if n + 1 == parts.len() {
            entry(&mut archive, "index.json", &text);
        } else {
            let digest = hex::encode(Sha256::digest(&text));
            entry(&mut archive, &format!("blobs/sha256/{digest}"), &text);
            digests.push(digest);
        }
    }
    archive.resize(archive.len() + 2 * BLOCK, 0);
    archive
}

/// `text` with the digests in the places of `$0` to `$9`.
fn named(text: &[u8], digests: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let digit =
            bytes.peek().filter(|d| byte == b'$' && d.is_ascii_digit()).map(|d| usize::from(d - b'0'));
        match digit.and_then(|n| digests.get(n)) {
            Some(digest) => {
                bytes.next();
                out.extend_from_slice(digest.as_bytes());
            }
            None => out.push(byte),
        }
    }
    out
}

fn entry(archive: &mut Vec<u8>, name: &str, data: &[u8]) {
    let mut header = vec![0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = header.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", data.len()).as_bytes());
    put(136, b"00000000000\0");
    put(156, b"0");
    put(257, b"ustar\x0000");
    mend(&mut header);
    archive.extend_from_slice(&header);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
}
