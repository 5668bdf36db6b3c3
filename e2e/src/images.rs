//! The default image for tests: built once by bothy itself, kept below `target/`, and hard-linked into every host's
//! store. The image-agent takes a store as it finds it, so a linked image is simply there.

use crate::host::Host;
use bothy_config::Config;
use fs_err as fs;
use nix::fcntl::{Flock, FlockArg};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// The workspace's directory.
pub fn workspace_dir() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("the workspace above e2e").to_owned()
}

/// Cargo's target directory: builds, tools and heavy state that is kept in between runs.
pub fn target_dir() -> PathBuf {
    let profile = bothy_testkit::target_dir();
    profile.parent().expect("a target directory above the profile's").to_owned()
}

/// The directory that heavy state is kept in between runs.
pub fn cache_dir() -> PathBuf {
    target_dir().join("bothy")
}

/// `PATH` with the tools of this checkout in front: the bus server that set-up fetched.
pub fn path_with_tools() -> OsString {
    let mut path = OsString::from(target_dir().join("tools"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    path
}

/// Points `config` at this checkout's recipes, guest binary and bus server.
pub fn configure(config: &mut Config) {
    // A host makes templates in the background, which costs a boot each; the tests of templates ask for them.
    config.template.max = 0;
    config.image.recipe_dir = workspace_dir().join("guest/images");
    config.image.guest_binary = target_dir().join("x86_64-unknown-linux-gnu/guest/bothy-guest");
    let server = target_dir().join("tools/nats-server");
    if server.is_file() {
        config.bus.server = server;
    }
}

/// The directory of the default image, built if it is missing or its recipe changed.
///
/// # Panics
/// If the build fails.
pub fn default_image() -> PathBuf {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(build).clone()
}

/// Only one process builds; the others wait for it. The builder's host shares the cached store with the runs before.
fn build() -> PathBuf {
    let cache = cache_dir().join("images");
    fs::create_dir_all(&cache).expect("the image cache");
    let lock = fs::File::create(cache.join(".lock")).expect("the cache's lock").into_parts().0;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).expect("the cache's lock");
    let image = cache.join("debian");
    // The builder's host has no way out by itself: its downloads go through the namespace that this process is in.
    let host = Host::start_bare(&[], |config| {
        config.image.build_netns = Some(format!("/proc/{}/ns/net", std::process::id()).into());
        if image.is_dir() {
            link_into(&image, config);
        }
    });
    let status = host.bothy_live(&cache, ["image", "build"]);
    assert_eq!(status, 0, "the default image could not be built\n{}", host.logs());
    let store = store_of(&host.config).join("debian");
    let fresh = fs::read(store.join("manifest.json")).expect("the manifest of the built image");
    if fs::read(image.join("manifest.json")).ok().as_deref() != Some(&fresh) {
        let beside = cache.join(".new");
        let _ = fs::remove_dir_all(&beside);
        copy_tree(&store, &beside);
        let _ = fs::remove_dir_all(&image);
        fs::rename(&beside, &image).expect("the image in its place");
    }
    host.finish();
    image
}

fn store_of(config: &Config) -> PathBuf {
    config.service_dir(bothy_contract::Service::Image).join("store/images")
}

/// Hard-links the image at `image` into the store of the host that `config` describes.
pub fn link_into(image: &Path, config: &Config) {
    let name = image.file_name().expect("an image has a name");
    let service = config.service_dir(bothy_contract::Service::Image);
    link_tree(image, &store_of(config).join(name));
    // The path down to the store is one that VMMs may pass, and no more.
    use std::os::unix::fs::PermissionsExt;
    let pass = std::fs::Permissions::from_mode(0o711);
    fs::set_permissions(service, pass).expect("the image-agent's directory");
}

/// Puts an image called `name` into the store of the host that `config` describes: the default one, with its manifest
/// changed.
///
/// # Panics
/// If the default image is not in that store.
pub fn variant_into(config: &Config, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let (from, to) = (store_of(config).join("debian"), store_of(config).join(name));
    link_tree(&from, &to);
    let path = to.join("manifest.json");
    let text = fs::read(&path).expect("the default image's manifest");
    let mut manifest: serde_json::Value = serde_json::from_slice(&text).expect("a manifest");
    manifest["name"] = name.into();
    change(&mut manifest);
    // Another file: the one that is there is linked to the cache's.
    fs::remove_file(&path).expect("the linked manifest");
    fs::write(&path, manifest.to_string()).expect("the changed manifest");
}

fn link_tree(from: &Path, to: &Path) {
    walk(from, to, &|from, to| {
        // Another file system than the cache's: then a copy.
        if fs::hard_link(from, to).is_err() {
            fs::copy(from, to).expect("a copy of an artifact");
        }
    });
}

/// The same files, so that what the manifest knows of them holds; on another file system, copies that keep holes, since
/// the disks in an image are mostly that.
fn copy_tree(from: &Path, to: &Path) {
    walk(from, to, &|from, to| {
        if fs::hard_link(from, to).is_ok() {
            return;
        }
        let copied = std::process::Command::new("cp").arg("--sparse=always").arg(from).arg(to).status();
        assert!(copied.expect("cp").success(), "cannot copy {}", from.display());
    });
}

fn walk(from: &Path, to: &Path, file: &dyn Fn(&Path, &Path)) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("an image's directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("its type").is_dir() {
            walk(&entry.path(), &target, file);
        } else {
            file(&entry.path(), &target);
        }
    }
}
