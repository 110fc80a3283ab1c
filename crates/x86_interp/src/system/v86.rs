//! Virtual-8086 mode: entering by IRET, IRET within, interrupt redirection (SDM 3B 20.2, 20.3).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::Exception;
use x86::bits::rflags;
use x86::state::sreg;

use super::frame::Frame;
use super::interrupt::vme;
use super::segment::v86_segment;
use crate::cpu::Cpu;

/// IRET from level 0 with VM set in the flags image: nine items in all.
pub fn enter(cpu: &mut Cpu, mut frame: Frame, rip: u64, cs: u16, flags: u64) -> Result<(), Exception> {
    let sp = frame.pop_sized(cpu, 4)?;
    let ss = frame.pop_sized(cpu, 4)? as u16;
    let mut data = [0u16; 4];
    for selector in &mut data {
        *selector = frame.pop_sized(cpu, 4)? as u16;
    }
    if rip > 0xffff {
        return Err(Exception::GP0);
    }
    cpu.s.seg[sreg::CS] = v86_segment(cs);
    cpu.s.seg[sreg::SS] = v86_segment(ss);
    for (reg, selector) in [sreg::ES, sreg::DS, sreg::FS, sreg::GS].into_iter().zip(data) {
        cpu.s.seg[reg] = v86_segment(selector);
    }
    cpu.rip = rip;
    cpu.gpr[4] = sp;
    cpu.s.cpl = 3;
    cpu.set_rflags(flags);
    cpu.derive_segments();
    Ok(())
}

/// IRET in V86 mode: needs IOPL 3 (or VME), stays in V86 mode.
pub fn iret(cpu: &mut Cpu, size: u64) -> Result<(), Exception> {
    let virtual_if = cpu.iopl() < 3;
    if virtual_if && !(vme(cpu) && size == 2) {
        return Err(Exception::GP0);
    }
    let mut frame = Frame::current(cpu);
    let rip = frame.pop_sized(cpu, size)?;
    let cs = frame.pop_sized(cpu, size)? as u16;
    let flags = frame.pop_sized(cpu, size)?;
    if rip > 0xffff {
        return Err(Exception::GP0);
    }
    let value = popped_flags(cpu, flags, size, virtual_if)?;
    cpu.gpr[4] = frame.sp;
    cpu.s.seg[sreg::CS] = v86_segment(cs);
    cpu.rip = rip;
    cpu.set_rflags(value);
    cpu.derive_segments();
    Ok(())
}

/// RFLAGS after POPF or IRET in V86 mode: IOPL, VM, VIP stay; IF goes to VIF when IOPL is below 3.
pub fn popped_flags(cpu: &Cpu, flags: u64, size: u64, virtual_if: bool) -> Result<u64, Exception> {
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID | rflags::RF;
    }
    let mut value = cpu.rflags();
    if virtual_if {
        let wants = flags & rflags::IF != 0;
        if flags & rflags::TF != 0 || wants && cpu.system_flag(rflags::VIP) {
            return Err(Exception::GP0);
        }
        value = value & !rflags::VIF | if wants { rflags::VIF } else { 0 };
    } else {
        mask |= rflags::IF;
    }
    Ok(value & !mask | flags & mask)
}

/// INT n in V86 mode (SDM 3B 20.3.3). True if it was redirected to the program's own handler; false if it goes through the
/// IDT.
pub fn redirect(cpu: &mut Cpu, vector: u8) -> Result<bool, Exception> {
    if !vme(cpu) || bitmap_bit(cpu, vector)? {
        return if cpu.iopl() < 3 { Err(Exception::GP0) } else { Ok(false) };
    }
    let mut entry = [0; 4];
    let access = cpu.data_access(x86::paging::AccessKind::Read);
    cpu.linear_read_bytes(u64::from(vector) * 4, &mut entry, access)?;
    let entry = u32::from_le_bytes(entry);
    let mut flags = cpu.rflags();
    if cpu.iopl() < 3 {
        let vif = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
        flags = flags & !rflags::IF | vif | rflags::IOPL;
    }
    let mut frame = Frame::current(cpu);
    frame.push::<u16>(cpu, flags)?;
    let cs = cpu.s.seg[sreg::CS].selector;
    frame.push::<u16>(cpu, u64::from(cs))?;
    let rip = cpu.rip;
    frame.push::<u16>(cpu, rip)?;
    cpu.gpr[4] = frame.sp;
    cpu.s.seg[sreg::CS] = v86_segment((entry >> 16) as u16);
    cpu.rip = u64::from(entry & 0xffff);
    let interrupt_flag = if cpu.iopl() < 3 { rflags::VIF } else { rflags::IF };
    let value = cpu.rflags() & !(interrupt_flag | rflags::TF);
    cpu.set_rflags(value);
    cpu.derive_segments();
    cpu.trap_suppressed = true;
    Ok(true)
}

/// A bit of the interrupt redirection bitmap: the 32 bytes below the I/O bitmap.
fn bitmap_bit(cpu: &mut Cpu, vector: u8) -> Result<bool, Exception> {
    if cpu.s.tr.limit < 0x67 {
        return Err(Exception::GP0);
    }
    let io_map: u16 = cpu.system_read(cpu.s.tr.base.wrapping_add(0x66))?;
    let at = u64::from(io_map).wrapping_sub(32).wrapping_add(u64::from(vector / 8));
    if at > u64::from(cpu.s.tr.limit) {
        return Err(Exception::GP0);
    }
    let byte: u8 = cpu.system_read(cpu.s.tr.base.wrapping_add(at))?;
    Ok(byte >> (vector & 7) & 1 != 0)
}
