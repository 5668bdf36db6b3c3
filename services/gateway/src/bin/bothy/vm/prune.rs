//! `bothy vm prune`.

use super::{
    change::{confirm, count, delete_one},
    many::{self, Targets},
    show::listing,
};
use crate::{Context, Status, cli};
use bothy_contract::{
    Error,
    vm::{VmRecord, VmState},
};
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

pub(super) async fn main(context: &Context, args: &cli::Prune) -> Result<Status, Error> {
    let now = Timestamp::now();
    let targets = Targets::own(context, |vm| is_old(vm, args.older_than, now)).await?;
    let printer = context.printer;
    if targets.vms.is_empty() {
        printer.note("there is no machine to delete");
        return Ok(Status::SUCCESS);
    }
    if args.dry_run {
        printer.records(&targets.vms, listing)?;
        return Ok(Status::SUCCESS);
    }
    if args.yes {
        printer.note(listing(&targets.vms));
    } else {
        let question = format!("delete {} with their disks?", count(targets.vms.len()));
        confirm(printer, &targets, &question, "--yes")?;
    }
    // One that was started meanwhile is not deleted: that would need force.
    many::change(context, targets, async |watcher, vm| delete_one(context, watcher, vm, false).await).await
}

/// Whether `vm` has been stopped or failed for longer than `older`.
fn is_old(vm: &VmRecord, older: Option<Duration>, now: Timestamp) -> bool {
    if !matches!(vm.state, VmState::Stopped | VmState::Error) {
        return false;
    }
    // One that never ran has been of no use since it was made.
    let since = vm.last_exit.as_ref().map_or(vm.created, |exit| exit.at);
    let older = older.and_then(|older| SignedDuration::try_from(older).ok());
    older.is_none_or(|older| now.duration_since(since) > older)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{
        ImageName, VmId,
        vm::{ExitRecord, Shape},
    };

    #[test]
    fn only_what_has_ended_and_is_old_enough() {
        let now: Timestamp = "2026-03-10T00:00:00Z".parse().unwrap();
        let day = |n: u64| Some(Duration::from_secs(n * 86_400));
        let mut vm =
            VmRecord::new(VmId::new(), "a".parse().unwrap(), 0, ImageName::default_image(), Shape::default());
        vm.created = "2026-03-01T00:00:00Z".parse().unwrap();
        for state in [VmState::Creating, VmState::Starting, VmState::Running, VmState::Stopping] {
            vm.state = state;
            assert!(!is_old(&vm, None, now), "{state:?}");
        }
        for state in [VmState::Stopped, VmState::Error] {
            vm.state = state;
            assert!(is_old(&vm, None, now) && is_old(&vm, day(8), now) && !is_old(&vm, day(10), now));
        }
        let at = "2026-03-08T00:00:00Z".parse().unwrap();
        vm.last_exit = Some(ExitRecord { at, status: Some(0), signal: None });
        assert!(is_old(&vm, day(1), now) && !is_old(&vm, day(7), now), "it counts from when it ended");
    }
}
