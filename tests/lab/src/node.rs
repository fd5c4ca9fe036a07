//! A running node: how it is talked to and taken down.

use crate::boot::{boot_error, console_tail, free_port, wait_for_sshd};
use crate::hub::Link;
use crate::process::Child;
use crate::qmp::Qmp;
use crate::{LabError, Result, ssh};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a command may take. A node can hang as a whole, and then nothing but this ends the wait.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);

/// What others need to use a running node; kept in its directory as `node.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Host name.
    pub name: String,
    /// The node's directory.
    pub dir: PathBuf,
    /// Its sshd is at 127.0.0.1 and this port.
    pub ssh_port: u16,
    /// Private key of root.
    pub ssh_key: PathBuf,
    /// known_hosts with the node's host key.
    pub known_hosts: PathBuf,
    /// Control socket of the shared ssh connection.
    pub ssh_control: PathBuf,
    /// The console's log.
    pub console: PathBuf,
    /// Address in the joint network.
    pub joint_address: Ipv4Addr,
    /// `kvm` or `tcg-svm`.
    pub accel: String,
    /// The same in words, with the reason.
    pub accel_words: String,
    /// Milliseconds from the start of QEMU until sshd and the services answered.
    pub boot_ms: u64,
    /// The same, by phase.
    pub phases: Phases,
}

/// When what was done, in milliseconds since QEMU was started.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Phases {
    /// sshd sent its banner.
    pub sshd_ms: u64,
    /// A login stood.
    pub login_ms: u64,
    /// The node manager answered, if it was to run.
    pub nodemgr_ms: Option<u64>,
    /// What the node says of itself: milliseconds since its kernel started.
    pub node_ms: BTreeMap<String, u64>,
}

/// What a command on a node gave.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status.
    pub status: i32,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// A running node. Dropping it takes it down.
pub struct Node {
    pub(crate) info: NodeInfo,
    pub(crate) target: ssh::Target,
    pub(crate) qemu: Child,
    pub(crate) master: Option<Child>,
    pub(crate) link: Link,
}

impl Node {
    /// What others need to use this node.
    pub fn info(&self) -> &NodeInfo {
        &self.info
    }

