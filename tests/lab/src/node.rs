//! One node: how it is asked for, started, talked to and taken down.

use crate::hub::{Hub, Link};
use crate::process::Child;
use crate::qemu::{Machine, joint_mac, uplink_mac};
use crate::qmp::Qmp;
use crate::{Accel, Images, LabError, Result, SliverImages, disks, images, ssh};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a node may take, on a machine that has much else to do.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// What a node is to be.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Its host name.
    pub name: String,
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// Its CPUs. More than the host has slow an emulated node down.
    pub cpus: u8,
    /// Length of the sparse disk at /var/lib/mandoline, in bytes.
    pub state_bytes: u64,
    /// Files for the configuration disk. `pl_node.txt` is completed with the lab's network, `authorized_keys` with
    /// the lab's key.
    pub config_dir: Option<PathBuf>,
    /// Further `NAME="value"` settings for pl_node.txt, such as `SERVICES`; they win over `config_dir`.
    pub settings: BTreeMap<String, String>,
    /// The directory of Mandoline's programs, for /usr/lib/mandoline; none: nothing is mounted there.
    pub programs: Option<PathBuf>,
    /// Further programs for /usr/lib/mandoline/bin.
    pub extra_programs: Vec<PathBuf>,
    /// What is at /usr/share/mandoline/images; none: nothing.
    pub sliver_images: Option<SliverImages>,
    /// An erofs image for /opt/peer (see `guest-image/node/peer`).
    pub peer: Option<PathBuf>,
    /// The service of this machine that the node reaches at 10.0.2.100:80.
    pub service: Option<SocketAddr>,
    /// More for the kernel's command line.
    pub append: String,
}

impl NodeSpec {
    /// A bare node: kernel, root, sshd.
    pub fn named(name: &str) -> NodeSpec {
        NodeSpec {
            name: name.into(),
            memory_mib: 4096,
            cpus: 2,
            state_bytes: 40 << 30,
            config_dir: None,
            settings: BTreeMap::new(),
            programs: None,
            extra_programs: Vec::new(),
            sliver_images: None,
            peer: None,
            service: None,
            append: String::new(),
        }
    }

    /// With Mandoline's programs and the sliver images, as found (see [`Images`]); the services do not run yet:
    /// that is for the setting `SERVICES`.
    pub fn with_mandoline(mut self) -> Result<NodeSpec> {
        let programs = images::programs().ok_or_else(|| LabError::Image {
            what: "Mandoline's programs",
            how: "cargo build --release, or set MANDOLINE_BIN to their directory".into(),
        })?;
        self.programs = Some(programs);
        self.sliver_images = Some(SliverImages::find()?);
        Ok(self)
    }

    /// With a setting in pl_node.txt.
    pub fn setting(mut self, name: &str, value: &str) -> NodeSpec {
        self.settings.insert(name.into(), value.into());
        self
    }
}

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
    pub joint_address: Option<Ipv4Addr>,
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
    info: NodeInfo,
    target: ssh::Target,
    qemu: Child,
    master: Option<Child>,
    link: Option<Link>,
}

