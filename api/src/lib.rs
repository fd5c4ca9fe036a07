//! Types and clients of Mandoline's four interfaces: monitor, agent, node manager, authority.
