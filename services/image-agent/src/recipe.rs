//! Recipes: what an image is made of.
//!
//! A recipe is a directory with `recipe.toml` and, where the image gets files of ours, a tree `files/` that is laid
//! over its root. It names no mirror: packages come from where the host's own come. Its digest, over both, is in
//! the manifest, so an image of an older recipe is told from a current one.
//!
//! A recipe that `extends` another is that one with its own words in addition: lists are joined, the trees are laid one over
//! the other, and what else it says takes the place of what the other says.

use crate::fault;
use bothy_contract::{
    Code, Error, ImageName,
    image::{InitStyle, WaitService},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{
    io,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

/// What units there are, by the ends of their names (systemd.unit(5)).
const UNIT_KINDS: [&str; 11] = [
    "service",
    "socket",
    "target",
    "timer",
    "path",
    "mount",
    "automount",
    "swap",
    "device",
    "slice",
    "scope",
];

/// A recipe that has been checked.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    /// The text of `recipe.toml`.
    pub(crate) spec: Spec,
    /// The trees that are laid over the root, in this order.
    pub(crate) files: Vec<PathBuf>,
    /// SHA-256 over the texts and the trees.
    pub(crate) sha256: String,
}

/// How many recipes may extend one another.
const MAX_DEPTH: usize = 4;

/// `recipe.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    /// The format: 1.
    pub(crate) version: u32,
    /// The release, `bookworm`; the host's own where it is not named.
    pub(crate) suite: Option<String>,
    /// How the guest is brought up.
    pub(crate) init: InitStyle,
    /// What the work disk is mounted on.
    pub(crate) home: String,
    /// The package that depends on the kernel's.
    pub(crate) kernel: String,
    /// Packages beside the essential ones.
    pub(crate) packages: Vec<String>,
    /// Shell scripts that are run inside the tree once the packages are in, while there is a network.
    #[serde(default)]
    pub(crate) run: Vec<String>,
    /// Units that shall never start.
    #[serde(default)]
    pub(crate) mask: Vec<String>,
    /// Paths that are removed from the tree after the packages are in.
    #[serde(default)]
    pub(crate) remove: Vec<String>,
    /// Directories of the home's skeleton that nobody else may enter, relative to the home.
    #[serde(default)]
    pub(crate) private: Vec<String>,
    /// What must answer before a VM is ready.
    #[serde(default)]
    pub(crate) wait: Vec<WaitService>,
}

impl Recipe {
    /// Reads the recipe `name` below `dir`.
    ///
    /// # Errors
    /// It is not there, or what is wrong with it.
    pub(crate) fn load(dir: &Path, name: &ImageName) -> Result<Self, Error> {
        let mut read = Vec::new();
        let mut next = Some(name.clone());
        while let Some(name) = next.take() {
            let path = dir.join(name.as_str()).join("recipe.toml");
            let wrong = |why: String| wrong(&path, &why);
            if read.len() == MAX_DEPTH {
                return Err(wrong(format!("more than {MAX_DEPTH} recipes extend one another")));
            }
            let text = fs_err::read_to_string(&path).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => {
                    Error::not_found(format!("there is no recipe {name} in {}", dir.display()))
                        .hint("`image.recipe_dir` in `bothy.toml` says where recipes are")
                }
                _ => fault::io(format!("cannot read the recipe {name}"), &e),
            })?;
            let mut table: toml::Table = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
            if let Some(other) = table.remove("extends") {
                let other = other.as_str().unwrap_or_default().parse::<ImageName>();
                next = Some(other.map_err(|e| wrong(format!("what it extends: {e}")))?);
            }
            let files = dir.join(name.as_str()).join("files");
            let files = files.is_dir().then_some(files);
            let sha256 = digest(&text, files.as_deref())
                .map_err(|e| fault::io(format!("cannot read the files of recipe {name}"), &e))?;
            read.push((path, table, files, sha256));
        }
        // From the one that extends none up to the one that was asked for.
        let (mut whole, mut files, mut digests) = (toml::Table::new(), Vec::new(), Vec::new());
        let mut asked = PathBuf::new();
        for (path, table, tree, sha256) in read.into_iter().rev() {
            extend(&mut whole, table);
            files.extend(tree);
            digests.push(sha256);
            asked = path;
        }
        let spec: Spec = whole.try_into().map_err(|e: toml::de::Error| wrong(&asked, &e.to_string()))?;
        spec.check().map_err(|why| wrong(&asked, &why))?;
        let sha256 = match digests.as_slice() {
            [one] => one.clone(),
            all => hex::encode(Sha256::digest(all.join("\n"))),
        };
        Ok(Self { spec, files, sha256 })
    }
}

