//! x86 as data: addresses, registers, descriptors, page tables, exceptions, the CPUID model, decoding.
//! Nothing here executes anything.

pub mod addr;
