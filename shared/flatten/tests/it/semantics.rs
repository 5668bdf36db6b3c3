//! What layers mean.

use crate::support::{Archive, Bench, text};
use bothy_contract::Code;
use bothy_flatten::{Layer, Limits, flatten};
use sha2::{Digest as _, Sha256};
use std::io::Write as _;

#[test]
fn layers_are_laid_over_one_another_and_hide_what_they_say() {
    let bench = Bench::new();
    let one = Archive::new()
        .dir("./")
        .dir("etc/")
        .file("etc/a", "one")
        .file("etc/b", "one")
        .link("etc/hard", "etc/a")
        .dir("gone")
        .file("gone/x", "x")
        .dir("opaque")
        .file("opaque/below", "x")
        .symlink("lib", "usr/lib")
        .dir("usr/lib")
        .file("was-file", "x")
        .dir("was-dir")
        .file("was-dir/x", "x");
    let two = Archive::new()
        .file("opaque/above", "two")
        .file("opaque/.wh..wh..opq", "")
        .file("etc/a", "two")
        .file("etc/.wh.b", "")
        .file(".wh.gone", "")
        .file("lib/libc.so", "through the link")
        .dir("was-file")
        .file("was-dir", "now a file")
        .file("made/by/itself", "x");
    let summary = bench.flatten(&[one.bytes(), two.bytes()]);
    assert_eq!(
        text(&bench.tree()),
        "etc dir\netc/a file two\netc/hard file one\nlib -> usr/lib\nmade dir\nmade/by dir\n\
         made/by/itself file x\nopaque dir\nopaque/above file two\nusr dir\nusr/lib dir\n\
         usr/lib/libc.so file through the link\nwas-dir file now a file\nwas-file dir\n"
    );
    assert_eq!((summary.files, summary.dropped.devices), (6, 0));
    assert_eq!(summary.hidden, 7, "`etc/b` and four files of one byte");
    assert!(bench.stat("/etc/a").contains("User:     7   Group: 70000"), "{}", bench.stat("/etc/a"));
}

#[test]
fn what_a_layer_hides_is_never_of_the_same_layer() {
    let bench = Bench::new();
    let below = Archive::new().dir("d").file("d/old", "x").file("f", "old");
    // Opposite orders: what is said of the layers below holds wherever it stands.
    let above = Archive::new()
        .dir("d")
        .file("d/new", "x")
        .file("d/.wh..wh..opq", "")
        .file("f", "new")
        .file(".wh.f", "");
    bench.flatten(&[below.bytes(), above.bytes()]);
    assert_eq!(text(&bench.tree()), "d dir\nd/new file x\nf file new\n");
}

#[test]
fn an_archive_of_a_root_file_system_hides_nothing() {
    let bench = Bench::new();
    let mut layers = bench.layers(&[Archive::new().file("a", "x").file(".wh.a", "y").bytes()]);
    layers[0].whiteouts = false;
    flatten(&layers, &bench.image(), &Limits::default(), &|_| Ok(())).unwrap();
    assert_eq!(text(&bench.tree()), ".wh.a file y\na file x\n");
}

