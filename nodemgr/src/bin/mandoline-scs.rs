//! `mandoline-scs`: the slice creation service, run on every node as the user `pl_conf`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use mandoline_nodemgr::scs::Service;
use mandoline_nodemgr::scs::config::Config;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Slice creation service: makes this node run the slivers that its authority wants.
///
/// Needs no privileges: it calls the node manager over a Unix socket, which knows it by its user id, and the
/// authority over HTTP. Everything of its state that matters is kept by those two; the state directory holds
/// the node's key alone.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Settings; an empty file takes the defaults.
    #[arg(long, value_name = "FILE", default_value = "/etc/mandoline/scs.toml")]
    config: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("MANDOLINE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match serve(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let service = Service::new(Config::read(&arguments.config)?)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = service.run() => {}
        _ = terminate.recv() => tracing::info!("asked to end"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    Ok(())
}
