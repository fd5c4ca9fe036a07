//! A vCPU's registers at the guest's first instruction.
//!
//! PVH (Xen's `docs/misc/pvh.pandoc`, "x86/HVM direct boot ABI"): 32-bit protected mode, paging off, flat
//! segments, EBX the address of `hvm_start_info`, interrupts off. The 64-bit Linux boot protocol: long mode on
//! page tables that map the kernel at its own address, flat segments, RSI the address of `boot_params`,
//! interrupts off. Application processors wait for their SIPI, which KVM's local APIC does by itself.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use mandoline_api::monitor::Hardware;

use crate::boot::image::Entry;
use crate::boot::layout::{GDT, PAGE_TABLES, START_INFO, ZERO_PAGE};
use crate::boot::linux64::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// MTRRs on, write-back by default: without it a kernel maps RAM uncached or complains.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTERNAL: u32 = 7 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

/// Registers could not be set.
#[derive(Debug, thiserror::Error)]
#[error("{call} of vCPU {cpu}: {source}")]
pub struct Error {
    /// The KVM call.
    call: &'static str,
    /// Which vCPU.
    cpu: u8,
    /// What KVM said.
    source: kvm_ioctls::Error,
}

/// x87, SSE and AVX: what XCR0 is set to as far as the CPU has it.
const XCR0_COMMON: u64 = 7;

/// Sets XCR0 to what every kernel will choose first. Under emulated SVM (QEMU's TCG) KVM never hears of the
/// guest's own XSETBV, its CPUID leaf 0xd keeps the size of the reset state, and Linux warns at length that its
/// XSAVE areas are inconsistent; with this they agree from the start. Elsewhere the guest just sets it again.
pub fn set_xcr0(vcpu: &VcpuFd, cpu: u8, supported: u64) -> Result<(), Error> {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        reserved: 0,
        value: supported & XCR0_COMMON,
    };
    vcpu.set_xcrs(&xcrs).map_err(|source| Error {
        call: "KVM_SET_XCRS",
        cpu,
        source,
    })
}

/// Sets the registers of one vCPU; the boot processor (0) starts at `entry`.
pub fn set(vcpu: &VcpuFd, cpu: u8, entry: Entry, hardware: Hardware) -> Result<(), Error> {
    let failed = |call| move |source| Error { call, cpu, source };
    set_msrs(vcpu).map_err(failed("KVM_SET_MSRS"))?;
    set_lapic(vcpu, hardware).map_err(failed("KVM_SET_LAPIC"))?;
    if cpu != 0 {
        return Ok(());
    }
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(failed("KVM_SET_FPU"))?;

    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let regs = match entry {
        Entry::Pvh { rip } => {
            protected_mode(&mut sregs);
            kvm_regs {
                rip,
                rbx: START_INFO,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
        Entry::Linux64 { rip } => {
            long_mode(&mut sregs);
            kvm_regs {
                rip,
                rsi: ZERO_PAGE,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            }
        }
    };
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

fn protected_mode(sregs: &mut kvm_sregs) {
    // The segments live in the hidden registers alone: the kernel loads its own GDT before it touches one.
    sregs.cs = flat(0x8, 0xb);
    set_data(sregs, flat(0x10, 0x3));
    sregs.tr = task(0x18);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = kvm_segment {
        db: 0,
        l: 1,
        ..flat(CODE_SELECTOR, 0xb)
    };
    set_data(sregs, flat(DATA_SELECTOR, 0x3));
    // Behind the GDT's end: nobody loads it again.
    sregs.tr = task(size_of_val(&GDT_ENTRIES) as u16);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = size_of_val(&GDT_ENTRIES) as u16 - 1;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
}

fn set_data(sregs: &mut kvm_sregs, data: kvm_segment) {
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
}

/// A busy task state segment, without which no CPU enters the guest.
fn task(selector: u16) -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        selector,
        ..Default::default()
    }
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MTRR_DEFAULT, MTRR_ON_WRITE_BACK),
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    // KVM stops at the first that it does not know and says how many it took: both are conveniences.
    vcpu.set_msrs(&msrs).map(|_| ())
}

/// LINT1 takes the NMI. With an MP table LINT0 takes the PIC's interrupts (virtual wire mode, MP specification
/// 3.6.2.2). ACPI tells of no PIC, so no kernel would ever silence the one that KVM has: it is shut out here.
fn set_lapic(vcpu: &VcpuFd, hardware: Hardware) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = vcpu.get_lapic()?;
    let lint0 = match hardware {
        Hardware::MpTable => DELIVERY_EXTERNAL,
        Hardware::Acpi => LVT_MASKED,
    };
    for (offset, mode) in [(LVT_LINT0, lint0), (LVT_LINT1, DELIVERY_NMI)] {
        let mut bytes = [0u8; 4];
        for (byte, register) in bytes.iter_mut().zip(&lapic.regs[offset..offset + 4]) {
            *byte = *register as u8;
        }
        let value = u32::from_le_bytes(bytes) & !DELIVERY_MASK | mode;
        for (byte, register) in value
            .to_le_bytes()
            .into_iter()
            .zip(&mut lapic.regs[offset..offset + 4])
        {
            *register = byte as _;
        }
    }
    vcpu.set_lapic(&lapic)
}
