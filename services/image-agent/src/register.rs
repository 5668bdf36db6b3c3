//! `image register`: a root file system of the host as an image, as an operation.
//!
//! The root file system stays where it is and is somebody else's: its stamp says when it changed. All else, the boot set and
//! the seeds, is made here and is the image's own.

use crate::{
    agent::Agent,
    bootset,
    build::{Stage, pack},
    ext4::{self, Ext4},
    fault::{self, blocking},
    hostfile,
    kinds::{self, Step, Work},
    store::Over,
};
use bothy_bus::Context;
use bothy_contract::{
    Error, KernelName,
    catalogue::{KernelSource, RegisterImage},
    image::{Artifact, ImageManifest, InitStyle},
};
use bothy_ops::{Begun, Graph, New, Op, Ops};
use serde::{Deserialize, Serialize};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// The kind of these operations.
pub(crate) const KIND: &str = "image.register";
/// The name of an image's own archive before the initramfs.
const INITRD: &str = "initrd.cpio";
/// The home of a registered image, and its private directory.
const HOME: &str = "/root";
const PRIVATE: &str = ".ssh";

/// Begins to register. What can be told at once is refused here.
pub(crate) async fn begin(
    ops: &Ops,
    agent: &Agent,
    context: Context,
    mut ask: RegisterImage,
) -> Result<Begun, Error> {
    let agent = agent.clone();
    let ask = blocking(move || {
        ask.rootfs = hostfile::public(&ask.rootfs)?;
        ext4::check(&ask.rootfs)?;
        ask.initrd = ask.initrd.as_deref().map(hostfile::file).transpose()?;
        match &ask.kernel {
            KernelSource::File { kernel, modules } => {
                hostfile::file(kernel)?;
                modules.as_deref().map(hostfile::directory).transpose()?;
            }
            KernelSource::Catalogue(name) => {
                agent.store.kernel(name)?;
            }
            KernelSource::Rootfs => {}
        }
        if !ask.force {
            agent.store.must_be_free(&ask.image)?;
        }
        Ok(ask)
    })
    .await?;
    let new = New {
        kind: KIND,
        subject: ask.image.to_string(),
        vm: None,
        owner: ask.owner,
        request: Some(context.request_id),
        input: serde_json::to_value(&ask).map_err(|e| Error::internal("cannot write down the image", &e))?,
    };
    ops.begin(new, move |tx, op| kinds::reserve(tx, &ask.image, op)).await
}

struct Register {
    agent: Agent,
    ask: RegisterImage,
    dir: PathBuf,
}

/// What the stage `boot_set` found, for the last one.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    release: String,
    kernel: Option<KernelName>,
    init: InitStyle,
}

/// The stages of a registration.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let dir = agent.store.dir().join(format!(".register-{}", op.id));
    Ok(kinds::sequence(Register { agent: agent.clone(), ask: op.input()?, dir }))
}

impl Work for Register {
    const STAGES: &'static [&'static str] = &["boot_set", "seeds", "finish"];

    fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    async fn run(&self, stage: &'static str, with: Stage) -> Result<Step, Error> {
        match stage {
            "boot_set" => self.boot_set(with).await,
            "seeds" => {
                let home = self.dir.join("home");
                new_home(&with, &self.ask.rootfs, HOME, &[PRIVATE.to_owned()], &home).await?;
                Ok(Step::note(pack::seeds(&with, &self.out(), &home).await?))
            }
            _ => self.finish(with).await,
        }
    }
}

impl Register {
    fn out(&self) -> PathBuf {
        self.dir.join("image")
    }

    async fn boot_set(&self, with: Stage) -> Result<Step, Error> {
        let (out, ask, agent) = (self.out(), self.ask.clone(), self.agent.clone());
        let root = self.dir.join("boot-root");
        let from = Ext4 { file: &ask.rootfs, with: &with };
        let init = match ask.init {
            Some(init) => init,
            None if from.names("/sbin").await?.iter().any(|n| n == "init") => InitStyle::Systemd,
            None => InitStyle::Agent,
        };
        if matches!(ask.kernel, KernelSource::Rootfs) {
            boot_files(&from, &root).await?;
        }
        let noted = self.dir.join("found.json");
        let (kernel, initrd) = (ask.kernel.clone(), ask.initrd.clone());
        blocking(move || {
            let failed = |e: std::io::Error| fault::io("cannot keep the boot set", &e);
            fs_err::create_dir(&out).map_err(failed)?;
            let (release, name) = match kernel {
                KernelSource::File { kernel, modules } => {
                    (bootset::put(&kernel, modules.as_deref(), &out)?.release, None)
                }
                KernelSource::Catalogue(name) => {
                    (agent.store.take_boot_set(Some(&name), &out)?.release, Some(name))
                }
                KernelSource::Rootfs => (bootset::put_from_root(&root, &out)?.release, None),
            };
            if let Some(initrd) = initrd {
                fs_err::copy(initrd, out.join(INITRD)).map_err(failed)?;
            }
            let note = format!("kernel {release}");
            let found = Found { release, kernel: name, init };
            fs_err::write(noted, serde_json::to_vec(&found).map_err(|e| failed(e.into()))?)
                .map_err(failed)?;
            Ok(Step::note(note))
        })
        .await
    }