    /// Process id of its QEMU.
    pub fn qemu_pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Runs a command and collects what it writes. It has five minutes.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.exec_with_input(argv, &[])
    }

    /// The same, with something on its stdin.
    pub fn exec_with_input(&self, argv: &[&str], input: &[u8]) -> Result<Output> {
        self.target
            .run(argv, input, COMMAND_LIMIT)?
            .ok_or_else(|| LabError::Hangs {
                name: self.info.name.clone(),
                command: argv.join(" "),
                seconds: COMMAND_LIMIT.as_secs(),
                console: console_tail(&self.info.dir),
            })
    }

    /// Runs a shell script and gives what it wrote; a status other than 0 is an error.
    pub fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", script])?;
        if output.status == 0 {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            name: self.info.name.clone(),
            command: script.into(),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// A command ready to be started, for those who want its streams as they come.
    pub fn command(&self, argv: &[&str]) -> Command {
        self.target.command(argv)
    }

    /// Copies a file in.
    pub fn copy_in(&self, from: &Path, to: &str) -> Result<()> {
        self.info.copy_in(from, to)
    }

    /// Copies a file out.
    pub fn copy_out(&self, from: &str, to: &Path) -> Result<()> {
        self.info.copy_out(from, to)
    }

    /// Forwards a port of 127.0.0.1 to the node's TCP port; gives the former.
    pub fn forward(&self, guest_port: u16) -> Result<u16> {
        self.info.forward(guest_port)
    }

    /// What the console has shown so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.info.console).unwrap_or_default()).into_owned()
    }

    /// Cuts or mends the node's link to the joint network.
    pub fn set_joint_link(&self, up: bool) {
        self.link.set(up);
    }

    /// Cuts or mends the node's link to the outside. Cutting it ends ssh too, until it is mended.
    pub fn set_uplink(&self, up: bool) -> Result<()> {
        let mut qmp = Qmp::connect(&self.info.dir.join("qmp"))?;
        qmp.command("set_link", json!({ "name": "uplink", "up": up }))
            .map(drop)
    }

    /// Cuts the node's power and gives it back: what it had not written to its disks is lost. Waits until it is up
    /// again; the services are not waited for.
    pub fn cut_power(&mut self) -> Result<()> {
        let before = std::fs::metadata(&self.info.console).map_or(0, |m| m.len());
        {
            let mut qmp = Qmp::connect(&self.info.dir.join("qmp"))?;
            // Otherwise a reset ends QEMU: a node that panics while it boots must not do so for ever.
            qmp.command("set-action", json!({ "reboot": "reset" }))?;
            qmp.command("system_reset", json!({}))?;
        }
        self.master = None;
        wait_for_sshd(
            &self.info.name,
            &mut self.qemu,
            &self.info.dir,
            self.info.ssh_port,
            before,
        )?;
        Qmp::connect(&self.info.dir.join("qmp"))?.command("set-action", json!({ "reboot": "shutdown" }))?;
        self.reconnect()
    }

    /// Opens the shared ssh connection again, after the node's sshd or link was gone for long.
    pub fn reconnect(&mut self) -> Result<()> {
        self.master = None;
        // A master that was killed leaves its socket.
        let _ = std::fs::remove_file(&self.target.control);
        self.master = Some(self.target.master()?);
        Ok(())
    }

    /// Whether its QEMU runs.
    pub fn running(&mut self) -> bool {
        self.qemu.exited().is_none()
    }

    /// Waits until its QEMU has ended: it was powered off from within.
    pub fn wait(&mut self) {
        self.qemu.wait();
    }

    /// Shuts the node down in order: services stopped, disks unmounted.
    pub fn power_off(mut self) -> Result<()> {
        // The connection may end before the command's answer comes; what counts is that QEMU ends.
        let _ = self.exec(&["poweroff"]);
        self.master = None;
        let began = Instant::now();
        while self.running() {
            if began.elapsed() > Duration::from_secs(60) {
                return Err(boot_error(
                    &self.info.name,
                    &self.info.dir,
                    "it did not power off in 60 s".into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl NodeInfo {
    /// The node whose directory this is, in a lab that runs; or the first node of a lab's directory.
    pub fn load(dir: &Path) -> Result<NodeInfo> {
        let candidates = [dir.join("node.json"), dir.join("1/node.json")];
        let path = candidates
            .iter()
            .find(|p| p.is_file())
            .ok_or_else(|| LabError::Image {
                what: "a running node",
                how: format!(
                    "{} has no node.json (the directory is in what `mandoline-lab up` prints)",
                    dir.display()
                ),
            })?;
        let text = std::fs::read(path).map_err(LabError::file("read", path))?;
        serde_json::from_slice(&text).map_err(|e| LabError::file("read", path)(e.into()))
    }

    fn target(&self) -> ssh::Target {
        ssh::Target {
            name: self.name.clone(),
            port: self.ssh_port,
            key: self.ssh_key.clone(),
            known_hosts: self.known_hosts.clone(),
            control: self.ssh_control.clone(),
        }
    }

    /// A command on the node, through the lab's connection.
    pub fn command(&self, argv: &[&str]) -> Command {
        self.target().command(argv)
    }

    /// Copies a file in, with its mode.
    pub fn copy_in(&self, from: &Path, to: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let file = std::fs::File::open(from).map_err(LabError::file("read", from))?;
        let mode = file
            .metadata()
            .map_err(LabError::file("look at", from))?
            .permissions()
            .mode()
            & 0o777;
        let word = ssh::shell_word(to);
        let script = format!("cat > {word} && chmod {mode:o} {word}");
        let output = self
            .command(&["sh", "-c", &script])
            .stdin(file)
            .output()
            .map_err(LabError::file("run ssh for", from))?;
        self.succeeded(&script, &output)
    }

    /// Copies a file out.
    pub fn copy_out(&self, from: &str, to: &Path) -> Result<()> {
        let file = std::fs::File::create(to).map_err(LabError::file("make", to))?;
        let output = self
            .command(&["cat", from])
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(Stdio::piped())
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .map_err(LabError::file("run ssh for", to))?;
        self.succeeded(&format!("cat {from}"), &output)
    }

    fn succeeded(&self, command: &str, output: &std::process::Output) -> Result<()> {
        if output.status.success() {
            return Ok(());
        }
        Err(LabError::Command {
            name: self.name.clone(),
            command: command.into(),
            status: output.status.code().unwrap_or(-1),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Forwards a free port of 127.0.0.1 to the node's TCP port.
    pub fn forward(&self, guest_port: u16) -> Result<u16> {
        let mut qmp = Qmp::connect(&self.dir.join("qmp"))?;
        let mut tries = 0;
        loop {
            tries += 1;
            let port = free_port()?;
            match qmp.human(&format!(
                "hostfwd_add uplink tcp:127.0.0.1:{port}-10.0.2.15:{guest_port}"
            )) {
                Ok(()) => return Ok(port),
                // Somebody took the port between our looking and QEMU's binding.
                Err(_) if tries < 5 => {}
                Err(e) => return Err(e),
            }
        }
    }
}
