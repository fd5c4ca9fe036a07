//! `mandoline-vmm run`.

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {}
