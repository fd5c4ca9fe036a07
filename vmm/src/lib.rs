//! One microVM, one process, on `/dev/kvm`.
//!
//! [`machine::build`] makes a VM of a [`config::Spec`]; [`monitor::run`] runs it to its end. Around them: the
//! configuration ([`config`], [`fds`]), the jail ([`jail`]), the control socket ([`api`]), and [`run`], which
//! boots a sliver by hand. What the outside sees is described in `mandoline_api::monitor`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod api;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod exit;
pub mod fds;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jail;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod park;
pub mod run;
pub mod state;
pub mod vcpu;
pub mod vm;
