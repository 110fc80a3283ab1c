//! Far JMP, CALL, RET and gates (SDM 3A 5.8, SDM 2 JMP, CALL, RET).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::segment::system_type;
use x86::state::sreg;
use x86::{Exception, Segment};

use super::frame::Frame;
use super::interrupt::{inner_stack, set_returned_stack};
use super::segment::{Descriptor, is_null, null_stack};
use super::task;
use crate::cpu::Cpu;

/// A target beyond the code segment (or not canonical in 64-bit code) is #GP(0).
pub fn check_target(cpu: &Cpu, code: &Segment, rip: u64) -> Result<(), Exception> {
    let ok = if cpu.s.long_mode() && code.attr.long() {
        x86::bits::is_canonical(rip)
    } else {
        rip <= u64::from(code.limit)
    };
    if ok { Ok(()) } else { Err(Exception::GP0) }
}

/// Whether far transfers are those of real mode.
fn is_real(cpu: &Cpu) -> bool {
    !cpu.s.protected() || cpu.s.v86()
}

/// CS in real and V86 mode.
fn real_code(cpu: &Cpu, selector: u16) -> Segment {
    if cpu.s.v86() {
        super::segment::v86_segment(selector)
    } else {
        Segment { selector, base: u64::from(selector) << 4, ..cpu.s.seg[sreg::CS] }
    }
}

