//! Our side: one interpreted vCPU without devices. Whatever asks a device is noted, and takes QEMU's answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::io::GeneralProtection;
use engine::{Cause, CpuIo, Signals, Vcpu, VcpuExit};
use guestmem::{Gpa, GuestMemory};
use x86::CpuState;
use x86::bits::{dr, rflags};
use x86::cpuid::CpuModel;
use x86::paging::{Access, AccessKind};
use x86::state::sreg;
use x86_interp::{Interp, Parts};

use crate::state::Registers;

/// An address that no instruction has: it is not canonical.
const NOWHERE: u64 = 1 << 63;

/// No devices: remembers that one was asked.
#[derive(Default)]
struct Noted {
    read: AtomicBool,
}

impl CpuIo for Noted {
    fn port_in(&self, _: usize, _: u16, _: u8) -> u32 {
        self.read.store(true, Ordering::Relaxed);
        u32::MAX
    }
    fn port_out(&self, _: usize, _: u16, _: u8, _: u32) {}
    fn mmio_read(&self, _: usize, _: Gpa, data: &mut [u8]) {
        self.read.store(true, Ordering::Relaxed);
        data.fill(0xff);
    }
    fn mmio_write(&self, _: usize, _: Gpa, _: &[u8]) {}
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        self.read.store(true, Ordering::Relaxed);
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, _: usize, _: u32) -> Result<u64, GeneralProtection> {
        self.read.store(true, Ordering::Relaxed);
        Ok(0)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        self.read.store(true, Ordering::Relaxed);
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

/// What one step was.
pub struct Stepped {
    /// A device, the clock or the APIC was read.
    pub read_device: bool,
    /// Exceptions delivered on the way (each of them is a step of QEMU's).
    pub exceptions: u64,
    /// Why the vCPU came back.
    pub exit: VcpuExit,
}

/// The vCPU.
pub struct Ours {
    vcpu: Interp,
    mem: Arc<GuestMemory>,
    io: Arc<Noted>,
}

impl Ours {
    /// A vCPU with this memory and state.
    pub fn new(memory: &[u8], state: &CpuState) -> anyhow::Result<Self> {
        let mem = GuestMemory::new(memory.len() as u64)?;
        for range in mem.ram() {
            let (start, end) = (usize::try_from(range.start)?, usize::try_from(range.end)?);
            mem.write(Gpa(range.start), &memory[start..end])?;
        }
        let io = Arc::new(Noted::default());
        let mut vcpu = Interp::new(Parts {
            index: 0,
            vcpus: 1,
            mem: Arc::clone(&mem),
            io: Arc::clone(&io) as Arc<dyn CpuIo>,
            signals: Arc::new(Signals::default()),
            model: Arc::new(CpuModel::parse("max")?),
        });
        vcpu.restore(state);
        Ok(Self { vcpu, mem, io })
    }

    /// Executes one instruction and the exceptions before it. `reads_debug`: it is a MOV of a debug register.
    ///
    /// The interpreter counts its budget at jumps, but goes instruction by instruction while a breakpoint is armed; so
    /// one is, where no instruction can be (or, for MOVs of debug registers, RFLAGS.RF does it).
    pub fn step(&mut self, reads_debug: bool) -> Stepped {
        self.io.read.store(false, Ordering::Relaxed);
        let before = self.exceptions();
        let cpu = self.vcpu.cpu();
        let (own, arm) = (cpu.s.dr[0], cpu.s.dr7 & dr::DR7_ENABLES == 0 && !reads_debug);
        if arm {
            cpu.s.dr[0] = NOWHERE;
            cpu.s.dr7 |= 1;
        } else if reads_debug {
            cpu.system_flags |= rflags::RF;
        }
        let exit = self.vcpu.run(1);
        if arm {
            let cpu = self.vcpu.cpu();
            cpu.s.dr[0] = own;
            cpu.s.dr7 &= !1;
        }
        Stepped {
            read_device: self.io.read.load(Ordering::Relaxed),
            exceptions: self.exceptions() - before,
            exit,
        }
    }

    fn exceptions(&self) -> u64 {
        let stats = self.vcpu.stats();
        stats.get(Cause::Exception) + stats.get(Cause::TruePageFault)
    }

    /// The registers that are compared.
    pub fn registers(&mut self) -> Registers {
        let cpu = self.vcpu.cpu();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        let area = &cpu.s.fpu.0;
        let lane = |at: usize, len: usize| -> u128 {
            area[at..at + len].iter().rev().fold(0, |value, &byte| value << 8 | u128::from(byte))
        };
        let order = [sreg::CS, sreg::SS, sreg::DS, sreg::ES, sreg::FS, sreg::GS];
        let mut xmm = [0; 16];
        for (i, slot) in xmm.iter_mut().enumerate() {
            *slot = lane(160 + 16 * i, 16); // SDM 1 table 10-2
        }
        Registers {
            gpr,
            rip: cpu.rip,
            rflags: cpu.rflags(),
            selectors: order.map(|i| cpu.s.seg[i].selector),
            fs_base: cpu.s.seg[sreg::FS].base,
            gs_base: cpu.s.seg[sreg::GS].base,
            cr: [cpu.s.cr0, cpu.s.cr2, cpu.s.cr3, cpu.s.cr4],
            efer: cpu.s.msr.efer,
            xmm,
            mxcsr: u32::try_from(lane(24, 4)).unwrap_or_default(),
        }
    }

    /// Takes over the values of general registers, arithmetic flags and SIMD registers.
    pub fn adopt(&mut self, theirs: &Registers) {
        let cpu = self.vcpu.cpu();
        cpu.gpr[..16].copy_from_slice(&theirs.gpr);
        let kept = cpu.rflags() & !rflags::STATUS;
        cpu.set_rflags(kept | theirs.rflags & rflags::STATUS);
        for (i, value) in theirs.xmm.iter().enumerate() {
            cpu.s.fpu.0[160 + 16 * i..176 + 16 * i].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Makes SS null, as QEMU does where the architecture leaves it alone.
    pub fn forget_stack_segment(&mut self) {
        let cpu = self.vcpu.cpu();
        cpu.s.seg[sreg::SS].selector = 0;
        cpu.derive_segments();
    }

    /// Size of the running code in bits, and its linear address.
    pub fn code(&mut self) -> (u32, u64) {
        let cpu = self.vcpu.cpu();
        let bits = cpu.code_size.bits();
        let base = if bits == 64 { 0 } else { cpu.s.seg[sreg::CS].base };
        (bits, base.wrapping_add(cpu.rip) & cpu.linear_mask)
    }

    /// Up to 15 bytes of code at a linear address, as far as they can be fetched.
    pub fn bytes(&mut self, address: u64) -> Vec<u8> {
        let user = self.vcpu.cpu().cpl() == 3;
        self.peek(address, 15, Access { kind: AccessKind::Fetch, user, ac: false })
    }

    /// Up to `len` bytes of data at a linear address, as far as they are mapped.
    pub fn data(&mut self, address: u64, len: u64) -> Vec<u8> {
        self.peek(address, len, Access { kind: AccessKind::Read, user: false, ac: true })
    }

    fn peek(&mut self, address: u64, len: u64, access: Access) -> Vec<u8> {
        let cpu = self.vcpu.cpu();
        let cr2 = cpu.s.cr2;
        let mut bytes = Vec::new();
        for i in 0..len {
            let Ok(found) = cpu.walk(address.wrapping_add(i), access) else { break };
            let Some(byte) = self.mem.load_gpa::<u8>(found.gpa) else { break };
            bytes.push(byte);
        }
        cpu.s.cr2 = cr2;
        bytes
    }

    /// Replaces what lies at a linear address, as far as it is mapped (what a device gave the other side).
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let cpu = self.vcpu.cpu();
        let cr2 = cpu.s.cr2;
        for (at, byte) in (address..).zip(bytes) {
            let access = Access { kind: AccessKind::Read, user: false, ac: true };
            if let Ok(found) = cpu.walk(at, access) {
                // What is no RAM is no memory of ours.
                let _ = self.mem.write(found.gpa, &[*byte]);
            }
        }
        cpu.s.cr2 = cr2;
    }

    /// All RAM below the hole as one piece, zero where there is none.
    pub fn memory(&self, len_bytes: usize) -> anyhow::Result<Vec<u8>> {
        let mut image = vec![0; len_bytes];
        for range in self.mem.ram() {
            let (start, end) = (usize::try_from(range.start)?, usize::try_from(range.end)?.min(len_bytes));
            if start < end {
                self.mem.read(Gpa(range.start), &mut image[start..end])?;
            }
        }
        Ok(image)
    }
}
