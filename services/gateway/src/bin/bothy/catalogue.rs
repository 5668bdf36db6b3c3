//! `bothy image verify`, `rm` and `prune`.

use crate::{
    Context, Status,
    cli::Keep,
    printer::{duration, size, table, word},
    progress::{Outcome, Watcher},
};
use bothy_contract::{
    Error,
    catalogue::{FileState, Pruned, Verified},
    op::Begun,
};
use http::Method;
use serde::Serialize;
use serde_json::json;

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
    }
    Ok(Status::SUCCESS)
}

/// Begins an operation of the image-agent and watches it to its end.
async fn operate(
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