/// The code segment of a direct far JMP or CALL: level stays the same.
fn direct_code(cpu: &mut Cpu, selector: u16, mut d: Descriptor) -> Result<Segment, Exception> {
    let attr = d.attr();
    let rpl = (selector & 3) as u8;
    let level_ok = if attr.is_conforming() {
        attr.dpl() <= cpu.cpl()
    } else {
        rpl <= cpu.cpl() && attr.dpl() == cpu.cpl()
    };
    let both_sizes = cpu.s.long_mode() && attr.long() && attr.db();
    if !level_ok || both_sizes {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(Segment::from_descriptor(selector, d.raw))
}

/// What a selector in a far pointer leads to.
enum Target {
    Code(Segment),
    CallGate(u16, Descriptor),
    Task(u16),
}

fn resolve(cpu: &mut Cpu, selector: u16) -> Result<Target, Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let d = cpu.descriptor(selector, Exception::gp)?;
    let attr = d.attr();
    if attr.is_code() {
        return direct_code(cpu, selector, d).map(Target::Code);
    }
    if attr.is_code_or_data() {
        return Err(cpu.gp(selector));
    }
    let reachable = attr.dpl() >= cpu.cpl().max((selector & 3) as u8);
    let long = cpu.s.long_mode();
    let target = match attr.typ() {
        system_type::CALL_GATE32 => Target::CallGate(selector, d),
        system_type::CALL_GATE16 if !long => Target::CallGate(selector, d),
        system_type::TASK_GATE if !long => Target::Task(d.gate_selector()),
        system_type::TSS16_AVAILABLE | system_type::TSS32_AVAILABLE if !long => Target::Task(selector),
        _ => return Err(cpu.gp(selector)),
    };
    if !reachable {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    Ok(target)
}

/// Far JMP.
pub fn jmp(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Exception> {
    if is_real(cpu) {
        if offset > 0xffff && offset > u64::from(cpu.s.seg[sreg::CS].limit) {
            return Err(Exception::GP0);
        }
        cpu.s.seg[sreg::CS] = real_code(cpu, selector);
        cpu.rip = offset;
        cpu.derive_segments();
        return Ok(());
    }
    let cpl = cpu.cpl();
    match resolve(cpu, selector)? {
        Target::Code(code) => {
            check_target(cpu, &code, offset)?;
            cpu.set_code_segment(code, cpl);
            cpu.rip = offset;
            Ok(())
        }
        Target::CallGate(at, gate) => {
            let (code, target) = gate_target(cpu, at, &gate)?;
            let code_cpl = if code.attr.is_conforming() { cpl } else { code.attr.dpl() };
            if code_cpl != cpl {
                return Err(cpu.gp(gate.gate_selector()));
            }
            check_target(cpu, &code, target)?;
            cpu.set_code_segment(code, cpl);
            cpu.rip = target;
            Ok(())
        }
        Target::Task(tss) => task::jump_to(cpu, tss),
    }
}

/// Code segment and offset that the call gate with selector `at` leads to.
fn gate_target(cpu: &mut Cpu, at: u16, gate: &Descriptor) -> Result<(Segment, u64), Exception> {
    let selector = gate.gate_selector();
    let long = cpu.s.long_mode();
    let wide = gate.attr().typ() & 8 != 0;
    let mut offset = gate.gate_offset(wide);
    if long {
        let high = cpu.descriptor_high(at, gate)?;
        if high >> 40 & 0x1f != 0 {
            return Err(cpu.gp(at));
        }
        offset |= high << 32;
    }
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let mut d = cpu.descriptor(selector, Exception::gp)?;
    let attr = d.attr();
    if !attr.is_code() || attr.dpl() > cpu.cpl() || long && (!attr.long() || attr.db()) {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    cpu.mark_accessed(&mut d)?;
    Ok((Segment::from_descriptor(selector, d.raw), offset))
}

/// Far CALL with operand `size` of 2, 4 or 8 bytes.
pub fn call(cpu: &mut Cpu, selector: u16, offset: u64, size: u64) -> Result<(), Exception> {
    let cs = u64::from(cpu.s.seg[sreg::CS].selector);
    let rip = cpu.rip;
    if is_real(cpu) {
        if offset > u64::from(cpu.s.seg[sreg::CS].limit) {
            return Err(Exception::GP0);
        }
        let mut frame = Frame::current(cpu);
        frame.push_sized(cpu, size, cs)?;
        frame.push_sized(cpu, size, rip)?;
        cpu.gpr[4] = frame.sp;
        cpu.s.seg[sreg::CS] = real_code(cpu, selector);
        cpu.rip = offset;
        cpu.derive_segments();
        return Ok(());
    }
    let cpl = cpu.cpl();
    match resolve(cpu, selector)? {
        Target::Code(code) => {
            check_target(cpu, &code, offset)?;
            let mut frame = Frame::current(cpu);
            frame.push_sized(cpu, size, cs)?;
            frame.push_sized(cpu, size, rip)?;
            cpu.set_stack_pointer(frame.sp);
            cpu.set_code_segment(code, cpl);
            cpu.rip = offset;
            Ok(())
        }
        Target::CallGate(at, gate) => call_gate(cpu, at, &gate),
        Target::Task(tss) => task::call_to(cpu, tss),
    }
}

/// CALL through a gate, perhaps to an inner level (SDM 3A 5.8.5).
fn call_gate(cpu: &mut Cpu, at: u16, gate: &Descriptor) -> Result<(), Exception> {
    let (code, target) = gate_target(cpu, at, gate)?;
    let long = cpu.s.long_mode();
    let size: u64 = if long {
        8
    } else if gate.attr().typ() & 8 != 0 {
        4
    } else {
        2
    };
    let cpl = if code.attr.is_conforming() { cpu.cpl() } else { code.attr.dpl() };
    let inner = cpl < cpu.cpl();
    let mut frame = match (inner, long) {
        (false, true) => Frame::long(cpu.s.seg[sreg::SS], cpu.gpr[4], cpl, 0),
        (false, false) => Frame::current(cpu),
        (true, true) => {
            let at = 4 + 8 * u64::from(cpl);
            if at + 7 > u64::from(cpu.s.tr.limit) {
                return Err(Exception::ts(cpu.selector_error(cpu.s.tr.selector)));
            }
            let sp: u64 = cpu.system_read(cpu.s.tr.base.wrapping_add(at))?;
            if !x86::bits::is_canonical(sp) {
                return Err(Exception::SS0);
            }
            Frame::long(null_stack(u16::from(cpl), cpl), sp, cpl, 0)
        }
        (true, false) => inner_stack(cpu, cpl)?,
    };
    check_target(cpu, &code, target)?;
    if inner {
        let ss = u64::from(cpu.s.seg[sreg::SS].selector);
        let sp = cpu.gpr[4];
        let parameters = if long { Vec::new() } else { gate_parameters(cpu, gate, size)? };
        frame.push_sized(cpu, size, ss)?;
        frame.push_sized(cpu, size, sp)?;
        for &p in parameters.iter().rev() {
            frame.push_sized(cpu, size, p)?;
        }
    }
    let cs = u64::from(cpu.s.seg[sreg::CS].selector);
    let rip = cpu.rip;
    frame.push_sized(cpu, size, cs)?;
    frame.push_sized(cpu, size, rip)?;
    cpu.s.seg[sreg::SS] = frame.ss;
    cpu.gpr[4] = frame.sp;
    cpu.set_code_segment(code, cpl);
    cpu.rip = target;
    Ok(())
}

/// The parameters that a 16- or 32-bit gate copies from the outer stack, top first.
fn gate_parameters(cpu: &mut Cpu, gate: &Descriptor, size: u64) -> Result<Vec<u64>, Exception> {
    let count = gate.raw >> 32 & 31;
    let mut outer = Frame::current(cpu);
    (0..count).map(|_| outer.pop_sized(cpu, size)).collect()
}

/// The code segment that a far RET or IRET returns to, and its level.
pub fn return_code(cpu: &mut Cpu, selector: u16) -> Result<(Segment, u8), Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let mut d = cpu.descriptor(selector, Exception::gp)?;
    let attr = d.attr();
    let rpl = (selector & 3) as u8;
    let level_ok = if attr.is_conforming() { attr.dpl() <= rpl } else { attr.dpl() == rpl };
    let both_sizes = cpu.s.long_mode() && attr.long() && attr.db();
    if !attr.is_code() || rpl < cpu.cpl() || !level_ok || both_sizes {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    cpu.mark_accessed(&mut d)?;
    Ok((Segment::from_descriptor(selector, d.raw), rpl))
}

/// The stack segment of a return to level `cpl`; in 64-bit code below level 3 it may be null.
pub fn return_stack(cpu: &mut Cpu, selector: u16, cpl: u8, to64: bool) -> Result<Segment, Exception> {
    if is_null(selector) {
        let allowed = to64 && cpl != 3 && (selector & 3) as u8 == cpl;
        return if allowed { Ok(null_stack(selector, cpl)) } else { Err(Exception::GP0) };
    }
    cpu.check_stack_segment(selector, cpl, Exception::gp)
}

/// Far RET with operand `size`; `extra` bytes of parameters are dropped.
pub fn ret(cpu: &mut Cpu, size: u64, extra: u64) -> Result<(), Exception> {
    let mut frame = Frame::current(cpu);
    let rip = frame.pop_sized(cpu, size)?;
    let cs = frame.pop_sized(cpu, size)? as u16;
    if is_real(cpu) {
        if rip > u64::from(cpu.s.seg[sreg::CS].limit) {
            return Err(Exception::GP0);
        }
        cpu.gpr[4] = frame.sp;
        cpu.drop_stack(extra);
        cpu.s.seg[sreg::CS] = real_code(cpu, cs);
        cpu.rip = rip;
        cpu.derive_segments();
        return Ok(());
    }
    let (code, cpl) = return_code(cpu, cs)?;
    if cpl == cpu.cpl() {
        check_target(cpu, &code, rip)?;
        cpu.set_stack_pointer(frame.sp);
        cpu.drop_stack(extra);
        cpu.set_code_segment(code, cpl);
        cpu.rip = rip;
        return Ok(());
    }
    frame.sp = frame.sp & !frame.mask | frame.sp.wrapping_add(extra) & frame.mask;
    let sp = frame.pop_sized(cpu, size)?;
    let selector = frame.pop_sized(cpu, size)? as u16;
    let to64 = cpu.s.long_mode() && code.attr.long();
    let ss = return_stack(cpu, selector, cpl, to64)?;
    check_target(cpu, &code, rip)?;
    cpu.set_code_segment(code, cpl);
    cpu.rip = rip;
    set_returned_stack(cpu, sp, ss, size);
    cpu.drop_stack(extra);
    cpu.drop_inner_segments();
    Ok(())
}
