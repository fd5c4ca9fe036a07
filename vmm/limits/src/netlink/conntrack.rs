//! Connection tracking: ending the flows of one mark.

use super::{Connection, Request};
use crate::error::Result;

const SUBSYSTEM: u16 = 1;
const DELETE: u16 = 2;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;

impl Connection {
    /// Ends every tracked flow that carries this mark (on a netfilter connection). Each one is
    /// announced to listeners with its counters, as if it had ended by itself.
    pub fn end_flows(&mut self, mark: u32) -> Result<()> {
        // nfgenmsg: AF_INET, version 0, no resource id; then two 32-bit attributes in network order.
        let mut payload = vec![libc::AF_INET as u8, 0, 0, 0];
        for (kind, value) in [(CTA_MARK, mark), (CTA_MARK_MASK, u32::MAX)] {
            payload.extend_from_slice(&8u16.to_ne_bytes());
            payload.extend_from_slice(&kind.to_ne_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        let request = Request::new(
            format!("end the flows marked {mark:#x}"),
            SUBSYSTEM << 8 | DELETE,
            0,
            payload,
        );
        self.execute(&[request.tolerate(libc::ENOENT)])
    }
}
