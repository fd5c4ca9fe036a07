//! `mandoline doctor`: what this machine has, what is missing, and what to do about it.

mod checks;
mod node;
mod source;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::output::{Output, table};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// As it should be.
    Ok,
    /// Not needed for the demo, or slower than it could be.
    Note,
    /// The demo cannot run like this.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How it came out.
    pub(crate) state: State,
    /// What was found.
    pub(crate) found: String,
    /// What to do, when something should be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

impl Check {
    pub(crate) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            advice: None,
        }
    }

    pub(crate) fn note(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Note,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    /// Missing if it is `needed`, else worth a note.
    pub(crate) fn lacking(
        needed: bool,
        name: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let state = if needed { State::Missing } else { State::Note };
        Self {
            name,
            state,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    pub(crate) fn missing(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Missing,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

/// Where a machine keeps what makes it a node.
const NODE_MARKS: [&str; 2] = ["/etc/mandoline/nodemgr.toml", "/run/mandoline"];

/// Whether this machine can be a node, if it is to be one or is; else whether the demo can run.
pub(crate) fn doctor(output: Output, node: bool) -> Result<()> {
    match node || NODE_MARKS.iter().any(|mark| std::path::Path::new(mark).exists()) {
        true => verdict(output, &node::checks(), "This machine can be a node", "a node"),
        false => machine(output),
    }
}

/// Shows checks; fails when something is missing.
fn verdict(output: Output, checks: &[Check], good: &str, what_for: &str) -> Result<()> {
    let missing = checks
        .iter()
        .filter(|check| check.state == State::Missing)
        .count();
    output.show(checks, people)?;
    match missing {
        0 => output.say(&format!("\n{good}")),
        1 => Err(Error::failure(format!("one thing is missing for {what_for}"))),
        n => Err(Error::failure(format!("{n} things are missing for {what_for}"))),
    }
}

/// Whether the demo can run.
fn machine(output: Output) -> Result<()> {
    let tree = source::tree();
    let mut checks = vec![
        checks::virtualisation(),
        checks::memory(),
        checks::disk(),
        checks::program(
            "qemu-system-x86_64",
            "qemu-system-x86",
            "the lab's nodes are QEMU machines",
        ),
        checks::program(
            "ssh",
            "openssh-client",
            "`mandoline ssh` is OpenSSH's ssh with the way filled in",
        ),
        checks::program("ssh-keygen", "openssh-client", "the demo makes a key of its own"),
        checks::cgroup(),
    ];
    match &tree {
        Some(tree) => {
            let (programs, images) = (source::programs(tree), source::images());
            // What is built needs nothing to be built with.
            let build = programs.state != State::Ok || images.state != State::Ok;
            checks.extend([
                source::rust(tree, build),
                source::packages(tree, build),
                programs,
                images,
            ]);
        }
        None => checks.push(Check::note(
            "source tree",
            "not run from one",
            "to check what building needs, run this below Mandoline's source tree",
        )),
    }
    verdict(output, &checks, "The demo can run: make demo", "the demo")
}

fn people(checks: &[Check]) -> String {
    let rows = checks.iter().map(|check| {
        let state = match check.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Missing => "MISSING",
        };
        [check.name.to_owned(), state.to_owned(), check.found.clone()]
    });
    let mut text = table(["CHECK", "STATE", "FOUND"], rows, "");
    for check in checks {
        if let Some(advice) = &check.advice {
            text.push_str(&format!("\n\n{}: {advice}", check.name));
        }
    }
    text
}
