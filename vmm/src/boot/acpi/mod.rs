//! The hardware in ACPI's words (specification 6.5), for kernels that expect them: hardware-reduced, no PCI, no
//! PIC, no PIT, no RTC.
//!
//! ```text
//!   RSDP --> XSDT --+--> FADT --> DSDT   devices: serial port, virtio-mmio, VM generation id and its event
//!                   +--> MADT            local APICs, IOAPIC
//! ```
//!
//! The tables follow each other from [`ACPI_TABLES`] on. What the FADT's registers do is in
//! [`crate::devices::control`].

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::boot::layout::{ACPI_TABLES, ACPI_TABLES_SIZE, IOAPIC, LOCAL_APIC};
use crate::devices::control::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};

const OEM_ID: [u8; 6] = *b"MNDLIN";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

// FADT `IAPC_BOOT_ARCH` (specification 5.2.9.3): what a PC has and this has not. Its bits for an i8042 and for
// devices on an ISA bus say by being 0 that there is none.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_CMOS_RTC: u16 = 1 << 5;

/// The tables do not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "ACPI tables of {bytes} bytes for {vcpus} vCPUs and {devices} devices: at most {ACPI_TABLES_SIZE} bytes fit"
)]
pub struct TablesTooLong {
    vcpus: u8,
    devices: usize,
    bytes: usize,
}

/// The tables' bytes, to be written at [`ACPI_TABLES`], RSDP first. `devices`: window and interrupt line of each
/// virtio device.
pub fn build(vcpus: u8, devices: &[(u64, u32)]) -> Result<Vec<u8>, TablesTooLong> {
    // The RSDP comes first and is known last.
    let mut tables = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        // Tables are aligned to 8 bytes (specification 5.2).
        tables.resize(tables.len().next_multiple_of(8), 0);
        let at = ACPI_TABLES + tables.len() as u64;
        table.to_aml_bytes(&mut tables);
        at
    };
    let dsdt = place(&dsdt::build(devices));
    let entries = [place(&fadt(dsdt)), place(&madt(vcpus))];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let rsdp = Rsdp::new(OEM_ID, place(&xsdt));
    let mut first = Vec::with_capacity(Rsdp::len());
    rsdp.to_aml_bytes(&mut first);
    tables.splice(..first.len(), first);
    if tables.len() as u64 > ACPI_TABLES_SIZE {
        return Err(TablesTooLong {
            vcpus,
            devices: devices.len(),
            bytes: tables.len(),
        });
    }
    Ok(tables)
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |address: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(address),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // A kernel does not look for buttons among the fixed registers, which are not there.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_MSI | NO_CMOS_RTC).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Flags are 0: there is no PIC (`PCAT_COMPAT`). No interrupt source override: lines are pins, and the DSDT says
/// of each that it is edge-triggered and active high.
fn madt(vcpus: u8) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for cpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, IOAPIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use mandoline_api::monitor::MAX_VCPUS;

    use super::*;
    use crate::boot::layout::{MAX_DEVICES, device_gsi, device_window};

    fn devices(count: usize) -> Vec<(u64, u32)> {
        (0..count)
            .map(|n| (device_window(n), device_gsi(n).unwrap()))
            .collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address, its checksum checked.
    fn table(tables: &[u8], address: u64) -> &[u8] {
        let rest = &tables[(address - ACPI_TABLES) as usize..];
        let table = &rest[..u32_at(rest, 4) as usize];
        assert_eq!(
            sum(table),
            0,
            "checksum of {:?}",
            std::str::from_utf8(&table[..4])
        );
        table
    }

    /// Follows the pointers as a kernel does: FADT, MADT, DSDT.
    fn walk(tables: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let xsdt = table(tables, u64_at(tables, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 16));
        let (fadt, madt) = (table(tables, u64_at(xsdt, 36)), table(tables, u64_at(xsdt, 44)));
        let dsdt = table(tables, u64_at(fadt, 140));
        assert_eq!(
            [&fadt[..4], &madt[..4], &dsdt[..4]],
            [b"FACP".as_slice(), b"APIC", b"DSDT"]
        );
        [fadt, madt, dsdt]
    }

    #[test]
    fn every_table_is_found_and_its_checksum_is_right() {
        for (vcpus, count) in [(1, 0), (8, 5), (MAX_VCPUS, MAX_DEVICES)] {
            let tables = build(vcpus, &devices(count)).unwrap();
            walk(&tables);
        }
    }

    #[test]
    fn the_fadt_has_what_hardware_reduced_acpi_has() {
        let tables = build(1, &[]).unwrap();
        let [fadt, ..] = walk(&tables);
        // Specification table 5.9.
        assert_eq!(fadt.len(), 276);
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
        let register = |at: usize| {
            let &[space, bits, offset, access] = &fadt[at..at + 4] else {
                unreachable!()
            };
            assert_eq!((space, bits, offset, access), (1, 8, 0, 1));
            u64_at(fadt, at + 4) as u16
        };
        assert_eq!(
            (register(116), register(244), register(256)),
            (RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT)
        );
        assert_eq!(fadt[128], RESET_VALUE);
        // PM1a, PM timer and GPE0, 32 and 64 bits: not there.
        for at in [56, 64, 76, 80] {
            assert_eq!(u32_at(fadt, at), 0);
        }
        assert!(fadt[148..244].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_madt_has_every_cpu_and_no_pic() {
        for vcpus in [1, 8, MAX_VCPUS] {
            let tables = build(vcpus, &[]).unwrap();
            let [_, madt, _] = walk(&tables);
            assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (LOCAL_APIC, 0));
            let mut rest = &madt[44..];
            for cpu in 0..vcpus {
                assert_eq!(&rest[..8], [0, 8, cpu, cpu, 1, 0, 0, 0]);
                rest = &rest[8..];
            }
            assert_eq!(
                (rest.len(), rest[0], u32_at(rest, 4), u32_at(rest, 8)),
                (12, 1, IOAPIC, 0)
            );
        }
    }

    #[test]
    fn the_dsdt_has_a_window_and_a_line_for_each_device() {
        let find = |dsdt: &[u8], what: &[u8]| dsdt.windows(what.len()).filter(|w| *w == what).count();
        for count in [0, 1, MAX_DEVICES] {
            let tables = build(1, &devices(count)).unwrap();
            let [_, _, dsdt] = walk(&tables);
            assert_eq!(find(dsdt, b"LNRO0005\0"), count);
            for (window, gsi) in devices(count) {
                // Memory32Fixed, read-write (6.4.3.4); extended interrupt, consumer, edge, high, exclusive (6.4.3.6).
                let mut resources = vec![0x86, 9, 0, 1];
                resources.extend((window as u32).to_le_bytes());
                resources.extend([0, 0x10, 0, 0, 0x89, 6, 0, 3, 1]);
                resources.extend(gsi.to_le_bytes());
                assert_eq!(find(dsdt, &resources), 1, "{window:#x}");
            }
            assert_eq!(find(dsdt, b"VM_Gen_Counter\0"), 2);
            assert_eq!(find(dsdt, b"ACPI0013\0"), 1);
        }
    }
}
