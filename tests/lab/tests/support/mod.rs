//! A node with a node manager, driven as its owner drives it.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::time::{Duration, Instant};

use mandoline_lab::{Lab, Node, NodeSpec};
use serde_json::{Value, json};

pub type Tested<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Owner's calls of a node's manager, over ssh.
pub struct Manager<'a>(pub &'a Node);

/// A sliver that was made.
pub struct Made {
    /// The rcap that stands for it.
    pub rcap: String,
    /// Its id.
    pub vm_id: u64,
}

/// Starts a node with a node manager that answers.
pub fn start(lab: &mut Lab, spec: NodeSpec) -> Tested<Node> {
    let node = lab.start(spec.with_mandoline()?.setting("SERVICES", "nodemgr"))?;
    Manager(&node).wait_until_it_answers()?;
    Ok(node)
}

impl Manager<'_> {
    /// `POST /v1/<operation>`.
    pub fn call(&self, operation: &str, body: &Value) -> Tested<Value> {
        let url = format!("http://nm/v1/{operation}");
        let args = [
            "curl",
            "-s",
            "-m",
            "60",
            "--unix-socket",
            "/run/mandoline/owner.sock",
            "-d",
            "@-",
            &url,
        ];
        let output = self.0.exec_with_input(&args, body.to_string().as_bytes())?;
        let answer: Value = serde_json::from_slice(&output.stdout)
            .map_err(|e| format!("{operation}: {e}: {:?}", String::from_utf8_lossy(&output.stdout)))?;
        match answer.get("error") {
            Some(error) => Err(format!("{operation} {body}: {error}").into()),
            None => Ok(answer),
        }
    }

    /// What a shell command of the node's prints, as JSON.
    pub fn shell_json(&self, command: &str) -> Tested<Value> {
        Ok(serde_json::from_str(&self.0.shell(command)?)?)
    }

    /// Waits until the node manager answers.
    pub fn wait_until_it_answers(&self) -> Tested {
        self.0.shell(
            "for i in $(seq 300); do curl -sf -m 5 -o /dev/null --unix-socket /run/mandoline/owner.sock http://nm/v1/node && exit 0
             sleep 0.1; done; tail -n 30 /var/log/mandoline/mandoline-nodemgr/current >&2; exit 1",
        )?;
        Ok(())
    }

    /// A root pool of the owner's for this slice. Gives its rcap.
    pub fn root_pool(&self, slice: &str, rspec: &Value) -> Tested<String> {
        let answer = self.call("create_root_pool", &json!({"slice_name": slice, "rspec": rspec}))?;
        Ok(answer["rcap"].as_str().unwrap_or_default().to_owned())
    }

    /// A sliver from a root pool of its own.
    pub fn sliver(&self, slice: &str, rspec: &Value) -> Tested<Made> {
        let rcap = self.root_pool(slice, rspec)?;
        let answer = self.call("bind", &json!({"rcap": rcap, "slice_name": slice}))?;
        let vm_id = answer["vm_id"].as_u64().ok_or("bind gave no vm_id")?;
        Ok(Made { rcap, vm_id })
    }

    /// What `list` says of a sliver; none if it is gone.
    pub fn find(&self, vm_id: u64) -> Tested<Option<Value>> {
        let list = self.call("list", &json!({}))?;
        let slivers = list["slivers"].as_array().cloned().unwrap_or_default();
        Ok(slivers.into_iter().find(|sliver| sliver["vm_id"] == vm_id))
    }

    /// Waits until a sliver is as wanted. Gives what `list` says of it.
    pub fn wait(&self, vm_id: u64, what: &str, wanted: impl Fn(&Value) -> bool) -> Tested<Value> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let sliver = self.find(vm_id)?.unwrap_or_else(|| json!({"state": "gone"}));
            if wanted(&sliver) {
                return Ok(sliver);
            }
            if Instant::now() > deadline {
                let log = self
                    .0
                    .shell("tail -n 40 /var/log/mandoline/mandoline-nodemgr/current")?;
                return Err(format!("sliver {vm_id} is not {what}: {sliver}\n{log}").into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until a sliver is in a state.
    pub fn wait_state(&self, vm_id: u64, state: &str) -> Tested<Value> {
        self.wait(vm_id, state, |sliver| sliver["state"] == state)
    }

    /// Waits until a file of the node's holds what is wanted.
    pub fn wait_file(&self, path: &str, wanted: impl Fn(&str) -> bool) -> Tested<String> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let text = self.read(path)?;
            if wanted(&text) {
                return Ok(text);
            }
            if Instant::now() > deadline {
                return Err(format!("{path} is {text:?}").into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A file of the node's, without the last newline; empty if it is not there.
    pub fn read(&self, path: &str) -> Tested<String> {
        let text = self.0.shell(&format!("cat {path} 2>/dev/null || true"))?;
        Ok(text.trim_end().to_owned())
    }
}
