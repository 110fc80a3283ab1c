//! Delivery of exceptions, interrupts and NMIs through the IDT (SDM 3A chapter 6), in every mode.

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use engine::Cause;
use x86::bits::{cr4, dr, rflags};
use x86::state::{Activity, InterruptShadow, sreg};
use x86::{Exception, Segment, segment::system_type};

use super::frame::Frame;
use super::segment::{is_null, null_stack};
use super::task;
use crate::cpu::Cpu;
use crate::intercept::{Action, Event};

/// Where an event comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A fault: RIP is the instruction's own, RF is set in the frame.
    Fault,
    /// A trap (#DB after an instruction): RIP is the next.
    Trap,
    /// INT n: the gate's DPL is checked.
    Software,
    /// INT3, INTO: software, but not subject to V86 redirection.
    SoftwareException,
    /// INT1 and external events: no DPL check.
    External,
}

/// One event to deliver.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    vector: u8,
    error: Option<u16>,
    source: Source,
}

/// Delivers an exception that an instruction raised; RIP is exact. Exceptions during the delivery are combined to
/// double faults (SDM 3A table 6-5) and shutdown.
pub fn deliver_exception(cpu: &mut Cpu, exception: Exception) {
    deliver(cpu, exception, Source::Fault);
}

/// Delivers a debug trap after an instruction.
pub fn deliver_trap(cpu: &mut Cpu, exception: Exception) {
    deliver(cpu, exception, Source::Trap);
}

/// Benign, contributory, page fault, double fault: how exceptions combine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

const fn class(vector: u8) -> Class {
    match vector {
        0 | 10..=13 => Class::Contributory,
        14 => Class::PageFault,
        8 => Class::DoubleFault,
        _ => Class::Benign,
    }
}

fn deliver(cpu: &mut Cpu, exception: Exception, source: Source) {
    let vector = exception.vector();
    let cause = if vector == 14 { Cause::TruePageFault } else { Cause::Exception };
    if cpu.intercepts.intercept(Event::Exception(vector)) == Action::Exit {
        cpu.stats.count(cause);
        return;
    }
    let span = cpu.stats.begin(cause);
    let first = Delivery { vector, error: exception.error_code(), source };
    // In real mode no error code is pushed; `enter` sees to it.
    attempt(cpu, first, 1);
    cpu.stats.end(cause, span);
}

/// Delivers; on exceptions on the way, what they combine to. `ext` is the EXT bit of their error codes.
fn attempt(cpu: &mut Cpu, first: Delivery, ext: u16) {
    let mut now = first;
    // A chain longer than a few links has come to a double fault or shutdown; the bound only proves the end.
    for _ in 0..8 {
        cpu.ext = ext;
        let result = enter(cpu, now);
        cpu.ext = 0;
        let Err(next) = result else {
            return;
        };
        let is_exception = now.vector < 32 && matches!(now.source, Source::Fault | Source::Trap);
        let before = if is_exception { class(now.vector) } else { Class::Benign };
        let after = class(next.vector());
        now = match (before, after) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault) => break,
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                Delivery { vector: 8, error: Some(0), source: Source::Fault }
            }
            _ => Delivery { vector: next.vector(), error: next.error_code(), source: Source::Fault },
        };
    }
    let _ = cpu.intercepts.intercept(Event::Shutdown);
    cpu.s.activity = Activity::Shutdown;
    cpu.derive_poll_mask();
}

/// Delivers an NMI; the next is held off until IRET.
pub fn deliver_nmi(cpu: &mut Cpu) {
    if cpu.intercepts.intercept(Event::Nmi) == Action::Exit {
        return;
    }
    let span = cpu.stats.begin(Cause::Nmi);
    cpu.s.activity = Activity::Running;
    cpu.s.nmi_blocked = true;
    cpu.derive_poll_mask();
    attempt(cpu, Delivery { vector: 2, error: None, source: Source::External }, 1);
    cpu.stats.end(Cause::Nmi, span);
}

/// Acknowledges and delivers an external interrupt.
pub fn deliver_external(cpu: &mut Cpu) {
    if cpu.intercepts.intercept(Event::Interrupt) == Action::Exit {
        return;
    }
    let Some(vector) = cpu.io.acknowledge_interrupt(cpu.index) else {
        return;
    };
    let span = cpu.stats.begin(Cause::Interrupt);
    cpu.s.activity = Activity::Running;
    attempt(cpu, Delivery { vector, error: None, source: Source::External }, 1);
    cpu.stats.end(Cause::Interrupt, span);
}

