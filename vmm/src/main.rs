//! `mandoline-vmm`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use mandoline_vmm::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let exit = match &cli.command {
        None => mandoline_vmm::vm::run(&cli.vm),
        Some(Command::Vm(args)) => mandoline_vmm::vm::run(args),
        Some(Command::Filters) => {
            print!("{}", mandoline_vmm::jail::seccomp::describe());
            return ExitCode::SUCCESS;
        }
        Some(Command::Set(args)) => {
            // The words after `set`, which is the first.
            let words: Vec<String> = std::env::args().skip(2).collect();
            return match mandoline_vmm::run::set(args, &words) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("mandoline-vmm: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Some(Command::Run(args)) => {
            return match mandoline_vmm::run::run(args) {
                Ok(code) => ExitCode::from(code),
                Err(error) => {
                    eprintln!("mandoline-vmm: {error}");
                    ExitCode::FAILURE
                }
            };
        }
    };
    ExitCode::from(exit.reason.exit_code())
}
