//! `bothy-image-agent`: images, kernels, seeds and the disks of VMs.
//!
//! `serve` (the default) answers on the bus; `build` makes an image without one, for packagers and first set-ups.

mod agent;
mod blockdev;
mod bootset;
mod build;
mod builds;
mod clone;
mod cpio;
mod digest;
mod disks;
mod ext4;
mod fault;
mod hostfile;
mod initramfs;
mod kernel;
mod kernels;
mod kinds;
mod modules;
mod oci;
mod promote;
mod recipe;
mod register;
mod remove;
mod seeds;
mod service;
mod store;
mod tools;
mod verify;

use agent::Agent;
use bothy_bus::Client;
use bothy_config::Config;
use bothy_contract::{Error, ImageName, OpId, Service};
use bothy_db::Db;
use bothy_ops::Ops;
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Images, kernels, seeds and the disks of VMs.
#[derive(Debug, Parser)]
#[command(name = "bothy-image-agent", version)]
struct Args {
    /// The host's configuration.
    #[arg(long, env = bothy_config::PATH_VARIABLE, default_value = bothy_config::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers on the bus until SIGTERM.
    Serve,
    /// Builds an image from the recipe of that name, without a bus.
    Build {
        /// The recipe.
        recipe: ImageName,
        /// Build even if an image of the same recipe is there.
        #[arg(long)]
        force: bool,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    bothy_daemon::main(Service::Image, |stop| run(args, stop))
}

async fn run(args: Args, stop: CancellationToken) -> Result<(), Error> {
    let config = Config::load(&args.config)?;
    let agent = Agent::open(&config)?;
    match args.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(&config, agent, stop).await,
        Command::Build { recipe, force } => build_here(&agent, &recipe, force, stop).await,
    }
}

/// Takes up what an earlier process left, then answers.
async fn serve(config: &Config, agent: Agent, stop: CancellationToken) -> Result<(), Error> {
    // Before anything can be begun: what is half made now belongs to nobody.
    build::sweep(&agent.store)?;
    agent.disks.sweep()?;
    agent.grown.sweep()?;
    agent.intake.sweep()?;
    agent.blobs.prepare()?;
    let db = Db::open(config.service_dir(Service::Image).join("image.db"), &kinds::MIGRATIONS)?;
    let client = Client::connect(config, Service::Image).await?;
    let ops = Ops::new(db, Service::Image, Arc::new(kinds::Works { agent: agent.clone() }));
    ops.publish_to(Arc::new(client.clone()));
    ops.resume().await?;
    let done = service::run(client, agent, ops.clone(), stop, bothy_daemon::ready).await;
    ops.shutdown().await;
    done
}

/// Builds with the stages' times in the log.
async fn build_here(
    agent: &Agent,
    name: &ImageName,
    force: bool,
    cancel: CancellationToken,
) -> Result<(), Error> {
    let (build, current) = agent.build(name, OpId::new())?;
    if current.is_some() && !force {
        tracing::info!(image = %name, "an image of this recipe is there");
        return Ok(());
    }
    let progress: build::Progress = Arc::new(|done, total, note| match total {
        Some(total) => tracing::debug!(done, total, "{note}"),
        None => tracing::info!("{note}"),
    });
    let with = build::Stage { cancel, progress };
    for stage in build::STAGES {
        let begun = Instant::now();
        match build.run(stage, &with).await {
            Ok(note) => tracing::info!(stage, took_ms = begun.elapsed().as_millis() as u64, "{note}"),
            Err(e) => {
                let e = e.context(format!("stage {stage} failed"));
                return Err(match build.undo().await {
                    Ok(()) => e,
                    Err(undo) => {
                        let both = format!("{}; and its undo failed: {undo}", e.message);
                        Error { message: both, ..e }
                    }
                });
            }
        }
    }
    Ok(())
}
