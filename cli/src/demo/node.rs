//! The demo's node: a virtual machine of the lab, kept by `mandoline-lab up`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mandoline_api::authority::NodeAdded;
use mandoline_api::authority_client::AuthorityClient;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::authority::Authority;
use super::children::{Daemon, tail};
use crate::admin::node_file;
use crate::config::write_private;
use crate::error::{About, Error, Result};

/// The authority as the lab's nodes reach it: their emulated network has this address for it and no way out.
const PLC_URL: &str = "http://10.0.2.100:80";
/// How long a node may take to boot, under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// How long its slice creation service may take to register.
const REGISTRATION: Duration = Duration::from_secs(180);
/// How often the authority is asked for it.
const ASK: Duration = Duration::from_millis(100);

/// The owner's script: all that slivers may use goes to the slice creation service.
const OWNER: &str = r#"[{"slice": "pl_conf", "rspec": {
    "cpu_share": 1000, "vcpus": 1, "mem_limit": "1 GiB", "disk_quota": "5 GB",
    "base_rate": "50 Mbit/s", "burst_rate": "100 Mbit/s"}}]
"#;

/// What `mandoline-lab up` says of a node (its other fields are for the lab).
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Info {
    /// The node's directory, by which the lab's other commands know it.
    pub(super) dir: PathBuf,
    /// The console's log.
    pub(super) console: PathBuf,
    /// `kvm` or `tcg-svm`.
    pub(super) accel: String,
    /// The same in words, with the reason.
    pub(super) accel_words: String,
    /// Milliseconds from the start of QEMU until its services answered.
    pub(super) boot_ms: u64,
}

/// A running node.
pub(super) struct LabNode {
    daemon: Daemon,
    lab: PathBuf,
    /// What the lab says of it.
    pub(super) info: Info,
}

impl LabNode {
    /// Starts one that belongs to the authority on `port`.
    pub(super) async fn start(bin: &Path, dir: &Path, added: &NodeAdded, port: u16) -> Result<Self> {
        let config = dir.join("node");
        let text = node_file(added, PLC_URL, None) + "\n";
        for (name, text) in [
            ("pl_node.txt", text.as_str()),
            ("owner.json", OWNER),
            ("authorized_keys", ""),
        ] {
            let path = config.join(name);
            write_private(&path, text.as_bytes()).about(path.display())?;
        }
        let lab = bin.join("mandoline-lab");
        let mut command = Command::new(&lab);
        command
            .args([
                "up",
                "--json",
                "--authority",
                &format!("127.0.0.1:{port}"),
                "--config-dir",
            ])
            .arg(&config);
        command.env("MANDOLINE_BIN", bin);
        let mut daemon = Daemon::start("mandoline-lab", command, &dir.join("lab.log"), true)?;
        let stdout = daemon
            .take_stdout()
            .ok_or_else(|| Error::failure("mandoline-lab: no standard output"))?;
        let stdout = tokio::process::ChildStdout::from_std(stdout).about("mandoline-lab")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = match tokio::time::timeout(BOOT, lines.next_line()).await {
            Ok(line) => line.about("mandoline-lab")?,
            Err(_) => {
                let message = format!(
                    "the node is not up after {} s; the end of the lab's log:\n{}",
                    BOOT.as_secs(),
                    daemon.tail()
                );
                return Err(Error::failure(message));
            }
        };
        let Some(line) = line else {
            // It has closed its standard output: it ends, and says why in its log.
            for _ in 0..100 {
                daemon.check()?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            return Err(Error::failure(format!(
                "mandoline-lab says nothing; the end of its log:\n{}",
                daemon.tail()
            )));
        };
        let info = serde_json::from_str(&line).about(format_args!("mandoline-lab said {line:?}"))?;
        Ok(Self { daemon, lab, info })
    }

    /// Waits until the node has announced what it offers.
    pub(super) async fn wait_registered(
        &mut self,
        admin: &AuthorityClient,
        hostname: &str,
        authority: &mut Authority,
    ) -> Result<()> {
        let asking = async {
            loop {
                if admin.node(hostname).await?.registered {
                    return Ok(());
                }
                authority.check()?;
                self.daemon.check()?;
                tokio::time::sleep(ASK).await;
            }
        };
        tokio::time::timeout(REGISTRATION, asking)
            .await
            .unwrap_or_else(|_| {
                Err(Error::failure(format!(
                    "the node has not registered after {} s",
                    REGISTRATION.as_secs()
                )))
            })
    }

    /// Runs a shell script on the node, as root, and gives what it printed.
    pub(super) async fn run(&self, script: &str) -> Result<String> {
        let out = tokio::process::Command::new(&self.lab)
            .arg("exec")
            .arg(&self.info.dir)
            .args(["--", "sh", "-c", script])
            .kill_on_drop(true)
            .output()
            .await
            .about("mandoline-lab exec")?;
        if !out.status.success() {
            let errors = String::from_utf8_lossy(&out.stderr);
            return Err(Error::failure(format!(
                "on the node: {}\n{}",
                out.status,
                tail(&errors)
            )));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// The ends of the logs that tell why something did not work.
    pub(super) async fn logs(&self) -> String {
        let mut text = String::new();
        for service in ["mandoline-scs", "mandoline-nodemgr"] {
            let script = format!("tail -n 20 /var/log/mandoline/{service}/current");
            let asked = self.run(&script);
            let log = match tokio::time::timeout(Duration::from_secs(20), asked).await {
                Ok(Ok(log)) => tail(&log),
                Ok(Err(error)) => format!("    (not to be had: {error})"),
                Err(_) => "    (the node does not answer)".into(),
            };
            text.push_str(&format!("the end of {service}'s log:\n{log}\n  "));
        }
        let console = std::fs::read(&self.info.console).unwrap_or_default();
        text.push_str(&format!(
            "the end of the node's console:\n{}",
            tail(&String::from_utf8_lossy(&console))
        ));
        text
    }
}
