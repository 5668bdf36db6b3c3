//! A machine that becomes another one, or goes on after it stood still.
//!
//! ```text
//!   template: Personalise{template} -- services up -- Quiesce --> saved, and resumed any number of times
//!                                                                   |
//!   machine:                       Personalise <--------------------'
//!                                     '-- then what was held still goes on, and at leisure: services restarted,
//!                                         the file system grown, timers started, the journal moved
//! ```

use std::io;
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use bothy_guest_proto::v1;
use tonic::Status;

use super::pending::Task;
use super::{Guest, Known, blocking, failed};
use crate::boot::by_serial;
use crate::nic::{self, Nic};
use crate::personalise::Prepared;
use crate::timeline::{Step, Steps, now_us};
use crate::{freezer, identity, kmsg, neighbours, personalise, rank, units, workdisk};

/// How long the processes of a template stand still after the reply: it shall not have to wait for them.
const REPLY: Duration = Duration::from_millis(3);
/// How long what is at leisure waits: the first command comes before it, unless somebody waits for it.
const LEISURE: Duration = Duration::from_secs(1);
/// The same for what nobody ever waits for.
const MORE_LEISURE: Duration = Duration::from_secs(3);

/// What a quiesced template holds back, and what it found out for the machine that comes.
#[derive(Debug, Default)]
pub(super) struct Held {
    processes: bool,
    /// Processes that come after everybody else.
    low: Vec<i32>,
    timers: Vec<String>,
    /// Units to be restarted, where that is known.
    restart: Option<Vec<String>>,
    prepared: Option<Prepared>,
}

/// What a `Personalise` has to leave for later.
#[derive(Debug)]
struct Later {
    low: Vec<i32>,
    timers: Vec<String>,
    restart: Vec<String>,
    home: String,
    /// The machine id of before and now.
    ids: Option<[String; 2]>,
}

impl Guest {
    pub(super) async fn personalise_now(
        &self,
        request: v1::PersonaliseRequest,
    ) -> Result<v1::PersonaliseReply, Status> {
        let mut identity = self.0.identity.lock().await;
        let nic = personalise::check(&request).map_err(Status::invalid_argument)?;
        let steps = Steps::default();
        if identity.as_ref().is_none_or(|now| !same(now, &request)) {
            let began = now_us();
            let resumed = identity.as_ref().is_some_and(|was| was.template && !request.template);
            // Whoever did not quiesce has nothing prepared, and all is found out now.
            let prepared = resumed.then(|| self.held().prepared.take().unwrap_or_default());
            let address = personalise::apply(&request, nic, prepared.as_ref(), &steps)
                .await
                .map_err(|error| failed("personalise", &error))?;
            let was = identity.replace(request.clone());
            *self.0.known.lock().unwrap_or_else(PoisonError::into_inner) = Known {
                personalised: true,
                template: request.template,
                address,
                home: request.home.clone(),
                defaults: request.defaults.clone().unwrap_or_default(),
            };
            if self.0.init.started() {
                self.leave_for_later(was, &request).await;
            } else {
                let grown = async {
                    at_home(&request.home, workdisk::barriers).await?;
                    at_home(&request.home, workdisk::fill).await
                };
                grown.await.map_err(|error| failed("personalise", &error))?;
            }
            let mut told = self.0.steps.lock().unwrap_or_else(PoisonError::into_inner);
            if resumed {
                // Its template's boot is not this machine's.
                *told = steps.all();
            } else {
                told.push(Step::ends_now("personalise", began));
            }
        }
        if !self.0.init.started() {
            let began = now_us();
            let handed = self.0.init.hand_over(request.init_systemd).await;
            handed.map_err(|error| failed("hand over PID 1", &error))?;
            self.add_step(Step::ends_now("init", began));
        }
        let boot_id = identity::boot_id().map_err(|error| failed("read the boot id", &error))?;
        let steps = steps.all().into_iter().map(Into::into).collect();
        let (pending, unix_time_us) = (self.0.pending.names(), identity::clock_us());
        Ok(v1::PersonaliseReply { boot_id, pending, steps, unix_time_us })
    }

