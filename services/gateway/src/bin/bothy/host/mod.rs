//! `bothy host`: the bus and the five services on one host, without systemd.

pub(crate) mod child;
pub(crate) mod down;
mod owner;
mod supervise;
pub(crate) mod up;

use crate::{
    Context, Status,
    printer::{Printer, facts, table},
};
use bothy_config::Config;
use bothy_contract::Error;
use bothy_gateway::api::HostReport;
use std::path::Path;

/// `host status`: the services and what they have. A service that is down makes the exit status 1.
pub(crate) async fn status(context: &Context) -> Result<Status, Error> {
    let report: HostReport = context.gateway.get("/v1/host").await?;
    context.printer.record(&report, text)?;
    Ok(if report.all_up() { Status::SUCCESS } else { Status::FOUND })
}

fn text(report: &HostReport) -> String {
    let services = table(
        &["SERVICE", "STATE", "WHY"],
        &[],
        report.services.iter().map(|s| {
            vec![
                s.service.binary().to_owned(),
                if s.up { "up" } else { "down" }.to_owned(),
                s.error.as_ref().map(ToString::to_string).unwrap_or_default(),
            ]
        }),
    );
    let vm = report.vm.as_ref();
    let net = report.net.as_ref();
    let facts = facts([
        ("machines", vm.map(|vm| format!("{} running of {}", vm.running, vm.total)).unwrap_or_default()),
        ("vmm", vm.map(|vm| format!("{} {}", vm.driver, vm.vmm_version)).unwrap_or_default()),
        (
            "accelerator",
            vm.map(|vm| format!("{} ({})", vm.accelerator, vm.accelerator_reason)).unwrap_or_default(),
        ),
        (
            "network",
            net.map(|net| {
                format!(
                    "{} {}, {} of {} slots leased, {} warm",
                    net.bridge, net.subnet, net.leased, net.capacity, net.warm
                )
            })
            .unwrap_or_default(),
        ),
        (
            "images",
            report
                .images
                .as_ref()
                .map(|images| images.iter().map(|i| i.name.to_string()).collect::<Vec<_>>().join(", "))
                .unwrap_or_default(),
        ),
    ]);
    format!("{services}\n\n{facts}").trim_end().to_owned()
}

/// `host bus-setup`: writes the bus' identities and configuration.
pub(crate) fn bus_setup(printer: Printer, config: &Path) -> Result<Status, Error> {
    let config = Config::load(config)?;
    bothy_bus::setup(&config)?;
    let conf = config.bus_dir().join("nats.conf");
    printer.record(&serde_json::json!({ "conf": conf }), |_| {
        format!("the bus' configuration is in {}", conf.display())
    })?;
    Ok(Status::SUCCESS)
}
