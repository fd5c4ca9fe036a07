//! What the control socket answers.
//!
//! The monitor boots from its configuration file, so of Firecracker's pre-boot requests those that read are
//! here, and those that would configure say that it is too late, as Firecracker's do after boot.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use mandoline_api::monitor::{
    Action, ActionType, Fault, InstanceInfo, MachineConfig, Phase, VmConfig, VmPatch, VmPatchState,
};
use vmm_sys_util::eventfd::EventFd;

use crate::api::http::{Request, Response};
use crate::monitor::{self, Call, Report};
use crate::state::Phases;

/// What the routes need.
pub struct Context {
    /// What `--id` said.
    pub id: String,
    /// The configuration that was booted.
    pub config: VmConfig,
    /// Requests to the event loop.
    pub calls: Sender<Call>,
    /// Signalled with each.
    pub event: Arc<EventFd>,
    /// Phases, for the metrics.
    pub phases: Arc<Phases>,
}

/// Answers a request.
pub fn answer(request: &Request, context: &Context) -> Response {
    let result = match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => info(context),
        ("GET", "/version") => json(&serde_json::json!({"firecracker_version": version()})),
        ("GET", "/vm/config") => json(&context.config),
        ("GET", "/machine-config") => json(&context.config.machine_config),
        ("GET", "/metrics") => metrics(context),
        ("PUT" | "PATCH", "/machine-config") => {
            parse::<MachineConfig>(request).and_then(|_| too_late(request))
        }
        ("PATCH", "/vm") => patch_vm(request, context),
        ("PUT", "/actions") => action(request, context),
        ("PUT" | "PATCH", path) if PRE_BOOT.iter().any(|known| path.starts_with(known)) => too_late(request),
        ("GET" | "PUT" | "PATCH" | "DELETE", path) => Err(fault(
            404,
            format!("no such path or method: {} {path}", request.method),
        )),
        (method, _) => Err(fault(
            405,
            format!("method is {method:?}; allowed: GET, PUT, PATCH"),
        )),
    };
    result.unwrap_or_else(|refusal| refusal)
}

/// Firecracker's paths that configure before boot.
const PRE_BOOT: [&str; 6] = [
    "/boot-source",
    "/drives/",
    "/network-interfaces/",
    "/vsock",
    "/entropy",
    "/logger",
];

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

fn fault(status: u16, fault_message: String) -> Response {
    let body = serde_json::to_string(&Fault { fault_message }).unwrap_or_default();
    Response { status, body }
}

fn json(value: &impl serde::Serialize) -> Result<Response, Response> {
    match serde_json::to_string(value) {
        Ok(body) => Ok(Response { status: 200, body }),
        Err(error) => Err(fault(500, error.to_string())),
    }
}

fn done() -> Result<Response, Response> {
    Ok(Response {
        status: 204,
        body: String::new(),
    })
}

fn too_late(request: &Request) -> Result<Response, Response> {
    Err(fault(
        400,
        format!(
            "The requested operation is not supported after starting the microVM: {} {}",
            request.method, request.path
        ),
    ))
}

fn parse<T: serde::de::DeserializeOwned>(request: &Request) -> Result<T, Response> {
    serde_json::from_slice(&request.body)
        .map_err(|error| fault(400, format!("{} {}: {error}", request.method, request.path)))
}

/// Asks the event loop and waits for its answer.
fn ask(context: &Context, request: monitor::Request) -> Result<Report, Response> {
    let gone = || fault(503, "the VM has ended".to_owned());
    let (sender, receiver) = channel();
    context.calls.send((request, sender)).map_err(|_| gone())?;
    context.event.write(1).map_err(|_| gone())?;
    let answer = receiver.recv().map_err(|_| gone())?;
    answer.map_err(|refusal| fault(400, refusal))
}

fn info(context: &Context) -> Result<Response, Response> {
    let report = ask(context, monitor::Request::Look)?;
    json(&InstanceInfo {
        app_name: "Mandoline".to_owned(),
        id: context.id.clone(),
        state: report.state,
        vmm_version: version().to_owned(),
    })
}

fn patch_vm(request: &Request, context: &Context) -> Result<Response, Response> {
    let wanted = match parse::<VmPatch>(request)?.state {
        VmPatchState::Paused => monitor::Request::Pause,
        VmPatchState::Resumed => monitor::Request::Resume,
        VmPatchState::Parked => {
            return Err(fault(400, "state is Parked: this VM has no park file".to_owned()));
        }
    };
    ask(context, wanted)?;
    done()
}

