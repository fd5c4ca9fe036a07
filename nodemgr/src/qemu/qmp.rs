//! QEMU's machine protocol: one command on a connection, which is all that is needed.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::vm_type::Failure;

/// How long QEMU may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest line that is read, in bytes.
const LINE_MAX: usize = 1 << 16;

/// A connection to a QEMU.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Runs one command and gives what it returned.
    pub(crate) async fn once(socket: &Path, command: &str, arguments: Value) -> Result<Value, Failure> {
        let work = async {
            let mut qmp = Self {
                stream: BufReader::new(UnixStream::connect(socket).await.map_err(|e| e.to_string())?),
            };
            qmp.line().await?;
            qmp.command("qmp_capabilities", &json!({})).await?;
            qmp.command(command, &arguments).await
        };
        let failed =
            |why: String| Failure::retryable(format!("QEMU at {}: {command}: {why}", socket.display()));
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(failed(format!("no answer in {PATIENCE:?}"))),
        }
    }

    async fn line(&mut self) -> Result<Value, String> {
        let mut line = Vec::new();
        let mut limited = tokio::io::AsyncReadExt::take(&mut self.stream, LINE_MAX as u64);
        match limited.read_until(b'\n', &mut line).await {
            Ok(0) => Err("it closed the connection".to_owned()),
            Ok(_) => serde_json::from_slice(&line).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .await
            .map_err(|e| e.to_string())?;
        loop {
            let mut answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or("it refused").to_owned());
            }
            // Events come between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn a_command_is_answered_among_events() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = tokio::spawn(async move {
            for last in [
                r#"{"return":{"actual":7}}"#,
                r#"{"error":{"class":"GenericError","desc":"no balloon"}}"#,
            ] {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let greeting = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n";
                stream.get_mut().write_all(greeting.as_bytes()).await.unwrap();
                for answer in [
                    "{\"return\":{}}\n".to_owned(),
                    format!("{{\"event\":\"STOP\"}}\n{last}\n"),
                ] {
                    let mut line = String::new();
                    stream.read_line(&mut line).await.unwrap();
                    assert!(line.contains("execute"), "{line}");
                    stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        let value = Qmp::once(&path, "query-balloon", json!({})).await.unwrap();
        assert_eq!(value["actual"], 7);
        let failure = Qmp::once(&path, "balloon", json!({"value": 1}))
            .await
            .unwrap_err();
        assert!(failure.reason.contains("no balloon"), "{failure}");
        qemu.await.unwrap();
    }
}
