//! Several machines at once. What a command names is resolved once, against one list; each machine is taken once; a
//! bounded number is worked on at a time; and what fails for one is told and keeps no other from being done.

use crate::{CANCELLED, Context, FAILED, Status, progress::Watcher};
use bothy_contract::{
    Code, Error,
    vm::{VmList, VmRecord},
};
use bothy_gateway::refs;
use futures::{Stream, StreamExt};

/// How many machines are worked on at a time. Each takes up to two of the connections that the gateway gives a user.
pub(super) const AT_ONCE: usize = 16;

/// The machines that a command is about.
pub(super) struct Targets {
    /// Each once, in the order in which they were named.
    pub(super) vms: Vec<VmRecord>,
    /// What names no machine, or several, and why.
    unknown: Vec<(String, Error)>,
}

impl Targets {
    /// What `refs` name.
    pub(super) async fn named(context: &Context, refs: &[String]) -> Result<Self, Error> {
        let list: VmList = context.gateway.get("/v1/vms").await?;
        Ok(Self::of(&list.vms, refs))
    }

    fn of(all: &[VmRecord], refs: &[String]) -> Self {
        let mut targets = Self { vms: Vec::with_capacity(refs.len()), unknown: Vec::new() };
        for text in refs {
            match refs::resolve(all, text) {
                Ok(vm) if targets.vms.iter().any(|have| have.id == vm.id) => {}
                Ok(vm) => targets.vms.push(vm.clone()),
                Err(_) if targets.unknown.iter().any(|(have, _)| have == text) => {}
                Err(e) => targets.unknown.push((text.clone(), e)),
            }
        }
        targets
    }

    /// The user's own machines that are `wanted`: also for root, who sees those of others and may name them.
    pub(super) async fn own(context: &Context, wanted: impl Fn(&VmRecord) -> bool) -> Result<Self, Error> {
        let me = nix::unistd::geteuid().as_raw();
        let mut list: VmList = context.gateway.get("/v1/vms").await?;
        list.vms.retain(|vm| vm.owner == me && wanted(vm));
        Ok(Self { vms: list.vms, unknown: Vec::new() })
    }

    /// Whether there is more than one thing to report on.
    pub(super) fn several(&self) -> bool {
        self.vms.len() + self.unknown.len() > 1
    }
}

/// What failed so far. The only thing that was asked for fails as the command's own error; of several, each is told with
/// its name as it fails.
pub(super) struct Failures {
    several: bool,
    only: Option<Error>,
    status: Status,
}

impl Failures {
    /// Those of `targets` that are no machines.
    pub(super) fn of(targets: &Targets, tell: impl Fn(&Failure<'_>)) -> Self {
        let mut failures = Self { several: targets.several(), only: None, status: Status::SUCCESS };
        for (text, error) in &targets.unknown {
            failures.add(text, error.clone(), &tell);
        }
        failures
    }

    /// One more.
    pub(super) fn add(&mut self, name: &str, error: Error, tell: impl Fn(&Failure<'_>)) {
        if !self.several {
            self.only = Some(error);
            return;
        }
        // That the user interrupted is the more telling end.
        if error.code == Code::Cancelled {
            self.status = Status(CANCELLED);
        } else if self.status == Status::SUCCESS {
            self.status = Status(FAILED);
        }
        tell(&Failure { name, error: &error });
    }

    /// How the command ends.
    pub(super) fn end(self) -> Result<Status, Error> {
        self.only.map_or(Ok(self.status), Err)
    }
}

/// What failed for one of several.
pub(crate) struct Failure<'a> {
    /// As the user named it, or the machine's name.
    pub(crate) name: &'a str,
    pub(crate) error: &'a Error,
}

impl Failure<'_> {
    /// The error, which names what failed.
    pub(crate) fn named(&self) -> Error {
        let plain = self.name.is_empty() || self.error.message.contains(self.name);
        if plain { self.error.clone() } else { self.error.clone().context(self.name) }
    }
}

/// Begins an operation on each of `targets` and waits for all.
pub(super) async fn change(
    context: &Context,
    targets: Targets,
    what: impl AsyncFn(&Watcher<'_>, &VmRecord) -> Result<(), Error>,
) -> Result<Status, Error> {
    let watcher = Watcher::new(&context.gateway, context.printer, targets.several())?;
    let tell = |failure: &Failure<'_>| watcher.screen().print(|printer| printer.failure(failure));
    let mut failures = Failures::of(&targets, tell);
    let (watching, what) = (&watcher, &what);
    let mut done = std::pin::pin!(
        futures::stream::iter(targets.vms)
            .map(|vm| async move {
                let done = what(watching, &vm).await;
                (vm, done)
            })
            .buffer_unordered(AT_ONCE)
    );
    while let Some((vm, done)) = done.next().await {
        if let Err(e) = done {
            failures.add(vm.name.as_str(), e, tell);
        }
    }
    failures.end()
}

/// Asks something of each of `vms`; the answers come in their order.
pub(super) fn ask<'a, T>(
    vms: &'a [VmRecord],
    what: &'a impl AsyncFn(&'a VmRecord) -> Result<T, Error>,
) -> impl Stream<Item = (&'a VmRecord, Result<T, Error>)> {
    futures::stream::iter(vms).map(move |vm| async move { (vm, what(vm).await) }).buffered(AT_ONCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{ImageName, VmId, vm::Shape};

    fn vm(name: &str) -> VmRecord {
        let name = name.parse().unwrap();
        VmRecord::new(VmId::new(), name, 1000, ImageName::default_image(), Shape::default())
    }

    #[test]
    fn each_machine_is_taken_once_whatever_it_is_called() {
        let all = [vm("web"), vm("web-1"), vm("db")];
        let id = all[0].id.to_string();
        let refs = ["web", "d", &id, "nope", "web", "we", "nope", "db"].map(str::to_owned);
        let targets = Targets::of(&all, &refs);
        let names: Vec<_> = targets.vms.iter().map(|vm| vm.name.as_str()).collect();
        assert_eq!(names, ["web", "db"]);
        let unknown: Vec<_> = targets.unknown.iter().map(|(text, e)| (text.as_str(), e.code)).collect();
        assert_eq!(unknown, [("nope", Code::NotFound), ("we", Code::InvalidArgument)]);
        assert!(targets.several() && !Targets::of(&all, &["web".into(), "web".into()]).several());
    }

    #[test]
    fn one_failure_is_the_commands_own_and_of_several_each_is_told() {
        let told = std::cell::RefCell::new(Vec::new());
        let tell = |failure: &Failure<'_>| told.borrow_mut().push(failure.named().message);
        let one = Targets::of(&[], &["a".into()]);
        assert_eq!(Failures::of(&one, tell).end().unwrap_err().code, Code::NotFound);
        assert!(told.borrow().is_empty());
        let several = Targets::of(&[vm("web")], &["web".into(), "nope".into()]);
        let mut failures = Failures::of(&several, tell);
        failures.add("web", Error::new(Code::Internal, "it broke"), tell);
        assert_eq!(failures.end().unwrap(), Status(FAILED));
        assert_eq!(*told.borrow(), ["there is no VM \"nope\"", "web: it broke"]);
        let mut failures = Failures::of(&several, tell);
        failures.add("web", Error::new(Code::Cancelled, "cancelled"), tell);
        assert_eq!(failures.end().unwrap(), Status(CANCELLED));
    }
}