#[test]
fn all_that_an_inode_has_comes_over() {
    let bench = Bench::new();
    let long = format!("/{}", "x".repeat(200));
    // cap_net_raw=ep, as vfs_cap_data revision 2.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let archive = Archive::new()
        .xattr("security.capability", &capability)
        .raw(b'0', b"ping", b"", 0o4755, b"x")
        .xattr("user.large", &[b'v'; 3000])
        .file("large", "x")
        .xattr("trusted.overlay.opaque", b"y")
        .dir("lied")
        .xattr("user.overlay.opaque", b"y")
        .dir("lied-too")
        .symlink("short", "ping")
        .symlink("long", &long)
        .link("pong", "ping")
        .raw(b'6', b"pipe", b"", 0o600, b"")
        .raw(b'3', b"whiteout", b"", 0o666, b"")
        .bytes();
    // The minor and major numbers of a device, which the builder does not set.
    let mut device = tar::Header::new_ustar();
    device.as_mut_bytes()[..4].copy_from_slice(b"null");
    device.set_entry_type(tar::EntryType::Char);
    device.set_mode(0o666);
    device.set_uid(0);
    device.set_gid(0);
    device.set_mtime(0);
    device.set_size(0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(300).unwrap();
    device.set_cksum();
    let archive = [device.as_bytes().as_slice(), &archive].concat();
    let summary = bench.flatten(&[archive]);
    assert_eq!((summary.dropped.devices, summary.dropped.xattrs), (1, 2));
    let stat = bench.stat("ping");
    assert!(stat.contains("Mode:  04755") && stat.contains("Links: 2"), "{stat}");
    assert!(stat.contains("security.capability (20)"), "{stat}");
    assert!(bench.stat("large").contains("user.large (3000)"));
    assert!(!bench.stat("lied").contains("overlay") && !bench.stat("lied-too").contains("overlay"));
    assert!(bench.stat("pipe").contains("Type: FIFO"));
    assert!(bench.stat("null").contains("01:300"), "{}", bench.stat("null"));
    let tree = bench.tree();
    assert_eq!(tree[b"short".as_slice()], "-> ping");
    assert_eq!(tree[b"long".as_slice()], format!("-> {long}"));
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

#[test]
fn compressed_layers_are_known_by_themselves_and_must_be_what_they_should() {
    let bench = Bench::new();
    let plain = [1, 2, 3].map(|n| Archive::new().file(&format!("f{n}"), &"data ".repeat(n * 90_000)).bytes());
    let zipped = [gzip(&plain[0]), zstd::encode_all(plain[1].as_slice(), 1).unwrap(), plain[2].clone()];
    let sum = |data: &[u8]| Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let mut layers = bench.layers(&zipped);
    for (layer, (inner, outer)) in layers.iter_mut().zip(plain.iter().zip(&zipped)) {
        layer.digest = Some(sum(outer));
        layer.diff_id = Some(sum(inner));
    }
    let go = |layers: &[Layer]| {
        let _ = fs_err::remove_file(bench.image());
        flatten(layers, &bench.image(), &Limits::default(), &|_| Ok(()))
    };
    go(&layers).unwrap();
    crate::support::check(&bench.image());
    assert_eq!(bench.tree().len(), 3);
    assert_eq!(bench.tree()[b"f3".as_slice()].len(), 5 + 5 * 270_000);
    let mut wrong = layers.clone();
    wrong[1].digest = Some(sum(b"other"));
    let err = go(&wrong).unwrap_err();
    assert!(err.message.contains("its digest is sha256:") && err.message.contains(&sum(b"other")), "{err}");
    wrong = layers.clone();
    wrong[0].diff_id = Some(sum(b"other"));
    assert!(go(&wrong).unwrap_err().message.contains("once decompressed"));
    // One that was cut off, and one with another's end.
    for damaged in [zipped[0][..zipped[0].len() / 2].to_vec(), [&zipped[0][..900], b"garbage"].concat()] {
        let err = go(&bench.layers(&[damaged])).unwrap_err();
        assert!(err.message.contains("damaged") || err.message.contains("middle"), "{err}");
    }
}

#[test]
fn work_that_is_stopped_ends_with_the_reason() {
    let bench = Bench::new();
    let layers = bench.layers(&[Archive::new().file("f", &"x".repeat(3 << 20)).bytes()]);
    let stop = |_| Err(bothy_contract::Error::new(Code::Cancelled, "as asked"));
    let err = flatten(&layers, &bench.image(), &Limits::default(), &stop).unwrap_err();
    assert_eq!((err.code, err.message.contains("as asked")), (Code::Cancelled, true));
}

#[test]
fn a_hundred_thousand_files_and_large_directories_are_sound() {
    let bench = Bench::new();
    let mut archive = Archive::new();
    for n in 0..100_000_u32 {
        archive = archive.file(&format!("many/{}/a-name-of-some-length-{n}", n % 3), "");
    }
    let summary = bench.flatten(&[archive.bytes()]);
    assert_eq!((summary.files, summary.directories), (100_000, 6));
}

/// The kernel's own view, in a mount namespace that ends with the command.
#[test]
fn the_kernel_mounts_it() {
    if !std::process::Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout == b"0\n") {
        eprintln!("skipped: only root may mount");
        return;
    }
    let bench = Bench::new();
    let body = "line\n".repeat(100_000);
    let archive = Archive::new()
        .file("d/body", &body)
        .link("d/again", "d/body")
        .symlink("d/link", "body")
        .xattr("user.k", b"v")
        .file("d/attr", "x");
    bench.flatten(&[archive.bytes()]);
    let mnt = bench.dir.path().join("mnt");
    fs_err::create_dir(&mnt).unwrap();
    let script = format!(
        "set -e; mount -o ro,loop {} {m}; cd {m}; wc -l < d/link; stat -c '%h %u %g %a %Y' d/again; ls d | wc -l",
        bench.image().display(),
        m = mnt.display()
    );
    let out = std::process::Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert_eq!(said, "100000\n2 7 70000 644 1700000000\n4\n", "{}", String::from_utf8_lossy(&out.stderr));
}
