//! Images from elsewhere: the archive of a root file system, or an OCI image, becomes an image of the store.
//!
//! ```text
//!  ticket's stream -> spool file ----> operation: layers -> flatten -> boot_set -> seeds -> finish
//!             '-> credentials, in memory --^        '-- a registry's come here, by way of [`Blobs`]
//! ```
//! The user's own process reads the archive and sends it; this agent never opens a path that a user named. The operation
//! begins when all is there, works in one directory, and undoing it is removing that. What comes in is hostile until
//! the opposite is shown: crate `bothy-flatten` contains it, and nothing of it is run.

mod blobs;
mod documents;
mod registry;
mod spool;

pub(crate) use blobs::Blobs;
pub(crate) use spool::Intake;

use crate::{
    agent::Agent,
    build::{Stage, pack},
    ext4::Ext4,
    fault::{self, blocking},
    kinds::{self, Step, Work},
    register::new_home,
    store::Over,
};
use bothy_contract::{
    Code, Error, KernelName, OpId, RequestId,
    image::{ImageManifest, InitStyle},
    intake::{IntakeSource, OpenIntake},
    op::Begun as OpBegun,
};
use bothy_db::rusqlite::{OptionalExtension as _, Transaction};
use bothy_flatten::Limits;
use bothy_oci::Contents;
use bothy_ops::{Graph, New, Op, Ops};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// The kinds of these operations: of an archive, and of a registry's image.
pub(crate) const IMPORT: &str = "image.import";
pub(crate) const PULL: &str = "image.pull";
/// The home of such an image, and its private directory.
const HOME: &str = "/root";
const PRIVATE: &str = ".ssh";
/// What must stay free on the host's file system.
const RESERVE: u64 = 512 << 20;

/// All that the operation's graph is made from.
#[derive(Debug, Serialize, Deserialize)]
struct Input {
    ask: OpenIntake,
    arrived: Arrived,
}

/// What came by the ticket's stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Arrived {
    /// An archive, in this file.
    Archive(PathBuf),
    /// Who asks the registry, under this key in this process's memory and nowhere else.
    Credentials(String),
}

/// What the stage `boot_set` took.
#[derive(Debug, Serialize, Deserialize)]
struct Boot {
    release: String,
    kernel: Option<KernelName>,
}

/// Refuses at once what cannot become an image.
fn check(agent: &Agent, ask: &OpenIntake) -> Result<(), Error> {
    if let IntakeSource::Registry { reference, .. } = &ask.source {
        registry::parse(reference)?;
    }
    if let Some(kernel) = &ask.kernel {
        agent.store.kernel(kernel)?;
    }
    if ask.force { Ok(()) } else { agent.store.must_be_free(&ask.image) }
}

/// Begins to make an image of what has arrived, or finds the operation that does just that already; and whether it is a new one.
async fn begin(ops: &Ops, ask: OpenIntake, arrived: Arrived) -> Result<(OpBegun, bool), Error> {
    let (image, owner) = (ask.image.clone(), ask.owner);
    let kind = match &ask.source {
        IntakeSource::Archive { .. } => IMPORT,
        IntakeSource::Registry { .. } => PULL,
    };
    let input = serde_json::to_value(Input { ask: ask.clone(), arrived })
        .map_err(|e| Error::internal("cannot write down the import", &e))?;
    let new =
        New { kind, subject: image.to_string(), vm: None, owner, request: Some(RequestId::new()), input };
    let same = Arc::new(Mutex::new(None));
    let found = Arc::clone(&same);
    let begun = ops
        .begin(new, move |tx, op| {
            if kind == PULL
                && let Some(pull) = pulled_by(tx, &ask)?
            {
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(pull);
                return Err(Error::new(Code::AlreadyExists, "it is being pulled").into());
            }
            kinds::reserve(tx, &image, op)
        })
        .await;
    if let Some(op) = same.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Ok((OpBegun { op, vm: None }, false));
    }
    Ok((begun?.into(), true))
}

