//! A lab node with a node manager, and the part of a benchmark that runs inside it.

use std::process::Stdio;

use anyhow::{Context, Result, bail};
use mandoline_lab::{Lab, Node, NodeSpec};
use serde::de::DeserializeOwned;

use crate::boot::{DESCRIBE, describe, kvm_of};
use crate::report::Machine;

/// A node whose node manager runs, for benchmark `name`.
pub(crate) struct Managed {
    node: Node,
    pub(crate) machine: Machine,
    // The node lives in its directory.
    _lab: Lab,
}

impl Managed {
    /// Starts one with at least so much memory.
    pub(crate) fn start(name: &str, memory_mib: u32) -> Result<Self> {
        mandoline_lab::clean_up_on_signals();
        let mut lab = Lab::new().context("preparing the lab")?;
        eprintln!("{name}: starting a lab node ({})", lab.accel().words);
        let mut spec = NodeSpec::named("perf")
            .with_mandoline()?
            .setting("SERVICES", "nodemgr");
        spec.extra_programs.push(std::env::current_exe()?);
        spec.memory_mib = spec.memory_mib.max(memory_mib);
        let kvm = kvm_of(&lab);
        let node = lab.start(spec)?;
        let machine = describe(&node.shell(DESCRIBE)?, kvm)?;
        Ok(Self {
            node,
            machine,
            _lab: lab,
        })
    }

    /// Runs `mandoline-perf in-node <benchmark>` there, and reads what it writes as JSON.
    pub(crate) fn run<T: DeserializeOwned>(&self, benchmark: &str, options: &[(&str, u32)]) -> Result<T> {
        let mut argv = vec!["/usr/lib/mandoline/bin/mandoline-perf", "in-node", benchmark];
        let values: Vec<String> = options.iter().map(|(_, value)| value.to_string()).collect();
        for ((name, _), value) in options.iter().zip(&values) {
            argv.extend([*name, value.as_str()]);
        }
        let output = self
            .node
            .command(&argv)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        if !output.status.success() {
            bail!(
                "the benchmark failed inside the node ({}); its reason is above",
                output.status
            );
        }
        serde_json::from_slice(&output.stdout).context("reading the samples")
    }
}
