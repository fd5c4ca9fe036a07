//! The control socket after boot: what the event loop is asked, and what is said of it.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use mandoline_api::monitor::{InstanceInfo, Phase, Version, VmConfig, VmPatchState};
use vmm_sys_util::eventfd::EventFd;

use crate::api::configuring::merged;
use crate::api::http::{Request, Response};
use crate::api::routes::{self, Command};
use crate::api::server::Reply;
use crate::fds::{Inherited, Paths};
use crate::log;
use crate::monitor::{self, Call, Report};
use crate::state::Phases;

/// What the routes need after boot.
pub struct Running {
    /// What `--id` said.
    pub id: String,
    /// The configuration as it is now.
    pub config: VmConfig,
    /// Requests to the event loop.
    pub calls: Sender<Call>,
    /// Signalled with each.
    pub event: Arc<EventFd>,
    /// Phases, for the metrics.
    pub phases: Arc<Phases>,
    /// Whether a request may name a path.
    pub paths: Paths,
}

impl Running {
    /// Answers a request.
    pub fn answer(&mut self, request: &Request, fds: Inherited) -> Reply {
        match self.execute(request, fds) {
            Ok(response) | Err(response) => Reply::Now(response),
        }
    }

    fn execute(&mut self, request: &Request, mut fds: Inherited) -> Result<Response, Response> {
        match routes::command(request, true)? {
            Command::GetInstance => {
                let report = self.ask(monitor::Request::Look)?;
                Ok(Response::json(&InstanceInfo {
                    app_name: "Mandoline".to_owned(),
                    id: self.id.clone(),
                    state: report.state,
                    vmm_version: routes::version().to_owned(),
                }))
            }
            Command::GetVersion => Ok(Response::json(&Version {
                firecracker_version: routes::version().to_owned(),
            })),
            Command::GetVmConfig => Ok(Response::json(&self.config)),
            Command::GetMachineConfig => Ok(Response::json(&self.config.machine_config)),
            Command::GetMetrics => self.metrics(),
            Command::PatchVm(state) => self.patch_vm(state),
            Command::PutLogger(logger) => {
                if let Some(path) = &logger.log_path {
                    self.paths.check("log_path", path).map_err(refused)?;
                }
                log::change(&logger, &mut fds).map_err(refused)?;
                self.config.logger = Some(merged(self.config.logger.take(), logger));
                Ok(Response::done())
            }
            Command::FlushMetrics => {
                tracing::info!(target: "metrics", "{}", self.metrics()?.body);
                Ok(Response::done())
            }
            Command::SendCtrlAltDel => Err(Response::fault(
                400,
                "SendCtrlAltDel: the machine has no keyboard; ask the guest's agent to shut down",
            )),
            _ => Err(routes::state_error("after")),
        }
    }

    /// Asks the event loop and waits for its answer.
    fn ask(&self, request: monitor::Request) -> Result<Report, Response> {
        let gone = || Response::fault(503, "the VM has ended");
        let (sender, receiver) = channel();
        self.calls.send((request, sender)).map_err(|_| gone())?;
        self.event.write(1).map_err(|_| gone())?;
        let answer = receiver.recv().map_err(|_| gone())?;
        answer.map_err(refused)
    }

    fn patch_vm(&self, state: VmPatchState) -> Result<Response, Response> {
        let wanted = match state {
            VmPatchState::Paused => monitor::Request::Pause,
            VmPatchState::Resumed => monitor::Request::Resume,
            VmPatchState::Parked => monitor::Request::Park,
        };
        self.ask(wanted)?;
        Ok(Response::done())
    }

    fn metrics(&self) -> Result<Response, Response> {
        let report = self.ask(monitor::Request::Look)?;
        let at = |phase| self.phases.reached(phase);
        let between = |from, to| Some(at(to)?.saturating_sub(at(from)?) / 1000);
        Ok(Response::json(&serde_json::json!({
            "id": self.id,
            "state": report.state,
            "serial": {"lost_bytes": report.console_lost},
            "park": report.sleep,
            "start": {
                "set_up_us": between(Phase::Main, Phase::FirstRun),
                "first_serial_byte_us": between(Phase::Main, Phase::FirstSerialByte),
                "boot_timer_us": between(Phase::Main, Phase::BootTimer),
            },
        })))
    }
}

fn refused(error: impl std::fmt::Display) -> Response {
    Response::fault(400, error.to_string())
}