/// Delivers an interrupt that was acknowledged already, by another engine that did not come to it.
pub fn deliver_acknowledged(cpu: &mut Cpu, vector: u8) {
    cpu.s.activity = Activity::Running;
    attempt(cpu, Delivery { vector, error: None, source: Source::External }, 1);
}

/// INT n, INT3, INTO, INT1: RIP is the next instruction's; on a fault the caller restores it.
pub fn software_interrupt(cpu: &mut Cpu, vector: u8, source: Source) -> Result<(), Exception> {
    let span = cpu.stats.begin(Cause::SoftwareInterrupt);
    let result = deliver_software(cpu, vector, source);
    cpu.stats.end(Cause::SoftwareInterrupt, span);
    result
}

fn deliver_software(cpu: &mut Cpu, vector: u8, source: Source) -> Result<(), Exception> {
    if cpu.s.v86() && source == Source::Software && super::v86::redirect(cpu, vector)? {
        return Ok(());
    }
    enter(cpu, Delivery { vector, error: None, source })
}

/// Goes through the IDT once.
fn enter(cpu: &mut Cpu, d: Delivery) -> Result<(), Exception> {
    if d.vector == 1 && d.source != Source::Software {
        cpu.s.dr7 &= !dr::DR7_GD;
    }
    if !cpu.s.protected() {
        enter_real(cpu, d)?;
    } else if cpu.s.long_mode() {
        enter_long(cpu, d)?;
    } else {
        enter_protected(cpu, d)?;
    }
    cpu.trap_suppressed = true;
    cpu.s.shadow = InterruptShadow::None;
    cpu.derive_poll_mask();
    Ok(())
}

/// RFLAGS as pushed: faults set RF, so that an instruction breakpoint does not hit again (SDM 3B 17.3.1.1).
fn pushed_flags(cpu: &Cpu, d: Delivery) -> u64 {
    let rf = if d.source == Source::Fault { rflags::RF } else { 0 };
    cpu.rflags() | rf
}

/// Error code for the IDT entry of this event.
fn idt_error(cpu: &Cpu, vector: u8) -> u16 {
    u16::from(vector) << 3 | 2 | cpu.ext
}

/// Real mode: the interrupt vector table (SDM 3B 20.1.4).
fn enter_real(cpu: &mut Cpu, d: Delivery) -> Result<(), Exception> {
    let at = u64::from(d.vector) * 4;
    if at + 3 > u64::from(cpu.s.idtr.limit) {
        return Err(Exception::gp(idt_error(cpu, d.vector)));
    }
    let entry: u32 = cpu.system_read(cpu.s.idtr.base.wrapping_add(at))?;
    let flags = cpu.rflags();
    let mut frame = Frame::current(cpu);
    frame.push::<u16>(cpu, flags)?;
    let cs = cpu.s.seg[sreg::CS].selector;
    frame.push::<u16>(cpu, u64::from(cs))?;
    let rip = cpu.rip;
    frame.push::<u16>(cpu, rip)?;
    cpu.gpr[4] = frame.sp;
    let selector = (entry >> 16) as u16;
    cpu.s.seg[sreg::CS] = Segment { selector, base: u64::from(selector) << 4, ..cpu.s.seg[sreg::CS] };
    cpu.rip = u64::from(entry & 0xffff);
    let cleared = rflags::IF | rflags::TF | rflags::AC | rflags::RF;
    cpu.set_rflags(flags & !cleared);
    cpu.derive_segments();
    Ok(())
}

