//! What a sliver's attributes ask of the network.

use mandoline_limits::Rate;
use mandoline_limits::shaper::Bandwidth;
use mandoline_rspec::{PortSet, Rspec, SliceId};

use super::NetError;

/// PlanetLab's smallest guarantee (architecture paper, section 5.1.3).
const LEAST_GUARANTEE: u64 = 1_000;

/// What a sliver's attributes ask of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wants {
    /// The slice: a day's bytes are its own, not the sliver's.
    pub slice: String,
    /// `base_rate` and `burst_rate`.
    pub bandwidth: Bandwidth,
    /// `sustained_rate`: the mean over a day. `None` = as much as `bandwidth` allows.
    pub sustained: Option<Rate>,
    /// `flow_limit`. `None` = an even share of the node's table.
    pub flow_limit: Option<u32>,
    /// `ports`: those of the node's address that are the sliver's alone.
    pub ports: PortSet,
}

impl Wants {
    /// What `rspec` asks for.
    pub fn of(slice: &SliceId, rspec: &Rspec) -> Result<Self, NetError> {
        let rate = |name| rspec.number(name).map(Rate::from_bits_per_second).transpose();
        let guarantee = rspec.number("base_rate").unwrap_or_default().max(LEAST_GUARANTEE);
        let flows = |limit| u32::try_from(limit).unwrap_or(u32::MAX);
        Ok(Self {
            slice: slice.to_string(),
            bandwidth: Bandwidth {
                guarantee: Rate::from_bits_per_second(guarantee)?,
                peak: rate("burst_rate")?,
            },
            sustained: rate("sustained_rate")?,
            flow_limit: rspec.number("flow_limit").map(flows),
            ports: rspec.ports(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use mandoline_rspec::AuthorityName;
    use serde_json::json;

    use super::*;

    #[test]
    fn every_attribute_about_the_network_is_heard() {
        let slice = SliceId::parse("plc.princeton_codeen", &AuthorityName::new("plc").unwrap(), &[]).unwrap();
        let none = Wants::of(&slice, &Rspec::new()).unwrap();
        assert_eq!(none.bandwidth.guarantee.bits_per_second(), 1_000, "always some");
        assert_eq!(
            (none.bandwidth.peak, none.sustained, none.flow_limit),
            (None, None, None)
        );
        let json = json!({
            "base_rate": "2 Mbit/s", "burst_rate": "10 Mbit/s", "sustained_rate": "1.5 Mbit/s", "flow_limit": 5000,
            "ports": ["tcp/80", "udp/53"],
        });
        let all = Wants::of(&slice, &Rspec::from_json(&json).unwrap()).unwrap();
        let rate = |bits| Rate::from_bits_per_second(bits).unwrap();
        assert_eq!(all.slice, "plc.princeton_codeen");
        assert_eq!(
            (all.bandwidth.guarantee, all.bandwidth.peak),
            (rate(2_000_000), Some(rate(10_000_000)))
        );
        assert_eq!(
            (all.sustained, all.flow_limit),
            (Some(rate(1_500_000)), Some(5_000))
        );
        assert_eq!(all.ports.to_string(), "tcp/80,udp/53");
    }
}
