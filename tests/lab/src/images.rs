//! Where the built things are: the environment says (`scripts/with-images` sets it), else the builders in the source
//! tree do, which build what is missing.

use crate::{LabError, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The images that nodes are made of.
#[derive(Debug, Clone)]
pub struct Images {
    /// The directory with vmlinux, initrd and node.erofs.
    pub node: PathBuf,
}

/// What slivers are made of.
#[derive(Debug, Clone)]
pub struct SliverImages {
    /// An erofs image that holds vmlinux-up, root.erofs and manifest.json.
    pub disk: PathBuf,
}

impl Images {
    /// `MANDOLINE_NODE_DIR`, else what `guest-image/node/build` gives.
    pub fn find() -> Result<Images> {
        let node = match from_environment("MANDOLINE_NODE_DIR")? {
            Some(dir) => dir,
            None => builder(
                "the node image",
                "MANDOLINE_NODE_DIR",
                "guest-image/node/build",
                &[],
            )?,
        };
        for file in ["vmlinux", "initrd", "node.erofs"] {
            if !node.join(file).is_file() {
                return Err(LabError::Image {
                    what: "the node image",
                    how: format!("{} has no {file}", node.display()),
                });
            }
        }
        Ok(Images { node })
    }
}

impl SliverImages {
    /// The disk made of `MANDOLINE_KERNEL_DIR` and `MANDOLINE_ROOT_DIR`, or of what the builders give; cached.
    pub fn find() -> Result<SliverImages> {
        let kernel = kernel("up")?;
        let root = match from_environment("MANDOLINE_ROOT_DIR")? {
            Some(dir) => dir,
            None => builder(
                "the sliver root image",
                "MANDOLINE_ROOT_DIR",
                "guest-image/root/build",
                &[],
            )?,
        };
        let arguments = [kernel.to_string_lossy(), root.to_string_lossy()];
        let dir = builder(
            "the sliver images",
            "MANDOLINE_SOURCE",
            "guest-image/node/images",
            &[arguments[0].as_ref(), arguments[1].as_ref()],
        )?;
        Ok(SliverImages {
            disk: dir.join("images.erofs"),
        })
    }
}

/// The directory of the sliver kernel of a flavour, with vmlinux and bzImage: `MANDOLINE_KERNEL_DIR` for `up`,
/// `MANDOLINE_KERNEL_SMP_DIR` for `smp`, else what the builder gives.
pub fn kernel(flavour: &str) -> Result<PathBuf> {
    let variable = match flavour {
        "smp" => "MANDOLINE_KERNEL_SMP_DIR",
        _ => "MANDOLINE_KERNEL_DIR",
    };
    match from_environment(variable)? {
        Some(dir) => Ok(dir),
        None => builder(
            "the sliver kernel",
            variable,
            "guest-image/kernel/build",
            &[flavour],
        ),
    }
}

/// The directory of Debian's cloud kernel for slivers, with bzImage and initrd: `MANDOLINE_CLOUD_KERNEL_DIR`, else
/// what the builder gives.
pub fn cloud_kernel() -> Result<PathBuf> {
    let variable = "MANDOLINE_CLOUD_KERNEL_DIR";
    match from_environment(variable)? {
        Some(dir) => Ok(dir),
        None => builder(
            "Debian's cloud kernel for slivers",
            variable,
            "guest-image/cloud-kernel/build",
            &[],
        ),
    }
}

/// The disk with the benchmarks' peer, for [`crate::NodeSpec::peer`]; cached.
pub fn peer() -> Result<PathBuf> {
    let dir = builder(
        "the benchmarks' peer",
        "MANDOLINE_SOURCE",
        "guest-image/node/peer",
        &[],
    )?;
    Ok(dir.join("peer.erofs"))
}

fn from_environment(name: &'static str) -> Result<Option<PathBuf>> {
    match std::env::var_os(name) {
        None => Ok(None),
        Some(dir) if Path::new(&dir).is_dir() => Ok(Some(dir.into())),
        Some(dir) => Err(LabError::Value {
            name,
            value: dir.to_string_lossy().into_owned(),
            allowed: "a directory that is there, or unset".into(),
        }),
    }
}

/// Runs a builder of the source tree; its progress goes to our stderr, its stdout is the directory.
fn builder(what: &'static str, variable: &str, script: &str, arguments: &[&str]) -> Result<PathBuf> {
    let path = source_tree()
        .ok_or_else(|| LabError::Image {
            what,
            how: format!(
                "{variable} is not set, and neither this directory nor the program lies in the source tree"
            ),
        })?
        .join(script);
    let output = Command::new(&path)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(LabError::file("run", &path))?;
    if !output.status.success() {
        return Err(LabError::Program {
            program: path.display().to_string(),
            status: output.status.to_string(),
            stderr: "its reasons are above".into(),
        });
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// The source tree: `MANDOLINE_SOURCE`, or the first directory upwards from here or from the program that has the
/// node image's builder.
pub fn source_tree() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("MANDOLINE_SOURCE") {
        return Some(dir.into());
    }
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    starts.into_iter().flatten().find_map(|start| {
        start
            .ancestors()
            .find(|dir| dir.join("guest-image/node/build").is_file())
            .map(Path::to_owned)
    })
}

/// The directory with Mandoline's programs: `MANDOLINE_BIN`, else beside this program (or above it, for tests), else
/// `target/release`.
pub fn programs() -> Result<PathBuf> {
    let missing = |how: String| LabError::Image {
        what: "mandoline-vmm",
        how,
    };
    if let Some(dir) = std::env::var_os("MANDOLINE_BIN").map(PathBuf::from) {
        if dir.join("mandoline-vmm").is_file() {
            return Ok(dir);
        }
        return Err(missing(format!(
            "it is not in MANDOLINE_BIN ({:?}); cargo build --release",
            dir.display()
        )));
    }
    let exe = std::env::current_exe().ok();
    let beside = exe
        .iter()
        .flat_map(|e| e.ancestors().skip(1).take(2))
        .map(Path::to_owned);
    beside
        .chain(source_tree().map(|s| s.join("target/release")))
        .find(|dir| dir.join("mandoline-vmm").is_file())
        .ok_or_else(|| {
            missing("cargo build --release, or set MANDOLINE_BIN to the programs' directory".into())
        })
}

/// The program `mandoline-lab` itself, which QEMU runs for each connection from a node to the host's service.
pub(crate) fn lab_program() -> Result<PathBuf> {
    let exe = std::env::current_exe().ok();
    if let Some(exe) = &exe
        && exe.file_name().is_some_and(|n| n == "mandoline-lab")
    {
        return Ok(exe.clone());
    }
    let bin = std::env::var_os("MANDOLINE_BIN").map(PathBuf::from);
    let beside = exe
        .iter()
        .flat_map(|e| e.ancestors().skip(1).take(2))
        .map(Path::to_owned);
    bin.into_iter()
        .chain(beside)
        .map(|dir| dir.join("mandoline-lab"))
        .find(|program| program.is_file())
        .ok_or_else(|| LabError::Image {
            what: "the program mandoline-lab",
            how: "set MANDOLINE_BIN to the directory that holds it (cargo build --release -p mandoline-lab)"
                .into(),
        })
}
