//! Starting a node.
//!
//! ```text
//!   disks, keys ─► QEMU ─► QMP answers ─► sshd's banner ─► login ─► node manager answers ─► up
//!                   │ ended at once: port taken? another one, else
//!                   └──────────────┴────────────┴────────────┴────────► error with the console's last lines
//! ```

use crate::config::{config_files, config_value, read_text};
use crate::hub::Link;
use crate::node::{Node, NodeInfo, Phases};
use crate::process::Child;
use crate::qemu::Machine;
use crate::qmp::Qmp;
use crate::{Accel, Images, LabError, NodeSpec, Result, disks, images, ssh};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long a node may take, on a machine that has much else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// What the node image writes on its console when its first stage has ended (guest-image/node/files/etc/runit/1).
const STAGE_DONE: &[u8] = b"stage 1 done";

/// A node's place in its lab: everything that it takes to start it.
pub(crate) struct Place {
    pub(crate) spec: NodeSpec,
    /// Which node of the lab, from 1.
    pub(crate) number: u8,
    /// An empty directory.
    pub(crate) dir: PathBuf,
    /// Its cable into the joint network, whose socket is `joint` in `dir`.
    pub(crate) link: Link,
    /// The lab's private key.
    pub(crate) key: PathBuf,
    pub(crate) images: Images,
    pub(crate) accel: Accel,
    pub(crate) accel_words: String,
}

impl Place {
    /// Starts the node and waits until it is up.
    pub(crate) fn start(self) -> Result<Node> {
        let Place {
            spec,
            number,
            dir,
            link,
            key,
            images: image,
            accel,
            accel_words,
        } = self;
        let (spec, dir, key) = (&spec, dir.as_path(), key.as_path());
        let host_key = dir.join("host_key");
        ssh::make_key(&host_key, &spec.name)?;
        let state = dir.join("state");
        disks::state(&state, spec.state_bytes)?;
        let mut images = vec![
            ("mandoline-root", image.node.join("node.erofs"), false),
            ("mandoline-state", state, true),
        ];
        if let Some(programs) = &spec.programs {
            let payload = dir.join("payload");
            disks::payload(&payload, programs, &spec.extra_programs)?;
            images.push(("mandoline-payload", payload, false));
        }
        if let Some(sliver) = &spec.sliver_images {
            images.push(("mandoline-images", sliver.disk.clone(), false));
        }
        if let Some(peer) = &spec.peer {
            images.push(("mandoline-peer", peer.clone(), false));
        }
        let config = dir.join("config");
        images.push(("PLCONF", config.clone(), false));
        let service = spec
            .service
            .map(|address| Ok::<_, LabError>((images::lab_program()?, address)))
            .transpose()?;

        // The port is free when we look and may be taken when QEMU binds it: then QEMU ends at once, and we try another.
        let mut tries = 0;
        let (ssh_port, began, mut qemu) = loop {
            tries += 1;
            let ssh_port = free_port()?;
            disks::config(&config, &config_files(spec, number, key, &host_key, ssh_port)?)?;
            let machine = Machine {
                accel,
                number,
                memory_mib: spec.memory_mib,
                cpus: spec.cpus,
                image: &image.node,
                dir,
                disks: images.clone(),
                ssh_port,
                join_socket: dir.join("joint"),
                service: service.clone(),
                extra_append: &spec.append,
            };
            let mut command = machine.command();
            let log = dir.join("qemu.log");
            let stderr = std::fs::File::create(&log).map_err(LabError::file("make", &log))?;
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
            let began = Instant::now();
            let mut qemu = Child::spawn(command, "qemu-system-x86_64", "qemu-system-x86")?;
            if wait_for_qmp(&mut qemu, dir)? {
                break (ssh_port, began, qemu);
            }
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            if tries == 5 || !said.contains("host forwarding") {
                return Err(boot_error(&spec.name, dir, "QEMU ended at once".into()));
            }
        };

        let known_hosts = dir.join("known_hosts");
        let public = read_text(&host_key.with_extension("pub"))?;
        std::fs::write(&known_hosts, format!("[127.0.0.1]:{ssh_port} {public}"))
            .map_err(LabError::file("write", &known_hosts))?;
        let target = ssh::Target {
            name: spec.name.clone(),
            port: ssh_port,
            key: key.to_owned(),
            known_hosts: known_hosts.clone(),
            control: dir.join("ssh"),
        };
        wait_for_sshd(&spec.name, &mut qemu, dir, ssh_port, 0)?;
        let sshd_ms = milliseconds(began);
        let master = target
            .master()
            .map_err(|e| boot_error(&spec.name, dir, e.to_string()))?;
        let login_ms = milliseconds(began);
        let info = NodeInfo {
            name: spec.name.clone(),
            dir: dir.to_owned(),
            ssh_port,
            ssh_key: key.to_owned(),
            known_hosts,
            ssh_control: target.control.clone(),
            console: dir.join("console.log"),
            joint_address: joint_address(number),
            accel: match accel {
                Accel::Kvm => "kvm".into(),
                Accel::TcgSvm => "tcg-svm".into(),
            },
            accel_words,
            boot_ms: 0,
            phases: Phases {
                sshd_ms,
                login_ms,
                ..Phases::default()
            },
        };
        let mut node = Node {
            info,
            target,
            qemu,
            master: Some(master),
            link,
        };
        if config_value(spec, "SERVICES")?.is_some_and(|s| s.split_whitespace().any(|s| s == "nodemgr")) {
            wait_for_nodemgr(&node)?;
            node.info.phases.nodemgr_ms = Some(milliseconds(began));
        }
        node.info.boot_ms = milliseconds(began);
        node.info.phases.node_ms = parse_phases(&node.shell("cat /run/mandoline/phases")?);
        let path = dir.join("node.json");
        let text =
            serde_json::to_vec_pretty(&node.info).map_err(|e| LabError::file("write", &path)(e.into()))?;
        std::fs::write(&path, text).map_err(LabError::file("write", &path))?;
        Ok(node)
    }
}

