//! A template and the machines resumed from it, with raw QEMU: what bothy's own are measured against and checked by.
//!
//! The template's memory is a file that QEMU maps shared, so saving it means saving the devices alone
//! (`x-ignore-shared`); a machine of it maps that file privately: it reads pages as it comes to them, and what it
//! writes is its own. The device state crosses a socket, which QEMU 7.2 and 10 both can; neither has to start a program.

use super::{Machine, PATIENCE, Recipe};
use bothy_guest_proto::{GuestClient, v1};
use serde_json::{Value, json};
use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};

/// What QEMU calls a microvm's memory.
const RAM: &str = "microvm.ram";
/// The template's work disk: nothing has it open, and every work disk is larger.
const PLACEHOLDER: u64 = 1 << 20;

/// A saved template: files in one directory.
#[derive(Debug, Clone)]
pub struct Saved {
    dir: PathBuf,
}

/// How far a machine was when, since its VMM's start.
#[derive(Debug, Clone, Copy)]
pub struct Resumed {
    /// The VMM was there.
    pub started: Duration,
    /// Its devices were loaded, and its processors let go.
    pub loaded: Duration,
    /// The agent answered.
    pub agent: Duration,
}

impl Saved {
    /// A template's files are in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// Its devices.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Its system disk, as it was when it was saved.
    #[must_use]
    pub fn system(&self) -> PathBuf {
        self.dir.join("system.ext4")
    }

    fn placeholder(&self) -> PathBuf {
        self.dir.join("placeholder")
    }
}

impl Recipe {
    /// Boots a template of this recipe into `saved`, as far as its agent's first answer. `system` is what its system
    /// disk begins as.
    ///
    /// # Errors
    /// Whatever goes wrong on the way.
    pub async fn begin_template(&self, saved: &Saved, system: &Path) -> io::Result<Machine> {
        fs_err::create_dir_all(&saved.dir)?;
        clone_disk(system, &saved.system()).await?;
        fs_err::File::create(saved.placeholder())?.set_len(PLACEHOLDER)?;
        // One that is there would be the memory as it was.
        let _ = fs_err::remove_file(saved.memory());
        let recipe = self.with_disk("system", &saved.system()).with_disk("work", &saved.placeholder());
        let mut machine = recipe.with_memory(&saved.memory(), "on").start().await?;
        machine.guest().await?.health(v1::HealthRequest {}).await.map_err(io::Error::other)?;
        Ok(machine)
    }

    /// Saves a template that was quiesced, and ends it.
    ///
    /// # Errors
    /// Whatever goes wrong on the way.
    pub async fn save_template(&self, saved: &Saved, mut machine: Machine) -> io::Result<()> {
        machine.ask("stop", json!({})).await?;
        ignore_shared(&mut machine).await?;
        let socket = saved.dir.join("state.sock");
        let _ = fs_err::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        machine.ask("migrate", json!({ "uri": format!("unix:{}", socket.display()) })).await?;
        let (mut stream, _) = timeout(PATIENCE, listener.accept()).await??;
        let mut file = fs_err::tokio::File::create(saved.state()).await?;
        timeout(PATIENCE, tokio::io::copy(&mut stream, &mut file)).await??;
        file.sync_all().await?;
        migrated(&mut machine).await?;
        machine.end().await
    }

    /// Lets a machine of `saved` go on, with disks of its own: a clone of the template's system disk, and `work`. Then
    /// its agent has answered, and nothing else has happened to it.
    ///
    /// # Errors
    /// Whatever goes wrong on the way.
    pub async fn resume(&self, saved: &Saved, work: &Path) -> io::Result<(Machine, GuestClient, Resumed)> {
        let system = self.disk("system").ok_or_else(|| io::Error::other("no system disk"))?;
        clone_disk(&saved.system(), &system).await?;
        let recipe = self.with_disk("work", work).with_memory(&saved.memory(), "off");
        let state = fs_err::read(saved.state())?;
        let begun = Instant::now();
        // Its ports are connected when `start` returns; a guest that is loaded before that never answers.
        let mut machine = recipe.with(&["-S", "-incoming", "defer"]).start().await?;
        let started = begun.elapsed();
        ignore_shared(&mut machine).await?;
        let socket = self.sockets.join("in.sock");
        let _ = fs_err::remove_file(&socket);
        machine.ask("migrate-incoming", json!({ "uri": format!("unix:{}", socket.display()) })).await?;
        let mut stream = UnixStream::connect(&socket).await?;
        stream.write_all(&state).await?;
        stream.shutdown().await?;
        migrated(&mut machine).await?;
        machine.ask("cont", json!({})).await?;
        let loaded = begun.elapsed();
        let size = fs_err::metadata(work)?.len();
        machine.ask("block_resize", json!({ "device": "work", "size": size })).await?;
        let mut guest = machine.guest().await?;
        timeout(PATIENCE, guest.health(v1::HealthRequest {})).await?.map_err(io::Error::other)?;
        Ok((machine, guest, Resumed { started, loaded, agent: begun.elapsed() }))
    }

    fn with_memory(&self, file: &Path, share: &str) -> Self {
        let mib = self.argv.iter().skip_while(|word| *word != "-m").nth(1).cloned().unwrap_or_default();
        let object = format!(
            "memory-backend-file,id={RAM},size={mib}M,mem-path={},share={share},x-use-canonical-path-for-ramblock-id=off",
            file.display()
        );
        self.with(&["-object", &object, "-machine", &format!("memory-backend={RAM}")])
    }
}

async fn ignore_shared(machine: &mut Machine) -> io::Result<()> {
    let on = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    machine.ask("migrate-set-capabilities", on).await.map(drop)
}

/// Waits until the VMM has saved or loaded all.
async fn migrated(machine: &mut Machine) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        let now = machine.ask("query-migrate", json!({})).await?;
        match now.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => return Err(io::Error::other(format!("migration: {now}"))),
            _ => sleep(Duration::from_millis(1)).await,
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the migration does not end"))
}

/// A copy that keeps holes.
async fn clone_disk(from: &Path, to: &Path) -> io::Result<()> {
    let copied = tokio::process::Command::new("cp").arg("--sparse=always").args([from, to]).status().await?;
    if copied.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("cannot copy {} to {}: {copied}", from.display(), to.display())))
}
