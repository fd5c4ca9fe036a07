//! The part of the io benchmark that runs inside the lab node: slivers of each subject in turn, each under every
//! load, and the node's end of the network loads.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mandoline_api::agent::{Exec, ExecEvent, Request, frame, read_frame, write_frame};
use serde::{Deserialize, Serialize};

use crate::boot::node::{joined, make_tap, sparse_copy};
use crate::boot::subject::{Machine, Running, Subject};

/// What to measure, and with what.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    #[arg(long)]
    pub kernel: PathBuf,
    #[arg(long)]
    pub root: PathBuf,
    /// Sparse ext4 that each start gets a copy of.
    #[arg(long)]
    pub disk_template: PathBuf,
    #[arg(long)]
    pub vmm: PathBuf,
    #[arg(long)]
    pub runs: u32,
    #[arg(long)]
    pub load_ms: u64,
}

/// A line of the in-node part's output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Sample(Sample),
}

/// One sliver of one subject under every load.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub subject: String,
    pub run: u32,
    pub blk_iops_1: f64,
    pub blk_iops_8: f64,
    pub tcp_out_mbit: f64,
    pub tcp_in_mbit: f64,
    pub udp_out_pps: f64,
}

/// Subjects: name, whose monitor, whether the kernel moves frames.
pub(crate) const SUBJECTS: [(&str, Subject, bool); 4] = [
    ("mandoline-vmm", Subject::Mandoline, false),
    ("qemu-microvm", Subject::QemuMicrovm, false),
    ("mandoline-vmm vhost", Subject::Mandoline, true),
    ("qemu-microvm vhost", Subject::QemuMicrovm, true),
];

/// Where the guest finds the program and the blocks to read.
const WORK_DEVICE: &str = "/dev/vdc";
/// Blocks to read, behind the program.
const BLOCKS_BYTES: u64 = 96 << 20;
const HOST: &str = "10.200.0.1";

pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    make_tap("perf0", "10.200.0.1/32", "10.200.0.2/32")?;
    let (work, program_bytes) = work_disk()?;
    for run in 1..=args.runs {
        for (i, (name, subject, vhost)) in SUBJECTS.into_iter().enumerate() {
            let dir = tempfile::tempdir()?;
            let disk = dir.path().join("disk");
            sparse_copy(&args.disk_template, &disk)?;
            let machine = Machine {
                kernel: args.kernel.clone(),
                root: args.root.clone(),
                disk,
                work: Some(work.path().into()),
                mem_mib: 256,
                tap: "perf0".into(),
                vhost,
                mac: "02:00:0a:c8:00:02".into(),
                park: false,
                dir: dir.path().into(),
            };
            let sample = sliver(
                args,
                name,
                subject,
                &machine,
                run,
                3 + run * 8 + i as u32,
                program_bytes,
            )
            .with_context(|| format!("{name} run {run}"))?;
            let mut out = std::io::stdout().lock();
            serde_json::to_writer(&mut out, &Line::Sample(sample))?;
            out.write_all(b"\n")?;
            out.flush()?;
        }
    }
    Ok(())
}

/// A disk that begins with this program; the rest is blocks that are not holes. Returns where they begin.
fn work_disk() -> Result<(tempfile::NamedTempFile, u64)> {
    let mut disk = tempfile::NamedTempFile::new()?;
    let program = std::fs::read(std::env::current_exe()?)?;
    let begin = (program.len() as u64).next_multiple_of(1 << 20);
    disk.write_all(&program)?;
    disk.write_all(&vec![0; (begin - program.len() as u64) as usize])?;
    let chunk: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    for _ in 0..BLOCKS_BYTES >> 20 {
        disk.write_all(&chunk)?;
    }
    disk.as_file().sync_all()?;
    Ok((disk, begin))
}

