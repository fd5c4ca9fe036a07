//! `mandoline`, the command that people type.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod admin;
mod args;
mod config;
mod demo;
mod doctor;
mod error;
mod node;
mod output;
mod rspec_args;
mod session;
mod slice;
mod ssh;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use tracing_subscriber::EnvFilter;

use crate::args::{Arguments, Command};
use crate::config::{Access, Config};
use crate::error::Result;
use crate::output::Output;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = match Arguments::from_arg_matches(&command().get_matches()) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let filter = EnvFilter::try_from_env("MANDOLINE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mandoline: {error}");
            error.code()
        }
    }
}

/// The command line, with the attribute table where it is wanted.
fn command() -> clap::Command {
    let table = rspec_args::help();
    Arguments::command().mut_subcommand("slice", |slice| {
        slice.mut_subcommand("create", |create| {
            create.after_long_help(format!("{EXAMPLE}\n{table}"))
        })
    })
}

const EXAMPLE: &str = "\
Example:
  mandoline slice create demo_first --node n1.lab --node n2.lab \\
      --rspec vm_type=kvm-microvm --rspec mem_limit=128MiB --rspec cpu_share=10 --wait
";

async fn run(arguments: &Arguments) -> Result<()> {
    let output = Output { json: arguments.json };
    // These need no authority, and no configuration that could be broken.
    match &arguments.command {
        Command::Doctor { node } => return doctor::doctor(output, *node),
        Command::Node(args::Node::Local(command)) => return node::local(output, command).await,
        Command::Demo(args) => return demo::demo(output, args).await,
        _ => {}
    }
    let file = Config::read(&config::path()?)?;
    let access = Access::resolve(arguments.authority.clone(), arguments.token.clone(), file);
    match &arguments.command {
        Command::Login(args) => session::login(&access, output, args).await,
        Command::Logout => session::logout(&access, output).await,
        Command::Whoami => session::whoami(&access, output).await,
        Command::Slice(command) => slice::slice(&access.client()?, output, command).await,
        Command::Sliver(command) => slice::sliver(&access.client()?, output, command).await,
        Command::Ssh(args) => slice::ssh(&access.client()?, args).await,
        Command::Node(command) => admin::node(&access.client()?, output, command).await,
        Command::Site(command) => admin::site(&access.client()?, output, command).await,
        Command::Person(command) => admin::person(&access.client()?, output, command).await,
        Command::Key(command) => admin::key(&access.client()?, output, command).await,
        Command::VmTypes => slice::vm_types(&access.client()?, output).await,
        Command::Doctor { .. } | Command::Demo(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_sound() {
        super::command().debug_assert();
    }
}