    async fn finish(&self, with: Stage) -> Result<Step, Error> {
        let (out, ask, agent, dir) = (self.out(), self.ask.clone(), self.agent.clone(), self.dir.clone());
        blocking(move || {
            let failed = |e: std::io::Error| fault::io(format!("cannot register image {}", ask.image), &e);
            let found = fs_err::read(dir.join("found.json")).map_err(failed)?;
            let found: Found = serde_json::from_slice(&found).map_err(|e| failed(e.into()))?;
            let size = fs_err::metadata(&ask.rootfs).map_err(failed)?.len();
            let file = |file: &str, path| Artifact {
                file: file.to_owned(),
                sha256: String::new(),
                size: 0,
                path,
                stamp: None,
            };
            let mut manifest = ImageManifest {
                origin: format!("registered {}", ask.rootfs.display()),
                home: HOME.to_owned(),
                private: vec![PRIVATE.to_owned()],
                wait: ask.wait,
                kernel_release: found.release,
                kernel: found.kernel,
                ..ImageManifest::new(ask.image.clone(), found.init)
            };
            manifest.artifacts.insert("rootfs".to_owned(), file("rootfs.ext4", Some(ask.rootfs)));
            if ask.initrd.is_some() {
                manifest.artifacts.insert("initrd".to_owned(), file(INITRD, None));
            }
            let over = if ask.force { Over::Any } else { Over::Nothing };
            let made = agent.store.publish(&out, manifest, over, &with.bytes(size))?;
            crate::build::remove(&dir)?;
            Step::last(format!("image {}", made.name), &made)
        })
        .await
    }
}

/// The boot set that a root file system carries, read out into `root`.
async fn boot_files(from: &Ext4<'_>, root: &Path) -> Result<(), Error> {
    let (boot, lib) = (root.join("boot"), root.join("lib/modules"));
    for dir in [&boot, &lib] {
        fs_err::create_dir_all(dir).map_err(|e| fault::io("cannot read out the kernel", &e))?;
    }
    let modules = from.names("/lib/modules").await?;
    let kernels = from.names("/boot").await?;
    let mut pairs: Vec<_> = modules
        .into_iter()
        .filter_map(|release| {
            let names = [format!("vmlinuz-{release}"), format!("vmlinux-{release}")];
            let kernel = names.into_iter().find(|name| kernels.contains(name))?;
            Some((release, kernel))
        })
        .collect();
    pairs.sort_by_key(|(release, _)| bootset::numbers(release));
    let Some((release, kernel)) = pairs.pop() else {
        return Err(Error::new(
            bothy_contract::Code::FailedPrecondition,
            format!("{} has no kernel with its modules", from.file.display()),
        )
        .hint(
            "it needs `/boot/vmlinuz-<release>` and `/lib/modules/<release>`; `--kernel` takes another one",
        ));
    };
    from.dump(&format!("/boot/{kernel}"), &boot).await?;
    from.dump_tree(&format!("/lib/modules/{release}"), &lib).await?;
    Ok(())
}

/// Makes `to` what a fresh home of the root file system in `rootfs` is: what it has at `home`, and the private directories.
pub(crate) async fn new_home(
    with: &Stage,
    rootfs: &Path,
    home: &str,
    private: &[String],
    to: &Path,
) -> Result<(), Error> {
    let failed = |e: std::io::Error| fault::io("cannot make a home", &e);
    let beside = to.with_extension("dump");
    fs_err::create_dir(&beside).map_err(failed)?;
    fs_err::set_permissions(&beside, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    let from = Ext4 { file: rootfs, with };
    let plain = home.chars().all(|c| c.is_ascii_alphanumeric() || "/-._".contains(c));
    let (parent, name) = home.rsplit_once('/').unwrap_or(("", home));
    let parent = if parent.is_empty() { "/" } else { parent };
    if plain && from.names(parent).await?.iter().any(|n| n == name) {
        let made = from.dump_tree(home, &beside).await?;
        fs_err::rename(made, to).map_err(failed)?;
    } else {
        fs_err::create_dir(to).map_err(failed)?;
    }
    fs_err::set_permissions(to, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    for dir in private.iter().filter_map(|p| crate::recipe::inside(p)) {
        let path = to.join(dir);
        fs_err::create_dir_all(&path).map_err(failed)?;
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    fs_err::remove_dir_all(&beside).map_err(failed)
}
