//! The control socket before boot: requests make up the configuration, and `InstanceStart` ends that.
//!
//! Every request is checked as far as it can be by itself: numbers, and that files are there. What touches others (taps,
//! sockets, KVM) waits for the start. A start that fails is refused with its reason, and everything can be set again.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use mandoline_api::monitor::{Drive, FD_PREFIX, InstanceInfo, InstanceState, Logger, Version, VmConfig};

use crate::api::http::{Request, Response};
use crate::api::routes::{self, Command};
use crate::api::server::Reply;
use crate::fds::Inherited;
use crate::metrics::ApiCounts;
use crate::{config, fds, log};

/// The configuration as it grows.
pub struct Configuring {
    /// What `--id` said.
    pub id: String,
    /// What was set so far; no kernel path: no boot source.
    pub config: VmConfig,
    /// Descriptors that were inherited or came with requests, and are not used yet.
    pub fds: Inherited,
    /// Counts requests.
    pub counts: Arc<ApiCounts>,
}

/// Puts `one` in place of the one with the same name, or at the end.
fn put<T>(all: &mut Vec<T>, one: T, name: impl Fn(&T) -> &str) {
    match all.iter_mut().find(|other| name(other) == name(&one)) {
        Some(other) => *other = one,
        None => all.push(one),
    }
}

impl Configuring {
    /// Answers a request; the answer to `InstanceStart` comes later.
    pub fn answer(&mut self, request: &Request, fds: Inherited) -> Reply {
        let reply = self.execute(request, fds).unwrap_or_else(Reply::Now);
        let status = match &reply {
            Reply::Now(response) => response.status,
            Reply::Later => 0,
        };
        self.counts.count(&request.method, status);
        reply
    }

    fn execute(&mut self, request: &Request, fds: Inherited) -> Result<Reply, Response> {
        let command = routes::command(request, false)?;
        self.fds.adopt_all(fds).map_err(refused)?;
        let response = match command {
            Command::InstanceStart => return self.ready().map(|()| Reply::Later),
            Command::GetInstance => Response::json(&InstanceInfo {
                app_name: "Mandoline".to_owned(),
                id: self.id.clone(),
                state: InstanceState::NotStarted,
                vmm_version: routes::version().to_owned(),
            }),
            Command::GetVersion => Response::json(&Version {
                firecracker_version: routes::version().to_owned(),
            }),
            Command::GetVmConfig => Response::json(&self.config),
            Command::GetMachineConfig => Response::json(&self.config.machine_config),
            Command::GetBalloon => match &self.config.balloon {
                Some(balloon) => Response::json(balloon),
                None => return Err(Response::fault(400, "This VM has no balloon.")),
            },
            command => self.set(command)?,
        };
        Ok(Reply::Now(response))
    }

    /// Takes `command` into the configuration if what comes of it is one that can be.
    fn set(&mut self, command: Command) -> Result<Response, Response> {
        let mut next = self.config.clone();
        match command {
            Command::PutMachineConfig(machine) => next.machine_config = machine,
            Command::PatchMachineConfig(patch) => patch.apply(&mut next.machine_config),
            Command::PutBootSource(boot) => {
                self.there("kernel_image_path", &boot.kernel_image_path, false)?;
                if let Some(initrd) = &boot.initrd_path {
                    self.there("initrd_path", initrd, false)?;
                }
                next.boot_source = boot;
            }
            Command::PutDrive(drive) => {
                let what = format!("drive {}", drive.drive_id);
                self.there(&what, &drive.path_on_host, !drive.is_read_only)?;
                put(&mut next.drives, drive, |drive: &Drive| &drive.drive_id);
                config::order_drives(&mut next.drives);
            }
            Command::PutInterface(interface) => {
                let what = format!("network interface {}", interface.iface_id);
                self.fds.known(&what, &interface.host_dev_name).map_err(refused)?;
                put(&mut next.network_interfaces, interface, |interface| {
                    &interface.iface_id
                });
            }
            Command::PutVsock(vsock) => {
                self.fds.known("vsock", &vsock.uds_path).map_err(refused)?;
                next.vsock = Some(vsock);
            }
            Command::PutEntropy(entropy) => next.entropy = Some(entropy),
            Command::PutBalloon(balloon) => next.balloon = Some(balloon),
            Command::PutPmem(pmem) => {
                self.there(&format!("pmem {}", pmem.id), &pmem.path_on_host, !pmem.read_only)?;
                put(&mut next.pmem, pmem, |pmem| &pmem.id);
            }
            Command::PutPark(park) => {
                self.fds.known("park", &park.mem_file_path).map_err(refused)?;
                next.park = Some(park);
            }
            Command::PutSerial(serial) => {
                if let Some(path) = &serial.serial_out_path {
                    self.fds.known("serial_out_path", path).map_err(refused)?;
                }
                next.serial = Some(serial);
            }
            Command::PutMetrics(metrics) => {
                self.fds
                    .known("metrics_path", &metrics.metrics_path)
                    .map_err(refused)?;
                next.metrics = Some(metrics);
            }
            Command::PutLogger(logger) => {
                log::change(&logger, &mut self.fds).map_err(refused)?;
                next.logger = Some(merged(next.logger.take(), logger));
            }
            _ => return Err(routes::state_error("before")),
        }
        config::check(&next).map_err(refused)?;
        self.config = next;
        Ok(Response::done())
    }

    /// Checks that a file can be opened, so that it is the request which names it that fails.
    fn there(&self, what: &str, source: &str, write: bool) -> Result<(), Response> {
        self.fds.known(what, source).map_err(refused)?;
        if !source.starts_with(FD_PREFIX) {
            std::fs::File::options()
                .read(true)
                .write(write)
                // Not to wait for a pipe's other end.
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(source)
                .map_err(|error| refused(fds::open_error(what, Path::new(source), error)))?;
        }
        Ok(())
    }

    /// Whether enough is set to start.
    fn ready(&self) -> Result<(), Response> {
        if self.config.boot_source.kernel_image_path.is_empty() {
            let text = "Cannot start microvm without kernel configuration.";
            return Err(Response::fault(400, text));
        }
        Ok(())
    }
}

/// What is absent in `later` stays as it was.
pub(super) fn merged(earlier: Option<Logger>, later: Logger) -> Logger {
    let earlier = earlier.unwrap_or_default();
    Logger {
        log_path: later.log_path.or(earlier.log_path),
        level: later.level.or(earlier.level),
        show_level: later.show_level.or(earlier.show_level),
        show_log_origin: later.show_log_origin.or(earlier.show_log_origin),
        module: later.module.or(earlier.module),
    }
}

fn refused(error: impl std::fmt::Display) -> Response {
    Response::fault(400, error.to_string())
}
