//! Saved state of devices, in a versioned form.
//!
//! A saved device is three things: its transport's registers, how far it got in each queue, and what its model
//! adds ([`Saved`], JSON with a version of its own). All of it is untrusted when it comes back: a device refuses
//! what it could not have written.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a device model keeps, beside its queues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Version of the model's form: each model counts its own.
    pub version: u16,
    /// In that form.
    pub state: serde_json::Value,
}

/// State that a device cannot take back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Written by another version of the model.
    #[error("state of {device} has version {got}; this monitor reads {known}")]
    Version {
        /// Which model.
        device: &'static str,
        /// The version found.
        got: u16,
        /// The version known.
        known: u16,
    },
    /// Not of the form that the version has.
    #[error("state of {device}: {source}")]
    Form {
        /// Which model.
        device: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A value that cannot be.
    #[error("state of {device}: {name} is {value}; allowed: {allowed}")]
    Value {
        /// Which model or part.
        device: &'static str,
        /// Which value.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// The host failed.
    #[error("state of {device}: {what}: {source}")]
    Host {
        /// Which model.
        device: &'static str,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

impl Saved {
    /// Puts `state` in its saved form. A state is plain data, so this cannot fail; if it did, the state would be null and
    /// refused when it comes back.
    pub fn new(version: u16, state: &impl Serialize) -> Self {
        let state = serde_json::to_value(state).unwrap_or_default();
        Self { version, state }
    }

    /// The state back, if its version is `known`.
    pub fn read<T: DeserializeOwned>(&self, device: &'static str, known: u16) -> Result<T, RestoreError> {
        if self.version != known {
            let got = self.version;
            return Err(RestoreError::Version { device, got, known });
        }
        T::deserialize(&self.state).map_err(|source| RestoreError::Form { device, source })
    }
}

/// How far a device got in a queue.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The available ring's next entry.
    pub next_available: u16,
    /// The used ring's next entry.
    pub next_used: u16,
    /// Heads that the device holds (a balloon's buffer for statistics).
    pub held: Vec<u16>,
}

/// The whole of a device in its slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice {
    /// Its name, as in the log; a device is put back into the slot of this name only.
    pub name: String,
    /// Its type's number.
    pub kind: u32,
    /// Its transport.
    pub transport: SavedTransport,
    /// Where it stands in its queues; absent before its driver is ready, and for queues that the driver left out.
    pub queues: Vec<Option<Progress>>,
    /// What the model adds.
    pub model: Saved,
}

/// A transport's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "named as the registers, virtio 1.2, 4.2.2")]
pub struct SavedTransport {
    pub status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub driver_features: u64,
    pub queue_select: u32,
    pub interrupt_status: u32,
    pub needs_reset: bool,
    pub config_generation: u32,
    pub queues: Vec<SavedQueue>,
}

/// A queue's registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "named as the registers, virtio 1.2, 4.2.2")]
pub struct SavedQueue {
    pub size: u32,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    pub ready: bool,
}