fn wrong(path: &Path, why: &str) -> Error {
    Error::new(Code::InvalidArgument, format!("{} is not a valid recipe: {why}", path.display()))
}

/// Adds the words of `more` to `base`: lists are joined, all else takes the place of what is there.
fn extend(base: &mut toml::Table, more: toml::Table) {
    for (key, value) in more {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Array(there)), toml::Value::Array(more)) => there.extend(more),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

impl Spec {
    /// Checks what the types alone do not. These words go into tools' arguments and paths of the image.
    fn check(&self) -> Result<(), String> {
        if self.version != 1 {
            return Err(format!("version {} is not 1, the one that this bothy knows", self.version));
        }
        if let Some(bad) = self.suite.iter().find(|s| !word(s, "-.")) {
            return Err(format!("{bad:?} is not the name of a suite"));
        }
        // Debian policy 5.6.1, with `:` for an architecture.
        if let Some(bad) = self.packages.iter().chain([&self.kernel]).find(|s| !word(s, "+-.:")) {
            return Err(format!("{bad:?} is not the name of a package"));
        }
        if let Some(bad) = self.mask.iter().find(|s| !unit(s)) {
            return Err(format!("{bad:?} is not the name of a unit"));
        }
        if self.run.iter().any(|script| script.contains('\0')) {
            return Err("a script in `run` has a zero byte in it".to_owned());
        }
        if !self.home.starts_with('/') || self.home == "/" || inside(&self.home).is_none() {
            return Err(format!("home {:?} is not an absolute path below the root", self.home));
        }
        if let Some(bad) = self.remove.iter().chain(&self.private).find(|p| inside(p).is_none()) {
            return Err(format!("{bad:?} is not a path within the image"));
        }
        if let Some(bad) = self.wait.iter().find(|w| !waitable(w)) {
            return Err(format!(
                "wait {:?} needs a name, a port or a unit, and a timeout_s of 1 or more",
                bad.name
            ));
        }
        if self.init != InitStyle::Systemd
            && let Some(bad) = self.wait.iter().find(|w| w.unit.is_some())
        {
            return Err(format!("wait {:?} names a unit, and only init `systemd` has units", bad.name));
        }
        Ok(())
    }
}

/// `path` without its leading `/`, if it then names something below where it is put and nothing else.
pub(crate) fn inside(path: &str) -> Option<&Path> {
    let path = Path::new(path.trim_start_matches('/'));
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

/// All paths below `dir`, parents first, sorted.
pub(crate) fn walk(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    let mut names = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        names.push(entry?);
    }
    names.sort_by_key(|e| e.file_name());
    for entry in names {
        out.push(entry.path());
        if entry.file_type()?.is_dir() {
            out.extend(walk(&entry.path())?);
        }
    }
    Ok(out)
}

fn digest(text: &str, files: Option<&Path>) -> io::Result<String> {
    let mut sha = Sha256::new();
    let mut field = |data: &[u8]| {
        sha.update((data.len() as u64).to_le_bytes());
        sha.update(data);
    };
    field(text.as_bytes());
    for path in files.map_or(Ok(Vec::new()), walk)? {
        let name = files.and_then(|f| path.strip_prefix(f).ok()).unwrap_or(&path);
        field(name.as_os_str().as_bytes());
        let meta = fs_err::symlink_metadata(&path)?;
        if meta.is_symlink() {
            field(fs_err::read_link(&path)?.as_os_str().as_bytes());
        } else if meta.is_file() {
            field(&[u8::from(meta.permissions().mode() & 0o100 != 0)]);
            field(&fs_err::read(&path)?);
        }
    }
    Ok(hex::encode(sha.finalize()))
}

