//! PLCAPI: PlanetLab's XML-RPC interface at `/PLCAPI/`.
//!
//! ```text
//! XML ─► [value] ─► [method]: argument count (101) ─► auth struct (102) ─► [auth]: who, role (103, 108)
//!        ─► argument types (102) ─► body: [people], [nodes], [slices], ... ─► domain ─► [objects] ─► XML
//! ```
//!
//! Fault texts are PlanetLab's: clients match them.

mod auth;
mod fault;
mod filter;
mod http;
mod method;
mod methods;
mod objects;
mod slivers;
mod system;
mod value;

pub use http::router;
pub use methods::METHODS;
