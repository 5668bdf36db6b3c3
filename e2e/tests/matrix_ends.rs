//! Faults in the stages of start, stop, delete, restart, kill and set, and in the middle of an undo.

use bothy_contract::Service;
use bothy_e2e::{
    host::QUICK,
    matrix::{Break, Cell, Change, Fault, Matrix, Then, WHOLE},
};
use bothy_testkit::require_root;

/// Each of `faults` in each of `stages`.
fn cells(stages: &[&'static str], faults: &[Fault], then: Then) -> Vec<Cell> {
    stages
        .iter()
        .flat_map(|stage| faults.iter().map(move |fault| Cell { stage, fault: *fault, then }))
        .collect()
}

#[test]
fn start() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    matrix.make(&["vm".to_owned()], WHOLE).unwrap();
    // With what a guest that was killed at the wrong moment keeps: git's lock.
    let line = "echo kept > /root/kept; echo kept > /etc/kept; touch -d 2001-01-01 /root/.gitconfig.lock";
    matrix.host.sh("vm", line).ok();
    matrix.stop("vm").unwrap();
    // What a stopped VM has is there by right.
    matrix.host.take_for_granted();
    let stages = [
        "resolve_image",
        "acquire_network",
        "prepare_rootfs",
        "launch_vmm",
        "wait_guest",
        "sync_identity",
        "wait_services",
    ];
    let faults = [Fault::Cancel, Fault::Kill(Service::Vm), Fault::DropBus];
    matrix.starts(&cells(&stages, &faults, Then::Undo), "vm");
    matrix.starts(&cells(&["launch_vmm"], &[Fault::Kill(Service::Vm)], Then::Ready), "vm");
    matrix.starts(&cells(&["launch_vmm"], &[Fault::Break(Break::NoVmm)], Then::Undo), "vm");
    matrix.starts(&cells(&["wait_guest"], &[Fault::Break(Break::HolderDies)], Then::Undo), "vm");
    // After all that, the disks are what they were.
    matrix.run("vm").unwrap();
    assert_eq!(matrix.host.sh("vm", "cat /root/kept /etc/kept").ok().stdout, "kept\nkept\n");
    matrix.delete("vm").unwrap();
    matrix.finish();
}

#[test]
fn stop() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    matrix.make(&["vm".to_owned()], QUICK).unwrap();
    matrix.stop("vm").unwrap();
    matrix.host.take_for_granted();
    let faults = [Fault::Kill(Service::Vm), Fault::DropBus];
    matrix.stops(&cells(&["shut_down_guest", "wait_exit"], &faults, Then::Ready), "vm");
    let faults = [Fault::Cancel, Fault::Break(Break::VmmDies), Fault::Break(Break::HolderDies)];
    matrix.stops(&cells(&["shut_down_guest"], &faults, Then::Ready), "vm");
    matrix.delete("vm").unwrap();
    matrix.finish();
}

#[test]
fn restart_and_kill() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    matrix.make(&["vm".to_owned()], QUICK).unwrap();
    matrix.stop("vm").unwrap();
    matrix.host.take_for_granted();
    let faults = [Fault::Kill(Service::Vm), Fault::DropBus];
    matrix.changes(Change::Kill, &cells(&["signal_vmm"], &faults, Then::Ready), "vm");
    matrix.changes(Change::Restart, &cells(&["wait_exit", "launch_vmm"], &faults, Then::Ready), "vm");
    matrix.changes(Change::Restart, &cells(&["shut_down_guest"], &[Fault::Cancel], Then::Undo), "vm");
    matrix.changes(Change::Restart, &cells(&["launch_vmm"], &[Fault::Cancel], Then::Undo), "vm");
    matrix.delete("vm").unwrap();
    matrix.finish();
}

#[test]
fn set() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    matrix.make(&["vm".to_owned()], QUICK).unwrap();
    matrix.stop("vm").unwrap();
    matrix.host.take_for_granted();
    let stages = ["grow_disks", "resize_vmm", "set_egress"];
    matrix.changes(Change::Set, &cells(&stages, &[Fault::Kill(Service::Vm)], Then::Ready), "vm");
    let cells = [
        Cell { stage: "grow_disks", fault: Fault::Kill(Service::Image), then: Then::Ready },
        Cell { stage: "set_egress", fault: Fault::Kill(Service::Net), then: Then::Ready },
        Cell { stage: "resize_vmm", fault: Fault::DropBus, then: Then::Ready },
    ];
    matrix.changes(Change::Set, &cells, "vm");
    matrix.delete("vm").unwrap();
    matrix.finish();
}

#[test]
fn delete() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    let faults = [Fault::Kill(Service::Vm), Fault::DropBus];
    let mut all = cells(&["kill_vmm", "release_disks", "release_network"], &faults, Then::Ready);
    all.push(Cell { stage: "kill_vmm", fault: Fault::Break(Break::HolderDies), then: Then::Ready });
    all.push(Cell { stage: "release_disks", fault: Fault::Kill(Service::Image), then: Then::Ready });
    all.push(Cell { stage: "release_network", fault: Fault::Kill(Service::Net), then: Then::Ready });
    matrix.deletes(&all);
    matrix.finish();
}

#[test]
fn undo() {
    require_root!();
    let mut matrix = Matrix::start(|_| {});
    let faults = [Fault::Kill(Service::Vm), Fault::DropBus];
    let mut all = cells(&["launch_vmm", "prepare_rootfs", "acquire_network"], &faults, Then::Undo);
    all.push(Cell { stage: "launch_vmm", fault: Fault::Break(Break::HolderDies), then: Then::Undo });
    all.push(Cell { stage: "prepare_rootfs", fault: Fault::Kill(Service::Image), then: Then::Undo });
    all.push(Cell { stage: "acquire_network", fault: Fault::Kill(Service::Net), then: Then::Ready });
    matrix.undos(&all);
    matrix.finish();
}
