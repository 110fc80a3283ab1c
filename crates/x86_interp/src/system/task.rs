//! Hardware task switches (SDM 3A 7.3).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::bits::{cr0, dr, rflags};
use x86::segment::system_type;
use x86::state::sreg;
use x86::{Attr, Exception, Segment};

use super::frame::Frame;
use super::segment::{Descriptor, is_null, v86_segment};
use crate::cpu::Cpu;
use crate::intercept::{Action, Event};

/// Why the task is switched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Jump,
    /// CALL, or an interrupt or exception through a task gate: the new task is nested.
    Call,
    /// IRET of a nested task.
    Return,
}

/// JMP to a TSS or task gate.
pub fn jump_to(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    switch(cpu, selector, Why::Jump, None)
}

/// CALL to a TSS or task gate.
pub fn call_to(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    switch(cpu, selector, Why::Call, None)
}

/// An interrupt or exception through a task gate.
pub fn interrupt_to(cpu: &mut Cpu, selector: u16, error: Option<u16>, fault: bool) -> Result<(), Exception> {
    let flags = cpu.rflags();
    if fault {
        cpu.system_flags |= rflags::RF;
    }
    let result = switch(cpu, selector, Why::Call, error);
    if result.is_err() {
        cpu.set_rflags(flags);
    }
    result
}

/// IRET with NT set: back to the task in the link field.
pub fn return_to_link(cpu: &mut Cpu) -> Result<(), Exception> {
    let link: u16 = cpu.system_read(cpu.s.tr.base)?;
    if link & 4 != 0 {
        return Err(Exception::ts(cpu.selector_error(link)));
    }
    switch(cpu, link, Why::Return, None)
}

/// The registers of a task as its TSS holds them.
struct Image {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    seg: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// The descriptor of the TSS to switch to, checked.
fn tss_descriptor(cpu: &mut Cpu, selector: u16, why: Why) -> Result<Descriptor, Exception> {
    let fault = if why == Why::Return { Exception::ts } else { Exception::gp };
    let error = cpu.selector_error(selector);
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault(error));
    }
    let d = cpu.descriptor(selector, fault)?;
    let attr = d.attr();
    let wanted = if why == Why::Return {
        [system_type::TSS16_BUSY, system_type::TSS32_BUSY]
    } else {
        [system_type::TSS16_AVAILABLE, system_type::TSS32_AVAILABLE]
    };
    if attr.is_code_or_data() || !wanted.contains(&attr.typ()) {
        return Err(fault(error));
    }
    if !attr.present() {
        return Err(Exception::np(error));
    }
    Ok(d)
}

fn switch(cpu: &mut Cpu, selector: u16, why: Why, error: Option<u16>) -> Result<(), Exception> {
    if cpu.intercepts.intercept(Event::TaskSwitch) == Action::Exit {
        return Ok(());
    }
    let d = tss_descriptor(cpu, selector, why)?;
    let mut tss = Segment::from_descriptor(selector, d.raw);
    let wide = tss.attr.typ() & 8 != 0;
    if tss.limit < if wide { 0x67 } else { 0x2b } {
        return Err(Exception::ts(cpu.selector_error(selector)));
    }
    let new = read_image(cpu, tss.base, wide)?;
    let mut flags = cpu.rflags();
    if why == Why::Return {
        flags &= !rflags::NT;
    }
    write_image(cpu, flags)?;
    let old_selector = cpu.s.tr.selector;
    if why != Why::Call {
        set_busy(cpu, old_selector, false)?;
    }
    if why == Why::Call {
        cpu.system_write(tss.base, old_selector)?;
    }
    if why != Why::Return {
        set_busy(cpu, selector, true)?;
    }
    // From here on the new task runs; faults are its own (SDM 3A 7.3, step 11).
    tss.attr = Attr(tss.attr.0 | 2);
    cpu.s.tr = tss;
    cpu.s.cr0 |= cr0::TS;
    cpu.s.dr7 &= !0x155;
    load_registers(cpu, &new, why)?;
    if let Some(e) = error {
        let size = if wide { 4 } else { 2 };
        let mut frame = Frame::current(cpu);
        frame.push_sized(cpu, size, u64::from(e))?;
        cpu.set_stack_pointer(frame.sp);
    }
    if cpu.rip > u64::from(cpu.s.seg[sreg::CS].limit) {
        return Err(Exception::GP0);
    }
    if new.trap {
        cpu.pending_debug |= dr::DR6_BT;
    }
    Ok(())
}

/// Sets or clears the busy bit of a TSS descriptor.
fn set_busy(cpu: &mut Cpu, selector: u16, busy: bool) -> Result<(), Exception> {
    let Some(d) = cpu.try_descriptor(selector)? else { return Ok(()) };
    let byte = (d.raw >> 40) as u8;
    let byte = if busy { byte | 2 } else { byte & !2 };
    cpu.system_write(d.la.wrapping_add(5), byte)
}

