//! An HTTP/1.1 and JSON client over a Unix socket, for callers of the monitor and the node manager.
