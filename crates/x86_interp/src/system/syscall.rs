//! SYSCALL, SYSRET, SYSENTER, SYSEXIT (SDM 2, APM 3).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::bits::{efer, is_canonical, rflags};
use x86::cpuid::Vendor;
use x86::state::sreg;
use x86::{Attr, Exception, Segment};

use crate::cpu::{CodeSize, Cpu};

const FLAT_CODE: u16 = Attr::P | Attr::S | Attr::G | 0xb;
const FLAT_DATA: u16 = Attr::P | Attr::S | Attr::G | Attr::DB | 0x3;

fn flat(selector: u16, attr: u16, dpl: u8) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attr: Attr(attr | (dpl as u16) << 5) }
}

/// Fixed code and stack segments of level `dpl`; code is 64-bit or 32-bit.
fn set_flat(cpu: &mut Cpu, cs: u16, ss: u16, dpl: u8, long: bool) {
    let size = if long { Attr::L } else { Attr::DB };
    cpu.s.seg[sreg::SS] = flat(ss, FLAT_DATA, dpl);
    cpu.s.seg[sreg::CS] = flat(cs, FLAT_CODE | size, dpl);
    cpu.s.cpl = dpl;
    cpu.derive_segments();
    cpu.derive_variant();
}

/// Selectors of CS and SS that SYSCALL in 64-bit code loads, and those of SYSRET to 64-bit code.
pub const fn selectors(cpu: &Cpu) -> [u16; 4] {
    let kernel = (cpu.s.msr.star >> 32) as u16 & 0xfffc;
    let user = (cpu.s.msr.star >> 48) as u16;
    [kernel, kernel.wrapping_add(8), user.wrapping_add(16) | 3, user.wrapping_add(8) | 3]
}

/// The segments that SYSCALL in 64-bit code leaves, for an engine that did the rest.
pub fn enter_flat(cpu: &mut Cpu) {
    let [cs, ss, ..] = selectors(cpu);
    set_flat(cpu, cs, ss, 0, true);
}

/// The segments that SYSRET to 64-bit code leaves, for an engine that did the rest.
pub fn return_flat(cpu: &mut Cpu) {
    let [.., cs, ss] = selectors(cpu);
    set_flat(cpu, cs, ss, 3, true);
}

/// SYSCALL.
pub fn syscall(cpu: &mut Cpu) -> Result<(), Exception> {
    let intel = cpu.model.vendor() == Vendor::Intel;
    let long = cpu.s.long_mode();
    if cpu.s.msr.efer & efer::SCE == 0 || !cpu.s.protected() || intel && cpu.code_size != CodeSize::Bits64 {
        return Err(Exception::UD);
    }
    let star = cpu.s.msr.star;
    let cs = (star >> 32) as u16 & 0xfffc;
    let flags = cpu.rflags();
    cpu.gpr[1] = cpu.rip;
    if long {
        cpu.gpr[11] = flags & !rflags::RF;
        let target = if cpu.code_size == CodeSize::Bits64 { cpu.s.msr.lstar } else { cpu.s.msr.cstar };
        set_flat(cpu, cs, cs.wrapping_add(8), 0, true);
        cpu.rip = target;
        cpu.set_rflags(flags & !cpu.s.msr.sfmask & !rflags::RF);
    } else {
        cpu.gpr[1] &= 0xffff_ffff;
        set_flat(cpu, cs, cs.wrapping_add(8), 0, false);
        cpu.rip = star & 0xffff_ffff;
        cpu.set_rflags(flags & !(rflags::VM | rflags::IF | rflags::RF));
    }
    cpu.trap_suppressed = !cpu.system_flag(rflags::TF);
    Ok(())
}

/// SYSRET; `wide` with REX.W.
pub fn sysret(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    let intel = cpu.model.vendor() == Vendor::Intel;
    if cpu.s.msr.efer & efer::SCE == 0 || !cpu.s.protected() || intel && cpu.code_size != CodeSize::Bits64 {
        return Err(Exception::UD);
    }
    if cpu.cpl() != 0 {
        return Err(Exception::GP0);
    }
    let star = (cpu.s.msr.star >> 48) as u16;
    let long = cpu.s.long_mode();
    let target = if wide { cpu.gpr[1] } else { cpu.gpr[1] & 0xffff_ffff };
    // A non-canonical target faults at level 0 on Intel, after the return on AMD.
    if wide && !is_canonical(target) && intel {
        return Err(Exception::GP0);
    }
    let flags = if long {
        cpu.gpr[11] & rflags::ALL & !(rflags::RF | rflags::VM) | rflags::FIXED
    } else {
        cpu.rflags() | rflags::IF
    };
    let cs = if wide { star.wrapping_add(16) } else { star };
    set_flat(cpu, cs | 3, star.wrapping_add(8) | 3, 3, wide);
    cpu.rip = target;
    cpu.set_rflags(flags);
    Ok(())
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu) -> Result<(), Exception> {
    let long = cpu.s.long_mode();
    if cpu.model.vendor() == Vendor::Amd && long {
        return Err(Exception::UD);
    }
    let cs = cpu.s.msr.sysenter_cs as u16;
    if !cpu.s.protected() || cs & 0xfffc == 0 {
        return Err(Exception::GP0);
    }
    let flags = cpu.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_rflags(flags);
    set_flat(cpu, cs & 0xfffc, (cs & 0xfffc).wrapping_add(8), 0, long);
    cpu.rip = cpu.s.msr.sysenter_eip & mask;
    cpu.gpr[4] = cpu.s.msr.sysenter_esp & mask;
    Ok(())
}

/// SYSEXIT; `wide` with REX.W.
pub fn sysexit(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    if cpu.model.vendor() == Vendor::Amd && cpu.s.long_mode() {
        return Err(Exception::UD);
    }
    let cs = cpu.s.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.s.protected() || cs == 0 || cpu.cpl() != 0 {
        return Err(Exception::GP0);
    }
    let (code, stack) = if wide { (32, 40) } else { (16, 24) };
    let (rip, rsp) = (cpu.gpr[2], cpu.gpr[1]);
    if wide && !(is_canonical(rip) && is_canonical(rsp)) {
        return Err(Exception::GP0);
    }
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    set_flat(cpu, cs.wrapping_add(code) | 3, cs.wrapping_add(stack) | 3, 3, wide);
    cpu.rip = rip & mask;
    cpu.gpr[4] = rsp & mask;
    Ok(())
}