    pub(super) async fn quiesce_now(&self) -> Result<v1::QuiesceReply, Status> {
        let identity = self.0.identity.lock().await;
        let (steps, mut left) = (Steps::default(), Vec::new());
        if let Some(now) = identity.as_ref().filter(|now| now.template) {
            let nic = now.nic.as_ref().map(Nic::parse).transpose().map_err(Status::internal)?;
            left.extend(steps.wait("prepare", self.prepare(nic)).await);
            self.held().low = rank::lower();
            // From here on: a failure half-way leaves some held, and the next Personalise lets all go.
            self.held().processes = true;
            let frozen = blocking("hold the processes still", {
                let steps = steps.clone();
                move || steps.run("freeze", || freezer::freeze(Path::new(freezer::ROOT)))
            });
            match frozen.await {
                Ok(moving) => left.extend(moving),
                Err(error) => left.push(error.message().to_owned()),
            }
        }
        let told = steps.clone();
        blocking("sync", move || {
            told.run("sync", nix::unistd::sync);
            Ok(())
        })
        .await?;
        Ok(v1::QuiesceReply { steps: steps.all().into_iter().map(Into::into).collect(), left })
    }

    /// Finds out, while there is time, all that the machine must know that this template becomes. Says what cannot be found out:
    /// it will be then, where it can be at all.
    async fn prepare(&self, nic: Option<Nic>) -> Vec<String> {
        let mut left = Vec::new();
        let mut tell = |what: &str, error: io::Error| left.push(format!("{what}: {error}"));
        if self.0.init.is_systemd() {
            match units::stop_timers().await {
                Ok(timers) => self.held().timers = timers,
                Err(error) => tell("stop the timers", error),
            }
            match units::to_restart(&[]).await {
                Ok(restart) => self.held().restart = Some(restart),
                Err(error) => tell("find the services to restart", error),
            }
        }
        let mut link = None;
        if let Some(nic) = nic {
            match nic::known(&nic).await {
                Ok(known) => link = Some(known),
                Err(error) => tell("look at the link", error),
            }
        }
        if let Err(error) = identity::lay_boot_id() {
            tell("lay a file over the boot id", error);
        }
        if let Err(error) = by_serial("work").and(by_serial("system")) {
            tell("find the disks", error);
        }
        self.held().prepared = Some(Prepared { link, seeds: identity::seeds(Path::new("/")) });
        left
    }

