//! From a kernel file to a guest's first instruction: image formats, boot protocols, the memory map, the MP table
//! or ACPI, CPUID and registers.

pub mod acpi;
pub mod bzimage;
pub mod cpuid;
pub mod elf;
pub mod image;
pub mod layout;
pub mod linux64;
pub mod loader;
pub mod memory_map;
pub mod mptable;
pub mod pvh;
pub mod regs;