/// The target code segment of a gate: segment and its level (SDM 3A 6.12.1.1).
fn gate_code(cpu: &mut Cpu, selector: u16, long: bool) -> Result<(Segment, u8), Exception> {
    if is_null(selector) {
        return Err(Exception::gp(cpu.ext));
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
    let cpl = if attr.is_conforming() { cpu.cpl() } else { attr.dpl() };
    Ok((Segment::from_descriptor(selector, d.raw), cpl))
}

/// IA-32e mode (SDM 3A 6.14).
fn enter_long(cpu: &mut Cpu, d: Delivery) -> Result<(), Exception> {
    let at = u64::from(d.vector) * 16;
    let error = idt_error(cpu, d.vector);
    if at + 15 > u64::from(cpu.s.idtr.limit) {
        return Err(Exception::gp(error));
    }
    let low: u64 = cpu.system_read(cpu.s.idtr.base.wrapping_add(at))?;
    let high: u64 = cpu.system_read(cpu.s.idtr.base.wrapping_add(at + 8))?;
    let typ = (low >> 40 & 0x1f) as u8;
    if typ != system_type::INTERRUPT_GATE32 && typ != system_type::TRAP_GATE32 {
        return Err(Exception::gp(error));
    }
    let software = matches!(d.source, Source::Software | Source::SoftwareException);
    if software && ((low >> 45 & 3) as u8) < cpu.cpl() {
        return Err(Exception::gp(error));
    }
    if low >> 47 & 1 == 0 {
        return Err(Exception::np(error));
    }
    let (code, cpl) = gate_code(cpu, (low >> 16) as u16, true)?;
    let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    let ist = low >> 32 & 7;
    let old_ss = cpu.s.seg[sreg::SS];
    let (ss, sp) = if ist != 0 {
        let ss = if cpl == cpu.cpl() { old_ss } else { null_stack(u16::from(cpl), cpl) };
        (ss, tss64_stack(cpu, 0x24 + 8 * (ist - 1))?)
    } else if cpl < cpu.cpl() {
        (null_stack(u16::from(cpl), cpl), tss64_stack(cpu, 4 + 8 * u64::from(cpl))?)
    } else {
        (old_ss, cpu.gpr[4])
    };
    if !x86::bits::is_canonical(target) {
        return Err(Exception::gp(cpu.ext));
    }
    let flags = pushed_flags(cpu, d);
    let mut frame = Frame::long(ss, sp & !15, cpl, cpu.ext);
    frame.push::<u64>(cpu, u64::from(old_ss.selector))?;
    let old_sp = cpu.gpr[4];
    frame.push::<u64>(cpu, old_sp)?;
    frame.push::<u64>(cpu, flags)?;
    let cs = cpu.s.seg[sreg::CS].selector;
    frame.push::<u64>(cpu, u64::from(cs))?;
    let rip = cpu.rip;
    frame.push::<u64>(cpu, rip)?;
    if let Some(e) = d.error {
        frame.push::<u64>(cpu, u64::from(e))?;
    }
    cpu.s.seg[sreg::SS] = ss;
    cpu.gpr[4] = frame.sp;
    cpu.rip = target;
    cpu.set_code_segment(code, cpl);
    clear_gate_flags(cpu, typ == system_type::INTERRUPT_GATE32);
    Ok(())
}

/// A stack pointer of the 64-bit TSS.
fn tss64_stack(cpu: &mut Cpu, offset: u64) -> Result<u64, Exception> {
    if offset + 7 > u64::from(cpu.s.tr.limit) {
        return Err(Exception::ts(cpu.selector_error(cpu.s.tr.selector)));
    }
    let sp: u64 = cpu.system_read(cpu.s.tr.base.wrapping_add(offset))?;
    if x86::bits::is_canonical(sp) { Ok(sp) } else { Err(Exception::ss(cpu.ext)) }
}

fn clear_gate_flags(cpu: &mut Cpu, interrupt_gate: bool) {
    let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    if interrupt_gate {
        cleared |= rflags::IF;
    }
    let flags = cpu.rflags() & !cleared;
    cpu.set_rflags(flags);
    cpu.derive_segments();
}

/// Protected mode without IA-32e (SDM 3A 6.12).
fn enter_protected(cpu: &mut Cpu, d: Delivery) -> Result<(), Exception> {
    let at = u64::from(d.vector) * 8;
    let error = idt_error(cpu, d.vector);
    if at + 7 > u64::from(cpu.s.idtr.limit) {
        return Err(Exception::gp(error));
    }
    let raw: u64 = cpu.system_read(cpu.s.idtr.base.wrapping_add(at))?;
    let gate = super::segment::Descriptor { la: 0, raw };
    let typ = (raw >> 40 & 0x1f) as u8;
    let known = matches!(
        typ,
        system_type::TASK_GATE
            | system_type::INTERRUPT_GATE16
            | system_type::TRAP_GATE16
            | system_type::INTERRUPT_GATE32
            | system_type::TRAP_GATE32
    );
    if !known {
        return Err(Exception::gp(error));
    }
    let software = matches!(d.source, Source::Software | Source::SoftwareException);
    if software && gate.attr().dpl() < cpu.cpl() {
        return Err(Exception::gp(error));
    }
    if !gate.attr().present() {
        return Err(Exception::np(error));
    }
    if typ == system_type::TASK_GATE {
        return task::interrupt_to(cpu, gate.gate_selector(), d.error, d.source == Source::Fault);
    }
    let wide = typ & 8 != 0;
    let (code, cpl) = gate_code(cpu, gate.gate_selector(), false)?;
    let target = gate.gate_offset(wide);
    if cpu.s.v86() && cpl != 0 {
        return Err(cpu.gp(gate.gate_selector()));
    }
    let mut frame = if cpl < cpu.cpl() { inner_stack(cpu, cpl)? } else { Frame::current(cpu) };
    if target > u64::from(code.limit) {
        return Err(Exception::gp(cpu.ext));
    }
    push_protected(cpu, &mut frame, d, cpl, if wide { 4 } else { 2 })?;
    if cpu.s.v86() {
        for reg in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            cpu.s.seg[reg] = Segment::default();
        }
    }
    cpu.s.seg[sreg::SS] = frame.ss;
    cpu.rip = target;
    // The stack's size is the new segment's.
    cpu.gpr[4] = if frame.mask == 0xffff { cpu.gpr[4] & !0xffff | frame.sp & 0xffff } else { frame.sp };
    cpu.system_flags &= !rflags::VM;
    cpu.s.rflags = cpu.system_flags;
    cpu.set_code_segment(code, cpl);
    clear_gate_flags(cpu, typ & 1 == 0);
    Ok(())
}

