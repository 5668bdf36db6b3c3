//! Archives to flatten, and what is in the file systems that come of them.

use bothy_contract::Error;
use bothy_flatten::{Layer, Limits, Summary, flatten};
use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// An archive under way.
pub(crate) struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry whose name is put as it is, whatever it says.
    pub(crate) fn raw(mut self, kind: u8, path: &[u8], link: &[u8], mode: u32, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        for (record, long) in [(b'L', path), (b'K', link)] {
            if long.len() >= 100 {
                let mut extended = tar::Header::new_gnu();
                extended.set_entry_type(tar::EntryType::new(record));
                extended.set_size(long.len() as u64 + 1);
                extended.set_cksum();
                self.0.append(&extended, &*[long, b"\0"].concat()).unwrap();
            }
        }
        let raw = header.as_mut_bytes();
        let short = |s: &[u8]| s[..s.len().min(99)].to_vec();
        raw[..short(path).len()].copy_from_slice(&short(path));
        raw[157..157 + short(link).len()].copy_from_slice(&short(link));
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(70_000);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, data: &str) -> Self {
        self.raw(b'0', path.as_bytes(), b"", 0o644, data.as_bytes())
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.raw(b'5', path.as_bytes(), b"", 0o755, b"")
    }

    pub(crate) fn symlink(self, path: &str, to: &str) -> Self {
        self.raw(b'2', path.as_bytes(), to.as_bytes(), 0o777, b"")
    }

    pub(crate) fn link(self, path: &str, to: &str) -> Self {
        self.raw(b'1', path.as_bytes(), to.as_bytes(), 0o644, b"")
    }

    /// Attributes of the entry that comes next.
    pub(crate) fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).unwrap();
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A directory with layers and the image that they become.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn layers(&self, archives: &[Vec<u8>]) -> Vec<Layer> {
        let mut layers = Vec::new();
        for (n, archive) in archives.iter().enumerate() {
            let file = self.dir.path().join(format!("layer-{n}"));
            fs_err::File::create(&file).unwrap().write_all(archive).unwrap();
            layers.push(Layer {
                file,
                offset: 0,
                length: None,
                digest: None,
                diff_id: None,
                whiteouts: true,
            });
        }
        layers
    }

    pub(crate) fn try_flatten(&self, archives: &[Vec<u8>], limits: &Limits) -> Result<Summary, Error> {
        let _ = fs_err::remove_file(self.image());
        flatten(&self.layers(archives), &self.image(), limits, &|_| Ok(()))
    }

    /// Flattens, and has e2fsck(8) look at what came of it.
    #[track_caller]
    pub(crate) fn flatten(&self, archives: &[Vec<u8>]) -> Summary {
        let summary = self.try_flatten(archives, &Limits::default()).unwrap();
        check(&self.image());
        summary
    }

    /// All that is in the image: by path, what it is and what it holds.
    pub(crate) fn tree(&self) -> BTreeMap<Vec<u8>, String> {
        let out = self.dir.path().join("out");
        let _ = fs_err::remove_dir_all(&out);
        fs_err::create_dir(&out).unwrap();
        debugfs(&self.image(), &format!("rdump / {}", out.display()));
        let mut tree = BTreeMap::new();
        walk(&out, &out, &mut tree);
        tree.remove(b"lost+found".as_slice());
        tree
    }

    /// What debugfs(8) says of a file.
    pub(crate) fn stat(&self, path: &str) -> String {
        debugfs(&self.image(), &format!("stat {path}"))
    }
}

#[track_caller]
pub(crate) fn check(image: &Path) {
    let out = Command::new("e2fsck").arg("-fn").arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
}

pub(crate) fn debugfs(image: &Path, command: &str) -> String {
    let out = Command::new("debugfs").args(["-R", command]).arg(image).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn walk(base: &Path, dir: &Path, tree: &mut BTreeMap<Vec<u8>, String>) {
    use std::os::unix::ffi::OsStrExt as _;
    for entry in fs_err::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = entry.path();
        let name = path.strip_prefix(base).unwrap().as_os_str().as_bytes().to_vec();
        let kind = entry.file_type().unwrap();
        let what = if kind.is_dir() {
            walk(base, &path, tree);
            "dir".to_owned()
        } else if kind.is_symlink() {
            format!("-> {}", fs_err::read_link(&path).unwrap().display())
        } else if kind.is_file() {
            format!("file {}", String::from_utf8_lossy(&fs_err::read(&path).unwrap()))
        } else {
            "other".to_owned()
        };
        tree.insert(name, what);
    }
}

/// A tree as text, for comparison.
pub(crate) fn text(tree: &BTreeMap<Vec<u8>, String>) -> String {
    tree.iter().map(|(path, what)| format!("{} {what}\n", path.escape_ascii())).collect()
}
