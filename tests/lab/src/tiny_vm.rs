//! The smallest proof that `/dev/kvm` is real: a virtual machine with one page of 16-bit code that adds two numbers,
//! says the sum on a port and halts.

use crate::{LabError, Result};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use std::path::PathBuf;

/// Where the code lies, in the guest's memory.
const CODE_AT: u64 = 0x1000;
const PAGE: usize = 4096;
const PORT: u16 = 0x3f8;

/// Page-aligned, as KVM wants memory to be.
#[repr(align(4096))]
struct Page([u8; PAGE]);

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> LabError {
    move |e| LabError::File {
        what,
        path: PathBuf::from("/dev/kvm"),
        source: std::io::Error::from_raw_os_error(e.errno()),
    }
}

/// `KVM_GET_API_VERSION`, and whether a machine can be made.
pub fn answers() -> (Option<i32>, bool) {
    match Kvm::new() {
        Ok(kvm) => (Some(kvm.get_api_version()), kvm.create_vm().is_ok()),
        Err(_) => (None, false),
    }
}

/// Runs the machine; gives what it said on its port, which is `a + b`.
pub fn add(a: u8, b: u8) -> Result<u8> {
    let mut page = Box::new(Page([0xf4; PAGE]));
    // mov dx, PORT; mov al, a; add al, b; out dx, al; hlt
    let [low, high] = PORT.to_le_bytes();
    let code = [0xba, low, high, 0xb0, a, 0x04, b, 0xee, 0xf4];
    page.0[..code.len()].copy_from_slice(&code);

    let device = Kvm::new().map_err(kvm("open"))?;
    let vm = device.create_vm().map_err(kvm("make a machine with"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_AT,
        memory_size: PAGE as u64,
        userspace_addr: (&raw mut page.0) as u64,
    };
    // SAFETY: the region is exactly the page, which is aligned, belongs to us alone, and outlives the machine: it is
    // declared before `vm`, so dropped after it.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give memory through"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm("make a CPU with"))?;
    let mut system = vcpu.get_sregs().map_err(kvm("read registers through"))?;
    system.cs.base = 0;
    system.cs.selector = 0;
    vcpu.set_sregs(&system).map_err(kvm("set registers through"))?;
    let mut registers = vcpu.get_regs().map_err(kvm("read registers through"))?;
    registers.rip = CODE_AT;
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(kvm("set registers through"))?;
    let mut said = None;
    loop {
        match vcpu.run().map_err(kvm("run"))? {
            VcpuExit::IoOut(PORT, [sum]) => said = Some(*sum),
            VcpuExit::Hlt => break,
            exit => return Err(unexpected(format!("{exit:?}"))),
        }
    }
    said.ok_or_else(|| unexpected("it halted without a word".into()))
}

fn unexpected(value: String) -> LabError {
    LabError::Value {
        name: "what the tiny virtual machine did",
        value,
        allowed: "one byte out of its port, then a halt".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_here_too_where_kvm_answers() {
        // KVM by pure emulation runs such payloads as well. Where there is no KVM there is nothing to test.
        if answers().1 {
            assert_eq!(add(40, 2).expect("sum"), 42);
        }
    }
}
