//! Every request that the control socket knows: its method, its path, when it may come, and what it asks for.
//!
//! Messages and status codes that Firecracker's clients see are the same: all refusals are 400, an unknown path too.

use mandoline_api::monitor::{
    Action, ActionType, Balloon, BalloonPatch, BalloonStatsPatch, BootSource, Drive, DrivePatch, Entropy,
    Logger, MachineConfig, MachineConfigPatch, Metrics, NetworkInterface, NetworkInterfacePatch, Park, Pmem,
    PmemPatch, Serial, VmPatch, VmPatchState, Vsock,
};
use serde::de::DeserializeOwned;

use crate::api::http::{Request, Response};

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the request of that name")]
pub enum Command {
    GetInstance,
    GetVersion,
    GetVmConfig,
    GetMachineConfig,
    GetBalloon,
    GetBalloonStatistics,
    GetMetrics,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigPatch),
    PutBootSource(BootSource),
    PutDrive(Drive),
    PutInterface(NetworkInterface),
    PutVsock(Vsock),
    PutEntropy(Entropy),
    PutBalloon(Balloon),
    PutPmem(Pmem),
    PutPark(Park),
    PutSerial(Serial),
    PutMetrics(Metrics),
    PutLogger(Logger),
    PatchDrive(DrivePatch),
    PatchInterface(NetworkInterfacePatch),
    PatchBalloon(BalloonPatch),
    PatchBalloonStatistics(BalloonStatsPatch),
    PatchPmem(PmemPatch),
    PatchVm(VmPatchState),
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
}

/// When a request may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before boot and after.
    Always,
    /// Before boot.
    Before,
    /// After boot.
    After,
    /// Firecracker's, and not here: a refusal that says so.
    Never,
}

/// One request.
pub struct Route {
    /// `GET`, `PUT` or `PATCH`.
    pub method: &'static str,
    /// With `{name}` where a name stands.
    pub path: &'static str,
    /// When it may come.
    pub when: When,
    /// What it does, for the interface description.
    pub summary: &'static str,
    /// The type of its body, if it has one.
    pub body: Option<&'static str>,
    /// The type of its answer, if that has a body.
    pub answer: Option<&'static str>,
    command: fn(&Body<'_>) -> Result<Command, Response>,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ({:?})", self.method, self.path, self.when)
    }
}

/// The name in a request's path, and its body.
struct Body<'a> {
    name: &'a str,
    bytes: &'a [u8],
}

impl Body<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(self.bytes).map_err(|error| {
            let text = format!("An error occurred when deserializing the json body of a request: {error}.");
            Response::fault(400, text)
        })
    }

    /// The body of a request on a named thing, whose path and body have to agree.
    fn named<T: DeserializeOwned>(&self, name_of: impl Fn(&T) -> &str) -> Result<T, Response> {
        let path = self.name;
        if !path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
        {
            let text = format!("The name in the path is {path:?}; allowed: letters, digits and any of _-.");
            return Err(Response::fault(400, text));
        }
        let body: T = self.read()?;
        if name_of(&body) != path {
            let text = format!(
                "The id from the path [{path}] does not match the id from the body [{}]!",
                name_of(&body)
            );
            return Err(Response::fault(400, text));
        }
        Ok(body)
    }
}

