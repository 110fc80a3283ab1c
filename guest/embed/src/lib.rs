//! The contract suite as bytes: an ELF64 image that boots by multiboot 1 and by PVH.
//!
//! Its source is `guest/src`; `guest/README.md` says how to run it elsewhere and how to add a test.

/// The image of the contract suite.
pub static CONTRACT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/contract.elf"));