fn action(request: &Request, context: &Context) -> Result<Response, Response> {
    match parse::<Action>(request)?.action_type {
        ActionType::InstanceStart => too_late(request),
        ActionType::SendCtrlAltDel => Err(fault(
            400,
            "SendCtrlAltDel: the machine has no keyboard; ask the guest's agent to shut down".to_owned(),
        )),
        ActionType::FlushMetrics => {
            ask(context, monitor::Request::Look)?;
            tracing::info!(target: "metrics", "{}", metrics(context)?.body);
            done()
        }
    }
}

fn metrics(context: &Context) -> Result<Response, Response> {
    let report = ask(context, monitor::Request::Look)?;
    let at = |phase| context.phases.reached(phase);
    let between = |from, to| Some(at(to)?.saturating_sub(at(from)?) / 1000);
    json(&serde_json::json!({
        "id": context.id,
        "state": report.state,
        "serial": {"lost_bytes": report.console_lost},
        "start": {
            "set_up_us": between(Phase::Main, Phase::FirstRun),
            "first_serial_byte_us": between(Phase::Main, Phase::FirstSerialByte),
            "boot_timer_us": between(Phase::Main, Phase::BootTimer),
        },
    }))
}

#[cfg(test)]
mod tests {
    use mandoline_api::monitor::InstanceState;

    use super::*;

    fn context() -> Context {
        let (calls, receiver) = channel::<Call>();
        std::thread::spawn(move || {
            let mut state = InstanceState::Running;
            for (request, answer) in receiver {
                match request {
                    monitor::Request::Pause => state = InstanceState::Paused,
                    monitor::Request::Resume => state = InstanceState::Running,
                    monitor::Request::Look | monitor::Request::Work(_) => {}
                }
                let _ = answer.send(Ok(Report {
                    state,
                    console_lost: 0,
                    said: serde_json::Value::Null,
                }));
            }
        });
        Context {
            id: "vm1".into(),
            config: serde_json::from_str(r#"{"boot-source": {"kernel_image_path": "fd:kernel"}}"#).unwrap(),
            calls,
            event: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            phases: Arc::default(),
        }
    }

    fn call(context: &Context, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = Request {
            method: method.into(),
            path: path.into(),
            body: body.into(),
            keep_alive: true,
        };
        let response = answer(&request, context);
        (response.status, response.body)
    }

    #[test]
    fn pause_and_resume_show_in_the_instance() {
        let context = context();
        let state = |context: &Context| {
            let (status, body) = call(context, "GET", "/", "");
            assert_eq!(status, 200);
            serde_json::from_str::<InstanceInfo>(&body).unwrap().state
        };
        assert_eq!(state(&context), InstanceState::Running);
        assert_eq!(call(&context, "PATCH", "/vm", r#"{"state":"Paused"}"#).0, 204);
        assert_eq!(state(&context), InstanceState::Paused);
        assert_eq!(call(&context, "PATCH", "/vm", r#"{"state":"Resumed"}"#).0, 204);
        assert_eq!(state(&context), InstanceState::Running);
    }

    #[test]
    fn refusals_say_why() {
        let context = context();
        for (method, path, body, status, word) in [
            ("PATCH", "/vm", r#"{"state":"Asleep"}"#, 400, "Asleep"),
            ("PATCH", "/vm", r#"{"state":"Paused","x":1}"#, 400, "`x`"),
            (
                "PATCH",
                "/machine-config",
                r#"{"vcpu_count":2,"mem_size_mib":64}"#,
                400,
                "after starting",
            ),
            ("PUT", "/machine-config", r#"{"cpus":2}"#, 400, "cpus"),
            ("PUT", "/drives/root", "{}", 400, "after starting"),
            (
                "PUT",
                "/actions",
                r#"{"action_type":"InstanceStart"}"#,
                400,
                "after starting",
            ),
            ("GET", "/nothing", "", 404, "/nothing"),
            ("BREW", "/", "", 405, "BREW"),
        ] {
            let (got, text) = call(&context, method, path, body);
            assert_eq!(got, status, "{method} {path}: {text}");
            let fault: Fault = serde_json::from_str(&text).unwrap();
            assert!(fault.fault_message.contains(word), "{text}");
        }
    }
}
