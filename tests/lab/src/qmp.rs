//! QEMU's machine protocol, as much of it as the lab needs: one command at a time on a Unix socket.

use crate::{LabError, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection to a QEMU. It serves one client at a time, so connections are short.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    pub(crate) fn connect(path: &Path) -> Result<Qmp> {
        let failed = |source| LabError::File {
            what: "talk to QEMU at",
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        // QEMU answers at once unless it is stuck; then the caller should hear of it.
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .map_err(failed)?;
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
        };
        qmp.read("greeting")?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self, command: &str) -> Result<Value> {
        let refuse = |why: String| LabError::Qmp {
            command: command.into(),
            why,
        };
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(refuse("it closed the connection".into())),
            Ok(_) => serde_json::from_str(&line).map_err(|e| refuse(format!("{e} in {line:?}"))),
            Err(e) => Err(refuse(e.to_string())),
        }
    }

    /// Runs a command and gives what it returned.
    pub(crate) fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let refuse = |why: String| LabError::Qmp {
            command: name.into(),
            why,
        };
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(|e| refuse(e.to_string()))?;
        loop {
            let mut answer = self.read(name)?;
            if let Some(error) = answer.get("error") {
                return Err(refuse(
                    error["desc"].as_str().unwrap_or("no reason given").to_owned(),
                ));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // An event: not ours.
        }
    }

    /// Runs a command of the human monitor, which says nothing when all is well.
    pub(crate) fn human(&mut self, line: &str) -> Result<()> {
        let said = self.command("human-monitor-command", json!({ "command-line": line }))?;
        match said.as_str().map(str::trim) {
            None | Some("") => Ok(()),
            Some(why) => Err(LabError::Qmp {
                command: line.into(),
                why: why.into(),
            }),
        }
    }
}