fn sliver(
    args: &NodeArgs,
    name: &str,
    subject: Subject,
    machine: &Machine,
    run: u32,
    cid: u32,
    begin: u64,
) -> Result<Sample> {
    let mut running = subject.start(machine, &args.vmm, cid)?;
    running.wait_mark()?;
    joined(&mut running, machine)?;
    let copy = format!("head -c {begin} {WORK_DEVICE} > /run/work && chmod +x /run/work");
    exec(&running, &["sh", "-c", &copy])?;
    let ms = args.load_ms.to_string();
    let blk = |threads: &str| -> Result<f64> {
        let (from, to) = (begin.to_string(), (begin + BLOCKS_BYTES).to_string());
        let said = exec(
            &running,
            &[
                "/run/work",
                "in-guest",
                "blk",
                "--device",
                WORK_DEVICE,
                "--from",
                &from,
                "--to",
                &to,
                "--threads",
                threads,
                "--ms",
                &ms,
            ],
        )?;
        said.trim().parse().with_context(|| said.clone())
    };
    Ok(Sample {
        subject: name.into(),
        run,
        blk_iops_1: blk("1")?,
        blk_iops_8: blk("8")?,
        tcp_out_mbit: tcp_out(&running, &ms)?,
        tcp_in_mbit: tcp_in(&running, args.load_ms)?,
        udp_out_pps: udp_out(&running, &ms)?,
    })
}

fn tcp_out(running: &Running, ms: &str) -> Result<f64> {
    let listener = TcpListener::bind((HOST, 0))?;
    let to = listener.local_addr()?.to_string();
    let receiver = std::thread::spawn(move || -> Result<f64> {
        let (mut stream, _) = listener.accept()?;
        let (began, mut buffer, mut bytes) = (Instant::now(), vec![0; 256 << 10], 0u64);
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(bytes as f64 * 8e-6 / began.elapsed().as_secs_f64()),
                count => bytes += count as u64,
            }
        }
    });
    exec(
        running,
        &["/run/work", "in-guest", "tcp-send", "--to", &to, "--ms", ms],
    )?;
    receiver
        .join()
        .map_err(|_| anyhow::anyhow!("the receiver panicked"))?
}

fn tcp_in(running: &Running, ms: u64) -> Result<f64> {
    let listener = TcpListener::bind((HOST, 0))?;
    let from = listener.local_addr()?.to_string();
    let sender = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let (began, buffer) = (Instant::now(), vec![7; 256 << 10]);
        while began.elapsed() < Duration::from_millis(ms) {
            stream.write_all(&buffer)?;
        }
        Ok(())
    });
    let said = exec(
        running,
        &["/run/work", "in-guest", "tcp-receive", "--from", &from],
    )?;
    sender
        .join()
        .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    let bytes: f64 = said.trim().parse().with_context(|| said.clone())?;
    Ok(bytes * 8e-6)
}

fn udp_out(running: &Running, ms: &str) -> Result<f64> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let to = socket.local_addr()?.to_string();
    let receiver = std::thread::spawn(move || -> f64 {
        let (mut buffer, mut first, mut last, mut packets) = ([0; 128], None, None, 0u64);
        // The load has its own end; a silence of half a second is ours.
        while first.is_none() || last.is_some_and(|at: Instant| at.elapsed() < Duration::from_millis(400)) {
            if socket.recv(&mut buffer).is_ok() {
                let now = Instant::now();
                first.get_or_insert(now);
                last = Some(now);
                packets += 1;
            }
        }
        match (first, last) {
            (Some(first), Some(last)) if last > first => packets as f64 / (last - first).as_secs_f64(),
            _ => 0.0,
        }
    });
    exec(
        running,
        &["/run/work", "in-guest", "udp-send", "--to", &to, "--ms", ms],
    )?;
    receiver
        .join()
        .map_err(|_| anyhow::anyhow!("the receiver panicked"))
}

/// Runs a program in the guest to its end; its output.
fn exec(running: &Running, argv: &[&str]) -> Result<String> {
    let mut stream = running.connect_agent()?;
    write_frame(
        &mut stream,
        &Request::Exec(Exec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            ..Exec::default()
        }),
    )?;
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    while let Some(body) = read_frame(&mut stream)? {
        match frame::decode_reply(&body)? {
            ExecEvent::Stdout { data } => output.extend(data.0),
            ExecEvent::Stderr { data } => errors.extend(data.0),
            ExecEvent::Exited(status) if status.code == Some(0) => {
                return Ok(String::from_utf8_lossy(&output).into_owned());
            }
            ExecEvent::Exited(status) => {
                bail!(
                    "{argv:?} in the guest: {status:?}: {}",
                    String::from_utf8_lossy(&errors)
                )
            }
            _ => {}
        }
    }
    bail!("{argv:?}: the guest closed the stream")
}
