//! A lab: a directory, an ssh key, and nodes that may share a network.

use crate::boot::Place;
use crate::hub::Hub;
use crate::node::Node;
use crate::workdir::WorkDir;
use crate::{Images, LabError, NodeSpec, Result, accel, disks, ssh};
use std::path::{Path, PathBuf};

/// What a node may come to write here in a short life, in MiB.
const NEEDED_MIB: u64 = 1024;

/// How often an emulated node whose kernel panics at its start is started in all.
const STARTS: u32 = 4;

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
        let mut nodes = self.start_all(vec![spec])?;
        nodes.pop().ok_or_else(|| LabError::Value {
            name: "the number of nodes",
            value: "0".into(),
            allowed: "as many as were asked for".into(),
        })
    }

    /// Starts several nodes at the same time; when one fails, all of them are taken down.
    ///
    /// QEMU before 8.1 may translate a page of code while another emulated CPU patches it, and then runs the
    /// breakpoint that the patching left there for a moment: a kernel panic in some 1 of 10 starts on a busy
    /// machine, mostly while the kernel starts. So an emulated node that panics there is started anew.
    pub fn start_all(&mut self, specs: Vec<NodeSpec>) -> Result<Vec<Node>> {
        let mut tries = 1;
        loop {
            match self.try_start_all(&specs) {
                Err(LabError::Boot { name, console, .. })
                    if self.accel.accel == accel::Accel::TcgSvm
                        && tries < STARTS
                        && console.contains("Kernel panic") =>
                {
                    eprintln!(
                        "lab: the emulator broke the kernel of {name} while it started (try {tries} of {STARTS}); once more"
                    );
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    fn try_start_all(&mut self, specs: &[NodeSpec]) -> Result<Vec<Node>> {
        let places = specs
            .iter()
            .map(|spec| self.prepare(spec.clone()))
            .collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let starting: Vec<_> = places
                .into_iter()
                .map(|place| scope.spawn(|| place.start()))
                .collect();
            // Every thread is waited for before the first failure is given, so that no node is left behind.
            let results: Vec<_> = starting
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .collect();
            results
                .into_iter()
                .map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    fn prepare(&mut self, spec: NodeSpec) -> Result<Place> {
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
        let link = self.hub.port(&dir.join("joint"))?;
        Ok(Place {
            spec,
            number,
            dir,
            link,
            key: self.key.clone(),
            images: self.images.clone(),
            accel: self.accel.accel,
            accel_words: self.accel.words.clone(),
        })
    }
}
