//! The tree of the root file system: packages by mmdebstrap(1), then the recipe's own files and what must not be in it.

use super::{Build, Stage};
use crate::{
    fault::{self, blocking},
    recipe::{Recipe, inside, walk},
    tools::Tool,
};
use bothy_contract::{Code, Error, image::InitStyle};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink},
    path::Path,
    time::Duration,
};

/// The time that packages' own scripts take it to be (reproducible-builds.org, SOURCE_DATE_EPOCH), and that of file systems with no
/// package in them: in November of 2023.
pub(super) const EPOCH: u64 = 1_700_000_000;
/// apt's configuration on this host.
const APT: &str = "/etc/apt";
/// Where the kernel's package waits in the tree until the stage `kernel` takes it.
pub(super) const KERNEL_DIR: &str = "bothy-kernel";

/// Downloads the package that the kernel's metapackage depends on, with the tree's own apt, while it still has a network.
/// `$1` is the tree and `$KERNEL` the metapackage's name, which the recipe's check keeps to a plain word.
const KERNEL_HOOK: &str = r#"mkdir "$1/bothy-kernel" && chmod 0755 "$1/bothy-kernel" && chroot "$1" sh -ec '
cd /bothy-kernel
package=$(apt-cache show --no-all-versions "$KERNEL" | sed -n "s/^Depends: \(linux-image-[^ ,]*\).*/\1/p")
test -n "$package" || { echo "package $KERNEL depends on no kernel" >&2; exit 1; }
apt-get -o APT::Sandbox::User=root download "$package"'"#;

/// How the host reaches registries (`HOST`: its npm settings and the authorities it trusts) for the recipe's scripts, for
/// as long as they run. Settings may hold secrets: nothing of this stays.
const HOST_DIR: &str = "bothy-host";
const LEND_HOOK: &str = r#"mkdir -m 0700 "$1/bothy-host" && cp "$HOST"/* "$1/bothy-host/""#;
const TAKE_BACK_HOOK: &str = r#"rm -rf "$1/bothy-host""#;
/// Runs a script of the recipe, `$RUN_n`, inside the tree.
const RUN_HOOK: &str = r#"
if test -s "$1/bothy-host/ca.crt"; then
    export NODE_EXTRA_CA_CERTS=/bothy-host/ca.crt SSL_CERT_FILE=/bothy-host/ca.crt
fi
chroot "$1" env -u HOST HOME=/root NPM_CONFIG_USERCONFIG=/bothy-host/npmrc sh -ec "$RUN_SCRIPT""#;
/// Where the host keeps npm's settings, npmrc(5), the more general first; and the authorities that it trusts.
const NPMRC: [&str; 2] = ["/etc/npmrc", "/root/.npmrc"];
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

