//! `kernel import`: a kernel and its modules into the catalogue, as an operation.

use crate::{
    agent::Agent,
    bootset::{self, BootFiles},
    build::{self, Stage, boot},
    fault::{self, blocking},
    hostfile,
    kinds::{self, Step, Work},
};
use bothy_bus::Context;
use bothy_contract::{Error, KernelName, catalogue::ImportKernel};
use bothy_ops::{Begun, Graph, New, Op, Ops};
use std::{io::Read as _, path::PathBuf};

/// The kind of these operations.
pub(crate) const KIND: &str = "kernel.import";
/// How a Debian package begins, deb(5).
const PACKAGE: &[u8] = b"!<arch>\ndebian-binary";

/// Begins an import.
pub(crate) async fn begin(ops: &Ops, _: &Agent, context: Context, ask: ImportKernel) -> Result<Begun, Error> {
    let check = ask.clone();
    blocking(move || {
        hostfile::file(&check.file)?;
        check.modules.as_deref().map(hostfile::directory).transpose()?;
        if is_package(&check)? && check.modules.is_some() {
            return Err(
                Error::invalid("a Debian package brings its own modules").hint("leave `--modules` away")
            );
        }
        Ok(())
    })
    .await?;
    let new = New {
        kind: KIND,
        subject: ask.name.as_ref().map_or_else(|| ask.file.display().to_string(), ToString::to_string),
        vm: None,
        owner: ask.owner,
        request: Some(context.request_id),
        input: serde_json::to_value(&ask).map_err(|e| Error::internal("cannot write down the import", &e))?,
    };
    ops.begin(new, |_, _| Ok(())).await
}

fn is_package(ask: &ImportKernel) -> Result<bool, Error> {
    let mut head = Vec::new();
    fs_err::File::open(&ask.file)
        .and_then(|f| f.take(PACKAGE.len() as u64).read_to_end(&mut head))
        .map_err(|e| fault::io("cannot read the kernel", &e))?;
    Ok(head == PACKAGE)
}

struct Import {
    agent: Agent,
    ask: ImportKernel,
    dir: PathBuf,
}

/// The stages of an import.
pub(crate) fn graph(agent: &Agent, op: &Op) -> Result<Graph, Error> {
    let dir = agent.store.dir().join(format!(".kernel-{}", op.id));
    Ok(kinds::sequence(Import { agent: agent.clone(), ask: op.input()?, dir }))
}

impl Work for Import {
    const STAGES: &'static [&'static str] = &["unpack", "finish"];

    fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    async fn run(&self, stage: &'static str, with: Stage) -> Result<Step, Error> {
        let (out, ask, agent) = (self.dir.join("kernel"), self.ask.clone(), self.agent.clone());
        let (noted, dir) = (self.dir.join("boot.json"), self.dir.clone());
        if stage == "unpack" {
            let unpacked = self.dir.join("unpacked");
            let package = is_package(&ask)?;
            if package {
                boot::unpack_package(&with, &ask.file, &unpacked).await?;
            }
            return blocking(move || {
                let failed = |e| fault::io("cannot keep the kernel", &e);
                fs_err::create_dir(&out).map_err(failed)?;
                let made = if package {
                    bootset::put_from_root(&unpacked, &out)?
                } else {
                    bootset::put(&ask.file, ask.modules.as_deref(), &out)?
                };
                let text =
                    serde_json::to_vec(&(&made.release, &made.modules)).map_err(|e| failed(e.into()))?;
                fs_err::write(noted, text).map_err(failed)?;
                Ok(Step::note(format!("{}, {} modules", made.release, made.modules.len())))
            })
            .await;
        }
        blocking(move || {
            let failed = |e| fault::io("cannot take up the kernel", &e);
            let text = fs_err::read(&noted).map_err(failed)?;
            let (release, modules) =
                serde_json::from_slice::<(String, Vec<String>)>(&text).map_err(|e| failed(e.into()))?;
            let name = match ask.name {
                Some(name) => name,
                None => release.parse::<KernelName>().map_err(|e| e.hint("give it a name with `--name`"))?,
            };
            let origin = ask.file.display().to_string();
            let made = agent.store.publish_kernel(&out, name, BootFiles { release, modules }, origin)?;
            build::remove(&dir)?;
            Step::last(format!("kernel {}", made.name), &made)
        })
        .await
    }
}
