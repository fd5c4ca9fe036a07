//! A lab: a directory, an ssh key, and nodes that may share a network.

use crate::hub::Hub;
use crate::node::{Node, NodeSpec};
use crate::workdir::WorkDir;
use crate::{Images, LabError, Result, accel, disks, ssh};
use std::path::{Path, PathBuf};

/// What a node may come to write here in a short life, in MiB.
const NEEDED_MIB: u64 = 1024;

/// A lab. Dropping it removes its directory; nodes that are still up must be dropped first.
pub struct Lab {
    // Fields drop in this order: the hub's sockets lie in the directory.
    hub: Hub,
    key: PathBuf,
    images: Images,
    accel: accel::KvmProbe,
    started: u8,
    dir: WorkDir,
}

impl Lab {
    /// A lab with what the environment or the source tree gives (see [`Images::find`]).
    pub fn new() -> Result<Lab> {
        Lab::with_images(Images::find()?)
    }

    /// A lab with this node image.
    pub fn with_images(images: Images) -> Result<Lab> {
        let dir = WorkDir::new()?;
        let free_mib = disks::free_bytes(dir.path())? >> 20;
        if free_mib < NEEDED_MIB {
            return Err(LabError::NoSpace {
                path: dir.path().to_owned(),
                free_mib,
                needed_mib: NEEDED_MIB,
            });
        }
        let key = dir.path().join("key");
        ssh::make_key(&key, "mandoline-lab")?;
        Ok(Lab {
            hub: Hub::default(),
            key,
            images,
            accel: accel::probe()?,
            started: 0,
            dir,
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// How nodes are run here.
    pub fn accel(&self) -> &accel::KvmProbe {
        &self.accel
    }

    /// Starts a node, joined with this lab's others, and waits until it is up.
    pub fn start(&mut self, spec: NodeSpec) -> Result<Node> {
        let number = self
            .started
            .checked_add(1)
            .filter(|n| *n < 255)
            .ok_or_else(|| LabError::Value {
                name: "the number of nodes",
                value: "255".into(),
                allowed: "up to 254 starts in one lab".into(),
            })?;
        self.started = number;
        let dir = self.dir.path().join(number.to_string());
        std::fs::create_dir(&dir).map_err(LabError::file("make", &dir))?;
        let accel = (self.accel.accel, self.accel.words.as_str());
        Node::start(
            &spec,
            number,
            &dir,
            &self.key,
            &self.images,
            accel,
            Some(&mut self.hub),
        )
    }

    /// Starts several nodes at the same time; when one fails, all are taken down.
    pub fn start_all(&mut self, specs: Vec<NodeSpec>) -> Result<Vec<Node>> {
        // Two emulated nodes at once take as long as one after the other on two cores: so in order, and the first
        // failure ends it.
        specs.into_iter().map(|spec| self.start(spec)).collect()
    }
}
