//! `bothy image verify`, `rm`, `prune`, `register` and `promote`.

use crate::{
    Context, Status,
    cli::{Init, Keep, Register},
    printer::{duration, size, table, word},
    progress::{Outcome, Watcher},
};
use bothy_contract::{
    Error,
    catalogue::{FileState, KernelSource, Pruned, Verified},
    image::InitStyle,
    op::Begun,
};
use bothy_gateway::api::RegisterBody;
use http::Method;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};

pub(crate) async fn main(context: &Context, command: Keep) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        Keep::Verify { image } => {
            let query = image.as_ref().map(|i| format!("?image={i}")).unwrap_or_default();
            let subject = image.map_or_else(|| "all images".to_owned(), |i| i.to_string());
            let path = format!("/v1/catalogue/verify{query}");
            let (_, outcome) = operate(context, &path, &json!({}), &subject).await?;
            let found: Vec<Verified> = serde_json::from_value(outcome.result.unwrap_or_default())
                .map_err(|e| Error::internal("the gateway's answer is not understood", &e))?;
            printer.record(&found, |found| verified(found, outcome.took_us))?;
            return Ok(if found.iter().all(Verified::is_whole) { Status::SUCCESS } else { Status::FOUND });
        }
        Keep::Rm { images } => {
            for image in images {
                let path = format!("/v1/images/{image}");
                let gone: Pruned = context.gateway.change(Method::DELETE, &path, &json!({})).await?;
                printer
                    .record(&gone, |gone| format!("image {image} is removed ({} freed)", size(gone.freed)))?;
            }
        }
        Keep::Prune { all, dry_run } => {
            let path = format!("/v1/catalogue/prune?all={all}&dry_run={dry_run}");
            let gone: Pruned = context.gateway.change(Method::POST, &path, &json!({})).await?;
            printer.record(&gone, |gone| pruned(gone, dry_run))?;
        }
        Keep::Register(args) => {
            let path = format!("/v1/images/{}/register", args.image);
            let (begun, outcome) = operate(context, &path, &body(&args)?, args.image.as_str())
                .await
                .map_err(|e| e.context(format!("image {} was not registered", args.image)))?;
            let value = json!({ "op": begun.op, "image": args.image, "result": outcome.result });
            printer.record(&value, |_| {
                format!("image {} is registered ({})", args.image, duration(outcome.took_us))
            })?;
        }
        Keep::Promote { image } => {
            let path = format!("/v1/images/{image}/promote");
            let (begun, outcome) = operate(context, &path, &json!({}), image.as_str())
                .await
                .map_err(|e| e.context(format!("image {image} was not promoted")))?;
            let value = json!({ "op": begun.op, "image": image, "result": outcome.result });
            printer
                .record(&value, |_| format!("image {image} is promoted ({})", duration(outcome.took_us)))?;
        }
    }
    Ok(Status::SUCCESS)
}

/// What `register` asks for, with paths that mean the same to the image-agent.
fn body(args: &Register) -> Result<RegisterBody, Error> {
    let kernel = match &args.kernel {
        None => KernelSource::Rootfs,
        Some(text) if text.contains('/') => KernelSource::File {
            kernel: absolute(text.as_ref())?,
            modules: args.modules.as_deref().map(absolute).transpose()?,
        },
        Some(_) if args.modules.is_some() => {
            return Err(Error::invalid("a kernel of the catalogue has its own modules")
                .hint("leave `--modules` away, or give the kernel's file with a `/` in it"));
        }
        Some(text) => KernelSource::Catalogue(text.parse()?),
    };
    Ok(RegisterBody {
        rootfs: absolute(&args.rootfs)?,
        kernel,
        initrd: args.initrd.as_deref().map(absolute).transpose()?,
        init: args.init.map(|init| match init {
            Init::Systemd => InitStyle::Systemd,
            Init::Agent => InitStyle::Agent,
        }),
        wait: args.wait.clone(),
        force: args.force,
    })
}

/// A path that does not depend on where this process is.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error::invalid(format!("{} is no path: {e}", path.display())))
}

/// Begins an operation of the image-agent and watches it to its end.
pub(crate) async fn operate(
    context: &Context,
    path: &str,
    body: &impl Serialize,
    subject: &str,
) -> Result<(Begun, Outcome), Error> {
    let watcher = Watcher::new(&context.gateway, context.printer, false)?;
    let begun: Begun = watcher.begin(context.gateway.change(Method::POST, path, body)).await?;
    let outcome = watcher.watch(begun.op, subject).await?;
    Ok((begun, outcome))
}

fn verified(found: &[Verified], took_us: u64) -> String {
    let damaged: Vec<_> = found
        .iter()
        .flat_map(|v| v.files.iter().map(move |f| (&v.image, f)))
        .filter(|(_, f)| f.state != FileState::Whole)
        .collect();
    if damaged.is_empty() {
        let names: Vec<_> = found.iter().map(|v| v.image.as_str()).collect();
        return match names.as_slice() {
            [] => "no images".to_owned(),
            [one] => format!("image {one} is whole ({})", duration(took_us)),
            all => format!("images {} are whole ({})", all.join(", "), duration(took_us)),
        };
    }
    let rows = damaged.iter().map(|(image, f)| {
        vec![image.to_string(), f.role.clone(), word(&f.state), f.path.display().to_string()]
    });
    table(&["IMAGE", "ARTIFACT", "IS", "FILE"], &[], rows)
}

fn pruned(gone: &Pruned, dry_run: bool) -> String {
    let would = if dry_run { "would be " } else { "" };
    let mut lines: Vec<_> = gone.images.iter().map(|i| format!("image {i}")).collect();
    lines.extend(gone.files.iter().map(|f| f.display().to_string()));
    lines.push(format!("{} {would}freed", size(gone.freed)));
    lines.join("\n")
}
