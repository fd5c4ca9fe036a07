//! `mandoline-nodemgr`: the only program on a node that creates VMs and gives them resources.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use mandoline_nodemgr::config::Config;
use mandoline_nodemgr::daemon;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// The node manager: pools, slivers, and the limits that hold them.
///
/// It must run as root. SIGTERM and SIGINT end it; slivers go on running and the next start takes them over.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; an empty one is a good one.
    #[arg(long, default_value = "/etc/mandoline/nodemgr.toml")]
    config: PathBuf,
    /// Reads the configuration, says whether it is good, and ends.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("MANDOLINE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mandoline-nodemgr: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::read(&arguments.config)?;
    if arguments.check {
        println!("{}: good", arguments.config.display());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: ending; slivers go on"),
                _ = interrupt.recv() => tracing::info!("SIGINT: ending; slivers go on"),
            }
            let _ = stop.send(true);
        });
        Ok(daemon::run(config, stopped).await?)
    })
}
