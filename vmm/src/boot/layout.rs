//! The guest's physical address space, in one place.
//!
//! ```text
//! 0x0000_0000  RAM (low): page 0 unused
//! 0x0000_0500    GDT (64-bit Linux)
//! 0x0000_6000    hvm_start_info (PVH)
//! 0x0000_6040    module list (initial RAM disk; PVH)
//! 0x0000_7000    memory map (PVH), or boot_params, the "zero page" (64-bit Linux)
//! 0x0000_8000    seed of the guest's random numbers (64-bit Linux)
//! 0x0000_9000    page tables: PML4, PDPT, up to four PDs (64-bit Linux)
//! 0x0002_0000    kernel command line (2 KiB)
//! 0x0009_fc00    MP table (the last KiB of base memory, where kernels look for it)
//! 0x000a_0000  hole of the old PC
//! 0x000e_0000    ACPI tables, RSDP first
//! 0x000f_0000    VM generation id, in a page of its own
//! 0x0010_0000  RAM (high): kernel, ... initial RAM disk at the end of low RAM
//! 0xc000_0000  MMIO: boot/exit page, then one 4 KiB page for each virtio device
//! 0xfec0_0000  IOAPIC        0xfee0_0000  local APIC        0xfffb_d000  KVM's TSS (Intel)
//! 0x1_0000_0000  RAM above the hole
//! next GiB       persistent memory: a window for each device
//! ```
//!
//! The constants agree with Firecracker's, so that tools which know one find their way in the other.

/// Where `hvm_start_info` stands.
pub const START_INFO: u64 = 0x6000;
/// Where the list of modules stands.
pub const MODULE_LIST: u64 = 0x6040;
/// Where the memory map stands.
pub const MEMORY_MAP: u64 = 0x7000;
/// Where the GDT stands that long mode starts with.
pub const GDT: u64 = 0x500;
/// Where `boot_params` stands, a page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Where the seed of the guest's random numbers stands.
pub const RNG_SEED: u64 = 0x8000;
/// Where the page tables stand that long mode starts with.
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the command line stands.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of command line, with the final NUL: x86's `COMMAND_LINE_SIZE`.
pub const COMMAND_LINE_SIZE: usize = 2048;
/// Where base memory ends and the MP table begins.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Room for the MP table: up to the end of base memory.
pub const MP_TABLE_SIZE: usize = 0x400;
/// Where the ACPI tables stand: the RSDP, where kernels that are not told look for it, then the others.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = 0x1_0000;
/// Where the VM generation id stands: in a page of its own, below 1 MiB but outside what a kernel takes for RAM.
pub const GENERATION_ID: u64 = 0xf_0000;
/// The page of the VM generation id.
pub const GENERATION_ID_SIZE: u64 = 0x1000;
/// First byte of high memory: nothing of a kernel may be loaded below.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Where the hole for devices begins: RAM stops here and goes on at [`RAM_ABOVE_HOLE`].
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const RAM_ABOVE_HOLE: u64 = 0x1_0000_0000;
/// Where windows of persistent memory begin and end: a large page, so that both sides can map it by such.
pub const PMEM_ALIGNMENT: u64 = 2 << 20;

/// The first window of persistent memory, when RAM ends with `last`: the next GiB, since Linux wants what is no RAM in
/// other sections (128 MiB) than RAM.
pub const fn pmem_window(last: u64) -> u64 {
    let end = last.saturating_add(1);
    let end = if end < RAM_ABOVE_HOLE { RAM_ABOVE_HOLE } else { end };
    end.next_multiple_of(1 << 30)
}

/// Size of one device's window in the hole.
pub const MMIO_WINDOW: u64 = 0x1000;
/// The first virtio device's window, after the boot/exit page.
pub const VIRTIO_MMIO: u64 = MMIO_HOLE + MMIO_WINDOW;
/// The IOAPIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel for real-mode emulation.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Number of the serial port's interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// Number of the interrupt line by which a new VM generation id is announced.
pub const GENERATION_GSI: u32 = 3;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u32 = 24;

/// The interrupt line of the `n`th virtio device: 5 to 23 without 8 and 13, which a PC-minded kernel takes
/// for its clock and its coprocessor.
pub const fn device_gsi(n: usize) -> Option<u32> {
    const LINES: [u32; MAX_DEVICES] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
    if n < MAX_DEVICES { Some(LINES[n]) } else { None }
}

/// Most virtio devices: one interrupt line each.
pub const MAX_DEVICES: usize = 17;

/// The window of the `n`th virtio device.
pub const fn device_window(n: usize) -> u64 {
    VIRTIO_MMIO + n as u64 * MMIO_WINDOW
}
