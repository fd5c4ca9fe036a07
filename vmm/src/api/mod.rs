//! The control socket: HTTP/1.1 and JSON on a Unix socket, in Firecracker's request shapes.

pub mod http;
pub mod routes;
pub mod server;
