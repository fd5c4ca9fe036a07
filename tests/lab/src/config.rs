//! The files on a node's configuration disk: what the caller gives, completed with what only the lab knows.

use crate::boot::joint_address;
use crate::qemu::{joint_mac, uplink_mac};
use crate::{LabError, NodeSpec, Result};
use std::collections::BTreeMap;
use std::path::Path;

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

/// One of them, as the node will see it.
pub(crate) fn config_value(spec: &NodeSpec, name: &str) -> Result<Option<String>> {
    Ok(given_settings(spec)?.remove(name))
}

/// Everything on the configuration disk.
pub(crate) fn config_files(
    spec: &NodeSpec,
    number: u8,
    key: &Path,
    host_key: &Path,
    ssh_port: u16,
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
    let network = [
        ("IP_METHOD", "static".to_owned()),
        ("IP_ADDRESS", "10.0.2.15".into()),
        ("IP_NETMASK", "255.255.255.0".into()),
        ("IP_GATEWAY", "10.0.2.2".into()),
        ("NET_DEVICE", uplink_mac(number)),
        ("SSH_ENDPOINT", format!("127.0.0.1:{ssh_port}")),
        ("JOIN_DEVICE", joint_mac(number)),
        ("JOIN_ADDRESS", format!("{}/24", joint_address(number))),
    ];
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

/// A text file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(LabError::file("read", path))
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
        let files = config_files(&spec, 3, &dir.path().join("key"), &dir.path().join("host"), 2222)
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
        assert!(config_files(&spec, 3, &dir.path().join("key"), &dir.path().join("host"), 1).is_err());
    }
}
