//! What a hostile driver, and the host's end of a device, may do: one step after the other.
//!
//! A step is a byte that says which and then its numbers, little-endian. Addresses are a byte, too (see [`place`]), since
//! a fuzzer would rarely meet guest memory by 64 random bits.

use crate::fuzzing::input::Input;

/// Guest memory of the benches.
pub(super) const RAM: u64 = 16 << 20;
/// Buffers lie from here on, in places of 256 bytes.
pub(super) const BUFFERS: u64 = 0x10_0000;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Writes a descriptor.
    Descriptor {
        queue: u8,
        index: u8,
        place: u8,
        length: u16,
        flags: u8,
        next: u8,
    },
    /// Makes a head available; does not kick.
    Offer { queue: u8, head: u8 },
    /// Sets the available ring's index.
    Index { queue: u8, index: u16 },
    /// Kicks, and lets the event loop work.
    Kick { queue: u8 },
    /// Writes guest memory.
    Write { place: u8, bytes: Vec<u8> },
    /// Writes a register: its offset in words.
    Register { offset: u8, value: u32 },
    /// Writes the configuration space.
    Config { offset: u8, bytes: Vec<u8> },
    /// Resets the device and brings it up with empty rings.
    Up,
    /// Saves the device, and goes on with another that was made from what was saved.
    Twin,
    /// The VM stands still, and goes on.
    Pause,
    /// The host's end says something.
    Host { bytes: Vec<u8> },
    /// The host's end goes.
    Close,
    /// A vsock packet from the guest: its header's fields, and as much data as it says.
    Packet {
        operation: u8,
        host_port: u8,
        guest_port: u8,
        length: u16,
        flags: u8,
        credit: u16,
        forwarded: u16,
    },
    /// Makes the device's timers fire, where it has some.
    Timers,
}

const KINDS: u8 = 14;
/// Most bytes of a write.
const MOST: usize = 64;

/// Where a place is: mostly buffers, but what is special, too.
pub(super) fn place(place: u8) -> u64 {
    match place {
        0..=0xef => BUFFERS + 0x100 * u64::from(place),
        0xf0 => 0,
        // The first queue's table, available ring and used ring (`testing::Ring`), and the second's.
        0xf1 => 0x1_0000,
        0xf2 => 0x1_4000,
        0xf3 => 0x1_6000,
        0xf4 => 0x2_0000,
        0xf5 => 0x2_4000,
        0xf6 => 0x2_6000,
        0xf7 => RAM - 8,
        0xf8 => RAM,
        0xf9 => 0xc000_1000,
        0xfa => u64::MAX - 7,
        0xfb => 1 << 50,
        _ => 0x80_0001 + u64::from(place),
    }
}

/// A length: as it is, but for the largest.
pub(super) fn length(length: u16) -> u32 {
    match length {
        0xffff => u32::MAX,
        0xfffe => RAM as u32,
        0xfffd => 0x8000_0000,
        0xfffc => 16 * 300,
        length => u32::from(length),
    }
}

impl Step {
    /// The next step of a script.
    pub(super) fn read(input: &mut Input<'_>) -> Option<Self> {
        if input.is_empty() {
            return None;
        }
        let bytes = |input: &mut Input<'_>| {
            let count = usize::from(input.u8()) % (MOST + 1);
            input.bytes(count).to_vec()
        };
        Some(match input.u8() % KINDS {
            0 => Step::Descriptor {
                queue: input.u8(),
                index: input.u8(),
                place: input.u8(),
                length: input.u16(),
                flags: input.u8(),
                next: input.u8(),
            },
            1 => Step::Offer {
                queue: input.u8(),
                head: input.u8(),
            },
            2 => Step::Index {
                queue: input.u8(),
                index: input.u16(),
            },
            3 => Step::Kick { queue: input.u8() },
            4 => Step::Write {
                place: input.u8(),
                bytes: bytes(input),
            },
            5 => Step::Register {
                offset: input.u8(),
                value: input.u32(),
            },
            6 => Step::Config {
                offset: input.u8(),
                bytes: bytes(input),
            },
            7 => Step::Up,
            8 => Step::Twin,
            9 => Step::Pause,
            10 => Step::Host { bytes: bytes(input) },
            11 => Step::Close,
            12 => Step::Packet {
                operation: input.u8(),
                host_port: input.u8(),
                guest_port: input.u8(),
                length: input.u16(),
                flags: input.u8(),
                credit: input.u16(),
                forwarded: input.u16(),
            },
            _ => Step::Timers,
        })
    }

    /// Its bytes: what [`Step::read`] takes.
    #[cfg(test)]
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        let mut text = |kind: u8, numbers: &[u8], bytes: Option<&[u8]>| {
            to.push(kind);
            to.extend(numbers);
            if let Some(bytes) = bytes {
                to.push(u8::try_from(bytes.len()).unwrap());
                to.extend(bytes);
            }
        };
        let two = |value: &u16| value.to_le_bytes();
        match self {
            Step::Descriptor {
                queue,
                index,
                place,
                length,
                flags,
                next,
            } => {
                let [low, high] = two(length);
                text(0, &[*queue, *index, *place, low, high, *flags, *next], None);
            }
            Step::Offer { queue, head } => text(1, &[*queue, *head], None),
            Step::Index { queue, index } => text(2, &[*queue, two(index)[0], two(index)[1]], None),
            Step::Kick { queue } => text(3, &[*queue], None),
            Step::Write { place, bytes } => text(4, &[*place], Some(bytes)),
            Step::Register { offset, value } => {
                text(5, &[&[*offset][..], &value.to_le_bytes()].concat(), None);
            }
            Step::Config { offset, bytes } => text(6, &[*offset], Some(bytes)),
            Step::Up => text(7, &[], None),
            Step::Twin => text(8, &[], None),
            Step::Pause => text(9, &[], None),
            Step::Host { bytes } => text(10, &[], Some(bytes)),
            Step::Close => text(11, &[], None),
            Step::Packet {
                operation,
                host_port,
                guest_port,
                length,
                flags,
                credit,
                forwarded,
            } => {
                let numbers = [
                    &[*operation, *host_port, *guest_port][..],
                    &two(length),
                    &[*flags],
                    &two(credit),
                    &two(forwarded),
                ];
                text(12, &numbers.concat(), None);
            }
            Step::Timers => text(13, &[], None),
        }
    }
}
