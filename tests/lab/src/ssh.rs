//! Commands on a node, through one ssh connection that stays open: a further command costs no key exchange.

use crate::node::Output;
use crate::process::Child;
use crate::{LabError, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How to reach a node's sshd.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) key: PathBuf,
    pub(crate) known_hosts: PathBuf,
    pub(crate) control: PathBuf,
}

/// Makes an ssh key pair at `path`.
pub(crate) fn make_key(path: &Path, comment: &str) -> Result<()> {
    let mut command = Command::new("ssh-keygen");
    command
        .args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"])
        .arg(path);
    let output = command.stdin(Stdio::null()).output().map_err(no_ssh)?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Program {
        program: "ssh-keygen".into(),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn no_ssh(source: std::io::Error) -> LabError {
    if source.kind() == std::io::ErrorKind::NotFound {
        LabError::MissingProgram {
            program: "ssh",
            package: "openssh-client",
        }
    } else {
        LabError::File {
            what: "run",
            path: "ssh".into(),
            source,
        }
    }
}

/// One word for a POSIX shell.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Target {
    fn ssh(&self) -> Command {
        let mut c = Command::new("ssh");
        // `-F none`: what this user has configured for other machines is not for these.
        c.args(["-F", "none", "-i"])
            .arg(&self.key)
            .args(["-p", &self.port.to_string()]);
        c.arg("-o")
            .arg(format!("UserKnownHostsFile={}", self.known_hosts.display()));
        c.arg("-o").arg(format!("ControlPath={}", self.control.display()));
        c.args([
            "-o",
            "StrictHostKeyChecking=yes",
            "-o",
            "BatchMode=yes",
            "-o",
            "LogLevel=ERROR",
        ]);
        c.args([
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "ConnectTimeout=60",
            "-o",
            "GlobalKnownHostsFile=none",
        ]);
        c
    }

    /// The connection that the others share. It lives as long as what is returned.
    pub(crate) fn master(&self) -> Result<Child> {
        let log = self.control.with_extension("log");
        let mut c = self.ssh();
        // The default key exchange computes a post-quantum one too, which an emulated node takes a second for.
        c.args([
            "-M",
            "-N",
            "-o",
            "ControlPersist=no",
            "-o",
            "KexAlgorithms=curve25519-sha256",
        ]);
        c.args(["-o", "ServerAliveInterval=0", "root@127.0.0.1"]);
        let stderr = std::fs::File::create(&log).map_err(LabError::file("make", &log))?;
        c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let mut child = Child::spawn(c, "ssh", "openssh-client")?;
        let began = Instant::now();
        // ssh makes the control socket when it is logged in.
        while !self.control.exists() {
            let why = || {
                std::fs::read_to_string(&log)
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            };
            if child.exited().is_some() {
                return Err(LabError::Lost {
                    name: self.name.clone(),
                    why: why(),
                });
            }
            if began.elapsed() > Duration::from_secs(90) {
                return Err(LabError::Lost {
                    name: self.name.clone(),
                    why: format!("no login in 90 s {}", why()),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(child)
    }

    /// A command to run: `argv` as it is, word by word. The caller sets stdin, stdout and stderr.
    pub(crate) fn command(&self, argv: &[&str]) -> Command {
        let line = argv.iter().map(|a| shell_word(a)).collect::<Vec<_>>().join(" ");
        let mut c = self.ssh();
        c.args(["-T", "-o", "ControlMaster=no", "root@127.0.0.1", "--"])
            .arg(line);
        c
    }

    /// Runs `argv` with `input` on its stdin; none if it has not ended within `limit`.
    pub(crate) fn run(&self, argv: &[&str], input: &[u8], limit: Duration) -> Result<Option<Output>> {
        let mut c = self.command(argv);
        c.stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        });
        c.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = c.spawn().map_err(no_ssh)?;
        if let Some(mut stdin) = child.stdin.take() {
            let input = input.to_owned();
            // A command that does not read all of its input is its own affair.
            std::thread::spawn(move || stdin.write_all(&input));
        }
        let (id, (done, output)) = (child.id(), channel());
        std::thread::spawn(move || done.send(child.wait_with_output()));
        let Ok(output) = output.recv_timeout(limit) else {
            // The thread still waits for it, so the number is still its own. The thread is left behind: the streams may be
            // held open by the master connection for as long as the node hangs.
            if let Some(pid) = rustix::process::Pid::from_raw(id.cast_signed()) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            return Ok(None);
        };
        let output = output.map_err(no_ssh)?;
        match output.status.code() {
            // 255 is ssh's own way to fail, though a command may use it too: then the connection still stands.
            Some(255) if !self.alive() => Err(LabError::Lost {
                name: self.name.clone(),
                why: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
            Some(status) => Ok(Some(Output {
                status,
                stdout: output.stdout,
                stderr: output.stderr,
            })),
            None => Err(LabError::Lost {
                name: self.name.clone(),
                why: output.status.to_string(),
            }),
        }
    }

    /// Whether the shared connection stands.
    fn alive(&self) -> bool {
        let mut c = self.ssh();
        c.args(["-O", "check", "root@127.0.0.1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        c.status().is_ok_and(|s| s.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        for word in ["", "plain", "two words", "it's", "$HOME `x` \"y\"", "a\nb", "*"] {
            let output = Command::new("sh")
                .arg("-c")
                .arg(format!("printf %s {}", shell_word(word)))
                .output();
            assert_eq!(output.expect("sh").stdout, word.as_bytes());
        }
    }
}
