//! Where a vCPU's port and memory accesses go.
//!
//! Device windows have one size and follow each other, so that the bus is an index, not a search.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::monitor::{EXIT_PAGE, EXIT_PAGE_SIZE};

use crate::boot::layout::{MMIO_WINDOW, VIRTIO_MMIO};
use crate::devices::control::{Control, I8042_COMMAND, RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use crate::devices::serial::Uart;
use crate::devices::virtio::mmio::Transport;
use crate::log::RateLimit;

/// The serial port's first port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports it has.
pub const SERIAL_PORTS: u16 = 8;
/// What an empty bus gives.
const FLOATING: u8 = 0xff;

/// Everything that a vCPU can reach.
pub struct Bus {
    uart: Arc<Uart>,
    control: Arc<Control>,
    virtio: Vec<Transport>,
    /// Memory that KVM lets the guest read only.
    read_only: Vec<Range<u64>>,
    complaints: RateLimit,
}

impl Bus {
    /// Puts the devices on the bus; virtio devices in the order of their windows. Stores to what is `read_only` come here,
    /// loads from it do not.
    pub fn new(
        uart: Arc<Uart>,
        control: Arc<Control>,
        virtio: Vec<Transport>,
        read_only: Vec<Range<u64>>,
    ) -> Self {
        Self {
            uart,
            control,
            virtio,
            read_only,
            complaints: RateLimit::new(1, Duration::from_secs(10)),
        }
    }

    /// Every device as it is at power-on.
    pub fn power_on(&self) {
        for transport in &self.virtio {
            transport.power_on();
        }
        self.uart.power_on();
    }

    /// `in`: string instructions repeat the port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match port {
                SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => {
                    self.uart.read((port - SERIAL_PORT) as u8)
                }
                // Always ready for a command: a kernel that resets through it waits for that.
                I8042_COMMAND => 0,
                SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT => 0,
                _ => FLOATING,
            };
        }
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        for byte in data {
            match port {
                SERIAL_PORT.. if port - SERIAL_PORT < SERIAL_PORTS => {
                    self.uart.write((port - SERIAL_PORT) as u8, *byte);
                }
                _ => self.control.port_write(port, *byte),
            }
        }
    }

    /// A load from the hole.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None if exit_page(address).is_some() => data.fill(0),
            None => data.fill(FLOATING),
        }
    }

    /// A store to the hole.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.write(offset, data);
        } else if let (Some(offset), Some(value)) = (exit_page(address), data.first()) {
            self.control.page_write(offset, *value);
        } else if self.read_only.iter().any(|window| window.contains(&address))
            && let Some(suppressed) = self.complaints.pass()
        {
            tracing::warn!(
                suppressed,
                "a store to read-only memory at {address:#x} is ignored"
            );
        }
    }

    fn transport(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(VIRTIO_MMIO)?;
        let transport = self.virtio.get(usize::try_from(offset / MMIO_WINDOW).ok()?)?;
        Some((transport, offset % MMIO_WINDOW))
    }
}

fn exit_page(address: u64) -> Option<u64> {
    address
        .checked_sub(EXIT_PAGE)
        .filter(|offset| *offset < EXIT_PAGE_SIZE)
}
