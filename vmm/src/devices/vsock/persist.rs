//! The saved state of vsock: the guest's address, and that its streams are not in it.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::persist::{RestoreError, Saved};
use crate::devices::vsock::muxer::FIRST_HOST_PORT;
use crate::devices::vsock::{TransportReset, Vsock};

const VERSION: u16 = 1;
const DEVICE: &str = "vsock";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The context id that the guest was told when it was saved. A restored one may have another: its driver asks for it
    /// again at the transport reset.
    guest_cid: u64,
    /// The next inward stream's port on the host. It goes on counting: the guest may still know the last ones.
    next_port: u32,
}

pub(super) fn save(vsock: &Vsock) -> Saved {
    let guest_cid = u64::from_le_bytes(vsock.config);
    let next_port = vsock.muxer.next_port;
    Saved::new(VERSION, &State { guest_cid, next_port })
}

pub(super) fn restore(vsock: &mut Vsock, saved: &Saved) -> Result<(), RestoreError> {
    let State { guest_cid, next_port } = saved.read(DEVICE, VERSION)?;
    if next_port < FIRST_HOST_PORT {
        return Err(RestoreError::Value {
            device: DEVICE,
            name: "next_port",
            value: next_port.to_string(),
            allowed: format!("{FIRST_HOST_PORT} to {}", u32::MAX),
        });
    }
    if guest_cid < 3 || guest_cid >= u64::from(u32::MAX) {
        return Err(RestoreError::Value {
            device: DEVICE,
            name: "guest_cid",
            value: guest_cid.to_string(),
            allowed: "3 to 4294967294".to_owned(),
        });
    }
    vsock.muxer.next_port = next_port;
    vsock.transport_reset = TransportReset::Due;
    Ok(())
}
