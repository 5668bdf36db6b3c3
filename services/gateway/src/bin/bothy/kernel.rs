//! `bothy kernel`: the kernels that images can boot.

use crate::{
    Context, Status,
    catalogue::{absolute, operate},
    cli::Kernel,
    printer::{facts, size, table},
};
use bothy_contract::{
    Error,
    catalogue::{KernelInfo, KernelList, KernelManifest, Pruned},
};
use bothy_gateway::api::{KernelBody, segment};
use http::Method;
use serde_json::json;

pub(crate) async fn main(context: &Context, command: Kernel) -> Result<Status, Error> {
    let printer = context.printer;
    match command {
        Kernel::Import { file, modules, name } => {
            let modules = modules.as_deref().map(absolute).transpose()?;
            let body = KernelBody { name, file: absolute(&file)?, modules };
            let (_, outcome) = operate(context, "/v1/kernels", &body, &file.display().to_string())
                .await
                .map_err(|e| e.context(format!("{} was not imported", file.display())))?;
            let made: KernelManifest = serde_json::from_value(outcome.result.unwrap_or_default())
                .map_err(|e| Error::internal("the gateway's answer is not understood", &e))?;
            printer.record(&made, |made| format!("kernel {} is imported", made.name))?;
        }
        Kernel::List => {
            let list: KernelList = context.gateway.get("/v1/kernels").await?;
            printer.record(&list.kernels, |kernels| listing(kernels))?;
        }
        Kernel::Show { kernel } => {
            let path = format!("/v1/kernels/{}", segment(kernel.as_str()));
            let kernel: KernelInfo = context.gateway.get(&path).await?;
            printer.record(&kernel, details)?;
        }
        Kernel::Rm { kernels } => {
            for kernel in kernels {
                let path = format!("/v1/kernels/{}", segment(kernel.as_str()));
                let gone: Pruned = context.gateway.change(Method::DELETE, &path, &json!({})).await?;
                printer.record(&gone, |gone| {
                    format!("kernel {kernel} is removed ({} freed)", size(gone.freed))
                })?;
            }
        }
    }
    Ok(Status::SUCCESS)
}

fn users(kernel: &KernelInfo) -> String {
    kernel.used_by.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn listing(kernels: &[KernelInfo]) -> String {
    if kernels.is_empty() {
        return "no kernels; built images have their own, `bothy kernel import` brings one for others"
            .to_owned();
    }
    table(
        &["NAME", "RELEASE", "ARCHITECTURE", "MODULES", "SIZE", "USED BY"],
        &["MODULES", "SIZE"],
        kernels.iter().map(|k| {
            let m = &k.manifest;
            vec![
                m.name.to_string(),
                m.release.clone(),
                m.architecture.clone(),
                m.module_names.len().to_string(),
                size(m.kernel.size + m.modules.size),
                users(k),
            ]
        }),
    )
}

fn details(kernel: &KernelInfo) -> String {
    let m = &kernel.manifest;
    facts([
        ("name", m.name.to_string()),
        ("release", m.release.clone()),
        ("architecture", m.architecture.clone()),
        ("from", m.origin.clone()),
        ("imported", m.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("used by", users(kernel)),
        ("kernel", format!("{}, {}", size(m.kernel.size), m.kernel.sha256)),
        ("modules", format!("{}, {}", size(m.modules.size), m.modules.sha256)),
        ("loads", m.module_names.join(" ")),
    ])
}