/// The operation that pulls the same for the same, if one does.
fn pulled_by(tx: &Transaction<'_>, ask: &OpenIntake) -> Result<Option<OpId>, bothy_db::Error> {
    let under_way = tx
        .query_row(
            "SELECT op.id, op.input FROM building JOIN op ON op.id = building.op
             WHERE building.image = ?1 AND op.kind = ?2 AND op.cancel = 0",
            [ask.image.as_str(), PULL],
            |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)),
        )
        .optional()?;
    let Some((op, input)) = under_way else { return Ok(None) };
    let other: Input = serde_json::from_str(&input)?;
    let same = OpenIntake { owner: ask.owner, ..other.ask } == *ask;
    Ok(op.parse().ok().filter(|_| same))
}

struct Import {
    agent: Agent,
    input: Input,
    dir: PathBuf,
}

/// The stages of an import.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let dir = agent.store.dir().join(format!(".import-{}", op.id));
    Ok(kinds::sequence(Import { agent: agent.clone(), input: op.input()?, dir }))
}

impl Work for Import {
    const STAGES: &'static [&'static str] = &["layers", "flatten", "boot_set", "seeds", "finish"];

    fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    async fn run(&self, stage: &'static str, with: Stage) -> Result<Step, Error> {
        match stage {
            "layers" => self.layers(with).await,
            "flatten" => self.flatten(with).await,
            "boot_set" => self.boot_set().await,
            "seeds" => {
                let home = self.dir.join("home");
                new_home(&with, &self.rootfs(), HOME, &[PRIVATE.to_owned()], &home).await?;
                Ok(Step::note(pack::seeds(&with, &self.out(), &home).await?))
            }
            _ => self.finish(with).await,
        }
    }
}

impl Import {
    fn out(&self) -> PathBuf {
        self.dir.join("image")
    }

    fn rootfs(&self) -> PathBuf {
        self.out().join("rootfs.ext4")
    }

    async fn layers(&self, with: Stage) -> Result<Step, Error> {
        let dir = self.dir.clone();
        let contents = match (&self.input.ask.source, &self.input.arrived) {
            (IntakeSource::Registry { reference, insecure_http }, Arrived::Credentials(key)) => {
                let who = self.agent.intake.take_credentials(key)?;
                let blobs = Arc::clone(&self.agent.blobs);
                registry::Pull::new(reference, *insecure_http, who, blobs, with)?.contents(&dir).await?
            }
            (IntakeSource::Archive { .. }, Arrived::Archive(spool)) => {
                let (dir, spool) = (dir.clone(), spool.clone());
                blocking(move || {
                    let archive = dir.join("archive");
                    fs_err::rename(spool, &archive).map_err(|e| fault::io("cannot take the archive", &e))?;
                    let length = fs_err::metadata(&archive)
                        .map_err(|e| fault::io("cannot look at the archive", &e))?
                        .len();
                    bothy_oci::look_into(&archive, &dir, room(&dir)?, &with.bytes(length))
                })
                .await?
            }
            _ => return Err(Error::new(Code::Internal, "what came is not what was announced")),
        };
        blocking(move || {
            keep(&dir, "contents", &contents)?;
            let bytes: u64 = contents.layers.iter().map(|l| l.length).sum();
            let what = match &contents.digest {
                Some(digest) => format!("OCI image sha256:{}", digest.get(..12).unwrap_or(digest)),
                None => "root file system".to_owned(),
            };
            Ok(Step::note(format!("{what}, {} layers, {} MiB", contents.layers.len(), bytes >> 20)))
        })
        .await
    }

    async fn flatten(&self, with: Stage) -> Result<Step, Error> {
        let (dir, out, rootfs) = (self.dir.clone(), self.out(), self.rootfs());
        blocking(move || {
            let contents: Contents = kept(&dir, "contents")?;
            let total = contents.layers.iter().map(|l| l.length).sum();
            let layers = contents.layers();
            fs_err::create_dir(&out).map_err(|e| fault::io("cannot make the image's directory", &e))?;
            let default = Limits::default();
            let limits = Limits { bytes: default.bytes.min(room(&dir)?), ..default };
            let made = bothy_flatten::flatten(&layers, &rootfs, &limits, &with.bytes(total))?;
            // The archive is not needed any more, and the disk may be.
            for layer in layers {
                let _ = fs_err::remove_file(layer.file);
            }
            let mut note = format!("{} files, {} MiB", made.files, made.bytes >> 20);
            for (n, what) in
                [(made.dropped.devices, "device nodes"), (made.dropped.xattrs, "extended attributes")]
            {
                if n > 0 {
                    note.push_str(&format!(", {n} {what} left out"));
                }
            }
            Ok(Step::note(note))
        })
        .await
    }

