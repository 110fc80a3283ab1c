//! The PC's devices. They name no engine: vCPUs reach them through [`bus::Bus`], they reach vCPUs
//! through [`irq::CpuSignal`], and all time comes from one [`clock::Clock`].
//!
//! Threading: each device sits behind its own mutex. Lock order (docs/design/devices.md):
//! bus table → device → interrupt controllers (PIC, IO-APIC) → local APIC. A device never holds its
//! own lock while it is called back by another device of the same rank.

pub mod ahci;
mod bell;
pub mod bus;
pub mod chipset;
pub mod clock;
pub mod dma;
pub mod irq;
pub mod net;
pub mod pci;
pub mod snapshot;
pub mod virtio;