/// What goes onto the stack, from the outermost item to the error code.
fn push_protected(
    cpu: &mut Cpu,
    frame: &mut Frame,
    d: Delivery,
    cpl: u8,
    size: u64,
) -> Result<(), Exception> {
    let flags = pushed_flags(cpu, d);
    if cpu.s.v86() {
        for reg in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
            let selector = cpu.s.seg[reg].selector;
            frame.push_sized(cpu, size, u64::from(selector))?;
        }
    }
    if cpl < cpu.cpl() {
        let ss = cpu.s.seg[sreg::SS].selector;
        frame.push_sized(cpu, size, u64::from(ss))?;
        let sp = cpu.gpr[4];
        frame.push_sized(cpu, size, sp)?;
    }
    frame.push_sized(cpu, size, flags)?;
    let cs = cpu.s.seg[sreg::CS].selector;
    frame.push_sized(cpu, size, u64::from(cs))?;
    let rip = cpu.rip;
    frame.push_sized(cpu, size, rip)?;
    if let Some(e) = d.error {
        frame.push_sized(cpu, size, u64::from(e))?;
    }
    Ok(())
}

/// The stack of an inner level from the 16- or 32-bit TSS (SDM 3A 5.8.5).
pub fn inner_stack(cpu: &mut Cpu, cpl: u8) -> Result<Frame, Exception> {
    let wide = cpu.s.tr.attr.typ() & 8 != 0;
    let (offset, size) = if wide { (4 + 8 * u64::from(cpl), 6) } else { (2 + 4 * u64::from(cpl), 4) };
    if offset + size - 1 > u64::from(cpu.s.tr.limit) {
        return Err(Exception::ts(cpu.selector_error(cpu.s.tr.selector)));
    }
    let base = cpu.s.tr.base.wrapping_add(offset);
    let (sp, selector) = if wide {
        (u64::from(cpu.system_read::<u32>(base)?), cpu.system_read::<u16>(base.wrapping_add(4))?)
    } else {
        (u64::from(cpu.system_read::<u16>(base)?), cpu.system_read::<u16>(base.wrapping_add(2))?)
    };
    let ss = cpu.check_stack_segment(selector, cpl, Exception::ts)?;
    Ok(Frame::new(cpu, ss, sp, cpl))
}

