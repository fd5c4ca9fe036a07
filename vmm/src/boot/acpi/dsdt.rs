//! The DSDT: the devices that no bus can be asked for, and the sleep state that is "off".

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::layout::{GENERATION_GSI, GENERATION_ID, MMIO_WINDOW, SERIAL_GSI};
use crate::bus::{SERIAL_PORT, SERIAL_PORTS};
use crate::devices::control::SLEEP_TYPE_OFF;

/// Since this revision integers have 64 bits.
const REVISION: u8 = 2;
const HEADER_BYTES: u32 = 36;
/// "Something about the device has changed" (specification 5.6.6).
const NOTIFY_DEVICE: u8 = 0x80;

/// The table.
pub(super) fn build(devices: &[(u64, u32)]) -> impl Aml {
    let mut aml = Vec::new();
    // Type for the control register, three values that nobody uses.
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut aml);

    let serial = Serial;
    let generation = Generation;
    let virtio: Vec<Virtio> = devices
        .iter()
        .enumerate()
        .map(|(n, (window, gsi))| Virtio {
            n,
            window: *window,
            gsi: *gsi,
        })
        .collect();
    let mut all: Vec<&dyn Aml> = vec![&serial, &generation];
    all.extend(virtio.iter().map(|device| device as &dyn Aml));
    Scope::new("_SB_".into(), all).to_aml_bytes(&mut aml);

    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&aml);
    Table(table)
}

struct Table(Sdt);

impl Aml for Table {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

/// An interrupt as an irqfd gives it: edge-triggered, active high, nobody else's.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The 16550.
struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS as u8),
                        &edge(SERIAL_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A virtio-mmio transport, by the name that Linux knows it under.
struct Virtio {
    n: usize,
    window: u64,
    gsi: u32,
}

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self { n, window, gsi } = self;
        Device::new(
            Path::new(&format!("V{n:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(*n as u32)),
                // Coherent with the caches, as everything here.
                &Name::new("_CCA".into(), &1u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, *window as u32, MMIO_WINDOW as u32),
                        &edge(*gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The VM generation id ("Virtual Machine Generation ID", Microsoft 2012), and the generic event device
/// (specification 5.6.9) that announces a new one.
struct Generation;

impl Aml for Generation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "VGEN".into(),
            vec![
                // Drivers know it by the names below; this one is ours.
                &Name::new("_HID".into(), &"MNDL0001"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                // The address' low and high half.
                &Name::new(
                    "ADDR".into(),
                    &Package::new(vec![&(GENERATION_ID as u32), &((GENERATION_ID >> 32) as u32)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
        let generation = Path::new("\\_SB_.VGEN");
        let notify = Notify::new(&generation, &NOTIFY_DEVICE);
        let ours = Equal::new(&Arg(0), &GENERATION_GSI);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(GENERATION_GSI)])),
                &Method::new("_EVT".into(), 1, true, vec![&If::new(&ours, vec![&notify])]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
