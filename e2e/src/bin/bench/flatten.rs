//! Layers of an image to an ext4 file system: bothy's way, which is one pass, against unpacking to a directory and filling a
//! file system from that.

use crate::median;
use bothy_flatten::{Layer, Limits, flatten};
use bothy_testkit::temp_dir;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

/// What the layers hold together, in MiB, and how many there are.
const MIB: u64 = 500;
const LAYERS: u64 = 4;

/// Alternating pairs; the ratio is what counts.
pub(crate) fn run(pairs: usize) {
    let dir = temp_dir();
    let layers: Vec<_> = (0..LAYERS).map(|n| layer(dir.path(), n)).collect();
    let size: u64 = layers.iter().map(|l| fs_err::metadata(l).expect("a layer").len()).sum();
    println!("{LAYERS} layers, gzip, {} MiB of {MIB} MiB", size >> 20);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        for way in 0..2 {
            sync();
            let begun = Instant::now();
            // Whoever goes first has the worse of it, or the better: they take turns.
            if (pair + way) % 2 == 0 {
                by_bothy(dir.path(), &layers);
                ours.push(begun.elapsed().as_secs_f64());
            } else {
                by_tools(dir.path(), &layers);
                theirs.push(begun.elapsed().as_secs_f64());
            }
            let _ = fs_err::remove_dir_all(dir.path().join("tree"));
            let _ = fs_err::remove_file(dir.path().join("image"));
        }
        println!("pair {}: bothy {:.2} s, tar and mkfs {:.2} s", pair + 1, ours[pair], theirs[pair]);
    }
    let (ours, theirs) = (median(&ours), median(&theirs));
    println!("median: bothy {ours:.2} s, tar and mkfs {theirs:.2} s, ratio {:.2} (bar 0.80)", ours / theirs);
}

/// Pieces of this machine's own programs and libraries, some thousands of small files and a few large ones.
fn layer(dir: &Path, n: u64) -> PathBuf {
    let tree = dir.join("made");
    let mut left = (MIB / LAYERS) << 20;
    let mut sources: Vec<PathBuf> = Vec::new();
    for from in ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/share/perl", "/usr/include"] {
        collect(Path::new(from), &mut sources);
    }
    sources.sort();
    for source in sources.iter().skip(usize::try_from(n).expect("small")).step_by(3).cycle().take(200_000) {
        let Ok(meta) = fs_err::metadata(source) else { continue };
        let to =
            tree.join(format!("layer{n}/{}", left >> 20)).join(source.strip_prefix("/").expect("a path"));
        fs_err::create_dir_all(to.parent().expect("a parent")).expect("a directory");
        fs_err::copy(source, &to).expect("a copy");
        left = left.saturating_sub(meta.len());
        if left == 0 {
            break;
        }
    }
    let layer = dir.join(format!("layer-{n}.tar.gz"));
    tool("tar", &["-C", text(&tree), "--use-compress-program=gzip -1", "-cf", text(&layer), "."]);
    fs_err::remove_dir_all(tree).expect("the tree goes");
    layer
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs_err::read_dir(dir) else { return };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), into),
            Ok(kind) if kind.is_file() => into.push(entry.path()),
            _ => {}
        }
    }
}

fn by_bothy(dir: &Path, layers: &[PathBuf]) {
    let layers: Vec<_> = layers
        .iter()
        .map(|file| Layer {
            file: file.clone(),
            offset: 0,
            length: None,
            digest: None,
            diff_id: None,
            whiteouts: true,
        })
        .collect();
    flatten(&layers, &dir.join("image"), &Limits::default(), &|_| Ok(())).expect("an image");
}

fn by_tools(dir: &Path, layers: &[PathBuf]) {
    let (tree, image) = (dir.join("tree"), dir.join("image"));
    fs_err::create_dir(&tree).expect("a directory");
    for layer in layers {
        tool("tar", &["-C", text(&tree), "-xpf", text(layer)]);
    }
    let size = format!("{}M", MIB * 3 / 2);
    tool("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-d", text(&tree), text(&image), &size]);
}

fn sync() {
    tool("sync", &[]);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

fn tool(name: &str, args: &[&str]) {
    let status = Command::new(name).args(args).status().expect("a tool");
    assert!(status.success(), "{name} failed");
}
