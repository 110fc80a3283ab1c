//! Descriptor-table registers and the instructions that inspect descriptors (SDM 2: LGDT … VERW).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::bits::{cr4, is_canonical, rflags};
use x86::segment::system_type;
use x86::{Attr, Exception, Segment, TableRegister};

use super::segment::{Descriptor, is_null};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::LazyFlags;

/// SGDT, SIDT, SLDT, STR, SMSW at CPL 3 fault under CR4.UMIP.
pub fn check_umip(cpu: &Cpu) -> Result<(), Exception> {
    let faults = cpu.s.cr4 & cr4::UMIP != 0 && cpu.cpl() == 3 && cpu.s.protected();
    if faults { Err(Exception::GP0) } else { Ok(()) }
}

/// Outside of protected mode (or in V86 mode) the instruction does not exist.
pub fn check_protected(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.s.protected() && !cpu.s.v86() { Ok(()) } else { Err(Exception::UD) }
}

/// LGDT, LIDT: reads the operand; `narrow`: a 16-bit operand loads 24 bits of base.
pub fn load_table(
    cpu: &mut Cpu,
    seg: u8,
    ea: u64,
    mask: u64,
    narrow: bool,
) -> Result<TableRegister, Exception> {
    let limit: u16 = cpu.read(seg, ea)?;
    let at = ea.wrapping_add(2) & mask;
    let base = if cpu.code_size == CodeSize::Bits64 {
        let base: u64 = cpu.read(seg, at)?;
        if !is_canonical(base) {
            return Err(Exception::GP0);
        }
        base
    } else {
        let base: u32 = cpu.read(seg, at)?;
        u64::from(if narrow { base & 0xff_ffff } else { base })
    };
    Ok(TableRegister { base, limit })
}

/// SGDT, SIDT.
pub fn store_table(cpu: &mut Cpu, seg: u8, ea: u64, table: TableRegister) -> Result<(), Exception> {
    let mut data = [0; 10];
    data[0..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..10].copy_from_slice(&table.base.to_le_bytes());
    let len = if cpu.code_size == CodeSize::Bits64 { 10 } else { 6 };
    cpu.write_bytes(seg, ea, &data[..len])
}

/// LLDT.
pub fn lldt(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        cpu.s.ldtr = Segment { selector, ..Segment::default() };
        return Ok(());
    }
    let (segment, attr) = system_segment(cpu, selector)?;
    if attr.typ() != system_type::LDT {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    cpu.s.ldtr = segment;
    Ok(())
}

/// LTR: the TSS becomes busy.
pub fn ltr(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let (mut segment, attr) = system_segment(cpu, selector)?;
    let available = attr.typ() == system_type::TSS32_AVAILABLE
        || attr.typ() == system_type::TSS16_AVAILABLE && !cpu.s.long_mode();
    if !available {
        return Err(cpu.gp(selector));
    }
    if !attr.present() {
        return Err(Exception::np(cpu.selector_error(selector)));
    }
    let d = cpu.descriptor(selector, Exception::gp)?;
    cpu.system_write(d.la.wrapping_add(5), (d.raw >> 40) as u8 | 2)?;
    segment.attr = Attr(attr.0 | 2);
    cpu.s.tr = segment;
    Ok(())
}

/// A system descriptor in the GDT, 16 bytes long in IA-32e mode.
fn system_segment(cpu: &mut Cpu, selector: u16) -> Result<(Segment, Attr), Exception> {
    if selector & 4 != 0 {
        return Err(cpu.gp(selector));
    }
    let d = cpu.descriptor(selector, Exception::gp)?;
    let attr = d.attr();
    if attr.is_code_or_data() {
        return Err(cpu.gp(selector));
    }
    let mut segment = Segment::from_descriptor(selector, d.raw);
    if cpu.s.long_mode() {
        let high = cpu.descriptor_high(selector, &d)?;
        if high >> 40 & 0x1f != 0 {
            return Err(cpu.gp(selector));
        }
        segment.base |= high << 32;
        if !is_canonical(segment.base) {
            return Err(cpu.gp(selector));
        }
    }
    Ok((segment, attr))
}

/// The descriptor of a selector that code of this level may look at; None: ZF is cleared.
fn visible(
    cpu: &mut Cpu,
    selector: u16,
    wanted: fn(Attr, bool) -> bool,
) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = cpu.try_descriptor(selector)? else { return Ok(None) };
    let attr = d.attr();
    let rpl = (selector & 3) as u8;
    let reachable = attr.is_conforming() || attr.dpl() >= rpl.max(cpu.cpl());
    Ok((wanted(attr, cpu.s.long_mode()) && reachable).then_some(d))
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    let others = cpu.flags.to_rflags() & !rflags::ZF;
    cpu.flags = LazyFlags::from_rflags(others | if zf { rflags::ZF } else { 0 });
}

/// Types that LAR accepts (SDM 2A table 3-53).
fn lar_type(attr: Attr, long: bool) -> bool {
    let system = match attr.typ() {
        2 | 9 | 11 | 12 => true,
        1 | 3 | 4 | 5 => !long,
        _ => false,
    };
    attr.is_code_or_data() || system
}

/// Types that LSL accepts (SDM 2A table 3-55).
fn lsl_type(attr: Attr, long: bool) -> bool {
    let system = match attr.typ() {
        2 | 9 | 11 => true,
        1 | 3 => !long,
        _ => false,
    };
    attr.is_code_or_data() || system
}

/// LAR: the access rights, or None with ZF clear.
pub fn lar(cpu: &mut Cpu, selector: u16) -> Result<Option<u64>, Exception> {
    let d = visible(cpu, selector, lar_type)?;
    set_zf(cpu, d.is_some());
    Ok(d.map(|d| d.raw >> 32 & 0x00ff_ff00))
}

/// LSL: the limit in bytes, or None with ZF clear.
pub fn lsl(cpu: &mut Cpu, selector: u16) -> Result<Option<u64>, Exception> {
    let d = visible(cpu, selector, lsl_type)?;
    set_zf(cpu, d.is_some());
    Ok(d.map(|d| u64::from(Segment::from_descriptor(selector, d.raw).limit)))
}

/// VERR.
pub fn verr(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    let d = visible(cpu, selector, |a, _| a.is_code_or_data() && a.is_readable())?;
    set_zf(cpu, d.is_some());
    Ok(())
}

/// VERW.
pub fn verw(cpu: &mut Cpu, selector: u16) -> Result<(), Exception> {
    let d = visible(cpu, selector, |a, _| a.is_writable())?;
    set_zf(cpu, d.is_some());
    Ok(())
}
