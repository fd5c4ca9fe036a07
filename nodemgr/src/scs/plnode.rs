//! `pl_node.txt`: what a node knows of itself before it has spoken to anybody (architecture paper,
//! section 5.2.2): lines `NAME="value"`, made by the authority, carried to the node on its own medium.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// What the slice creation service needs of it.
pub struct NodeFile {
    /// The node's number at its authority.
    pub node_id: i64,
    /// The secret that authenticates the registration, as written.
    pub node_key: Zeroizing<String>,
    /// The authority's address.
    pub plc_url: String,
    /// The node's name.
    pub host_name: String,
    /// Where outsiders reach the node's ssh server.
    pub ssh_endpoint: SshEndpoint,
}

/// A host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshEndpoint {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl fmt::Debug for NodeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeFile")
            .field("node_id", &self.node_id)
            .field("plc_url", &self.plc_url)
            .field("host_name", &self.host_name)
            .field("ssh_endpoint", &self.ssh_endpoint)
            .finish_non_exhaustive()
    }
}

/// Why a `pl_node.txt` is of no use.
#[derive(Debug, thiserror::Error)]
pub enum NodeFileError {
    /// It is not there, or cannot be read.
    #[error("{}: {source}; the node's configuration file is made by the authority (GenerateNodeConfFile, or `mandoline node add`)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A line that is no assignment.
    #[error("{}, line {line}: {text:?} is not an assignment; allowed: NAME=\"value\", a comment (#), nothing", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The name only when there is one: the value may be a secret.
        text: String,
    },
    /// Two different values for one name.
    #[error("{}, line {line}: {name} is set a second time", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The name.
        name: String,
    },
    /// A name that has to be there.
    #[error("{}: {name} is not set; it is {what}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The name.
        name: &'static str,
        /// What it is for.
        what: &'static str,
    },
    /// A value that cannot be right.
    #[error("{}: {name} is {value:?}; allowed: {allowed}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The name.
        name: &'static str,
        /// The value (never of NODE_KEY).
        value: String,
        /// What could stand there.
        allowed: &'static str,
    },
}

impl NodeFile {
    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self, NodeFileError> {
        let text = fs::read_to_string(path)
            .map(Zeroizing::new)
            .map_err(|source| NodeFileError::Read {
                path: path.to_owned(),
                source,
            })?;
        Self::parse(&text, path)
    }

    /// Reads `text`; `path` is for the messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, NodeFileError> {
        let values = assignments(text, path)?;
        let get = |name: &'static str, what: &'static str| {
            values
                .get(name)
                .filter(|value| !value.is_empty())
                .map(|value| (*value).to_owned())
                .ok_or_else(|| NodeFileError::Missing {
                    path: path.to_owned(),
                    name,
                    what,
                })
        };
        let wrong = |name: &'static str, value: &str, allowed: &'static str| NodeFileError::Value {
            path: path.to_owned(),
            name,
            value: value.to_owned(),
            allowed,
        };

        let id = get("NODE_ID", "the node's number at its authority")?;
        let node_id = id
            .parse()
            .ok()
            .filter(|id| *id > 0)
            .ok_or_else(|| wrong("NODE_ID", &id, "a whole number from 1"))?;
        let node_key = Zeroizing::new(get("NODE_KEY", "the secret that the node registers with")?);
        let plc_url = get(
            "PLC_URL",
            "the authority's address, such as http://plc.example.org",
        )?;
        if !plc_url.starts_with("http://") && !plc_url.starts_with("https://") {
            return Err(wrong(
                "PLC_URL",
                &plc_url,
                "http://HOST[:PORT] or https://HOST[:PORT]",
            ));
        }
        let host_name = get("HOST_NAME", "the node's name")?;
        // PlanetLab's files do not have it: there, outsiders reach the node under its name on ssh's own port.
        let ssh_endpoint = match values.get("SSH_ENDPOINT").filter(|value| !value.is_empty()) {
            None => SshEndpoint {
                host: host_name.clone(),
                port: 22,
            },
            Some(value) => value
                .parse()
                .map_err(|()| wrong("SSH_ENDPOINT", value, "HOST:PORT, [ADDRESS]:PORT"))?,
        };
        Ok(Self {
            node_id,
            node_key,
            plc_url,
            host_name,
            ssh_endpoint,
        })
    }
}

impl std::str::FromStr for SshEndpoint {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = text.rsplit_once(':').ok_or(())?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // A bare IPv6 address leaves open where it ends.
        if host.is_empty() || bare.is_none() && host.contains(':') || host.contains(char::is_whitespace) {
            return Err(());
        }
        let port = port.parse().ok().filter(|port| *port > 0).ok_or(())?;
        Ok(Self {
            host: bare.unwrap_or(host).to_owned(),
            port,
        })
    }
}

