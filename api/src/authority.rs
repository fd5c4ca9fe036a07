//! The authority's interface: REST types and the node side of it.