/// Whether `s` is a word of letters and digits and what `also` has, which begins with one of the former.
fn word(s: &str, also: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphanumeric())
        && s.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
}

/// Whether `s` is the name of a unit (systemd.unit(5)): not an option, a path or a pattern, and with its kind.
fn unit(s: &str) -> bool {
    let kind = s.rsplit_once('.').map(|(_, kind)| kind);
    kind.is_some_and(|kind| UNIT_KINDS.contains(&kind)) && s.len() < 256 && word(s, "-.@_:\\")
}

/// Whether something can be waited for: it has a name, a time, and a port or a unit.
fn waitable(w: &WaitService) -> bool {
    let named = w.unit.as_deref().is_some_and(unit);
    !w.name.is_empty()
        && w.timeout_s > 0
        && w.port != Some(0)
        && (w.unit.is_none() || named)
        && (w.port.is_some() || named)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "version = 1\ninit = 'systemd'\nhome = '/root'\nkernel = 'linux-image-cloud-amd64'\n\
        packages = ['git', 'g++', 'libc6:amd64']\nmask = ['a@.service']\nremove = ['usr/share/doc']\n\
        private = ['.ssh']\n[[wait]]\nname = 'ssh'\nport = 22\ntimeout_s = 60\n";

    fn put(text: &str) -> (tempfile::TempDir, ImageName) {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir_all(dir.path().join("x/files/etc")).unwrap();
        fs_err::write(dir.path().join("x/recipe.toml"), text).unwrap();
        fs_err::write(dir.path().join("x/files/etc/f"), "1").unwrap();
        (dir, "x".parse().unwrap())
    }

    #[test]
    fn the_recipe_that_comes_with_bothy_is_valid() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/images");
        let recipe = Recipe::load(&dir, &ImageName::default_image()).unwrap();
        assert!(recipe.spec.wait.iter().any(|w| w.port == Some(22)));
    }

    #[test]
    fn every_recipe_that_comes_with_bothy_is_valid() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/images");
        let mut names = Vec::new();
        for entry in fs_err::read_dir(&dir).unwrap() {
            let name: ImageName = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
            Recipe::load(&dir, &name).unwrap();
            names.push(name.to_string());
        }
        names.sort();
        assert_eq!(names, ["agent", "debian", "minimal"]);
    }

    #[test]
    fn a_recipe_that_extends_another_is_both() {
        let (dir, _) = put(GOOD);
        let more = |text: &str| {
            fs_err::create_dir_all(dir.path().join("y/files")).unwrap();
            fs_err::write(dir.path().join("y/recipe.toml"), text).unwrap();
            Recipe::load(dir.path(), &"y".parse().unwrap())
        };
        let both = more(
            "extends = 'x'\nhome = '/home/me'\npackages = ['npm']\nrun = ['true']\n\
            [[wait]]\nname = 'web'\nport = 80\ntimeout_s = 5\n",
        )
        .unwrap();
        assert_eq!(both.spec.packages, ["git", "g++", "libc6:amd64", "npm"]);
        assert_eq!((both.spec.home.as_str(), both.spec.run.len(), both.spec.wait.len()), ("/home/me", 1, 2));
        assert_eq!(both.files, [dir.path().join("x/files"), dir.path().join("y/files")]);
        fs_err::write(dir.path().join("x/files/etc/f"), "2").unwrap();
        let other = more("extends = 'x'\n").unwrap().sha256;
        assert!(other != both.sha256, "a change of the one that is extended is a change");
        assert!(more("extends = 'y'\n").unwrap_err().message.contains("extend one another"));
        assert_eq!(more("extends = 'z'\n").unwrap_err().code, Code::NotFound);
        assert!(more("extends = '../x'\n").unwrap_err().message.contains("what it extends"));
    }

    #[test]
    fn a_digest_changes_with_text_content_name_and_mode() {
        let (dir, name) = put(GOOD);
        let sha = || Recipe::load(dir.path(), &name).unwrap().sha256;
        let file = dir.path().join("x/files/etc/f");
        let mut seen = vec![sha()];
        assert_eq!(sha(), seen[0]);
        fs_err::write(&file, "2").unwrap();
        seen.push(sha());
        fs_err::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        seen.push(sha());
        fs_err::rename(&file, file.with_file_name("g")).unwrap();
        seen.push(sha());
        fs_err::write(dir.path().join("x/recipe.toml"), format!("{GOOD}\n")).unwrap();
        seen.push(sha());
        let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(distinct.len(), 5);
    }

    #[test]
    fn a_service_may_be_a_port_a_unit_or_both() {
        let text = format!(
            "{GOOD}[[wait]]\nname = 'web'\nunit = 'web@1.service'\ntimeout_s = 5\n\
            [[wait]]\nname = 'both'\nport = 80\nunit = 'dev-disk\\x2dby.device'\ntimeout_s = 5\n"
        );
        let (dir, name) = put(&text);
        let wait = Recipe::load(dir.path(), &name).unwrap().spec.wait;
        let told: Vec<_> = wait.iter().map(|w| (w.name.as_str(), w.port, w.unit.as_deref())).collect();
        assert_eq!(
            told,
            [
                ("ssh", Some(22), None),
                ("web", None, Some("web@1.service")),
                ("both", Some(80), Some("dev-disk\\x2dby.device"))
            ]
        );
        let long = format!("unit = '{}.service'", "a".repeat(248));
        for bad in [
            "unit = 'ssh'",
            "unit = ''",
            "unit = '--all.service'",
            "unit = 'a b.service'",
            "unit = '../a.service'",
            "unit = '*.service'",
            "unit = 'a.exe'",
            "port = 0\nunit = 'a.service'",
            "timeout_s = 0\nunit = 'a.service'",
            &long,
            "",
        ] {
            let seconds = if bad.contains("timeout_s") { "" } else { "timeout_s = 5\n" };
            let (dir, name) = put(&format!("{GOOD}[[wait]]\nname = 'x'\n{bad}\n{seconds}"));
            let err = Recipe::load(dir.path(), &name).unwrap_err();
            assert!(err.message.contains("wait \"x\" needs"), "{bad}: {err}");
        }
        let (dir, name) = put(&text.replacen("init = 'systemd'", "init = 'agent'", 1));
        let err = Recipe::load(dir.path(), &name).unwrap_err();
        assert!(err.message.contains("wait \"web\" names a unit"), "{err}");
    }

    #[test]
    fn wrong_recipes_are_refused_with_what_is_wrong() {
        let bad = [
            ("version = 1", "version = 2", "version 2"),
            ("'git'", "'--option'", "not the name of a package"),
            ("'git'", "'git;reboot'", "not the name of a package"),
            ("linux-image-cloud-amd64", "a b", "not the name of a package"),
            ("'a@.service'", "'../x.service'", "not the name of a unit"),
            ("'/root'", "'/'", "home"),
            ("'/root'", "'/root/../etc'", "home"),
            ("usr/share/doc", "../../etc", "not a path within"),
            ("usr/share/doc", "/", "not a path within"),
            ("port = 22", "port = 0", "needs a name, a port"),
            ("port = 22", "port = 99999", "99999"),
            ("init = 'systemd'", "init = 'runit'", "runit"),
            ("[[wait]]", "colour = 1\n[[wait]]", "colour"),
            ("version = 1", "version = 1\nsuite = '-x'", "name of a suite"),
        ];
        for (from, to, why) in bad {
            let (dir, name) = put(&GOOD.replacen(from, to, 1));
            let err = Recipe::load(dir.path(), &name).unwrap_err();
            assert_eq!(err.code, Code::InvalidArgument, "{to}: {err}");
            assert!(err.message.contains(why), "{to}: {err}");
        }
        let (dir, _) = put(GOOD);
        let err = Recipe::load(dir.path(), &"gone".parse().unwrap()).unwrap_err();
        assert_eq!(err.code, Code::NotFound);
    }
}
