//! Archives that mean ill: refused with words, or contained in the image.

use crate::support::{Archive, Bench, check, text};
use bothy_contract::Code;
use bothy_flatten::Limits;

#[track_caller]
fn refused(archive: Archive, why: &str) {
    let bench = Bench::new();
    let err = bench.try_flatten(&[archive.bytes()], &Limits::default()).unwrap_err();
    assert!(err.message.contains(why), "{err}");
    assert_eq!(err.code, Code::InvalidArgument);
}

#[test]
fn names_that_lead_out_are_refused() {
    refused(Archive::new().file("../../etc/passwd", "x"), "leads upwards");
    refused(Archive::new().file("a/../../b", "x"), "leads upwards");
    refused(Archive::new().file("x", "x").link("y", "../../etc/shadow"), "leads upwards");
    refused(Archive::new().file("a/../.wh.b", ""), "leads upwards");
    refused(Archive::new().file(".wh...", ""), "hides no name");
    refused(Archive::new().file(".wh.", ""), "hides no name");
    refused(Archive::new().link("y", "/etc/shadow"), "which is not there");
    refused(Archive::new().dir("d").link("y", "d"), "which is a directory");
    refused(Archive::new().link("y", "/"), "which is a directory");
    refused(Archive::new().file("f", "x").file("f/x", "x"), "is not a directory");
    refused(Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", "x"), "too many symbolic links");
    refused(Archive::new().file(&"n".repeat(256), "x"), "longer than any file system");
    refused(Archive::new().file(&"n/".repeat(2100), "x"), "too long");
    refused(Archive::new().symlink("a", ""), "empty");
    refused(Archive::new().raw(b'0', b"d/", b"", 0o644, b"x"), "checksum");
    refused(Archive::new().symlink("/", "x"), "the root can only be a directory");
    refused(Archive::new().raw(b'Q', b"x", b"", 0o644, b""), "unknown type");
    refused(Archive::new().raw(b'S', b"x", b"", 0o644, b""), "sparse");
}

#[test]
fn links_on_the_way_stay_inside() {
    let bench = Bench::new();
    let below = Archive::new()
        .symlink("out", "../../../../tmp")
        .symlink("abs", "/etc")
        .symlink("twice", "out/deeper")
        .file("etc/passwd", "inside")
        .file("etc/victim", "inside");
    let above = Archive::new()
        .file("out/made", "x")
        .file("abs/passwd", "new")
        .file("abs/.wh.victim", "")
        .file("/absolute", "x")
        .file("twice/x", "x")
        .link("hard", "out/made");
    bench.flatten(&[below.bytes(), above.bytes()]);
    assert_eq!(
        text(&bench.tree()),
        "abs -> /etc\nabsolute file x\netc dir\netc/passwd file new\nhard file x\nout -> ../../../../tmp\n\
         tmp dir\ntmp/deeper dir\ntmp/deeper/x file x\ntmp/made file x\ntwice -> out/deeper\n"
    );
    assert!(!std::path::Path::new("/tmp/made").exists() && !std::path::Path::new("/absolute").exists());
}

#[test]
fn names_are_bytes() {
    let bench = Bench::new();
    let archive =
        Archive::new().raw(b'0', b"new\nline", b"", 0o644, b"1").raw(b'0', b"\xff\x01", b"", 0o644, b"2");
    bench.flatten(&[archive.bytes()]);
    assert_eq!(text(&bench.tree()), "new\\nline file 1\n\\xff\\x01 file 2\n");
}

#[test]
fn what_an_archive_uses_up_is_bounded() {
    let bench = Bench::new();
    // 64 MiB of zeros in 64 KiB.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let archive = Archive::new().raw(b'0', b"zeros", b"", 0o644, &vec![0; 64 << 20]).bytes();
    std::io::Write::write_all(&mut bomb, &archive).unwrap();
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    let limits = Limits { bytes: 8 << 20, entries: 10, names: 2000 };
    let err = bench.try_flatten(&[bomb], &limits).unwrap_err();
    assert_eq!((err.code, err.message.contains("more than 8 MiB")), (Code::ResourceExhausted, true), "{err}");
    let many = (0..11).fold(Archive::new(), |a, n| a.file(&format!("f{n}"), ""));
    assert!(
        bench.try_flatten(&[many.bytes()], &limits).unwrap_err().message.contains("more than 10 entries")
    );
    let long = (0..9).fold(Archive::new(), |a, n| a.file(&format!("{n}/{}", "x".repeat(250)), ""));
    assert!(bench.try_flatten(&[long.bytes()], &limits).unwrap_err().message.contains("names come to"));
    // Of several layers together.
    let half = Archive::new().raw(b'0', b"f", b"", 0o644, &vec![1; 5 << 20]).bytes();
    assert!(bench.try_flatten(&[half.clone(), half], &limits).unwrap_err().message.contains("8 MiB"));
}

#[test]
fn headers_that_lie_are_refused() {
    let bench = Bench::new();
    let sound = Archive::new().file("f", "data").bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut archive = sound.clone();
        archive[at..at + bytes.len()].copy_from_slice(bytes);
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes().copy_from_slice(&archive[..512]);
        header.set_cksum();
        archive[..512].copy_from_slice(header.as_bytes());
        archive
    };
    for (archive, why) in [
        (with(124, b"77777777777"), "middle of a file"),
        (with(124, &[0xff; 12]), "no number"),
        (with(124, &[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), "no number"),
        (with(124, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), "too large"),
        (with(124, b"9999       "), "no number"),
        (with(156, b"x"), "without sense"),
        (with(156, b"L"), "end in the middle"),
        (sound[..700].to_vec(), ""),
        (sound[..300].to_vec(), "middle of a header"),
        (b"not an archive at all".repeat(100), "checksum"),
    ] {
        match bench.try_flatten(&[archive], &Limits::default()) {
            Err(e) => assert!(e.message.contains(why), "{e} {why}"),
            // A long name without an entry behind it is an archive without entries.
            Ok(_) => assert!(why == "end in the middle" || why.is_empty(), "{why}"),
        }
    }
}

/// Archives with bytes changed at random: whatever comes of them, nothing panics, and an image that is made is sound.
#[test]
fn damaged_archives_never_make_unsound_images() {
    let bench = Bench::new();
    let sound = Archive::new()
        .dir("d")
        .file("d/f", "data")
        .symlink("d/l", "f")
        .xattr("user.a", b"b")
        .file(&"long".repeat(40), "x")
        .link("d/h", "d/f")
        .file("d/.wh.f", "")
        .bytes();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let mut made = 0;
    for round in 0..400 {
        let mut archive = sound.clone();
        for _ in 0..=random(4) {
            let at = random(archive.len());
            archive[at] = u8::try_from(random(256)).unwrap();
        }
        // Right checksums again, so that not all of them end there.
        for at in (0..archive.len()).step_by(512) {
            if archive[at + 257..].starts_with(b"ustar") {
                let mut header = tar::Header::new_gnu();
                header.as_mut_bytes().copy_from_slice(&archive[at..at + 512]);
                header.set_cksum();
                archive[at..at + 512].copy_from_slice(header.as_bytes());
            }
        }
        if random(8) == 0 {
            archive.truncate(random(archive.len()));
        }
        let limits = Limits { bytes: 1 << 20, entries: 100, names: 1 << 16 };
        if bench.try_flatten(&[archive], &limits).is_ok() {
            made += 1;
            // Each check is a process.
            if round % 8 == 0 {
                check(&bench.image());
            }
        }
    }
    assert!(made > 20, "{made} images were made: most archives are refused at once, and little is tried");
}