fn assignments<'t>(text: &'t str, path: &Path) -> Result<BTreeMap<&'t str, &'t str>, NodeFileError> {
    let mut values = BTreeMap::new();
    for (index, raw) in text.lines().enumerate() {
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let syntax = |text: &str| NodeFileError::Syntax {
            path: path.to_owned(),
            line: index + 1,
            text: text.to_owned(),
        };
        let (name, value) = line.split_once('=').ok_or_else(|| syntax("..."))?;
        let name = name.trim_end();
        let well_named = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let value = unquote(value.trim_start())
            .filter(|_| well_named)
            .ok_or_else(|| syntax(name))?;
        // Repeating a line does no harm; contradicting one does.
        if values.insert(name, value).is_some_and(|old| old != value) {
            return Err(NodeFileError::Twice {
                path: path.to_owned(),
                line: index + 1,
                name: name.to_owned(),
            });
        }
    }
    Ok(values)
}

/// The value of `"value"`, `'value'` or a bare word; a comment may follow. Nothing expands: the file is data.
fn unquote(text: &str) -> Option<&str> {
    let (value, rest) = match text.chars().next() {
        Some(quote @ ('"' | '\'')) => text[1..].split_once(quote)?,
        _ => text.split_at(text.find(char::is_whitespace).unwrap_or(text.len())),
    };
    let rest = rest.trim();
    (!value.contains('"') && (rest.is_empty() || rest.starts_with('#'))).then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = r#"
# made by the authority
NODE_ID="7"
NODE_KEY="c2VjcmV0+/x"
PLC_URL="http://10.0.2.100:80"
HOST_NAME='n1.lab'   # its name
IP_METHOD=dhcp
SSH_ENDPOINT="127.0.0.1:2201"
"#;

    fn parse(text: &str) -> Result<NodeFile, String> {
        NodeFile::parse(text, Path::new("pl_node.txt")).map_err(|e| e.to_string())
    }

    #[test]
    fn reads_what_the_authority_writes() {
        let node = parse(GOOD).unwrap();
        assert_eq!(node.node_id, 7);
        assert_eq!(node.node_key.as_str(), "c2VjcmV0+/x");
        assert_eq!(node.plc_url, "http://10.0.2.100:80");
        assert_eq!(node.host_name, "n1.lab");
        assert_eq!(
            node.ssh_endpoint,
            SshEndpoint {
                host: "127.0.0.1".into(),
                port: 2201
            }
        );
        assert!(
            !format!("{node:?}").contains("c2VjcmV0"),
            "the key shows in Debug"
        );
    }

    #[test]
    fn without_endpoint_it_is_the_host_on_port_22() {
        let node = parse(&GOOD.replace("SSH_ENDPOINT", "OTHER")).unwrap();
        assert_eq!(
            node.ssh_endpoint,
            SshEndpoint {
                host: "n1.lab".into(),
                port: 22
            }
        );
    }

    #[test]
    fn endpoints() {
        let v6 = SshEndpoint {
            host: "2001:db8::1".into(),
            port: 22,
        };
        assert_eq!("[2001:db8::1]:22".parse(), Ok(v6));
        for bad in [
            "host",
            "host:",
            ":22",
            "host:0",
            "host:65536",
            "2001:db8::1:22",
            "a b:1",
        ] {
            assert_eq!(bad.parse::<SshEndpoint>(), Err(()), "{bad}");
        }
    }

    #[test]
    fn errors_say_where_and_what() {
        for (text, part) in [
            (
                GOOD.replace("NODE_ID=\"7\"", "NODE_ID=\"seven\""),
                "NODE_ID is \"seven\"; allowed: a whole number from 1",
            ),
            (
                GOOD.replace("HOST_NAME", "X"),
                "HOST_NAME is not set; it is the node's name",
            ),
            (
                GOOD.replace("http:", "ftp:"),
                "PLC_URL is \"ftp://10.0.2.100:80\"",
            ),
            (GOOD.replace("2201", "none"), "SSH_ENDPOINT is \"127.0.0.1:none\""),
            (
                GOOD.to_owned() + "NODE_ID=\"8\"",
                "line 9: NODE_ID is set a second time",
            ),
            (
                GOOD.to_owned() + "no assignment",
                "line 9: \"...\" is not an assignment",
            ),
            (GOOD.to_owned() + "A=\"open", "line 9: \"A\" is not an assignment"),
            (
                GOOD.to_owned() + "A=\"a\" b",
                "line 9: \"A\" is not an assignment",
            ),
        ] {
            let message = parse(&text).unwrap_err();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn the_key_is_in_no_message() {
        for text in [
            GOOD.replace("c2V", "c2V\" "),
            GOOD.replace("NODE_KEY=", "NODE_KEY "),
            GOOD.replace("NODE_ID", "NODE ID"),
        ] {
            assert!(!parse(&text).unwrap_err().contains("+/x"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "[A-Z_=\"' #\n0-9:é]{0,80}") {
            let _ = parse(&text);
        }
    }
}