/// IRET to the level and mode that the frame says (SDM 2A IRET). `size` is 2, 4 or 8.
pub fn iret(cpu: &mut Cpu, size: u64) -> Result<(), Exception> {
    let nmi = std::mem::take(&mut cpu.s.nmi_blocked);
    let result = if !cpu.s.protected() {
        iret_real(cpu, size)
    } else if cpu.s.v86() {
        super::v86::iret(cpu, size)
    } else if cpu.system_flag(rflags::NT) && !cpu.s.long_mode() {
        task::return_to_link(cpu)
    } else if cpu.system_flag(rflags::NT) {
        Err(Exception::GP0)
    } else {
        iret_protected(cpu, size)
    };
    if result.is_err() {
        cpu.s.nmi_blocked = nmi;
    }
    cpu.derive_poll_mask();
    result
}

/// Flags that IRET and POPF restore at `cpl` with operand `size`.
pub fn writable_flags(cpu: &Cpu, size: u64) -> u64 {
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if !cpu.s.protected() || cpu.cpl() == 0 {
        mask |= rflags::IOPL;
    }
    if !cpu.s.protected() || cpu.cpl() <= cpu.iopl() {
        mask |= rflags::IF;
    }
    mask
}

fn iret_real(cpu: &mut Cpu, size: u64) -> Result<(), Exception> {
    let mut frame = Frame::current(cpu);
    let rip = frame.pop_sized(cpu, size)?;
    let cs = frame.pop_sized(cpu, size)? as u16;
    let flags = frame.pop_sized(cpu, size)?;
    if rip > u64::from(cpu.s.seg[sreg::CS].limit) {
        return Err(Exception::GP0);
    }
    cpu.gpr[4] = frame.sp;
    cpu.s.seg[sreg::CS] = Segment { selector: cs, base: u64::from(cs) << 4, ..cpu.s.seg[sreg::CS] };
    cpu.rip = rip;
    let mask = writable_flags(cpu, size) | if size > 2 { rflags::RF } else { 0 };
    let value = cpu.rflags() & !mask | flags & mask;
    cpu.set_rflags(value);
    cpu.derive_segments();
    Ok(())
}

fn iret_protected(cpu: &mut Cpu, size: u64) -> Result<(), Exception> {
    let long = cpu.code_size == crate::cpu::CodeSize::Bits64;
    let mut frame = Frame::current(cpu);
    let rip = frame.pop_sized(cpu, size)?;
    let cs = frame.pop_sized(cpu, size)? as u16;
    let flags = frame.pop_sized(cpu, size)?;
    if size > 2 && flags & rflags::VM != 0 && cpu.cpl() == 0 && !cpu.s.long_mode() {
        return super::v86::enter(cpu, frame, rip, cs, flags);
    }
    let (code, cpl) = super::far::return_code(cpu, cs)?;
    let outward = cpl > cpu.cpl();
    let mut stack = None;
    if outward || long {
        let sp = frame.pop_sized(cpu, size)?;
        let selector = frame.pop_sized(cpu, size)? as u16;
        let to64 = cpu.s.long_mode() && code.attr.long();
        stack = Some((sp, super::far::return_stack(cpu, selector, cpl, to64)?));
    }
    super::far::check_target(cpu, &code, rip)?;
    let mut mask = writable_flags(cpu, size) | if size > 2 { rflags::RF } else { 0 };
    if cpu.cpl() == 0 && size > 2 {
        mask |= rflags::VIF | rflags::VIP;
    }
    let value = cpu.rflags() & !mask | flags & mask;
    cpu.set_code_segment(code, cpl);
    cpu.rip = rip;
    match stack {
        None => cpu.gpr[4] = frame.sp,
        Some((sp, ss)) => set_returned_stack(cpu, sp, ss, size),
    }
    if outward {
        cpu.drop_inner_segments();
    }
    cpu.set_rflags(value);
    cpu.derive_segments();
    Ok(())
}

/// Loads SS and the stack pointer that a return to an outer level popped.
pub fn set_returned_stack(cpu: &mut Cpu, sp: u64, ss: Segment, size: u64) {
    cpu.s.seg[sreg::SS] = ss;
    cpu.derive_segments();
    cpu.gpr[4] = if cpu.code_size == crate::cpu::CodeSize::Bits64 {
        if size == 8 { sp } else { sp & ((1 << (8 * size)) - 1) }
    } else if cpu.stack_mask == 0xffff {
        cpu.gpr[4] & !0xffff | sp & 0xffff
    } else {
        sp & 0xffff_ffff
    };
}

/// Whether virtual-8086 mode extensions are on.
pub const fn vme(cpu: &Cpu) -> bool {
    cpu.s.cr4 & cr4::VME != 0
}
