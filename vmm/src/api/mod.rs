//! The control socket: HTTP/1.1 and JSON on a Unix socket, in Firecracker's request shapes.
//!
//! ```text
//!  bytes, descriptors --> server + http --> routes: Command --> before boot: configuring
//!                                                          \--> after:       running --> event loop
//! ```

pub mod configuring;
pub mod http;
pub mod routes;
pub mod running;
pub mod server;
