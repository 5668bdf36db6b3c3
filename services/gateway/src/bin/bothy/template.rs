//! `bothy image warm` and `bothy image templates`: booted guests whose memory is kept, for creates that do not boot.

use crate::{
    Context, Status, cli,
    printer::{duration, size, table},
    progress::Watcher,
};
use bothy_contract::{
    Error,
    vm::{Shape, TemplateList, TemplateMade, TemplateRecord},
};
use bothy_gateway::api::WarmBody;
use http::Method;

/// Makes the template of an image and a shape, unless it is there, and waits for it.
pub(crate) async fn warm(context: &Context, args: cli::Warm) -> Result<Status, Error> {
    let default = Shape::default();
    let shape = Shape {
        cpus: args.cpus.unwrap_or(default.cpus),
        memory_mib: args.memory.unwrap_or(default.memory_mib),
        system_mib: args.system_disk.unwrap_or(default.system_mib),
        ..default
    };
    shape.check()?;
    let body = WarmBody { shape, force: args.force };
    let path = format!("/v1/images/{}/warm", args.image);
    let watcher = Watcher::new(&context.gateway, context.printer, false)?;
    let made: TemplateMade = watcher.begin(context.gateway.change(Method::POST, &path, &body)).await?;
    let printer = context.printer;
    let begun = match made {
        TemplateMade::There(record) => {
            printer.record(&record, |record| format!("{} is there already", described(record)))?;
            return Ok(Status::SUCCESS);
        }
        TemplateMade::Begun(begun) => begun,
    };
    let outcome = watcher
        .watch(begun.op, args.image.as_str())
        .await
        .map_err(|e| e.context(format!("no template of image {} was made", args.image)))?;
    let list: TemplateList = context.gateway.get("/v1/templates").await?;
    let record = list.templates.into_iter().find(|template| Some(template.id) == begun.vm);
    printer.record(&record, |record| match record {
        Some(record) => format!("{} is made ({})", described(record), duration(outcome.took_us)),
        None => format!("a template of image {} was made, and is gone by now", args.image),
    })?;
    Ok(Status::SUCCESS)
}

/// Lists the templates.
pub(crate) async fn list(context: &Context) -> Result<Status, Error> {
    let list: TemplateList = context.gateway.get("/v1/templates").await?;
    context.printer.record(&list.templates, |templates| listing(templates))?;
    Ok(Status::SUCCESS)
}

fn described(template: &TemplateRecord) -> String {
    let TemplateRecord { image, shape, bytes, .. } = template;
    format!("the template of {image} with {} and {}, {}", cpus(shape), memory(shape), size(*bytes))
}

fn cpus(shape: &Shape) -> String {
    format!("{} cpu{}", shape.cpus, if shape.cpus == 1 { "" } else { "s" })
}

fn memory(shape: &Shape) -> String {
    size(shape.memory_mib << 20)
}

fn listing(templates: &[TemplateRecord]) -> String {
    if templates.is_empty() {
        return "no templates; the first create of an image makes one, or `bothy image warm`".to_owned();
    }
    table(
        &["IMAGE", "CPUS", "MEMORY", "VMM", "ON DISK", "USES", "MADE", "STATE"],
        &["CPUS", "MEMORY", "ON DISK", "USES"],
        templates.iter().map(|t| {
            vec![
                t.image.to_string(),
                t.shape.cpus.to_string(),
                memory(&t.shape),
                t.vmm.clone(),
                size(t.bytes),
                t.uses.to_string(),
                t.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                t.set_aside.as_ref().map_or("ready".to_owned(), |why| format!("set aside: {why}")),
            ]
        }),
    )
}
