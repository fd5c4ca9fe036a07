//! The authority: principals, nodes, slices; PLCAPI and REST.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod auth;
pub mod db;
pub mod domain;
pub mod error;
pub mod plc;
pub mod rest;
pub mod server;
pub mod service;
pub mod setup;
