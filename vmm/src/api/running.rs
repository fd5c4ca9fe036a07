//! The control socket after boot: what the event loop is asked, and what is said of it.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use mandoline_api::monitor::{
    DrivePatch, InstanceInfo, NetworkInterfacePatch, PmemPatch, RateLimiter, Version, VmConfig, VmPatchState,
};
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use crate::api::configuring::merged;
use crate::api::http::{Request, Response};
use crate::api::routes::{self, Command};
use crate::api::server::Reply;
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::net::Net;
use crate::devices::pmem::Pmem;
use crate::devices::virtio::Device;
use crate::fds::{Inherited, Paths};
use crate::log;
use crate::metrics::ApiCounts;
use crate::monitor::{self, Call, Report, Work};

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
    /// Counts requests.
    pub counts: Arc<ApiCounts>,
    /// Whether a request may name a path.
    pub paths: Paths,
}

impl Running {
    /// Answers a request.
    pub fn answer(&mut self, request: &Request, fds: Inherited) -> Reply {
        let (Ok(response) | Err(response)) = self.execute(request, fds);
        self.counts.count(&request.method, response.status);
        Reply::Now(response)
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
            Command::GetMetrics => Ok(Response::json(&self.ask(monitor::Request::Metrics)?.said)),
            Command::GetBalloon => {
                let said = self.at("balloon", |balloon: &mut Balloon| said(&balloon.options()))?;
                Ok(Response::json(&said))
            }
            Command::GetBalloonStatistics => {
                let said = self.at("balloon", |balloon: &mut Balloon| {
                    said(&balloon.statistics().map_err(text)?)
                })?;
                Ok(Response::json(&said))
            }
            Command::PatchVm(state) => self.patch_vm(state),
            Command::PatchDrive(patch) => self.patch_drive(patch, fds),
            Command::PatchInterface(patch) => self.patch_interface(patch),
            Command::PatchPmem(patch) => self.patch_pmem(patch),
            Command::PatchBalloon(patch) => {
                self.at("balloon", move |balloon: &mut Balloon| {
                    balloon.set_target(patch.amount_mib).map_err(text)?;
                    Ok(Value::Null)
                })?;
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.amount_mib = patch.amount_mib;
                }
                Ok(Response::done())
            }
            Command::PatchBalloonStatistics(patch) => {
                let seconds = patch.stats_polling_interval_s;
                self.at("balloon", move |balloon: &mut Balloon| {
                    balloon.set_statistics_interval(seconds).map_err(text)?;
                    Ok(Value::Null)
                })?;
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.stats_polling_interval_s = seconds;
                }
                Ok(Response::done())
            }
            Command::PutLogger(logger) => {
                if let Some(path) = &logger.log_path {
                    self.paths.check("log_path", path).map_err(refused)?;
                }
                log::change(&logger, &mut fds).map_err(refused)?;
                self.config.logger = Some(merged(self.config.logger.take(), logger));
                Ok(Response::done())
            }
            Command::FlushMetrics => {
                self.ask(monitor::Request::FlushMetrics)?;
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

    /// Does `work` at the device of this name, and returns what it says.
    fn at<T: Device>(
        &self,
        name: &str,
        work: impl FnOnce(&mut T) -> Result<Value, String> + Send + 'static,
    ) -> Result<Value, Response> {
        let wanted = name.to_owned();
        let work: Work = Box::new(move |slots| {
            let slot = slots.iter().find(|slot| slot.name == wanted);
            slot.and_then(|slot| slot.with(work))
                .unwrap_or_else(|| Err(format!("{wanted}: this VM has no such device that can do that")))
        });
        Ok(self.ask(monitor::Request::Work(work))?.said)
    }

    /// Another file first, since only it can fail; then the limits.
    fn patch_drive(&mut self, patch: DrivePatch, mut fds: Inherited) -> Result<Response, Response> {
        let name = format!("drive {}", patch.drive_id);
        let drives = &mut self.config.drives;
        let Some(at) = drives.iter().position(|drive| drive.drive_id == patch.drive_id) else {
            return Err(Response::fault(400, format!("{name}: this VM has no such drive")));
        };
        let read_only = drives[at].is_read_only;
        let file = match &patch.path_on_host {
            None => None,
            Some(path) => {
                self.paths.check(&name, path).map_err(refused)?;
                Some(fds.file(&name, path, !read_only).map_err(refused)?)
            }
        };
        let limits = patch.rate_limiter;
        self.at(&format!("blk {}", patch.drive_id), move |blk: &mut Blk| {
            if let Some(file) = file {
                blk.replace_file(file, true).map_err(text)?;
            }
            if let Some(limits) = &limits {
                blk.set_rate_limiter(limits);
            }
            Ok(Value::Null)
        })?;
        let drive = &mut self.config.drives[at];
        if let Some(path) = patch.path_on_host {
            drive.path_on_host = path;
        }
        relimit(&mut drive.rate_limiter, limits);
        Ok(Response::done())
    }

    fn patch_interface(&mut self, patch: NetworkInterfacePatch) -> Result<Response, Response> {
        let (rx, tx) = (patch.rx_rate_limiter, patch.tx_rate_limiter);
        self.at(&format!("net {}", patch.iface_id), move |net: &mut Net| {
            net.set_rate_limiters(rx.as_ref(), tx.as_ref());
            Ok(Value::Null)
        })?;
        let mut interfaces = self.config.network_interfaces.iter_mut();
        if let Some(interface) = interfaces.find(|interface| interface.iface_id == patch.iface_id) {
            relimit(&mut interface.rx_rate_limiter, rx);
            relimit(&mut interface.tx_rate_limiter, tx);
        }
        Ok(Response::done())
    }

    fn patch_pmem(&mut self, patch: PmemPatch) -> Result<Response, Response> {
        let limits = patch.rate_limiter;
        self.at(&format!("pmem {}", patch.id), move |pmem: &mut Pmem| {
            if let Some(limits) = &limits {
                pmem.set_rate_limiter(limits);
            }
            Ok(Value::Null)
        })?;
        if let Some(pmem) = self.config.pmem.iter_mut().find(|pmem| pmem.id == patch.id) {
            relimit(&mut pmem.rate_limiter, limits);
        }
        Ok(Response::done())
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
}

/// What a device says, as the event loop hands it on.
fn said(value: &impl serde::Serialize) -> Result<Value, String> {
    serde_json::to_value(value).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Takes the buckets that `later` names into what is known of a limit: an absent one stays, one of size or refill time 0
/// goes.
fn relimit(known: &mut Option<RateLimiter>, later: Option<RateLimiter>) {
    let Some(later) = later else { return };
    let mut both = known.unwrap_or_default();
    for (bucket, later) in [(&mut both.bandwidth, later.bandwidth), (&mut both.ops, later.ops)] {
        if let Some(later) = later {
            *bucket = (later.size != 0 && later.refill_time != 0).then_some(later);
        }
    }
    *known = (both != RateLimiter::default()).then_some(both);
}

fn refused(error: impl std::fmt::Display) -> Response {
    Response::fault(400, error.to_string())
}

#[cfg(test)]
mod tests {
    use mandoline_api::monitor::TokenBucket;

    use super::*;

    #[test]
    fn a_bucket_that_is_not_named_stays_and_one_of_size_0_goes() {
        let bucket = |size| {
            Some(TokenBucket {
                size,
                one_time_burst: None,
                refill_time: 100,
            })
        };
        let limit = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
        let mut known = None;
        relimit(&mut known, limit(bucket(5), None));
        relimit(&mut known, limit(None, bucket(7)));
        assert_eq!(known, limit(bucket(5), bucket(7)));
        relimit(&mut known, None);
        relimit(&mut known, limit(bucket(0), None));
        assert_eq!(known, limit(None, bucket(7)));
        relimit(&mut known, limit(None, bucket(0)));
        assert_eq!(known, None);
    }
}