fn wait_for_nodemgr(node: &Node) -> Result<()> {
    // One command that waits there, since each that we send costs more than each try does.
    let script = "tries=0
            until curl --silent --fail --output /dev/null --max-time 5 --unix-socket /run/mandoline/owner.sock http://nm/v1/node; do
                tries=$((tries + 1)); [ $tries -lt 600 ] || exit 1; sleep 0.05
            done";
    let output = node.exec(&["sh", "-c", script])?;
    if output.status == 0 {
        return Ok(());
    }
    let log = node.shell("tail -n 30 /var/log/mandoline/mandoline-nodemgr/current")?;
    Err(boot_error(
        &node.info.name,
        &node.info.dir,
        format!("the node manager does not answer; its log:\n{log}"),
    ))
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A node's address in the joint network.
pub(crate) fn joint_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, number)
}

/// A TCP port of 127.0.0.1 that is free at this moment.
pub(crate) fn free_port() -> Result<u16> {
    let here = || PathBuf::from("127.0.0.1");
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(LabError::file("listen on", here()))?;
    Ok(listener
        .local_addr()
        .map_err(LabError::file("listen on", here()))?
        .port())
}

/// With the last lines of the console, and what QEMU said.
pub(crate) fn boot_error(name: &str, dir: &Path, why: String) -> LabError {
    LabError::Boot {
        name: name.into(),
        why,
        console: console_tail(dir),
    }
}

/// The last lines of the console of the node in `dir`, and what QEMU said.
pub(crate) fn console_tail(dir: &Path) -> String {
    let console = std::fs::read(dir.join("console.log")).unwrap_or_default();
    let qemu = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
    let text = format!("{}{qemu}", String::from_utf8_lossy(&console));
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

/// True when QEMU answers, false when it has ended.
fn wait_for_qmp(qemu: &mut Child, dir: &Path) -> Result<bool> {
    let socket = dir.join("qmp");
    let began = Instant::now();
    loop {
        if qemu.exited().is_some() {
            // Its socket would be in the next try's way.
            let _ = std::fs::remove_file(&socket);
            return Ok(false);
        }
        if socket.exists() {
            match Qmp::connect(&socket) {
                Ok(_) => return Ok(true),
                Err(e) if began.elapsed() > Duration::from_secs(30) => return Err(e),
                Err(_) => {}
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the console's word that the node's first stage is done, then for sshd. Not for sshd at once: QEMU accepts
/// connections on the node's behalf from the first moment, and each that piles up there costs the node an sshd later.
/// `seen` bytes of the console are from an earlier boot.
pub(crate) fn wait_for_sshd(name: &str, qemu: &mut Child, dir: &Path, port: u16, seen: u64) -> Result<()> {
    let began = Instant::now();
    let console = dir.join("console.log");
    let mut stage_done = false;
    loop {
        if qemu.exited().is_some() {
            return Err(boot_error(name, dir, "its machine stopped".into()));
        }
        if began.elapsed() > BOOT_LIMIT {
            let what = if stage_done {
                "sshd"
            } else {
                "end of its first stage"
            };
            return Err(boot_error(
                name,
                dir,
                format!("no {what} after {} s", BOOT_LIMIT.as_secs()),
            ));
        }
        if !stage_done {
            let text = std::fs::read(&console).unwrap_or_default();
            let text = text
                .get(usize::try_from(seen).unwrap_or(usize::MAX)..)
                .unwrap_or_default();
            stage_done = text.windows(STAGE_DONE.len()).any(|w| w == STAGE_DONE);
        } else if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            let mut banner = [0; 4];
            // Closed at once while nobody listens there yet; otherwise sshd will speak, soon or late.
            let patient = stream.set_read_timeout(Some(Duration::from_secs(30)));
            if patient.is_ok() && stream.read_exact(&mut banner).is_ok() && &banner == b"SSH-" {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn parse_phases(text: &str) -> BTreeMap<String, u64> {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter_map(|(name, seconds)| {
            let (whole, hundredths) = seconds.split_once('.')?;
            Some((
                name.to_owned(),
                whole.parse::<u64>().ok()? * 1000 + hundredths.parse::<u64>().ok()? * 10,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_read_as_milliseconds() {
        let phases = parse_phases("stage1=1.25 ready=12.05 odd=x ");
        assert_eq!(
            phases,
            BTreeMap::from([("stage1".into(), 1250), ("ready".into(), 12050)])
        );
    }
}
