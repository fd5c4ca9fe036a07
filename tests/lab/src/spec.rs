//! How a node is asked for.

use crate::{Result, SliverImages, images};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

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
        self.programs = Some(images::programs()?);
        self.sliver_images = Some(SliverImages::find()?);
        Ok(self)
    }

    /// With a setting in pl_node.txt.
    pub fn setting(mut self, name: &str, value: &str) -> NodeSpec {
        self.settings.insert(name.into(), value.into());
        self
    }
}
