//! The node manager: pools, slivers, enforcement; and the slice creation service beside it.
//!
//! [`daemon`] puts the node manager together. [`core`] takes operations ([`ops`], [`owner`]) and writes them
//! down ([`state`], [`store`], [`secret`]); a [`supervisor`] for each sliver makes them real through a backend
//! ([`vm_type`], [`kvm`], limited by [`cgroup`]) and tells what happens ([`events`]). [`http`] is the
//! interface, as JSON and as [`xmlrpc`], of [`methods`]; [`caller`] is who may use it, [`services`] how slivers
//! get there, [`accounts`] the way in by ssh. [`usage`] is what is used, [`sensors`] tell it. [`net`] is the slivers' network, [`scs`] an unprivileged client.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod accounts;
pub mod caller;
pub mod capacity;
pub mod cgroup;
pub mod config;
pub mod core;
pub mod daemon;
pub mod events;
pub mod host_service;
pub mod http;
pub mod kvm;
pub mod methods;
pub mod net;
pub mod ops;
pub mod owner;
pub mod policy;
pub mod pressure;
pub mod qemu;
pub mod scs;
pub mod secret;
pub mod sensors;
pub mod services;
pub mod state;
pub mod store;
pub mod supervisor;
pub mod usage;
pub mod vm_type;
pub mod xmlrpc;