    async fn boot_set(&self) -> Result<Step, Error> {
        let (agent, dir, out) = (self.agent.clone(), self.dir.clone(), self.out());
        let kernel = self.input.ask.kernel.clone();
        blocking(move || {
            let taken = agent.store.take_boot_set(kernel.as_ref(), &out)?;
            let boot = Boot { release: taken.release, kernel: taken.kernel };
            keep(&dir, "boot", &boot)?;
            Ok(Step::note(format!("kernel {}", boot.release)))
        })
        .await
    }

    async fn finish(&self, with: Stage) -> Result<Step, Error> {
        let dir = self.dir.clone();
        let contents: Contents = blocking(move || kept(&dir, "contents")).await?;
        // What an OCI image would start is an application, whatever it has at /sbin/init.
        let from = Ext4 { file: &self.rootfs(), with: &with };
        let init = if contents.digest.is_none() && from.names("/sbin").await?.iter().any(|n| n == "init") {
            InitStyle::Systemd
        } else {
            InitStyle::Agent
        };
        let (agent, dir, out) = (self.agent.clone(), self.dir.clone(), self.out());
        let ask = self.input.ask.clone();
        blocking(move || {
            let boot: Boot = kept(&dir, "boot")?;
            let name = match ask.source {
                IntakeSource::Archive { name } => name,
                IntakeSource::Registry { reference, .. } => {
                    let reference = registry::parse(&reference)?;
                    format!("{}/{}{}", reference.registry(), reference.repository(), tag(&reference))
                }
            };
            let origin = match &contents.digest {
                Some(digest) => format!("{name}@sha256:{digest}"),
                None => name,
            };
            let manifest = ImageManifest {
                origin,
                home: HOME.to_owned(),
                private: vec![PRIVATE.to_owned()],
                kernel_release: boot.release,
                kernel: boot.kernel,
                defaults: contents.defaults,
                ..ImageManifest::new(ask.image, init)
            };
            let over = if ask.force { Over::Any } else { Over::Nothing };
            let files = fs_err::read_dir(&out).map_err(|e| fault::io("cannot look at the image", &e))?;
            let size = files.flatten().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
            let made = agent.store.publish(&out, manifest, over, &with.bytes(size))?;
            crate::build::remove(&dir)?;
            Step::last(format!("image {}", made.name), &made)
        })
        .await
    }
}

/// What follows the repository in a reference, without its digest.
fn tag(reference: &oci_client::Reference) -> String {
    reference.tag().map(|tag| format!(":{tag}")).unwrap_or_default()
}

/// What may still be written where `dir` is.
fn room(dir: &Path) -> Result<u64, Error> {
    let stat =
        rustix::fs::statvfs(dir).map_err(|e| fault::io("cannot see how much space is free", &e.into()))?;
    Ok((stat.f_bavail * stat.f_frsize).saturating_sub(RESERVE))
}

/// Writes down what a stage found, for the later ones.
fn keep(dir: &Path, name: &str, what: &impl Serialize) -> Result<(), Error> {
    let text =
        serde_json::to_vec(what).map_err(|e| Error::internal("cannot write down what was found", &e))?;
    fs_err::write(dir.join(name).with_extension("json"), text)
        .map_err(|e| fault::io("cannot write down what was found", &e))
}

fn kept<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T, Error> {
    let text = fs_err::read(dir.join(name).with_extension("json"))
        .map_err(|e| fault::io("cannot read what was found", &e))?;
    serde_json::from_slice(&text).map_err(|e| Error::internal("cannot read what was found", &e))
}
