//! `mandoline-lab`: starts virtual nodes, runs things in them, takes them down.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use mandoline_lab::{Lab, NodeInfo, NodeSpec, doctor};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Virtual nodes with a real /dev/kvm inside. No root needed; everything is gone when it ends.
#[derive(Parser)]
#[command(name = "mandoline-lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(clap::Args)]
struct NodeOptions {
    /// A directory of files for the node's configuration disk (pl_node.txt, owner.json ...); once for each node
    #[arg(long, value_name = "DIR")]
    config_dir: Vec<PathBuf>,
    /// A setting for pl_node.txt, such as SERVICES="nodemgr scs"
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = setting)]
    settings: Vec<(String, String)>,
    /// The service of this machine (the authority) that nodes reach at 10.0.2.100:80
    #[arg(long, value_name = "ADDRESS:PORT")]
    authority: Option<SocketAddr>,
    /// Without Mandoline's programs and sliver images
    #[arg(long)]
    bare: bool,
    /// A further program for /usr/lib/mandoline/bin
    #[arg(long = "program", value_name = "FILE")]
    programs: Vec<PathBuf>,
    /// An erofs image for /opt/peer (guest-image/node/peer)
    #[arg(long, value_name = "FILE")]
    peer: Option<PathBuf>,
    /// Memory of each node, in MiB
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=1_048_576))]
    memory: u32,
    /// CPUs of each node
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// Length of each node's sparse state disk, in GiB
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=16384))]
    state_gib: u64,
    /// More for the kernel's command line
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Start nodes and keep them until Ctrl-C; one JSON line for each when it is up
    Up {
        /// How many
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
        nodes: u8,
        /// JSON on stdout (there is no other form; the option is for symmetry with our other programs)
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        options: NodeOptions,
    },
    /// Start a node, run a command in it, take it down; exits as the command did
    Run {
        #[command(flatten)]
        options: NodeOptions,
        /// The command, after `--`
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Run a command in a node that is up
    Exec {
        /// The node's directory
        dir: PathBuf,
        /// The command, after `--`
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Copy a file into a node that is up
    CopyIn {
        /// The node's directory
        dir: PathBuf,
        /// The file here
        from: PathBuf,
        /// The path there
        to: String,
    },
    /// Copy a file out of a node that is up
    CopyOut {
        /// The node's directory
        dir: PathBuf,
        /// The path there
        from: String,
        /// The file here
        to: PathBuf,
    },
    /// Forward a port of 127.0.0.1 to a TCP port of the node; prints the former
    Forward {
        /// The node's directory
        dir: PathBuf,
        /// The port there
        port: u16,
    },
    /// Print what the node's console has shown
    Console {
        /// The node's directory
        dir: PathBuf,
    },
    /// Print as JSON what this machine has for a lab; status 1 when something is missing
    Doctor,
    /// Run a tiny virtual machine that adds two numbers through /dev/kvm; prints the sum
    TinyVm {
        /// One
        a: u8,
        /// The other
        b: u8,
    },
    /// Remove the directories of labs that were killed
    Sweep,
    /// Join stdin and stdout to a TCP connection (QEMU uses this for connections to the authority)
    #[command(hide = true)]
    Connect {
        /// Where to
        address: SocketAddr,
    },
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("allowed: NAME=VALUE".into()),
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mandoline-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Subcommands) -> Result<ExitCode> {
    match command {
        Subcommands::Up {
            nodes,
            json: _,
            options,
        } => up(nodes, &options),
        Subcommands::Run { options, argv } => {
            mandoline_lab::clean_up_on_signals();
            let mut lab = Lab::new()?;
            let node = lab.start(spec(&options, 1)?)?;
            status(node.command(&words(&argv)))
        }
        Subcommands::Exec { dir, argv } => status(NodeInfo::load(&dir)?.command(&words(&argv))),
        Subcommands::CopyIn { dir, from, to } => done(NodeInfo::load(&dir)?.copy_in(&from, &to)),
        Subcommands::CopyOut { dir, from, to } => done(NodeInfo::load(&dir)?.copy_out(&from, &to)),
        Subcommands::Forward { dir, port } => {
            println!("{}", NodeInfo::load(&dir)?.forward(port)?);
            Ok(ExitCode::SUCCESS)
        }
        Subcommands::Console { dir } => {
            let path = NodeInfo::load(&dir)?.console;
            let mut file =
                std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
            std::io::copy(&mut file, &mut std::io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
        Subcommands::Doctor => {
            let report = doctor::examine()?;
            println!("{}", serde_json::to_string_pretty(&report)?);
            Ok(if report.problems.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Subcommands::TinyVm { a, b } => {
            println!("{}", mandoline_lab::tiny_vm::add(a, b)?);
            Ok(ExitCode::SUCCESS)
        }
        Subcommands::Sweep => {
            println!("{}", mandoline_lab::sweep()?);
            Ok(ExitCode::SUCCESS)
        }
        Subcommands::Connect { address } => {
            mandoline_lab::connect::connect(address).with_context(|| format!("connection to {address}"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn done(result: mandoline_lab::Result<()>) -> Result<ExitCode> {
    result?;
    Ok(ExitCode::SUCCESS)
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}

fn status(mut command: std::process::Command) -> Result<ExitCode> {
    let code = command.status().context("cannot run ssh")?.code().unwrap_or(255);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
}

/// The `number`-th node, from 1.
fn spec(options: &NodeOptions, number: u8) -> Result<NodeSpec> {
    let mut spec = NodeSpec::named(&format!("node{number}"));
    spec.memory_mib = options.memory;
    spec.cpus = options.cpus;
    spec.state_bytes = options.state_gib << 30;
    spec.config_dir = options.config_dir.get(usize::from(number) - 1).cloned();
    spec.settings = options.settings.iter().cloned().collect();
    spec.extra_programs = options.programs.clone();
    spec.peer = options.peer.clone();
    spec.service = options.authority;
    spec.append = options.append.clone();
    if let Some(name) = spec.settings.get("HOST_NAME") {
        spec.name = name.clone();
    }
    Ok(if options.bare {
        spec
    } else {
        spec.with_mandoline()?
    })
}

fn up(nodes: u8, options: &NodeOptions) -> Result<ExitCode> {
    if options.config_dir.len() > usize::from(nodes) {
        bail!(
            "--config-dir was given {} times for {nodes} node(s)",
            options.config_dir.len()
        );
    }
    mandoline_lab::clean_up_on_signals();
    let mut lab = Lab::new()?;
    eprintln!("mandoline-lab: nodes run by {}", lab.accel().words);
    let specs = (1..=nodes)
        .map(|number| spec(options, number))
        .collect::<Result<Vec<_>>>()?;
    let mut running = lab.start_all(specs)?;
    for node in &running {
        println!("{}", serde_json::to_string(node.info())?);
    }
    // Until a signal comes, or the nodes have powered themselves off.
    let mut died = false;
    for node in &mut running {
        node.wait();
        let console = node.console();
        if console.contains("Kernel panic") {
            died = true;
            let lines: Vec<&str> = console.lines().collect();
            let last = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!(
                "mandoline-lab: the kernel of {} panicked; its console:\n{last}",
                node.info().name
            );
        }
    }
    eprintln!("mandoline-lab: the nodes have powered off");
    Ok(if died {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