impl Node {
    /// Starts the `number`-th node of a lab in `dir`, which must be empty, and waits until it is up.
    pub(crate) fn start(
        spec: &NodeSpec,
        number: u8,
        dir: &Path,
        key: &Path,
        image: &Images,
        accel: (Accel, &str),
        hub: Option<&mut Hub>,
    ) -> Result<Node> {
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
        let link = hub.map(|hub| hub.port(&dir.join("joint"))).transpose()?;
        let service = spec
            .service
            .map(|address| Ok::<_, LabError>((images::lab_program()?, address)))
            .transpose()?;

        // The port is free when we look and may be taken when QEMU binds it: then QEMU ends at once, and we try another.
        let mut tries = 0;
        let (ssh_port, began, mut qemu) = loop {
            tries += 1;
            let ssh_port = free_port()?;
            disks::config(
                &config,
                &config_files(spec, number, key, &host_key, ssh_port, link.is_some())?,
            )?;
            let machine = Machine {
                accel: accel.0,
                number,
                memory_mib: spec.memory_mib,
                cpus: spec.cpus,
                image: &image.node,
                dir,
                disks: images.clone(),
                ssh_port,
                join_socket: link.as_ref().map(|_| dir.join("joint")),
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
        wait_for_banner(&spec.name, &mut qemu, dir, ssh_port)?;
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
            joint_address: link.as_ref().map(|_| joint_address(number)),
            accel: match accel.0 {
                Accel::Kvm => "kvm".into(),
                Accel::TcgSvm => "tcg-svm".into(),
            },
            accel_words: accel.1.into(),
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
            node.wait_for_nodemgr()?;
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

    fn wait_for_nodemgr(&self) -> Result<()> {
        // One command that waits there, since each that we send costs more than each try does.
        let script = "tries=0
            until curl --silent --fail --output /dev/null --max-time 5 --unix-socket /run/mandoline/owner.sock http://nm/v1/node; do
                tries=$((tries + 1)); [ $tries -lt 600 ] || exit 1; sleep 0.05
            done";
        let output = self.exec(&["sh", "-c", script])?;
        if output.status == 0 {
            return Ok(());
        }
        let log = self.shell("tail -n 30 /var/log/mandoline/mandoline-nodemgr/current")?;
        Err(boot_error(
            &self.info.name,
            &self.info.dir,
            format!("the node manager does not answer; its log:\n{log}"),
        ))
    }

    /// What others need to use this node.
    pub fn info(&self) -> &NodeInfo {
        &self.info
    }

    /// Process id of its QEMU.
    pub fn qemu_pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Runs a command and collects what it writes.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.exec_with_input(argv, &[])
    }

    /// The same, with something on its stdin.
    pub fn exec_with_input(&self, argv: &[&str], input: &[u8]) -> Result<Output> {
        let (status, stdout, stderr) = self.target.run(argv, input)?;
        Ok(Output {
            status,
            stdout,
            stderr,
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
        if let Some(link) = &self.link {
            link.set(up);
        }
    }

    /// Cuts or mends the node's link to the outside. Cutting it ends ssh too, until it is mended.
    pub fn set_uplink(&self, up: bool) -> Result<()> {
        let mut qmp = Qmp::connect(&self.info.dir.join("qmp"))?;
        qmp.command("set_link", json!({ "name": "uplink", "up": up }))
            .map(drop)
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

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn joint_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, number)
}

fn free_port() -> Result<u16> {
    let here = || PathBuf::from("127.0.0.1");
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(LabError::file("listen on", here()))?;
    Ok(listener
        .local_addr()
        .map_err(LabError::file("listen on", here()))?
        .port())
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(LabError::file("read", path))
}

fn boot_error(name: &str, dir: &Path, why: String) -> LabError {
    let console = std::fs::read(dir.join("console.log")).unwrap_or_default();
    let qemu = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
    let text = format!("{}{qemu}", String::from_utf8_lossy(&console));
    let lines: Vec<_> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(25)..].join("\n");
    LabError::Boot {
        name: name.into(),
        why,
        console: tail,
    }
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

/// QEMU accepts connections for the node from the first moment, and drops them until somebody listens there.
fn wait_for_banner(name: &str, qemu: &mut Child, dir: &Path, port: u16) -> Result<()> {
    let began = Instant::now();
    loop {
        if qemu.exited().is_some() {
            return Err(boot_error(name, dir, "its machine stopped".into()));
        }
        if began.elapsed() > BOOT_LIMIT {
            return Err(boot_error(
                name,
                dir,
                format!("no sshd after {} s", BOOT_LIMIT.as_secs()),
            ));
        }
        if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            let mut banner = [0; 4];
            // While the node has no network yet, the connection hangs: look again soon.
            let _ = stream.set_read_timeout(Some(Duration::from_millis(if cfg!(test) { 100 } else { 400 })));
            if stream.read_exact(&mut banner).is_ok() && &banner == b"SSH-" {
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

/// `NAME="value"` lines, the papers' format.
fn parse_settings(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.trim().split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().trim_matches('"').to_owned()))
        .collect()
}

fn given_settings(spec: &NodeSpec) -> Result<BTreeMap<String, String>> {
    let mut settings = BTreeMap::new();
    if let Some(file) = spec
        .config_dir
        .as_ref()
        .map(|d| d.join("pl_node.txt"))
        .filter(|f| f.is_file())
    {
        settings = parse_settings(&read_text(&file)?);
    }
    settings.extend(spec.settings.clone());
    Ok(settings)
}

fn config_value(spec: &NodeSpec, name: &str) -> Result<Option<String>> {
    Ok(given_settings(spec)?.remove(name))
}

/// Everything on the configuration disk.
fn config_files(
    spec: &NodeSpec,
    number: u8,
    key: &Path,
    host_key: &Path,
    ssh_port: u16,
    joined: bool,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    if let Some(dir) = &spec.config_dir {
        for entry in std::fs::read_dir(dir).map_err(LabError::file("list", dir))? {
            let path = entry.map_err(LabError::file("list", dir))?.path();
            if let (true, Some(name)) = (path.is_file(), path.file_name().and_then(|n| n.to_str())) {
                files.insert(
                    name.to_owned(),
                    std::fs::read(&path).map_err(LabError::file("read", &path))?,
                );
            }
        }
    }
    let mut settings = BTreeMap::from(
        [("NODE_ID", number.to_string()), ("HOST_NAME", spec.name.clone())].map(|(n, v)| (n.to_owned(), v)),
    );
    if spec.service.is_some() {
        settings.insert("PLC_URL".into(), "http://10.0.2.100:80".into());
    }
    settings.extend(given_settings(spec)?);
    // The network is the lab's, whatever the configuration says.
    let mut network = vec![
        ("IP_METHOD", "static".to_owned()),
        ("IP_ADDRESS", "10.0.2.15".into()),
        ("IP_NETMASK", "255.255.255.0".into()),
        ("IP_GATEWAY", "10.0.2.2".into()),
        ("NET_DEVICE", uplink_mac(number)),
        ("SSH_ENDPOINT", format!("127.0.0.1:{ssh_port}")),
    ];
    if joined {
        network.push(("JOIN_DEVICE", joint_mac(number)));
        network.push(("JOIN_ADDRESS", format!("{}/24", joint_address(number))));
    }
    settings.extend(network.into_iter().map(|(n, v)| (n.to_owned(), v)));
    let mut text = String::new();
    for (name, value) in &settings {
        if value.contains(['"', '\n']) {
            return Err(LabError::Value {
                name: "a setting of pl_node.txt",
                value: format!("{name}={value}"),
                allowed: "text without quotation marks and line ends".into(),
            });
        }
        text.push_str(&format!("{name}=\"{value}\"\n"));
    }
    files.insert("pl_node.txt".into(), text.into_bytes());
    let keys = files.entry("authorized_keys".into()).or_default();
    if keys.last().is_some_and(|b| *b != b'\n') {
        keys.push(b'\n');
    }
    keys.extend(read_text(&key.with_extension("pub"))?.bytes());
    files.insert("ssh_host_ed25519_key".into(), read_text(host_key)?.into_bytes());
    files.insert(
        "ssh_host_ed25519_key.pub".into(),
        read_text(&host_key.with_extension("pub"))?.into_bytes(),
    );
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_completed_not_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let at = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
        at(
            "pl_node.txt",
            "NODE_ID=\"77\"\nNODE_KEY=\"k\"\nIP_METHOD=\"dhcp\"\n",
        );
        at("owner.json", "[]");
        at("authorized_keys", "ssh-ed25519 AAAA mine");
        at("key.pub", "ssh-ed25519 BBBB lab\n");
        at("host", "secret");
        at("host.pub", "public");
        let mut spec = NodeSpec::named("n1").setting("SERVICES", "nodemgr");
        spec.config_dir = Some(dir.path().to_owned());
        spec.service = Some(([127, 0, 0, 1], 8000).into());
        let files = config_files(
            &spec,
            3,
            &dir.path().join("key"),
            &dir.path().join("host"),
            2222,
            true,
        )
        .expect("configuration");
        let settings = parse_settings(std::str::from_utf8(&files["pl_node.txt"]).expect("text"));
        for (name, value) in [
            ("NODE_ID", "77"),
            ("NODE_KEY", "k"),
            ("IP_METHOD", "static"),
            ("SERVICES", "nodemgr"),
            ("PLC_URL", "http://10.0.2.100:80"),
            ("SSH_ENDPOINT", "127.0.0.1:2222"),
            ("JOIN_ADDRESS", "10.99.0.3/24"),
        ] {
            assert_eq!(settings[name], value, "{name}");
        }
        assert_eq!(files["owner.json"], b"[]");
        assert_eq!(
            files["authorized_keys"],
            b"ssh-ed25519 AAAA mine\nssh-ed25519 BBBB lab\n"
        );
        spec = spec.setting("X", "a\"b");
        assert!(
            config_files(
                &spec,
                3,
                &dir.path().join("key"),
                &dir.path().join("host"),
                1,
                true
            )
            .is_err()
        );
    }

    #[test]
    fn phases_are_read_as_milliseconds() {
        let phases = parse_phases("stage1=1.25 ready=12.05 odd=x ");
        assert_eq!(
            phases,
            BTreeMap::from([("stage1".into(), 1250), ("ready".into(), 12050)])
        );
    }
}
