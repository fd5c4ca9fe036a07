//! Who calls: passwords, sessions, signed calls of nodes, and the brake on guessing.

pub mod limiter;
pub mod node;
pub mod password;
pub mod session;
pub mod sshkey;
