//! `bothy image`: images and their builds.

use crate::{
    Context, Status, catalogue, cli, intake,
    printer::{duration, facts, size, table, word},
    progress::Watcher,
    template,
};
use bothy_contract::{
    Error,
    image::{ImageList, ImageManifest},
    op::Begun,
};
use http::Method;
use serde_json::json;

pub(crate) async fn main(context: &Context, command: cli::Image) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        cli::Image::Build { image, force } => {
            let path = format!("/v1/images/{image}/build?force={force}");
            let watcher = Watcher::new(&context.gateway, context.printer, false)?;
            let body = json!({});
            let begun: Begun = watcher.begin(context.gateway.change(Method::POST, &path, &body)).await?;
            let outcome = watcher
                .watch(begun.op, image.as_str())
                .await
                .map_err(|e| e.context(format!("image {image} was not built")))?;
            let value = json!({ "op": begun.op, "image": image, "took_us": outcome.took_us, "result": outcome.result });
            printer.record(&value, |_| format!("image {image} is built ({})", duration(outcome.took_us)))?;
        }
        cli::Image::Warm(args) => return template::warm(context, args).await,
        cli::Image::Intake(command) => return intake::main(context, command).await,
        cli::Image::Keep(command) => return catalogue::main(context, command).await,
        cli::Image::Templates => return template::list(context).await,
        cli::Image::List => {
            let list: ImageList = context.gateway.get("/v1/images").await?;
            printer.record(&list.images, |images| listing(images))?;
        }
        cli::Image::Show { image } => {
            let image: ImageManifest = context.gateway.get(&format!("/v1/images/{image}")).await?;
            printer.record(&image, details)?;
        }
    }
    Ok(Status::SUCCESS)
}

fn total(image: &ImageManifest) -> u64 {
    image.artifacts.values().map(|a| a.size).sum()
}

fn listing(images: &[ImageManifest]) -> String {
    if images.is_empty() {
        return "no images; `bothy image build` makes the default one".to_owned();
    }
    table(
        &["NAME", "ARCHITECTURE", "KERNEL", "INIT", "SIZE", "CREATED"],
        &["SIZE"],
        images.iter().map(|image| {
            vec![
                image.name.to_string(),
                image.architecture.clone(),
                image.kernel_release.clone(),
                word(&image.init),
                size(total(image)),
                image.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            ]
        }),
    )
}

fn details(image: &ImageManifest) -> String {
    let wait: Vec<_> =
        image.wait.iter().map(|w| format!("{} ({}, {} s)", w.name, w.what(), w.timeout_s)).collect();
    let facts = facts([
        ("name", image.name.to_string()),
        ("architecture", image.architecture.clone()),
        ("kernel", image.kernel_release.clone()),
        ("init", word(&image.init)),
        ("home", image.home.clone()),
        ("waits for", wait.join(", ")),
        ("from", image.origin.clone()),
        ("recipe", image.recipe_sha256.clone()),
        ("created", image.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
    ]);
    let artifacts = table(
        &["ARTIFACT", "SIZE", "SHA-256"],
        &["SIZE"],
        image.artifacts.iter().map(|(role, a)| vec![role.clone(), size(a.size), a.sha256.clone()]),
    );
    format!("{facts}\n\n{artifacts}")
}