impl Build {
    pub(super) async fn fetch_packages(&self, with: &Stage) -> Result<String, Error> {
        let spec = &self.recipe.spec;
        let suite = match &spec.suite {
            Some(suite) => suite.clone(),
            None => host_codename()?,
        };
        let apt = Path::new(APT);
        let sources = bothy_apt_sources::of_host(apt)
            .and_then(|all| bothy_apt_sources::of_release(&all, &suite, apt))
            .map_err(|e| {
                Error::new(Code::FailedPrecondition, bothy_contract::error::chain(&e))
                    .hint("images are built from the host's own package sources, which must be Debian's")
            })?;
        let (work, out, lent) = (self.work.clone(), self.out(), self.work.join("host"));
        let list = self.work.join("host.sources");
        let text: String = sources.iter().map(bothy_apt_sources::Source::to_deb822).collect();
        let written = list.clone();
        blocking(move || {
            let make = || {
                // mmdebstrap's downloads run as another user, who must get to the tree.
                std::fs::DirBuilder::new().mode(0o755).create(&work)?;
                std::fs::DirBuilder::new().mode(0o755).create(&out)?;
                for dir in [&work, &out] {
                    fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
                }
                lend(&lent)?;
                fs_err::write(&written, text)
            };
            make().map_err(|e| fault::io("cannot begin the build", &e))
        })
        .await?;
        let settings = acquire_settings(with).await?;
        let mut count = 0_u64;
        let minutes = Duration::from_secs(30 * 60);
        let mut include = OsString::from("--include=");
        include.push(spec.packages.join(","));
        let mut hooks = Vec::new();
        if !spec.run.is_empty() {
            hooks.push(LEND_HOOK.to_owned());
            hooks.extend((0..spec.run.len()).map(|n| RUN_HOOK.replace("RUN_SCRIPT", &format!("RUN_{n}"))));
            hooks.push(TAKE_BACK_HOOK.to_owned());
        }
        let mut mmdebstrap = Tool::new("mmdebstrap", "mmdebstrap", minutes)
            .in_netns(self.netns.as_deref())
            .contained()
            .args(["--mode=root", "--variant=minbase", "--format=directory", "--skip=cleanup/apt/lists"])
            .args(settings.into_iter().map(|s| format!("--aptopt={s}")))
            .arg(include)
            .args(hooks.into_iter().map(|hook| format!("--customize-hook={hook}")))
            .arg(format!("--customize-hook={KERNEL_HOOK}"))
            .args(["--customize-hook=rm -rf \"$1\"/var/lib/apt/lists/*"])
            .env("KERNEL", &spec.kernel)
            .env("HOST", self.work.join("host"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string())
            .args([OsString::from(&suite), self.tree().into(), list.into()]);
        for (n, script) in spec.run.iter().enumerate() {
            mmdebstrap = mmdebstrap.env(format!("RUN_{n}"), script);
        }
        mmdebstrap
            .run(&with.cancel, |line| {
                if let Some(what) = line.strip_prefix("I: ") {
                    count += 1;
                    (with.progress)(count, None, what);
                }
            })
            .await?;
        Ok(format!("{suite}, {} packages asked for", spec.packages.len()))
    }

    pub(super) async fn customise(&self) -> Result<String, Error> {
        let (tree, recipe, work) = (self.tree(), self.recipe.clone(), self.work.clone());
        blocking(move || {
            newest(&tree)
                .and_then(|time| fs_err::write(work.join("newest"), time.to_string()))
                .and_then(|()| customise(&tree, &recipe, &work.join("home")))
                .map_err(|e| fault::io("cannot put the recipe's files into the image", &e))?;
            Ok(format!("{} units masked", recipe.spec.mask.len()))
        })
        .await
    }
}

/// How this host's apt reaches its sources (proxies, certificates, clocks), for the build's apt to do the same.
async fn acquire_settings(with: &Stage) -> Result<Vec<String>, Error> {
    let dump = Tool::new("apt-config", "apt", Duration::from_secs(60))
        .args(["dump", "--no-empty", "Acquire"])
        .run(&with.cancel, |_| ())
        .await?;
    let own = [
        "Acquire::Check-Valid-Until",
        "Acquire::Check-Date",
        "Acquire::http",
        "Acquire::https",
        "Acquire::Retries",
    ];
    Ok(dump.lines().filter(|l| own.iter().any(|o| l.starts_with(o))).map(str::to_owned).collect())
}

/// Puts what the recipe's scripts may use of the host into `dir`.
fn lend(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(dir)?;
    let mut npmrc = String::new();
    for path in NPMRC {
        match fs_err::read_to_string(path) {
            Ok(text) => npmrc.extend(text.lines().filter(|l| !names_a_host_file(l)).flat_map(|l| [l, "\n"])),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    match fs_err::copy(AUTHORITIES, dir.join("ca.crt")) {
        Ok(_) => npmrc.push_str("cafile=/bothy-host/ca.crt\n"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    fs_err::write(dir.join("npmrc"), npmrc)
}

/// Whether a line of npm's settings names a file or directory of the host, which is not in the tree.
fn names_a_host_file(line: &str) -> bool {
    let key = line.split('=').next().unwrap_or_default().trim();
    ["ca", "ca[]", "cafile", "certfile", "keyfile", "nodedir", "prefix", "cache"].contains(&key)
}

/// The release of this host, os-release(5).
fn host_codename() -> Result<String, Error> {
    let text = fs_err::read_to_string("/etc/os-release")
        .map_err(|e| fault::io("cannot tell the host's release", &e))?;
    codename(&text).ok_or_else(|| {
        Error::new(Code::FailedPrecondition, "/etc/os-release names no VERSION_CODENAME")
            .hint("name the release in the recipe: `suite = \"bookworm\"`")
    })
}

fn codename(os_release: &str) -> Option<String> {
    let fields: BTreeMap<_, _> = os_release.lines().filter_map(|l| l.split_once('=')).collect();
    fields.get("VERSION_CODENAME").map(|v| v.trim_matches(['"', '\'']).to_owned()).filter(|v| !v.is_empty())
}

/// When the newest of the packages in `tree` was made, by their own changelogs and copyrights, which keep the times that they were
/// packed with: another one only where another package is in.
fn newest(tree: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut newest = EPOCH;
    for path in walk(&tree.join("usr/share/doc"))? {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let meta = fs_err::symlink_metadata(&path)?;
        if meta.is_file() && (name == b"copyright" || name.starts_with(b"changelog")) {
            newest = newest.max(meta.mtime().try_into().unwrap_or_default());
        }
    }
    Ok(newest)
}

/// Everything that happens to the tree once its packages are in; `home` gets the skeleton of the work disk.
fn customise(tree: &Path, recipe: &Recipe, home: &Path) -> io::Result<()> {
    let spec = &recipe.spec;
    remove_any(&tree.join(HOST_DIR))?;
    for files in &recipe.files {
        lay_over(files, tree)?;
    }
    if spec.init == InitStyle::Systemd {
        let units = tree.join("etc/systemd/system");
        for unit in &spec.mask {
            let link = units.join(unit);
            remove_any(&link)?;
            symlink("/dev/null", &link)?;
        }
    }
    for path in spec.remove.iter().filter_map(|p| inside(p)) {
        remove_any(&tree.join(path))?;
    }
    // Each guest gets its own from the host, before its init starts.
    for entry in fs_err::read_dir(tree.join("etc/ssh")).into_iter().flatten() {
        let path = entry?.path();
        if path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"ssh_host_")) {
            fs_err::remove_file(path)?;
        }
    }
    for empty in ["etc/machine-id", "etc/resolv.conf"] {
        let path = tree.join(empty);
        remove_any(&path)?;
        fs_err::write(path, "")?;
    }
    // The kernel's package is no part of the root.
    let kernel = tree.join(KERNEL_DIR);
    fs_err::rename(&kernel, home.with_file_name("kernel"))?;
    skeleton(&tree.join(inside(&spec.home).unwrap_or(Path::new("root"))), home, &spec.private)
}

/// Copies `files` over `tree`: owners are root, since we are; a file is executable or not, and a link is a link.
fn lay_over(files: &Path, tree: &Path) -> io::Result<()> {
    for from in walk(files)? {
        let to = tree.join(from.strip_prefix(files).unwrap_or(&from));
        let meta = fs_err::symlink_metadata(&from)?;
        if meta.is_dir() {
            if !to.is_dir() {
                fs_err::create_dir(&to)?;
                fs_err::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
            }
        } else if meta.is_symlink() {
            remove_any(&to)?;
            symlink(fs_err::read_link(&from)?, &to)?;
        } else {
            remove_any(&to)?;
            fs_err::write(&to, fs_err::read(&from)?)?;
            let executable = meta.permissions().mode() & 0o100 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            fs_err::set_permissions(&to, std::fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// The content of a fresh home: what the packages put there, and the private directories.
fn skeleton(from: &Path, home: &Path, private: &[String]) -> io::Result<()> {
    fs_err::create_dir(home)?;
    fs_err::set_permissions(home, std::fs::Permissions::from_mode(0o700))?;
    for path in walk(from)? {
        let to = home.join(path.strip_prefix(from).unwrap_or(&path));
        if path.is_dir() {
            fs_err::create_dir(to)?;
        } else {
            fs_err::copy(path, to)?;
        }
    }
    for dir in private.iter().filter_map(|p| inside(p)) {
        let path = home.join(dir);
        fs_err::create_dir_all(&path)?;
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn remove_any(path: &Path) -> io::Result<()> {
    match fs_err::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs_err::remove_dir_all(path),
        Ok(_) => fs_err::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_as_a_shell_would() {
        assert_eq!(codename("NAME=x\nVERSION_CODENAME=bookworm\n").unwrap(), "bookworm");
        assert_eq!(codename("VERSION_CODENAME=\"trixie\"").unwrap(), "trixie");
        assert_eq!(codename("VERSION_CODENAME=\n"), None);
        assert_eq!(codename(""), None);
    }

    #[test]
    fn a_tree_loses_identities_and_gets_files_masks_and_a_home() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, home) = (dir.path().join("tree"), dir.path().join("home"));
        for d in ["etc/ssh", "etc/systemd/system", "root", "bothy-kernel", "usr/share/doc/x"] {
            fs_err::create_dir_all(tree.join(d)).unwrap();
        }
        for (file, text) in [
            ("etc/machine-id", "0123"),
            ("etc/ssh/ssh_host_rsa_key", "secret"),
            ("etc/ssh/moduli", "kept"),
            ("root/.profile", "p"),
            ("etc/systemd/system/a.service", "real"),
        ] {
            fs_err::write(tree.join(file), text).unwrap();
        }
        // Never a file of this machine's own: the test may run as root, and the code under test may be wrong.
        let outside = dir.path().join("outside");
        fs_err::write(&outside, "the host's").unwrap();
        symlink(&outside, tree.join("etc/resolv.conf")).unwrap();
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/images");
        let mut recipe = Recipe::load(&recipes, &bothy_contract::ImageName::default_image()).unwrap();
        recipe.spec.mask = vec!["a.service".into()];
        customise(&tree, &recipe, &home).unwrap();
        assert_eq!(fs_err::read(&outside).unwrap(), b"the host's", "a link out of the tree was followed");
        assert_eq!(fs_err::read(tree.join("etc/machine-id")).unwrap(), b"");
        assert!(!tree.join("etc/ssh/ssh_host_rsa_key").exists() && tree.join("etc/ssh/moduli").exists());
        assert!(!tree.join("usr/share/doc").exists() && !tree.join("bothy-kernel").exists());
        let masked = fs_err::read_link(tree.join("etc/systemd/system/a.service")).unwrap();
        assert_eq!(masked, Path::new("/dev/null"));
        assert!(tree.join("etc/ssh/sshd_config.d/bothy.conf").is_file());
        let ssh = fs_err::metadata(home.join(".ssh")).unwrap();
        assert_eq!(ssh.permissions().mode() & 0o777, 0o700);
        assert_eq!(fs_err::read(home.join(".profile")).unwrap(), b"p");
    }
}
