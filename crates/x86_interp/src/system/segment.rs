//! Loading segment registers and reading descriptors (SDM 3A chapter 5).

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use x86::state::sreg;
use x86::{Attr, Exception, Segment};

use crate::cpu::{CodeSize, Cpu};

/// A descriptor as read from its table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Linear address of its first byte.
    pub la: u64,
    /// The first eight bytes.
    pub raw: u64,
}

impl Descriptor {
    /// Access rights.
    pub const fn attr(&self) -> Attr {
        Attr((self.raw >> 40) as u16 & 0xf0ff)
    }

    /// Offset of a gate with 16 or 32 bits.
    pub const fn gate_offset(&self, wide: bool) -> u64 {
        let low = self.raw & 0xffff;
        if wide { low | self.raw >> 32 & 0xffff_0000 } else { low }
    }

    /// Target selector of a gate.
    pub const fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
}

/// Whether a selector is null.
pub const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

impl Cpu {
    /// Error code for a selector: its index and table, and EXT while an event is delivered.
    pub const fn selector_error(&self, selector: u16) -> u16 {
        selector & 0xfffc | self.ext
    }

    /// #GP for a selector.
    pub const fn gp(&self, selector: u16) -> Exception {
        Exception::gp(self.selector_error(selector))
    }

    /// Where the descriptor of `selector` lies and how many bytes of its table are left there; None beyond the limit.
    fn descriptor_place(&self, selector: u16, bytes: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.s.gdtr.base, u64::from(self.s.gdtr.limit))
        } else if self.s.ldtr.attr.present() {
            (self.s.ldtr.base, u64::from(self.s.ldtr.limit))
        } else {
            return None;
        };
        let offset = u64::from(selector & 0xfff8);
        (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// The descriptor of a selector; None beyond the table's limit.
    pub fn try_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Exception> {
        let Some(la) = self.descriptor_place(selector, 8) else { return Ok(None) };
        let raw = self.system_read(la)?;
        Ok(Some(Descriptor { la, raw }))
    }

    /// The descriptor of a selector, or `fault(selector)` beyond the table's limit.
    pub fn descriptor(
        &mut self,
        selector: u16,
        fault: fn(u16) -> Exception,
    ) -> Result<Descriptor, Exception> {
        let error = self.selector_error(selector);
        self.try_descriptor(selector)?.ok_or(fault(error))
    }

    /// Upper eight bytes of a 16-byte descriptor.
    pub fn descriptor_high(&mut self, selector: u16, low: &Descriptor) -> Result<u64, Exception> {
        if self.descriptor_place(selector, 16).is_none() {
            return Err(self.gp(selector));
        }
        self.system_read(low.la.wrapping_add(8))
    }

    /// Sets the accessed bit of a code or data descriptor in its table, if it is clear.
    pub fn mark_accessed(&mut self, d: &mut Descriptor) -> Result<(), Exception> {
        if d.raw >> 40 & 1 == 0 {
            d.raw |= 1 << 40;
            self.system_write(d.la.wrapping_add(5), (d.raw >> 40) as u8)?;
        }
        Ok(())
    }

    /// MOV, POP, LDS… to a data or stack segment register in any mode.
    pub fn load_segment(&mut self, reg: usize, selector: u16) -> Result<(), Exception> {
        let segment = if !self.s.protected() {
            Segment { selector, base: u64::from(selector) << 4, ..self.s.seg[reg] }
        } else if self.s.v86() {
            v86_segment(selector)
        } else if reg == sreg::SS {
            let cpl = self.cpl();
            self.check_stack_segment(selector, cpl, Exception::gp)?
        } else {
            self.check_data_segment(selector)?
        };
        self.s.seg[reg] = segment;
        self.derive_segments();
        Ok(())
    }

    /// SDM 2B MOV: loading DS, ES, FS, GS in protected mode.
    fn check_data_segment(&mut self, selector: u16) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let mut d = self.descriptor(selector, Exception::gp)?;
        let attr = d.attr();
        if !attr.is_code_or_data() || !attr.is_readable() {
            return Err(self.gp(selector));
        }
        let rpl = (selector & 3) as u8;
        if !attr.is_conforming() && attr.dpl() < rpl.max(self.cpl()) {
            return Err(self.gp(selector));
        }
        if !attr.present() {
            return Err(Exception::np(self.selector_error(selector)));
        }
        self.mark_accessed(&mut d)?;
        Ok(Segment::from_descriptor(selector, d.raw))
    }

    /// The checks of a stack segment for code of level `cpl`; what is wrong with it is reported by `fault`
    /// (#GP for MOV SS, #TS for stacks from a TSS).
    pub fn check_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u16) -> Exception,
    ) -> Result<Segment, Exception> {
        let rpl = (selector & 3) as u8;
        let error = self.selector_error(selector);
        if is_null(selector) {
            if self.code_size == CodeSize::Bits64 && cpl != 3 && rpl == cpl {
                return Ok(null_stack(selector, cpl));
            }
            return Err(fault(self.ext));
        }
        let mut d = self.descriptor(selector, fault)?;
        let attr = d.attr();
        if rpl != cpl || !attr.is_writable() || attr.dpl() != cpl {
            return Err(fault(error));
        }
        if !attr.present() {
            return Err(Exception::ss(error));
        }
        self.mark_accessed(&mut d)?;
        Ok(Segment::from_descriptor(selector, d.raw))
    }

    /// After a return to an outer level: data segments that the outer level may not use become null
    /// (SDM 2B RET, IRET).
    pub fn drop_inner_segments(&mut self) {
        let cpl = self.cpl();
        for reg in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            let attr = self.s.seg[reg].attr;
            if !attr.is_conforming() && attr.dpl() < cpl {
                let base = self.s.seg[reg].base;
                let keep = if self.s.long_mode() && is_null(self.s.seg[reg].selector) { base } else { 0 };
                self.s.seg[reg] = Segment { base: keep, ..Segment::default() };
            }
        }
    }

    /// Whether [`Cpu::drop_inner_segments`] changes nothing on a return to level 3.
    pub fn keeps_segments_outward(&self) -> bool {
        [sreg::ES, sreg::DS, sreg::FS, sreg::GS].iter().all(|&reg| {
            let s = &self.s.seg[reg];
            s.attr.is_conforming()
                || s.attr.dpl() == 3
                || *s == Segment { base: s.base, ..Segment::default() }
        })
    }

    /// Makes `segment` the code segment of level `cpl`.
    pub fn set_code_segment(&mut self, mut segment: Segment, cpl: u8) {
        segment.selector = segment.selector & !3 | u16::from(cpl);
        self.s.seg[sreg::CS] = segment;
        self.s.cpl = cpl;
        self.derive_segments();
        self.derive_variant();
    }
}

/// A segment as V86 mode makes it (SDM 3B 20.2.1).
pub const fn v86_segment(selector: u16) -> Segment {
    Segment { selector, base: (selector as u64) << 4, limit: 0xffff, attr: Attr(0xf3) }
}

/// The null SS of 64-bit code.
pub const fn null_stack(selector: u16, cpl: u8) -> Segment {
    // Present and flat inside, so that nothing but the selector shows that it is null; D/B set as processors do.
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attr: Attr(Attr::G | Attr::DB | Attr::P | Attr::S | Attr::WRITABLE | (cpl as u16) << 5),
    }
}
