//! rspecs and their arithmetic, names, rcaps, loans, tickets: the vocabulary of Mandoline.
//!
//! No I/O and no async: everything here is data and arithmetic, so that the node manager, the authority
//! and the command line agree on what an rspec means by sharing this code.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attributes;
mod error;
mod loan;
mod name;
mod page;
mod pool;
mod ports;
mod profile;
mod rcap;
mod rspec;
mod shares;
mod ticket;
mod units;
mod value;
mod xml;

pub use attributes::{
    ATTRIBUTE_TABLE_VERSION, ATTRIBUTES, Attribute, Kind, Setter, Type, attribute, attribute_names,
};
pub use error::{NameError, RcapError, RspecError};
pub use loan::{Loan, LoanResource, Unlent, with_loans};
pub use name::{AuthorityName, LOCAL_NAMES, LOGIN_BASE_MAX, SLICE_NAME_MAX, SliceId, SliceName};
pub use page::attributes_page;
pub use ports::{PortRange, PortSet, Protocol};
pub use profile::{MANDOLINE, PROFILES, Profile};
pub use rcap::Rcap;
pub use rspec::Rspec;
pub use shares::{CPU_SHARES, Guarantees};
pub use ticket::{
    Claims, Narrowing, PublicKey, TICKET_LINKS_MAX, TICKET_MAX, Ticket, TicketError, Trust, TrustedKey,
};
pub use units::{format_bytes, format_rate, parse_bytes, parse_rate};
pub use value::Value;

/// The `vm_type` of our own microVMs, which a slice gets when it names none.
pub const KVM_MICROVM: &str = "kvm-microvm";

/// Names of virtualisations from the papers; a node takes them where its operator maps them to a type of
/// its own (architecture paper, sections 5.1.3 and 5.4).
pub const PAPER_VM_TYPES: [&str; 3] = ["linux_vserver", "linux-vserver", "xen-domain"];
