//! What building from the source tree needs: toolchain, Debian packages; and what is built already.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Check;
use super::checks::{cache_dir, find_program};

/// The programs that the demo runs.
const PROGRAMS: [&str; 5] = [
    "mandoline-authority",
    "mandoline-lab",
    "mandoline-nodemgr",
    "mandoline-scs",
    "mandoline-vmm",
];

/// The source tree around the working directory, or around this program.
pub(super) fn tree() -> Option<PathBuf> {
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    starts.into_iter().flatten().find_map(|start| {
        start
            .ancestors()
            .find(|dir| dir.join("guest-image").is_dir() && dir.join("Cargo.toml").is_file())
            .map(Path::to_owned)
    })
}

/// A Rust toolchain that is new enough.
pub(super) fn rust(tree: &Path, needed: bool) -> Check {
    const NAME: &str = "Rust";
    let manifest = fs::read_to_string(tree.join("Cargo.toml")).unwrap_or_default();
    let want = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
        .unwrap_or("0");
    let said = Command::new("rustc").arg("--version").output();
    let have = said.ok().and_then(|out| String::from_utf8(out.stdout).ok());
    let version = have
        .as_deref()
        .and_then(|text| text.split_ascii_whitespace().nth(1));
    match version {
        None => Check::lacking(
            needed,
            NAME,
            "rustc is not on the path",
            format!("install Rust {want} or newer (see rustup.rs)"),
        ),
        Some(version) if numbers(version) < numbers(want) => Check::lacking(
            needed,
            NAME,
            format!("{version}; needed {want} or newer"),
            "rustup update",
        ),
        Some(version) => Check::ok(NAME, version),
    }
}

fn numbers(version: &str) -> Vec<u32> {
    version
        .split(['.', '-'])
        .map_while(|part| part.parse().ok())
        .collect()
}

/// The Debian packages that the tree's `packages` files name.
pub(super) fn packages(tree: &Path, needed: bool) -> Check {
    const NAME: &str = "Debian packages";
    let mut wanted = BTreeMap::new();
    for file in package_files(tree) {
        for (name, why) in fs::read_to_string(file)
            .unwrap_or_default()
            .lines()
            .filter_map(package)
        {
            wanted.entry(name).or_insert(why);
        }
    }
    if find_program("dpkg-query").is_none() {
        return Check::note(
            NAME,
            "this is not a Debian system",
            "install by your own means what the files named `packages` list",
        );
    }
    let asked = Command::new("dpkg-query")
        .args(["-W", "-f=${Package} ${db:Status-Status}\n"])
        .args(wanted.keys())
        .output();
    let text = asked
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default();
    let installed = |name: &str| text.lines().any(|line| line == format!("{name} installed"));
    let missing: Vec<_> = wanted.iter().filter(|(name, _)| !installed(name)).collect();
    if missing.is_empty() {
        return Check::ok(NAME, format!("all {} installed", wanted.len()));
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| name.as_str()).collect();
    let mut advice = format!(
        "make setup, or: apt-get install --no-install-recommends {}",
        names.join(" ")
    );
    for (name, why) in &missing {
        advice.push_str(&format!("\n  {name}: {why}"));
    }
    Check::lacking(
        needed,
        NAME,
        format!("{} of {} are missing", missing.len(), wanted.len()),
        advice,
    )
}

fn package_files(tree: &Path) -> Vec<PathBuf> {
    let mut files = vec![tree.join("scripts/packages")];
    if let Ok(dirs) = fs::read_dir(tree.join("guest-image")) {
        files.extend(dirs.filter_map(|entry| Some(entry.ok()?.path().join("packages"))));
    }
    files.retain(|file| file.is_file());
    files.sort();
    files
}

/// A line `name # why`.
fn package(line: &str) -> Option<(String, String)> {
    let (name, why) = line.split_once('#').unwrap_or((line, ""));
    let name = name.trim();
    (!name.is_empty()).then(|| (name.to_owned(), why.trim().to_owned()))
}

/// Whether the programs are built.
pub(super) fn programs(tree: &Path) -> Check {
    const NAME: &str = "programs";
    let dir = std::env::var_os("MANDOLINE_BIN").map_or_else(|| tree.join("target/release"), PathBuf::from);
    let missing: Vec<_> = PROGRAMS
        .into_iter()
        .filter(|name| !dir.join(name).is_file())
        .collect();
    match missing.is_empty() {
        true => Check::ok(NAME, format!("built, in {}", dir.display())),
        false => Check::note(
            NAME,
            format!("not built in {}: {}", dir.display(), missing.join(", ")),
            "`make demo` builds them (a few minutes)",
        ),
    }
}

/// Whether images are built.
pub(super) fn images() -> Check {
    const NAME: &str = "images";
    let Some(cache) = cache_dir() else {
        return Check::note(NAME, "no cache directory", "set MANDOLINE_CACHE or HOME");
    };
    let built = |kind: &str| {
        let dirs = fs::read_dir(cache.join(kind)).into_iter().flatten().flatten();
        dirs.filter(|entry| entry.path().join("manifest.json").is_file())
            .count()
    };
    let kinds = [
        ("kernel-up", "sliver kernel"),
        ("root", "sliver root"),
        ("node", "node image"),
    ];
    let missing: Vec<_> = kinds
        .iter()
        .filter(|(dir, _)| built(dir) == 0)
        .map(|(_, what)| *what)
        .collect();
    match missing.is_empty() {
        true => Check::ok(NAME, format!("cached in {}", cache.display())),
        false => Check::note(
            NAME,
            format!("not in {}: {}", cache.display(), missing.join(", ")),
            "`make demo` builds them (the kernel takes about five minutes)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(numbers("1.95.0") >= numbers("1.95"));
        assert!(numbers("1.100.0-nightly") > numbers("1.95"));
        assert!(numbers("1.94.1") < numbers("1.95"));
    }

    #[test]
    fn package_lines() {
        assert_eq!(
            package("bc   # kernel build"),
            Some(("bc".into(), "kernel build".into()))
        );
        assert_eq!(package("# a comment"), None);
        assert_eq!(package(""), None);
    }
}