fn read_image(cpu: &mut Cpu, base: u64, wide: bool) -> Result<Image, Exception> {
    let mut gpr = [0; 8];
    let mut seg = [0; 6];
    if wide {
        for (i, r) in gpr.iter_mut().enumerate() {
            *r = u64::from(cpu.system_read::<u32>(base.wrapping_add(0x28 + 4 * i as u64))?);
        }
        for (i, s) in seg.iter_mut().enumerate() {
            *s = cpu.system_read(base.wrapping_add(0x48 + 4 * i as u64))?;
        }
        let paging = cpu.s.cr0 & cr0::PG != 0;
        let cr3 = u64::from(cpu.system_read::<u32>(base.wrapping_add(0x1c))?);
        Ok(Image {
            cr3: paging.then_some(cr3),
            rip: u64::from(cpu.system_read::<u32>(base.wrapping_add(0x20))?),
            flags: u64::from(cpu.system_read::<u32>(base.wrapping_add(0x24))?),
            gpr,
            seg,
            ldt: cpu.system_read(base.wrapping_add(0x60))?,
            trap: cpu.system_read::<u16>(base.wrapping_add(0x64))? & 1 != 0,
        })
    } else {
        for (i, r) in gpr.iter_mut().enumerate() {
            *r = 0xffff_0000 | u64::from(cpu.system_read::<u16>(base.wrapping_add(0x12 + 2 * i as u64))?);
        }
        for (i, s) in seg.iter_mut().take(4).enumerate() {
            *s = cpu.system_read(base.wrapping_add(0x22 + 2 * i as u64))?;
        }
        Ok(Image {
            cr3: None,
            rip: u64::from(cpu.system_read::<u16>(base.wrapping_add(0x0e))?),
            flags: u64::from(cpu.system_read::<u16>(base.wrapping_add(0x10))?),
            gpr,
            seg,
            ldt: cpu.system_read(base.wrapping_add(0x2a))?,
            trap: false,
        })
    }
}

/// Saves the running task into its TSS.
fn write_image(cpu: &mut Cpu, flags: u64) -> Result<(), Exception> {
    let base = cpu.s.tr.base;
    let wide = cpu.s.tr.attr.typ() & 8 != 0;
    let rip = cpu.rip;
    if wide {
        cpu.system_write(base.wrapping_add(0x20), rip as u32)?;
        cpu.system_write(base.wrapping_add(0x24), flags as u32)?;
        for i in 0..8 {
            let value = cpu.gpr[i] as u32;
            cpu.system_write(base.wrapping_add(0x28 + 4 * i as u64), value)?;
        }
        for i in 0..6 {
            let value = cpu.s.seg[i].selector;
            cpu.system_write(base.wrapping_add(0x48 + 4 * i as u64), value)?;
        }
    } else {
        cpu.system_write(base.wrapping_add(0x0e), rip as u16)?;
        cpu.system_write(base.wrapping_add(0x10), flags as u16)?;
        for i in 0..8 {
            let value = cpu.gpr[i] as u16;
            cpu.system_write(base.wrapping_add(0x12 + 2 * i as u64), value)?;
        }
        for i in 0..4 {
            let value = cpu.s.seg[i].selector;
            cpu.system_write(base.wrapping_add(0x22 + 2 * i as u64), value)?;
        }
    }
    Ok(())
}

fn load_registers(cpu: &mut Cpu, new: &Image, why: Why) -> Result<(), Exception> {
    if let Some(cr3) = new.cr3
        && cr3 != cpu.s.cr3
    {
        super::control::write_cr3(cpu, cr3)?;
    }
    cpu.rip = new.rip;
    cpu.gpr[..8].copy_from_slice(&new.gpr);
    let nested = if why == Why::Call { rflags::NT } else { 0 };
    cpu.set_rflags(new.flags | nested);
    // All segments are unusable until each has been checked.
    for (seg, &selector) in cpu.s.seg.iter_mut().zip(&new.seg) {
        *seg = Segment { selector, ..Segment::default() };
    }
    cpu.s.ldtr = Segment { selector: new.ldt, ..Segment::default() };
    load_ldt(cpu, new.ldt)?;
    if cpu.s.v86() {
        for (seg, &selector) in cpu.s.seg.iter_mut().zip(&new.seg) {
            *seg = v86_segment(selector);
        }
        cpu.set_cpl(3);
        cpu.derive_all();
        return Ok(());
    }
    let cpl = (new.seg[sreg::CS] & 3) as u8;
    cpu.set_cpl(cpl);
    let ss = cpu.check_stack_segment(new.seg[sreg::SS], cpl, Exception::ts)?;
    cpu.s.seg[sreg::SS] = ss;
    let code = code_segment(cpu, new.seg[sreg::CS])?;
    cpu.set_code_segment(code, cpl);
    for reg in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
        cpu.load_segment(reg, new.seg[reg]).map_err(as_ts)?;
    }
    cpu.derive_all();
    Ok(())
}

/// Faults of segments from a TSS are #TS where a MOV would give #GP.
fn as_ts(e: Exception) -> Exception {
    match (e.vector(), e.error_code()) {
        (13, Some(code)) => Exception::ts(code),
        _ => e,
    }
}

fn load_ldt(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        return Ok(());
    }
    let error = cpu.selector_error(selector);
    if selector & 4 != 0 {
        return Err(Exception::ts(error));
    }
    let d = cpu.descriptor(selector, Exception::ts)?;
    let attr = d.attr();
    if attr.is_code_or_data() || attr.typ() != system_type::LDT || !attr.present() {
        return Err(Exception::ts(error));
    }
    cpu.s.ldtr = Segment::from_descriptor(selector, d.raw);
    Ok(())
}

fn code_segment(cpu: &mut Cpu, selector: u16) -> Result<Segment, Exception> {
    let error = cpu.selector_error(selector);
    if is_null(selector) {
        return Err(Exception::ts(error));
    }
    let mut d = cpu.descriptor(selector, Exception::ts)?;
    let attr = d.attr();
    let rpl = (selector & 3) as u8;
    let level_ok = if attr.is_conforming() { attr.dpl() <= rpl } else { attr.dpl() == rpl };
    if !attr.is_code() || !level_ok {
        return Err(Exception::ts(error));
    }
    if !attr.present() {
        return Err(Exception::np(error));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(Segment::from_descriptor(selector, d.raw))
}
