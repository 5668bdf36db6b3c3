//! `bothy image pull`: the image-agent fetches an image of an OCI registry, as whoever the user has logged in as there.

use crate::{
    Context, Status,
    cli::Pull,
    printer::duration,
    progress::Watcher,
    registry_auth::{self, Login},
};
use bothy_contract::{Error, ImageName, op::Begun};
use bothy_gateway::api::PullBody;
use http::Method;

pub(crate) async fn main(context: &Context, args: Pull) -> Result<Status, Error> {
    let image = match args.name {
        Some(name) => name,
        None => name_of(&args.reference)?,
    };
    let credentials = match registry_auth::login(&args.reference)? {
        Login::As(credentials) => Some(credentials),
        Login::Anybody => None,
        Login::Elsewhere(why) => {
            context.printer.note(why);
            None
        }
    };
    let body = PullBody {
        reference: args.reference,
        kernel: args.kernel,
        force: args.force,
        insecure_http: args.insecure_http,
        credentials,
    };
    let failed = |e: Error| e.context(format!("image {image} was not pulled"));
    let watcher = Watcher::new(&context.gateway, context.printer, false)?;
    let path = format!("/v1/images/{image}/pull");
    let begun: Begun =
        watcher.begin(context.gateway.change(Method::POST, &path, &body)).await.map_err(failed)?;
    let outcome = watcher.watch(begun.op, image.as_str()).await.map_err(failed)?;
    let value = serde_json::json!({
        "op": begun.op, "image": image, "took_us": outcome.took_us, "result": outcome.result
    });
    context.printer.record(&value, |_| format!("image {image} is pulled ({})", duration(outcome.took_us)))?;
    Ok(Status::SUCCESS)
}

/// What an image is called where nothing is said: the last part of its repository's name.
fn name_of(reference: &str) -> Result<ImageName, Error> {
    let last = registry_auth::repository(reference).rsplit('/').next().unwrap_or_default();
    last.parse().map_err(|_| {
        Error::invalid(format!("`{last}` of `{reference}` is not a name for an image"))
            .hint("say how it is to be called with `--name`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_its_repository() {
        for (reference, name) in [
            ("debian", "debian"),
            ("ghcr.io/a/tool:1.2", "tool"),
            ("localhost:5000/x", "x"),
            ("docker.io/library/alpine@sha256:00", "alpine"),
        ] {
            assert_eq!(name_of(reference).unwrap().as_str(), name);
        }
        for bad in ["", "a/my_tool", "a/"] {
            assert!(name_of(bad).unwrap_err().hint.unwrap().contains("--name"), "{bad}");
        }
    }
}
