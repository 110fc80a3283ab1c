//! A vCPU with memory and no devices, for tests and benchmarks of the interpreter alone.

#![allow(
    dead_code,
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "each test uses a part of it; ports carry bytes"
)]

use std::sync::{Arc, Mutex};

use engine::io::GeneralProtection;
use engine::{CpuIo, Signals};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86::{Attr, CpuState, Segment};
use x86_interp::{Interp, Parts};

/// Ports: COM1 is kept, 0xf4 and 0x604 are remembered; everything else reads as all ones.
#[derive(Default)]
pub struct NoDevices {
    pub serial: Mutex<Vec<u8>>,
    pub exit: Mutex<Option<u32>>,
    pub echo: bool,
    pub signals: Mutex<Option<Arc<Signals>>>,
}

impl CpuIo for NoDevices {
    fn port_in(&self, _: usize, port: u16, _: u8) -> u32 {
        if port == 0x3fd { 0x60 } else { u32::MAX }
    }
    fn port_out(&self, _: usize, port: u16, _: u8, value: u32) {
        match port {
            0x3f8 => {
                self.serial.lock().unwrap().push(value as u8);
                if self.echo {
                    eprint!("{}", value as u8 as char);
                }
            }
            0xf4 | 0x604 => {
                *self.exit.lock().unwrap() = Some(value);
                if let Some(s) = &*self.signals.lock().unwrap() {
                    s.raise(engine::signals::Signal::KICK);
                }
            }
            _ => {}
        }
    }
    fn mmio_read(&self, _: usize, _: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: usize, _: Gpa, _: &[u8]) {}
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, _: usize, _: u32) -> Result<u64, GeneralProtection> {
        Ok(0xfee0_0900)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        0
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

/// A vCPU, its memory and what it said.
pub struct Mini {
    pub mem: Arc<GuestMemory>,
    pub io: Arc<NoDevices>,
    pub vcpu: Interp,
}

impl Mini {
    pub fn new(bytes: u64) -> Self {
        let mem = GuestMemory::new(bytes).unwrap();
        let signals = Arc::new(Signals::default());
        let io = Arc::new(NoDevices { echo: std::env::var_os("ECHO").is_some(), ..NoDevices::default() });
        *io.signals.lock().unwrap() = Some(Arc::clone(&signals));
        let vcpu = Interp::new(Parts {
            index: 0,
            vcpus: 1,
            mem: Arc::clone(&mem),
            io: Arc::clone(&io) as Arc<dyn CpuIo>,
            signals,
            model: Arc::new(CpuModel::parse("max").unwrap()),
        });
        Self { mem, io, vcpu }
    }
}

/// 64-bit code at level 0 with the first GiB mapped one to one by 2-MiB pages; tables at 0x1000 to 0x3fff.
pub fn long_mode(mem: &GuestMemory, rip: u64, rsp: u64) -> CpuState {
    mem.write(Gpa(0x1000), &0x2007u64.to_le_bytes()).unwrap();
    mem.write(Gpa(0x2000), &0x3007u64.to_le_bytes()).unwrap();
    for i in 0..512u64 {
        mem.write(Gpa(0x3000 + 8 * i), &(i << 21 | 0xe7).to_le_bytes()).unwrap();
    }
    let mut s = CpuState::reset();
    let flat = |attr| Segment { selector: 0x10, base: 0, limit: u32::MAX, attr: Attr(attr) };
    s.seg = [flat(0xc093); 6];
    s.seg[1] = Segment { selector: 8, ..flat(0xa09b) };
    s.cr0 = 0x8005_0033;
    s.cr3 = 0x1000;
    s.cr4 = 0x0004_06a0;
    s.xcr0 = 7;
    s.msr.efer = 0xd01;
    s.rip = rip;
    s.gpr[4] = rsp;
    s
}

/// 32-bit protected mode without paging, as PVH and multiboot enter.
pub fn protected_mode(rip: u64, rbx: u64) -> CpuState {
    let mut s = CpuState::reset();
    let flat = |attr| Segment { selector: 0x10, base: 0, limit: u32::MAX, attr: Attr(attr) };
    s.seg = [flat(0xc093); 6];
    s.seg[1] = Segment { selector: 8, ..flat(0xc09b) };
    s.cr0 = 0x11;
    s.rip = rip;
    s.gpr[3] = rbx;
    s
}
