//! The saved state of vsock: the guest's address, and that its streams are not in it.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::persist::{RestoreError, Saved};
use crate::devices::vsock::Vsock;

const VERSION: u16 = 1;
const DEVICE: &str = "vsock";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The context id that the guest was told when it was saved. A restored one may have another: its driver asks for it
    /// again at the transport reset.
    guest_cid: u64,
}

pub(super) fn save(vsock: &Vsock) -> Saved {
    let guest_cid = u64::from_le_bytes(vsock.config);
    Saved::new(VERSION, &State { guest_cid })
}

pub(super) fn restore(vsock: &mut Vsock, saved: &Saved) -> Result<(), RestoreError> {
    let State { guest_cid } = saved.read(DEVICE, VERSION)?;
    if guest_cid < 3 || guest_cid >= u64::from(u32::MAX) {
        return Err(RestoreError::Value {
            device: DEVICE,
            name: "guest_cid",
            value: guest_cid.to_string(),
            allowed: "3 to 4294967294".to_owned(),
        });
    }
    vsock.transport_reset = true;
    Ok(())
}
