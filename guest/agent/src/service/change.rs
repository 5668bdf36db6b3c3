//! A machine that becomes another one, or goes on after it stood still.
//!
//! ```text
//!   template: Personalise{template} -- services up -- Quiesce --> saved, and resumed any number of times
//!                                                                   |
//!   machine:                       Personalise <--------------------'    what was held back goes on
//!                                     '-- Pending: services restarted, timers started, file system grown
//! ```

use std::io;
use std::path::Path;
use std::sync::PoisonError;

use bothy_guest_proto::v1;
use tonic::Status;

use super::pending::Task;
use super::{Guest, Known, blocking, failed};
use crate::nic::Nic;
use crate::timeline::{Step, Steps, now_us};
use crate::{freezer, identity, kmsg, neighbours, personalise, units, workdisk};

/// What a quiesced template holds back.
#[derive(Debug, Default)]
pub(super) struct Held {
    processes: bool,
    timers: Vec<String>,
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
            let address = personalise::apply(request.clone(), nic, resumed, &steps)
                .await
                .map_err(|error| failed("personalise", &error))?;
            *self.0.known.lock().unwrap_or_else(PoisonError::into_inner) =
                Known { personalised: true, template: request.template, address, home: request.home.clone() };
            let was = identity.replace(request.clone());
            if self.0.init.started() {
                steps
                    .run("thaw", || self.let_go())
                    .map_err(|error| failed("let the processes go on", &error))?;
                self.leave_pending(was, &request);
            } else {
                self.grow_now(&request).await?;
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
        Ok(v1::PersonaliseReply { boot_id, pending: self.0.pending.names(), steps })
    }

    pub(super) async fn quiesce_now(&self) -> Result<v1::QuiesceReply, Status> {
        let identity = self.0.identity.lock().await;
        let (steps, mut left) = (Steps::default(), Vec::new());
        if identity.as_ref().is_some_and(|now| now.template) {
            if self.0.init.is_systemd() {
                match steps.wait("timers", units::stop_timers()).await {
                    Ok(timers) => self.held().timers = timers,
                    Err(error) => left.push(format!("stop the timers: {error}")),
                }
            }
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
            neighbours::refresh(&nic).await.map_err(|error| failed("look for the neighbours", &error))?;
        }
        let boot_id = identity::boot_id().map_err(|error| failed("read the boot id", &error))?;
        let off = unix_time_us.cast_signed().saturating_sub(was.cast_signed());
        Ok(v1::ResumedReply { boot_id, clock_was_off_us: if unix_time_us == 0 { 0 } else { off } })
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn let_go(&self) -> io::Result<()> {
        let mut held = self.held();
        if held.processes {
            freezer::thaw(Path::new(freezer::ROOT))?;
            held.processes = false;
        }
        Ok(())
    }

    /// Before init starts nobody waits for the growth, and it is done with the rest.
    async fn grow_now(&self, request: &v1::PersonaliseRequest) -> Result<(), Status> {
        if request.home.is_empty() {
            return Ok(());
        }
        let home = request.home.clone();
        blocking("personalise", move || workdisk::grow_work(Path::new(&home), 0).map(drop)).await
    }

    /// Begins what need not be done before the first command.
    fn leave_pending(&self, was: Option<v1::PersonaliseRequest>, now: &v1::PersonaliseRequest) {
        let timers = std::mem::take(&mut self.held().timers);
        let old_id = was.map(|was| was.machine_id).filter(|old| *old != now.machine_id);
        let systemd = self.0.init.is_systemd();
        let mut tasks = Vec::new();
        if systemd {
            tasks.push(Task::Services);
        }
        if !now.home.is_empty() {
            tasks.push(Task::Grow);
        }
        if !timers.is_empty() {
            tasks.push(Task::Timers);
        }
        if systemd && old_id.is_some() {
            tasks.push(Task::Journal);
        }
        self.0.pending.begin(&tasks);
        let (guest, now) = (self.clone(), now.clone());
        tokio::spawn(async move {
            for task in tasks {
                let done = guest.work_off(task, &timers, old_id.as_deref(), &now).await;
                if let Err(why) = &done {
                    kmsg::error(&format!("after personalise: {why}"));
                }
                guest.0.pending.end(task, done);
            }
        });
    }

    async fn work_off(
        &self,
        task: Task,
        timers: &[String],
        old_id: Option<&str>,
        now: &v1::PersonaliseRequest,
    ) -> Result<(), String> {
        let root = Path::new("/");
        let done = match task {
            Task::Services => units::restart(&now.restart_units).await,
            Task::Grow => {
                let (guest, home) = (self.clone(), now.home.clone());
                let grown = async move {
                    // The kernel refuses two growths of one file system at a time.
                    let _one = guest.0.identity.lock().await;
                    blocking("grow", move || workdisk::grow_work(Path::new(&home), 0).map(drop)).await
                };
                grown.await.map_err(|status| io::Error::other(status.message().to_owned()))
            }
            Task::Timers => units::start_timers(root, timers).await,
            Task::Journal => units::move_journal(root, old_id.unwrap_or_default(), &now.machine_id).await,
        };
        done.map_err(|error| format!("{task:?}: {error}").to_lowercase())
    }
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
