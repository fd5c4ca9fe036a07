//! `mandoline-authority`: makes and runs an authority.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use mandoline_authority::service::{Config, Service};
use mandoline_authority::{rest, server, setup};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// The authority: people, sites, nodes, slices; PLCAPI (XML-RPC) at /PLCAPI/ and REST at /v1.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an authority with one administrator
    Init {
        /// Directory for its data; made, for its owner only
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// E-mail address of the administrator
        #[arg(long, value_name = "EMAIL")]
        admin_email: String,
        /// File with the administrator's password (mode 0600)
        #[arg(long, value_name = "FILE")]
        admin_password_file: PathBuf,
        /// PostgreSQL database instead of SQLite in DIR
        #[arg(long, value_name = "URL", env = "MANDOLINE_DATABASE", hide_env_values = true)]
        database: Option<String>,
    },
    /// Run it
    Serve {
        /// Directory of its data
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// Address and port; port 0 picks a free one
        #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8480")]
        listen: SocketAddr,
        /// PostgreSQL database instead of SQLite in DIR; several authorities may share one
        #[arg(long, value_name = "URL", env = "MANDOLINE_DATABASE", hide_env_values = true)]
        database: Option<String>,
        /// Take PlanetLab's HMAC-SHA1 from old nodes over PLCAPI (it can be replayed)
        #[arg(long)]
        compat_hmac_sha1: bool,
        /// Skip unknown nodes in AddSliceToNodes without an error, as PlanetLab's server did
        #[arg(long)]
        compat_skip_unknown: bool,
        /// Serve an address that is not loopback without encryption (behind a proxy that does TLS)
        #[arg(long)]
        plain_http: bool,
    },
    /// Print the OpenAPI description of the REST interface
    Openapi,
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,sqlx=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mandoline-authority: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    match command {
        Command::Init {
            data,
            admin_email,
            admin_password_file,
            database,
        } => {
            let password = setup::read_password(&admin_password_file).context("administrator's password")?;
            runtime.block_on(setup::init(&data, database.as_deref(), &admin_email, &password))?;
            println!(
                "authority made in {}; run it with: mandoline-authority serve --data {0}",
                data.display()
            );
            Ok(())
        }
        Command::Serve {
            data,
            listen,
            database,
            compat_hmac_sha1,
            compat_skip_unknown,
            plain_http,
        } => {
            if !listen.ip().is_loopback() && !plain_http {
                bail!(
                    "{listen} is not a loopback address, and passwords would cross the network in plain text: \
                     listen on 127.0.0.1 behind a proxy that does TLS, or say --plain-http"
                );
            }
            let config = Config {
                compat_hmac_sha1,
                compat_skip_unknown,
            };
            runtime.block_on(serve(data, listen, database, config))
        }
        Command::Openapi => {
            println!("{}", rest::openapi().context("cannot write the description")?);
            Ok(())
        }
    }
}

async fn serve(data: PathBuf, listen: SocketAddr, database: Option<String>, config: Config) -> Result<()> {
    let opened = setup::open(&data, database.as_deref()).await?;
    let listener = match TcpListener::bind(listen).await {
        Ok(listener) => listener,
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("{listen} is in use: stop what listens there, or choose another with --listen")
        }
        Err(error) => return Err(error).with_context(|| format!("cannot listen on {listen}")),
    };
    let (stop, stopping) = watch::channel(false);
    let service = Service::start(opened.db.clone(), config, stopping.clone()).await?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        tracing::info!("stopping");
        // The receivers live as long as the server does; if they are gone it has stopped.
        let _ = stop.send(true);
    });
    println!(
        "listening on http://{}",
        listener.local_addr().context("own address")?
    );
    server::serve(listener, service, stopping)
        .await
        .context("server")?;
    opened.db.close().await;
    Ok(())
}
