//! Types and clients of Mandoline's four interfaces: monitor, agent, node manager, authority.
//!
//! Each interface is one module behind one feature of the same name, so that the guest agent (PID 1 of
//! every sliver, small and static) takes in only its own protocol: `default-features = false,
//! features = ["agent"]`. Clients come with `unix-client` and `authority-client`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "authority")]
pub mod authority;
#[cfg(feature = "authority-client")]
pub mod authority_client;
#[cfg(feature = "monitor")]
pub mod monitor;
#[cfg(feature = "nodemgr")]
pub mod nodemgr;
#[cfg(any(feature = "unix-client", feature = "authority-client"))]
pub mod sse;
#[cfg(feature = "unix-client")]
pub mod unix;
#[cfg(feature = "xmlrpc")]
pub mod xmlrpc;
