//! From a kernel file to a guest's first instruction: PVH, the memory map, the MP table, CPUID and registers.

pub mod cpuid;
pub mod elf;
pub mod layout;
pub mod loader;
pub mod mptable;
pub mod regs;