    pub(super) async fn resumed_now(&self, request: v1::ResumedRequest) -> Result<v1::ResumedReply, Status> {
        let v1::ResumedRequest { unix_time_us, entropy } = request;
        identity::add_entropy(&entropy).map_err(|error| failed("add entropy", &error))?;
        let was = identity::clock_us();
        if unix_time_us != 0 {
            identity::set_clock(unix_time_us).map_err(|error| failed("set the clock", &error))?;
        }
        let identity = self.0.identity.lock().await;
        let nic = identity.as_ref().and_then(|now| now.nic.as_ref()).map(Nic::parse).transpose();
        if let Some(nic) = nic.map_err(Status::internal)? {
            // Nobody has to wait for it: who is not known yet is asked for with the first packet.
            tokio::spawn(async move {
                if let Err(error) = neighbours::refresh(&nic).await {
                    kmsg::error(&format!("after a rest: look for the neighbours: {error}"));
                }
            });
        }
        let boot_id = identity::boot_id().map_err(|error| failed("read the boot id", &error))?;
        let off = unix_time_us.cast_signed().saturating_sub(was.cast_signed());
        let clock_was_off_us = if unix_time_us == 0 { 0 } else { off };
        Ok(v1::ResumedReply { boot_id, clock_was_off_us, unix_time_us: identity::clock_us() })
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins what need not be done before the reply.
    async fn leave_for_later(&self, was: Option<v1::PersonaliseRequest>, now: &v1::PersonaliseRequest) {
        let mut held = std::mem::take(&mut *self.held());
        let systemd = self.0.init.is_systemd();
        let mut tasks = Vec::new();
        if held.processes {
            tasks.push(Task::Processes);
        }
        if !held.low.is_empty() {
            tasks.push(Task::Rank);
        }
        let known = held.restart.take().filter(|_| now.restart_units.is_empty());
        let restart = match known {
            Some(restart) => restart,
            None if systemd => units::to_restart(&now.restart_units).await.unwrap_or_else(|error| {
                kmsg::error(&format!("after personalise: find the services to restart: {error}"));
                Vec::new()
            }),
            None => Vec::new(),
        };
        if !restart.is_empty() {
            tasks.push(Task::Services);
        }
        if !now.home.is_empty() {
            // One that cannot be looked at says why when it is to be grown.
            if workdisk::is_to_grow(Path::new(&now.home)).unwrap_or(true) {
                tasks.push(Task::Grow);
            }
            tasks.push(Task::Barriers);
        }
        if !held.timers.is_empty() {
            tasks.push(Task::Timers);
        }
        let ids = was.map(|was| [was.machine_id, now.machine_id.clone()]);
        let ids = ids.filter(|[old, new]| systemd && old != new);
        if ids.is_some() {
            tasks.push(Task::Journal);
        }
        self.0.pending.begin(&tasks);
        let later = Later { low: held.low, timers: held.timers, restart, home: now.home.clone(), ids };
        let guest = self.clone();
        tokio::spawn(async move {
            for task in tasks {
                guest.wait_for_turn(task).await;
                let done = guest.work_off(task, &later).await.map_err(|e| format!("{}: {e}", task.name()));
                if let Err(why) = &done {
                    kmsg::error(&format!("after personalise: {why}"));
                }
                guest.0.pending.end(task, done);
            }
        });
    }

    async fn wait_for_turn(&self, task: Task) {
        match task {
            Task::Processes => tokio::time::sleep(REPLY).await,
            Task::Rank | Task::Services | Task::Grow | Task::Barriers => {
                let hurry = self.0.pending.hurried();
                let _ = tokio::time::timeout(LEISURE, hurry).await;
            }
            Task::Timers | Task::Journal => tokio::time::sleep(MORE_LEISURE).await,
        }
    }

    async fn work_off(&self, task: Task, later: &Later) -> io::Result<()> {
        let root = Path::new("/");
        match task {
            Task::Processes => {
                let thawed = tokio::task::spawn_blocking(|| freezer::thaw(Path::new(freezer::ROOT)));
                thawed.await.map_err(io::Error::other)?
            }
            Task::Rank => {
                rank::raise(&later.low);
                Ok(())
            }
            Task::Services => units::restart(&later.restart).await,
            Task::Grow => {
                // The kernel refuses two growths of one file system at a time.
                let _one = self.0.identity.lock().await;
                at_home(&later.home, workdisk::fill).await
            }
            Task::Barriers => at_home(&later.home, workdisk::barriers).await,
            Task::Timers => units::start_timers(root, &later.timers).await,
            Task::Journal => match &later.ids {
                Some([old, new]) => units::move_journal(root, old, new).await,
                None => Ok(()),
            },
        }
    }
}

/// Blocking work on the home, where there is one.
async fn at_home(home: &str, work: fn(&Path) -> io::Result<()>) -> io::Result<()> {
    if home.is_empty() {
        return Ok(());
    }
    let home = home.to_owned();
    tokio::task::spawn_blocking(move || work(Path::new(&home))).await.map_err(io::Error::other)?
}

/// Whether two requests describe the same machine; time and randomness are of the moment.
fn same(a: &v1::PersonaliseRequest, b: &v1::PersonaliseRequest) -> bool {
    let still = |request: &v1::PersonaliseRequest| v1::PersonaliseRequest {
        unix_time_us: 0,
        entropy: Vec::new(),
        ..request.clone()
    };
    still(a) == still(b)
}
