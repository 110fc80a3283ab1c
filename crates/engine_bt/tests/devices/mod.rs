//! Devices for tests and benchmarks of the translator: memory that remembers, and a counter that runs.

#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "each test uses a part of it")]

use std::sync::{Arc, Mutex};

use engine::io::GeneralProtection;
use engine::{CpuIo, Signals};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86_interp::Parts;

use crate::common;

/// Device memory that remembers what was written, reads as a count, and a counter like the host's.
#[derive(Default)]
pub struct Devices {
    none: common::NoDevices,
    pub writes: Mutex<Vec<(u64, Vec<u8>)>>,
    reads: Mutex<u8>,
}

impl CpuIo for Devices {
    fn port_in(&self, vcpu: usize, port: u16, size: u8) -> u32 {
        self.none.port_in(vcpu, port, size)
    }
    fn port_out(&self, vcpu: usize, port: u16, size: u8, value: u32) {
        self.none.port_out(vcpu, port, size, value);
    }
    fn mmio_read(&self, _: usize, _: Gpa, data: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap();
        *reads = reads.wrapping_add(1);
        data.fill(0);
        data[0] = *reads;
    }
    fn mmio_write(&self, _: usize, gpa: Gpa, data: &[u8]) {
        self.writes.lock().unwrap().push((gpa.0, data.to_vec()));
    }
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, vcpu: usize, msr: u32) -> Result<u64, GeneralProtection> {
        self.none.apic_msr_read(vcpu, msr)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        #[allow(unsafe_code, reason = "reads the counter")]
        // SAFETY: the instruction is there, and Linux lets programs execute it.
        unsafe {
            std::arch::x86_64::_rdtsc()
        }
    }
    fn tsc_delta(&self) -> Option<u64> {
        Some(0)
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    fn system_time_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
    fn tsc_offset_changed(&self, _: usize, _: u64) {}
    fn apic_init(&self, _: usize) {}
}

/// A machine's only vCPU, with these devices.
pub fn parts(mem: &Arc<GuestMemory>, io: &Arc<Devices>) -> Parts {
    Parts {
        index: 0,
        vcpus: 1,
        mem: Arc::clone(mem),
        io: Arc::clone(io) as Arc<dyn CpuIo>,
        signals: Arc::new(Signals::default()),
        model: Arc::new(CpuModel::parse("max").unwrap()),
    }
}
