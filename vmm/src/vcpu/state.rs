//! Everything that a vCPU knows: to put it back to its first instruction when the guest reboots, and to see
//! whether it sleeps.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs,
    kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// What a kernel sets and a new one must not find: entry points, its per-CPU base, and the pages that KVM writes clocks and
/// stolen time to (they lie in memory that is cleared).
const VOLATILE_MSRS: [u32; 15] = [
    0x4b56_4d00, // KVM wall clock
    0x4b56_4d01, // KVM system time
    0x4b56_4d02, // KVM asynchronous page faults
    0x4b56_4d03, // KVM steal time
    0x4b56_4d04, // KVM paravirtual end of interrupt
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    MSR_TSC_DEADLINE,
];
/// Bytes of the local APIC's registers (Intel SDM volume 3, 11.4.1).
const LVT_TIMER: usize = 0x320;
const TIMER_INITIAL_COUNT: usize = 0x380;
const TIMER_CURRENT_COUNT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const INTERRUPT_REQUESTS: usize = 0x200;
const LVT_MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const TIMER_DEADLINE: u32 = 2 << 17;

/// KVM refused a vCPU's state.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct Error {
    call: &'static str,
    source: kvm_ioctls::Error,
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error { call, source }
}

/// A vCPU before its first instruction.
pub struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl PowerOn {
    /// Takes the state of a vCPU that has been set up and has not run.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, Error> {
        Ok(Self {
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            fpu: vcpu.get_fpu().map_err(failed("KVM_GET_FPU"))?,
            // Not there on a CPU without XSAVE.
            xcrs: vcpu.get_xcrs().ok(),
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            mp_state: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
        })
    }

    /// Puts the vCPU back into it. The time stamp counter goes on: nothing in a kernel wants it to be young.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        // One by one: an MSR that this CPU does not have stops a list, and has no value to clear either.
        for index in VOLATILE_MSRS {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            if let Ok(msrs) = Msrs::from_entries(&[entry]) {
                let _ = vcpu.set_msrs(&msrs);
            }
        }
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_fpu(&self.fpu).map_err(failed("KVM_SET_FPU"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // Sets the APIC's base and mode, so it goes before the APIC's registers.
        vcpu.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))
    }
}

/// How deep a paused vCPU sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sleep {
    /// It has something to do.
    Awake,
    /// It waits for an interrupt, and its timer fires in so many ns.
    Until(u64),
    /// It waits for an interrupt and has set no timer.
    Deep,
}

/// Looks at a paused vCPU.
pub fn sleep(vcpu: &VcpuFd) -> Result<Sleep, Error> {
    let state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
    if matches!(state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) {
        return Ok(Sleep::Deep);
    }
    let events = vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let pending =
        events.interrupt.injected | events.exception.injected | events.nmi.injected | events.nmi.pending;
    if state != KVM_MP_STATE_HALTED || pending != 0 {
        return Ok(Sleep::Awake);
    }
    let lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    if (0..8).any(|word| register(&lapic, INTERRUPT_REQUESTS + 0x10 * word) != 0) {
        return Ok(Sleep::Awake);
    }
    let timer = register(&lapic, LVT_TIMER);
    if timer & TIMER_MODE == TIMER_DEADLINE {
        let (deadline, now) = (read_msr(vcpu, MSR_TSC_DEADLINE)?, read_msr(vcpu, MSR_TSC)?);
        let khz = u64::from(vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?);
        return Ok(until_deadline(timer & LVT_MASKED != 0, deadline, now, khz));
    }
    Ok(until_count(
        timer & LVT_MASKED != 0 || register(&lapic, TIMER_INITIAL_COUNT) == 0,
        register(&lapic, TIMER_CURRENT_COUNT),
        register(&lapic, TIMER_DIVIDE),
    ))
}

fn until_deadline(masked: bool, deadline: u64, now: u64, khz: u64) -> Sleep {
    match deadline.checked_sub(now) {
        _ if masked || deadline == 0 => Sleep::Deep,
        Some(left) if khz > 0 => {
            let ns = u128::from(left) * 1_000_000 / u128::from(khz);
            Sleep::Until(u64::try_from(ns).unwrap_or(u64::MAX))
        }
        _ => Sleep::Awake,
    }
}

/// The count goes down once every `divide` ns: KVM's APIC timer runs at 1 GHz.
fn until_count(off: bool, count: u32, divide: u32) -> Sleep {
    let step = 1u64 << ((((divide >> 1) & 4 | divide & 3) + 1) & 7);
    match count {
        _ if off => Sleep::Deep,
        0 => Sleep::Awake,
        count => Sleep::Until(u64::from(count) * step),
    }
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let mut bytes = [0u8; 4];
    for (to, from) in bytes.iter_mut().zip(lapic.regs.iter().skip(offset)) {
        *to = *from as u8;
    }
    u32::from_le_bytes(bytes)
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<u64, Error> {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let call = "KVM_GET_MSRS";
    let no_memory = |_| failed(call)(kvm_ioctls::Error::new(libc::ENOMEM));
    let mut msrs = Msrs::from_entries(&[entry]).map_err(no_memory)?;
    match vcpu.get_msrs(&mut msrs).map_err(failed(call))? {
        1 => Ok(msrs.as_slice().first().map_or(0, |entry| entry.data)),
        _ => Err(failed(call)(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_become_times() {
        assert_eq!(until_deadline(false, 0, 5, 1000), Sleep::Deep);
        assert_eq!(until_deadline(true, 9, 5, 1000), Sleep::Deep);
        assert_eq!(until_deadline(false, 5, 9, 1000), Sleep::Awake);
        assert_eq!(
            until_deadline(false, 3_000_000, 1_000_000, 2_000_000),
            Sleep::Until(1_000_000)
        );
        assert_eq!(until_deadline(false, u64::MAX, 0, 1), Sleep::Until(u64::MAX));
        assert_eq!(until_deadline(false, 9, 5, 0), Sleep::Awake, "an unknown clock");
    }

    #[test]
    fn counts_are_divided_as_the_manual_says() {
        // Divide configuration: 0b1011 is 1, 0b0000 is 2, 0b1010 is 128 (SDM volume 3, figure 11-10).
        for (divide, step) in [
            (0b1011, 1),
            (0b0000, 2),
            (0b0001, 4),
            (0b0011, 16),
            (0b1000, 32),
            (0b1010, 128),
        ] {
            assert_eq!(
                until_count(false, 10, divide),
                Sleep::Until(10 * step),
                "{divide:#b}"
            );
        }
        assert_eq!(until_count(false, 0, 0), Sleep::Awake);
        assert_eq!(until_count(true, 10, 0), Sleep::Deep);
    }
}
