//! What the authority does, whichever interface asks: PLCAPI and REST both call these functions, and the
//! rules about who may do what are here and nowhere else.
//!
//! Each function works on a connection inside a transaction (see [`crate::db`]), so that an interface can
//! put several into one.

pub mod caller;
pub mod desired;
pub mod events;
pub mod keys;
pub mod lookup;
pub mod nodes;
pub mod persons;
pub mod rspec;
pub mod sites;
pub mod slice_members;
pub mod slices;
pub mod slivers;
pub mod tags;

pub use caller::{Caller, Role, Who};
pub use lookup::Ref;
