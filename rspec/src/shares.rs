//! The node's 1000 CPU shares (OSDI/NSDI'04 paper, section 4.2.2) and how they are given out.
//!
//! ```text
//!   root
//!   ├── host services          a reserved part of the 1000
//!   ├── sliver, guarantee 500  weighs 500
//!   ├── sliver, guarantee 10   weighs 10
//!   └── best effort            weighs what is left; inside it slivers weigh by cpu_share
//! ```

use crate::RspecError;

/// Shares that a node has in all: a guarantee of 1 is at least 0.1 % of it.
pub const CPU_SHARES: u64 = 1000;
/// How a node's shares are given out: the host's part, guarantees, and what is left for best effort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guarantees {
    host: u64,
    given: u64,
}

impl Guarantees {
    /// A node of which `host` of 1000 are kept for its own services.
    pub fn new(host: u64) -> Self {
        Self {
            host: host.min(CPU_SHARES),
            given: 0,
        }
    }

    /// Shares still to give.
    pub fn left(&self) -> u64 {
        CPU_SHARES - self.host - self.given
    }

    /// Admits a guarantee, or says how much is left.
    pub fn admit(&mut self, share: u64) -> Result<(), RspecError> {
        if share > self.left() {
            return Err(RspecError::Exceeds {
                attribute: "cpu_guarantee".to_owned(),
                value: share.to_string(),
                allowed: format!("at most {} of {CPU_SHARES}", self.left()),
            });
        }
        self.given += share;
        Ok(())
    }

    /// Takes a guarantee back.
    pub fn give_back(&mut self, share: u64) {
        self.given -= share.min(self.given);
    }

    /// What the parent of all best-effort slivers weighs, never nothing.
    pub fn best_effort_weight(&self) -> u64 {
        self.left().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn guarantees_never_pass_the_node(host in 0u64..1200, asks in proptest::collection::vec(0u64..600, 0..20)) {
            let mut node = Guarantees::new(host);
            let mut held = Vec::new();
            for ask in asks {
                match node.admit(ask) {
                    Ok(()) => held.push(ask),
                    Err(_) => { if let Some(back) = held.pop() { node.give_back(back); } }
                }
                let sum: u64 = held.iter().sum();
                prop_assert_eq!(host.min(1000) + sum + node.left(), 1000);
            }
        }
    }
}
