//! Machines as people see them.

use crate::printer::{facts, table, word};
use bothy_contract::{
    GroupName,
    vm::{Idle, IdleAction, Shape, VmRecord},
};

/// All machines as a table.
pub(super) fn listing(vms: &[VmRecord]) -> String {
    if vms.is_empty() {
        return "no machines; `bothy vm create` makes one".to_owned();
    }
    table(
        &["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "ADDRESS", "CREATED", "ID"],
        &["CPUS", "MEMORY"],
        vms.iter().map(|vm| {
            vec![
                vm.name.to_string(),
                word(&vm.state),
                vm.image.to_string(),
                vm.shape.cpus.to_string(),
                format!("{} MiB", vm.shape.memory_mib),
                vm.lease.as_ref().map_or_else(|| "-".to_owned(), |l| l.address.to_string()),
                vm.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                vm.id.to_string(),
            ]
        }),
    )
}

/// All that is known of a machine.
pub(super) fn details(vm: &VmRecord) -> String {
    let lease = vm.lease.as_ref();
    // What a change of a running machine has not reached yet.
    let runs = |has: u64, unit: &str, booted: fn(&Shape) -> u64| match vm.booted.as_ref().map(booted) {
        Some(booted) if booted != has => format!("{has}{unit} (it runs with {booted}{unit})"),
        _ => format!("{has}{unit}"),
    };
    let exit = vm.last_exit.as_ref().map(|exit| {
        let how = match (exit.status, exit.signal) {
            (_, Some(signal)) => format!("signal {signal}"),
            (Some(status), None) => format!("status {status}"),
            (None, None) => "unknown".to_owned(),
        };
        format!("{how} at {}", exit.at.strftime("%Y-%m-%d %H:%M:%SZ"))
    });
    facts([
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("state", word(&vm.state)),
        ("reason", vm.reason.clone().unwrap_or_default()),
        ("owner", vm.owner.to_string()),
        ("image", vm.image.to_string()),
        ("cpus", runs(vm.shape.cpus.into(), "", |s| s.cpus.into())),
        ("memory", runs(vm.shape.memory_mib, " MiB", |s| s.memory_mib)),
        ("work disk", runs(vm.shape.work_mib, " MiB", |s| s.work_mib)),
        ("system disk", runs(vm.shape.system_mib, " MiB", |s| s.system_mib)),
        ("address", lease.map(|l| format!("{}/{}", l.address, l.prefix)).unwrap_or_default()),
        (
            "address 6",
            lease.and_then(|l| Some(format!("{}/{}", l.address6?, l.prefix6?))).unwrap_or_default(),
        ),
        ("mac", lease.map(|l| l.mac.clone()).unwrap_or_default()),
        ("tap", lease.map(|l| l.tap.clone()).unwrap_or_default()),
        ("egress", vm.egress.to_string()),
        ("published", published(vm)),
        ("groups", groups(vm)),
        ("idle", vm.idle.as_ref().map(idle).unwrap_or_default()),
        ("vmm", vm.vmm.clone().unwrap_or_default()),
        ("vmm pid", vm.vmm_pid.map(|pid| pid.to_string()).unwrap_or_default()),
        ("boot id", vm.boot_id.clone().unwrap_or_default()),
        ("last exit", exit.unwrap_or_default()),
        ("created", vm.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("started", vm.started.map(|t| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string()).unwrap_or_default()),
    ])
}

/// What happens when nobody uses a machine.
pub(super) fn idle(idle: &Idle) -> String {
    match idle.action {
        IdleAction::Never => "left alone when nobody uses it".to_owned(),
        action => format!("{} after {} s without use", word(&action), idle.after_s),
    }
}

/// The groups of a machine in a row.
pub(super) fn groups(vm: &VmRecord) -> String {
    vm.groups.iter().map(GroupName::as_str).collect::<Vec<_>>().join(", ")
}

/// The published ports of a machine in a row.
pub(super) fn published(vm: &VmRecord) -> String {
    let ports: Vec<_> =
        vm.publish.iter().map(|port| format!("{} -> {}", port.listen, port.guest_port)).collect();
    ports.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_says_what_to_do() {
        assert!(listing(&[]).contains("bothy vm create"));
    }
}