const fn route(
    method: &'static str,
    path: &'static str,
    when: When,
    body: Option<&'static str>,
    summary: &'static str,
    command: fn(&Body<'_>) -> Result<Command, Response>,
) -> Route {
    Route {
        method,
        path,
        when,
        summary,
        body,
        answer: None,
        command,
    }
}

const fn get(
    path: &'static str,
    answer: &'static str,
    summary: &'static str,
    command: fn(&Body<'_>) -> Result<Command, Response>,
) -> Route {
    Route {
        method: "GET",
        path,
        when: When::Always,
        summary,
        body: None,
        answer: Some(answer),
        command,
    }
}

const fn absent(method: &'static str, path: &'static str) -> Route {
    route(method, path, When::Never, None, "Not there.", |_| {
        Err(Response::fault(500, ""))
    })
}

/// Every request.
pub const ROUTES: &[Route] = &[
    get(
        "/",
        "InstanceInfo",
        "What runs here, and whether it runs.",
        |_| Ok(Command::GetInstance),
    ),
    get("/version", "Version", "The monitor's version.", |_| {
        Ok(Command::GetVersion)
    }),
    get(
        "/vm/config",
        "VmConfig",
        "The configuration as it is now.",
        |_| Ok(Command::GetVmConfig),
    ),
    get("/machine-config", "MachineConfig", "CPUs and memory.", |_| {
        Ok(Command::GetMachineConfig)
    }),
    get(
        "/balloon",
        "Balloon",
        "The balloon as it is configured now.",
        |_| Ok(Command::GetBalloon),
    ),
    Route {
        when: When::After,
        ..get(
            "/balloon/statistics",
            "BalloonStats",
            "What the guest said last of its memory.",
            |_| Ok(Command::GetBalloonStatistics),
        )
    },
    Route {
        when: When::After,
        ..get(
            "/metrics",
            "MetricsReport",
            "What was counted since the start (ours).",
            |_| Ok(Command::GetMetrics),
        )
    },
    route(
        "PUT",
        "/machine-config",
        When::Before,
        Some("MachineConfig"),
        "Sets CPUs and memory; what is absent gets its default.",
        |body| body.read().map(Command::PutMachineConfig),
    ),
    route(
        "PATCH",
        "/machine-config",
        When::Before,
        Some("MachineConfigPatch"),
        "Changes CPUs and memory; what is absent stays.",
        |body| {
            let patch = body.read()?;
            if patch == MachineConfigPatch::default() {
                return Err(Response::fault(400, "Empty PATCH request."));
            }
            Ok(Command::PatchMachineConfig(patch))
        },
    ),
    route(
        "PUT",
        "/boot-source",
        When::Before,
        Some("BootSource"),
        "Sets kernel, initial RAM disk and command line.",
        |body| body.read().map(Command::PutBootSource),
    ),
    route(
        "PUT",
        "/drives/{drive_id}",
        When::Before,
        Some("Drive"),
        "Adds a drive, or replaces the one of this name.",
        |body| body.named(|drive: &Drive| &drive.drive_id).map(Command::PutDrive),
    ),
    route(
        "PATCH",
        "/drives/{drive_id}",
        When::After,
        Some("DrivePatch"),
        "Gives a drive another file or another limit.",
        |body| {
            body.named(|drive: &DrivePatch| &drive.drive_id)
                .map(Command::PatchDrive)
        },
    ),
    route(
        "PUT",
        "/network-interfaces/{iface_id}",
        When::Before,
        Some("NetworkInterface"),
        "Adds a network interface, or replaces the one of this name.",
        |body| {
            body.named(|interface: &NetworkInterface| &interface.iface_id)
                .map(Command::PutInterface)
        },
    ),
    route(
        "PATCH",
        "/network-interfaces/{iface_id}",
        When::After,
        Some("NetworkInterfacePatch"),
        "Gives a network interface other limits.",
        |body| {
            body.named(|interface: &NetworkInterfacePatch| &interface.iface_id)
                .map(Command::PatchInterface)
        },
    ),
    route(
        "PUT",
        "/pmem/{id}",
        When::Before,
        Some("Pmem"),
        "Adds a persistent memory device, or replaces the one of this name.",
        |body| body.named(|pmem: &Pmem| &pmem.id).map(Command::PutPmem),
    ),
    route(
        "PATCH",
        "/pmem/{id}",
        When::After,
        Some("PmemPatch"),
        "Gives a persistent memory device another limit.",
        |body| body.named(|pmem: &PmemPatch| &pmem.id).map(Command::PatchPmem),
    ),
    route(
        "PUT",
        "/vsock",
        When::Before,
        Some("Vsock"),
        "Sets the stream socket device.",
        |body| body.read().map(Command::PutVsock),
    ),
    route(
        "PUT",
        "/entropy",
        When::Before,
        Some("Entropy"),
        "Sets the entropy device.",
        |body| body.read().map(Command::PutEntropy),
    ),
    route(
        "PUT",
        "/balloon",
        When::Before,
        Some("Balloon"),
        "Sets the balloon.",
        |body| body.read().map(Command::PutBalloon),
    ),
    route(
        "PATCH",
        "/balloon",
        When::After,
        Some("BalloonPatch"),
        "Changes how much memory the balloon shall take.",
        |body| body.read().map(Command::PatchBalloon),
    ),
    route(
        "PATCH",
        "/balloon/statistics",
        When::After,
        Some("BalloonStatsPatch"),
        "Changes the time between statistics.",
        |body| body.read().map(Command::PatchBalloonStatistics),
    ),
    route(
        "PUT",
        "/serial",
        When::Before,
        Some("Serial"),
        "Sets where the console's output goes.",
        |body| body.read().map(Command::PutSerial),
    ),
    route(
        "PUT",
        "/park",
        When::Before,
        Some("Park"),
        "Sets how an idle VM gives its memory back (ours).",
        |body| body.read().map(Command::PutPark),
    ),
    route(
        "PUT",
        "/metrics",
        When::Before,
        Some("Metrics"),
        "Sets where the metrics go.",
        |body| body.read().map(Command::PutMetrics),
    ),
    route(
        "PUT",
        "/logger",
        When::Always,
        Some("Logger"),
        "Sets where the log goes and what is in it. After boot too (ours).",
        |body| body.read().map(Command::PutLogger),
    ),
    route(
        "PUT",
        "/actions",
        When::Always,
        Some("Action"),
        "Boots, flushes the metrics, or presses Ctrl-Alt-Del.",
        |body| {
            Ok(match body.read::<Action>()?.action_type {
                ActionType::InstanceStart => Command::InstanceStart,
                ActionType::FlushMetrics => Command::FlushMetrics,
                ActionType::SendCtrlAltDel => Command::SendCtrlAltDel,
            })
        },
    ),
    route(
        "PATCH",
        "/vm",
        When::After,
        Some("VmPatch"),
        "Pauses, resumes or parks (ours) the VM.",
        |body| Ok(Command::PatchVm(body.read::<VmPatch>()?.state)),
    ),
    absent("PUT", "/cpu-config"),
    absent("GET", "/mmds"),
    absent("PUT", "/mmds"),
    absent("PATCH", "/mmds"),
    absent("PUT", "/mmds/config"),
    absent("GET", "/hotplug/memory"),
    absent("PUT", "/hotplug/memory"),
    absent("PATCH", "/hotplug/memory"),
    absent("PUT", "/snapshot/create"),
    absent("PUT", "/snapshot/load"),
    absent("PATCH", "/balloon/hinting/start"),
    absent("PATCH", "/balloon/hinting/stop"),
    absent("GET", "/balloon/hinting/status"),
];

/// The name in `path` if it is of this pattern; the name is empty if the pattern has none.
fn matched<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let path = path
        .strip_suffix('/')
        .filter(|path| !path.is_empty())
        .unwrap_or(path);
    match pattern.split_once('{') {
        None => (pattern == path).then_some(""),
        Some((before, _)) => path
            .strip_prefix(before)
            .filter(|name| !name.is_empty() && !name.contains('/')),
    }
}

/// What a request asks for, before boot or after (`booted`).
pub fn command(request: &Request, booted: bool) -> Result<Command, Response> {
    let method = request.method.as_str();
    let found = ROUTES.iter().find_map(|route| {
        let name = matched(route.path, &request.path)?;
        (route.method == method).then_some((route, name))
    });
    let Some((route, name)) = found else {
        let path = request.path.trim_start_matches('/');
        let text = format!("Invalid request method and/or path: {method} {path}.");
        return Err(Response::fault(400, text));
    };
    if route.when == When::Never {
        let text = format!("{method} {}: this monitor does not have it", route.path);
        return Err(Response::fault(400, text));
    }
    match (method, request.body.is_empty()) {
        ("GET", false) => return Err(Response::fault(400, "GET request cannot have a body.")),
        ("PUT" | "PATCH", true) => return Err(Response::fault(400, format!("Empty {method} request."))),
        _ => {}
    }
    let command = (route.command)(&Body {
        name,
        bytes: &request.body,
    })?;
    // The one path whose requests differ in when they may come.
    let when = match command {
        Command::InstanceStart => When::Before,
        Command::FlushMetrics | Command::SendCtrlAltDel => When::After,
        _ => route.when,
    };
    match (when, booted) {
        (When::Before, true) => Err(state_error("after")),
        (When::After, false) => Err(state_error("before")),
        _ => Ok(command),
    }
}

/// Firecracker's words, which its clients look for.
pub(super) fn state_error(side: &str) -> Response {
    let text = format!("The requested operation is not supported {side} starting the microVM.");
    Response::fault(400, text)
}

/// The monitor's version.
pub(super) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(method: &str, path: &str, body: &[u8]) -> Request {
        Request {
            method: method.into(),
            path: path.into(),
            body: body.to_vec(),
            keep_alive: true,
            fd_names: Vec::new(),
        }
    }

    #[test]
    fn names_stand_where_the_pattern_has_them() {
        assert_eq!(matched("/drives/{drive_id}", "/drives/a-b_c.d"), Some("a-b_c.d"));
        assert_eq!(matched("/vsock", "/vsock/"), Some(""));
        assert_eq!(matched("/", "/"), Some(""));
        for path in ["/drives", "/drives/", "/drives/a/b", "/vsock"] {
            assert_eq!(matched("/drives/{drive_id}", path), None, "{path}");
        }
    }

    #[test]
    fn a_name_has_no_odd_characters() {
        let body = br#"{"drive_id": "a%2fb", "is_root_device": true, "path_on_host": "/x"}"#;
        let refusal = command(&request("PUT", "/drives/a%2fb", body), false).unwrap_err();
        assert!(refusal.body.contains("letters, digits"), "{}", refusal.body);
    }

    /// Bytes, or what looks like the body of a request.
    fn body() -> impl Strategy<Value = Vec<u8>> {
        let like = concat!(
            r#"\{("(drive_id|path_on_host|size|level|state|action_type|vcpu_count)": ?"#,
            r#"("[a-z]*"|[0-9]{1,22}|null|\{\}),?){0,4}\}"#
        );
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            like.prop_map(String::into_bytes),
        ]
    }

    proptest! {
        #[test]
        fn any_body_is_taken_or_refused_with_a_reason(
            route in 0..ROUTES.len(),
            body in body(),
            booted: bool,
        ) {
            let route = &ROUTES[route];
            if let Err(refusal) = command(&request(route.method, route.path, &body), booted) {
                prop_assert_eq!(refusal.status, 400);
                let fault: mandoline_api::monitor::Fault = serde_json::from_str(&refusal.body).unwrap();
                prop_assert!(!fault.fault_message.is_empty());
            }
        }

        #[test]
        fn any_path_is_known_or_refused(method in "GET|PUT|PATCH|[A-Z]{1,6}", path in "/[ -~]{0,40}") {
            if let Err(refusal) = command(&request(&method, &path, b""), false) {
                prop_assert_eq!(refusal.status, 400);
            }
        }
    }
}
