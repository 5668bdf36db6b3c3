//! Every fault in every stage of a create. One host for each stage; the rows are what is tested.

use bothy_contract::Service;
use bothy_e2e::matrix::{Break, Cell, Fault, Matrix, Then};
use bothy_testkit::require_root;

/// Who dies so that the create must go on to its end all the same: whoever serves the stage, or the vm-agent.
const SERVED_BY: [(&str, Service); 12] = [
    ("resolve_image", Service::Image),
    ("acquire_network", Service::Net),
    ("host_key", Service::Vm),
    ("prepare_rootfs", Service::Image),
    ("prepare_work_disk", Service::Vm),
    ("resume", Service::Vm),
    ("launch_vmm", Service::Vm),
    ("wait_guest", Service::Vm),
    ("personalise", Service::Vm),
    ("publish_dns", Service::Net),
    ("sync_identity", Service::Workspace),
    ("wait_services", Service::Vm),
];

/// All cells of one stage: it is cancelled, each service and the bus die, and it fails for real reasons.
fn cells(stage: &'static str, breaks: &[Break]) -> Vec<Cell> {
    let to_the_end = SERVED_BY.iter().find(|(name, _)| *name == stage).map(|(_, service)| *service);
    let mut cells = vec![Cell { stage, fault: Fault::Cancel, then: Then::Ready }];
    for service in Service::ALL {
        let then = if Some(service) == to_the_end { Then::Ready } else { Then::Undo };
        cells.push(Cell { stage, fault: Fault::Kill(service), then });
    }
    cells.push(Cell { stage, fault: Fault::DropBus, then: Then::Undo });
    cells.extend(breaks.iter().map(|what| Cell { stage, fault: Fault::Break(*what), then: Then::Undo }));
    cells
}

fn stage(stage: &'static str, breaks: &[Break]) {
    let mut matrix = Matrix::start(|_| {});
    matrix.creates(&cells(stage, breaks));
    matrix.finish();
}

#[test]
fn resolve_image() {
    require_root!();
    stage("resolve_image", &[Break::NoManifest, Break::TornRootfs]);
}

#[test]
fn acquire_network() {
    require_root!();
    let mut matrix = Matrix::start(|config| config.net.prefix = 29);
    matrix.creates(&cells("acquire_network", &[Break::SubnetFull]));
    matrix.finish();
}

#[test]
fn host_key() {
    require_root!();
    stage("host_key", &[Break::NoKeygen]);
}

#[test]
fn prepare_rootfs() {
    require_root!();
    stage("prepare_rootfs", &[Break::NoSystemSeed, Break::DiskFull]);
}

#[test]
fn prepare_work_disk() {
    require_root!();
    stage("prepare_work_disk", &[Break::TornRootfs]);
}

#[test]
fn resume() {
    require_root!();
    let mut matrix = Matrix::start(|config| config.template.max = 1);
    matrix.warm();
    matrix.creates(&cells("resume", &[]));
    matrix.finish();
}

#[test]
fn launch_vmm() {
    require_root!();
    stage("launch_vmm", &[Break::NoVmm]);
}

#[test]
fn wait_guest() {
    require_root!();
    stage("wait_guest", &[Break::VmmDies, Break::HolderDies]);
}

#[test]
fn a_guest_that_does_not_answer_in_time() {
    require_root!();
    let mut matrix = Matrix::start(|config| config.vm.boot_timeout_s = 2);
    matrix.creates(&[Cell { stage: "wait_guest", fault: Fault::Break(Break::TooSlow), then: Then::Undo }]);
    matrix.finish();
}

#[test]
fn personalise() {
    require_root!();
    stage("personalise", &[Break::VmmDies, Break::HolderDies]);
}

#[test]
fn publish_dns() {
    require_root!();
    stage("publish_dns", &[]);
}

#[test]
fn sync_identity() {
    require_root!();
    stage("sync_identity", &[Break::BadKey]);
}

#[test]
fn wait_services() {
    require_root!();
    stage("wait_services", &[Break::VmmDies, Break::DeadPort]);
}
