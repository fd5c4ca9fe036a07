//! However the program ends, no process and no directory of a lab is left.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

type Tested = Result<(), Box<dyn std::error::Error>>;

/// A `mandoline-lab up` in a base directory of its own.
fn up(base: &Path) -> Result<(Child, PathBuf), Box<dyn std::error::Error>> {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_mandoline-lab"))
        .args(["up", "--bare", "--memory", "1024"])
        .env("MANDOLINE_LAB_DIR", base)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = lab.stdout.take().ok_or("no stdout")?;
    BufReader::new(stdout).read_line(&mut line)?;
    let node: serde_json::Value = serde_json::from_str(&line)?;
    let dir = node["dir"].as_str().ok_or("no dir")?.into();
    Ok((lab, dir))
}

/// Process ids of those whose command line names something below `base`.
fn users_of(base: &Path) -> Vec<u32> {
    let needle = base.to_string_lossy().into_owned();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&needle)
        })
        .collect()
}

/// The kernel kills them when their parent dies; that they are gone from /proc may take it a moment.
fn wait_until_none_use(base: &Path) {
    let began = std::time::Instant::now();
    while !users_of(base).is_empty() {
        assert!(
            began.elapsed().as_secs() < 30,
            "still there: {:?}",
            users_of(base)
        );
        std::thread::yield_now();
    }
}

fn labs_in(base: &Path) -> usize {
    std::fs::read_dir(base).map_or(0, |d| d.flatten().count())
}

#[test]
#[ignore = "lab"]
fn after_sigterm() -> Tested {
    let base = tempfile::tempdir()?;
    let (mut lab, dir) = up(base.path())?;
    assert!(
        dir.is_dir() && users_of(base.path()).len() >= 2,
        "QEMU and ssh run"
    );
    let pid = rustix::process::Pid::from_raw(lab.id().cast_signed()).ok_or("no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    assert_eq!(lab.wait()?.code(), Some(128 + 15));
    wait_until_none_use(base.path());
    assert_eq!(labs_in(base.path()), 0);
    Ok(())
}

#[test]
#[ignore = "lab"]
fn after_kill() -> Tested {
    let base = tempfile::tempdir()?;
    let (mut lab, dir) = up(base.path())?;
    lab.kill()?;
    lab.wait()?;
    wait_until_none_use(base.path());
    // Its directory is swept by whoever is next.
    assert!(dir.exists());
    let swept = Command::new(env!("CARGO_BIN_EXE_mandoline-lab"))
        .arg("sweep")
        .env("MANDOLINE_LAB_DIR", base.path())
        .output()?;
    assert_eq!(swept.stdout, b"1\n");
    assert_eq!(labs_in(base.path()), 0);
    Ok(())
}
