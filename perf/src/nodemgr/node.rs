//! The part of the node manager's benchmark that runs inside the lab node, as its owner and as `pl_conf`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mandoline_api::nodemgr::{OWNER_SOCKET, SERVICE_SOCKET};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calls::{call, wait_for_node_manager};
use crate::proc;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    #[arg(long)]
    pub pools: u32,
    #[arg(long)]
    pub slivers: u32,
    #[arg(long)]
    pub runs: u32,
    #[arg(long)]
    pub rest_s: u32,
}

/// One measure, with all its values.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub measure: String,
    pub unit: String,
    pub values: Vec<f64>,
}

/// The papers' steps of a sliver's creation on its node (NSDI'04, section 5.2).
pub(crate) const CREATE: &str = "get_rcap, split_pool and bind";
pub(crate) const STATUS_CPU: &str = "CPU of list";
pub(crate) const REST_CPU: &str = "CPU in 30 s at rest";

/// So far off that nothing starts.
const LATER: &str = "2100-01-01T00:00:00Z";
pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    wait_for_node_manager()?;
    let pid = nodemgr()?;
    let pool = json!({"rspec": {"cpu_guarantee": 800, "base_rate": "50 Mbit/s"}, "slice_name": "pl_conf"});
    call(OWNER_SOCKET, "create_root_pool", &pool)?;
    let (mut create, mut split, mut bind) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..=args.runs {
        let whole = Instant::now();
        let root = as_pl_conf("get_rcap", &json!({}))?["rcap"].clone();
        let began = Instant::now();
        let rcap = as_pl_conf("split_pool", &json!({"rcap": root, "rspec": sliver()}))?["rcap"].clone();
        let splitting = began.elapsed();
        let began = Instant::now();
        as_pl_conf("bind", &json!({"rcap": rcap, "slice_name": format!("a_x{n}")}))?;
        // The first round warms the caches.
        if n > 0 {
            bind.push(ms(began.elapsed()));
            split.push(ms(splitting));
            create.push(ms(whole.elapsed()));
        }
        as_pl_conf("destroy", &json!({"rcap": rcap}))?;
    }
    fill(args)?;
    let (mut status, mut status_cpu) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        let (cpu, began) = (proc::cpu_ns(pid)?, Instant::now());
        let list = call(OWNER_SOCKET, "list", &json!({}))?;
        status.push(ms(began.elapsed()));
        status_cpu.push((proc::cpu_ns(pid)? - cpu) as f64 / 1e6);
        let slivers = list["slivers"].as_array().map_or(0, Vec::len);
        if slivers < args.slivers as usize {
            bail!("list shows {slivers} slivers, not {}", args.slivers);
        }
    }
    let (cpu, began) = (proc::cpu_ns(pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs(args.rest_s.into()));
    let used = (proc::cpu_ns(pid)? - cpu) as f64 / 1e6;
    let rest = used / began.elapsed().as_secs_f64() * 30.0;
    let sample = |measure: &str, values| Sample {
        measure: measure.into(),
        unit: "ms".into(),
        values,
    };
    let samples = [
        sample(CREATE, create),
        sample("split_pool", split),
        sample("bind", bind),
        sample("list", status),
        sample(STATUS_CPU, status_cpu),
        sample(REST_CPU, vec![rest]),
    ];
    serde_json::to_writer(std::io::stdout().lock(), &samples)?;
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn sliver() -> Value {
    json!({"vm_type": "kvm-microvm", "mem_limit": "32 MiB", "disk_quota": "16 MiB", "start_time": LATER})
}

/// Brings the node to as many pools and slivers as are asked for.
fn fill(args: &NodeArgs) -> Result<()> {
    let root = as_pl_conf("get_rcap", &json!({}))?["rcap"].clone();
    for n in 1..args.pools {
        let is_sliver = n <= args.slivers;
        let rspec = if is_sliver {
            sliver()
        } else {
            json!({"cpu_share": 1})
        };
        let rcap = as_pl_conf("split_pool", &json!({"rcap": root, "rspec": rspec}))?["rcap"].clone();
        if is_sliver {
            as_pl_conf("bind", &json!({"rcap": rcap, "slice_name": format!("a_s{n}")}))?;
        }
    }
    Ok(())
}

/// A call of the slice creation service's: the node manager knows it by its user.
fn as_pl_conf(operation: &str, body: &Value) -> Result<Value> {
    let uid = pl_conf()?;
    // SAFETY: seteuid takes a number and touches no memory of ours; this process has one thread.
    if unsafe { libc::seteuid(uid) } != 0 {
        return Err(std::io::Error::last_os_error()).context("becoming pl_conf");
    }
    let answer = call(SERVICE_SOCKET, operation, body);
    // SAFETY: as above.
    if unsafe { libc::seteuid(0) } != 0 {
        return Err(std::io::Error::last_os_error()).context("becoming root again");
    }
    answer
}

fn pl_conf() -> Result<u32> {
    let passwd = std::fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
    let line = passwd.lines().find_map(|line| line.strip_prefix("pl_conf:"));
    let uid = line.and_then(|line| line.split(':').nth(1)?.parse().ok());
    uid.context("the node has no user pl_conf")
}

/// The node manager's process.
fn nodemgr() -> Result<u32> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let program = std::fs::read_link(entry.path().join("exe")).unwrap_or_default();
        if program.ends_with("mandoline-nodemgr") {
            return Ok(pid);
        }
    }
    bail!("no mandoline-nodemgr runs")
}
