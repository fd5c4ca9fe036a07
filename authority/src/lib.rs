//! The authority: principals, nodes, slices; PLCAPI and REST.
