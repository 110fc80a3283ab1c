//! Faults of fragments delivered on the frame: from 64-bit code at level 0 or 3 to a 64-bit handler at level 0, through the IDT (SDM 3A 6.14), without the
//! interpreter's copy of the registers.
//!
//! INV-DEL-1: nothing changes before every check of the interpreter's (`x86_interp::system::interrupt`) has passed, and each word of IDT, GDT and
//! TSS is read once, by way of the second-level TLB. Whatever is unusual (a page that it does not know, a stack across pages, a gate to another code segment of level 0)
//! is the interpreter's. As behind IRETQ in the cache the segments are loaded when somebody looks (`state::read_mode`).

use bt::frame;
use engine::Cause;
use guestmem::Hva;
use x86::bits::{is_canonical, rflags};
use x86::segment::system_type;
use x86::{Exception, Segment};
use x86_interp::cpu::{CodeSize, Cpu};

use crate::exec::{Frame, action};
use crate::{BtVcpu, state};

/// Register number of RSP in the frame.
const STACK_POINTER: i32 = frame::GPR + 8 * 4;
const CODE_SELECTOR: i32 = frame::SELECTORS + 4;
const STACK_SELECTOR: i32 = frame::SELECTORS + 8;

/// What a gate, and the descriptor that it names, say.
struct Gate {
    target: u64,
    selector: u32,
    descriptor: u64,
    stack: u64,
    clears_if: bool,
}

/// Eight bytes at a linear address that level 0 may read.
fn read(cpu: &Cpu, la: u64) -> Option<u64> {
    let entry = cpu.tlb.entry(la, 0);
    let known = entry.read_tag == cpu.tlb.tag(la) && is_canonical(la) && la & 0xfff <= 4096 - 8;
    known.then(|| cpu.mem.load(Hva(la.wrapping_add(entry.addend))))
}

/// Where `size` bytes lie that level 0 may write.
fn writable(cpu: &Cpu, la: u64, size: u64) -> Option<Hva> {
    let entry = cpu.tlb.entry(la, 0);
    let known = entry.write_tag == cpu.tlb.tag(la) && is_canonical(la) && la & 0xfff <= 4096 - size;
    known.then(|| Hva(la.wrapping_add(entry.addend)))
}

/// The gate of a vector, if its handler is 64-bit code at level 0.
fn gate(cpu: &Cpu, frame: &Frame, vector: u8) -> Option<Gate> {
    let at = u64::from(vector) * 16;
    if at + 15 > u64::from(cpu.s.idtr.limit) {
        return None;
    }
    let low = read(cpu, cpu.s.idtr.base.wrapping_add(at))?;
    let high = read(cpu, cpu.s.idtr.base.wrapping_add(at + 8))?;
    let typ = (low >> 40 & 0x1f) as u8;
    let known = typ == system_type::INTERRUPT_GATE32 || typ == system_type::TRAP_GATE32;
    let selector = low >> 16 & 0xffff;
    if !known || low >> 47 & 1 == 0 || selector & 7 != 0 || selector == 0 {
        return None;
    }
    if selector + 7 > u64::from(cpu.s.gdtr.limit) {
        return None;
    }
    let descriptor = read(cpu, cpu.s.gdtr.base.wrapping_add(selector))?;
    let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    if !is_flat_code(descriptor) || !is_canonical(target) {
        return None;
    }
    let ist = low >> 32 & 7;
    let stack = match (ist, cpu.s.cpl) {
        (0, 0) => frame.get(STACK_POINTER),
        (0, _) => task_stack(cpu, 4)?,
        _ => task_stack(cpu, 0x24 + 8 * (ist - 1))?,
    };
    let selector = selector as u32;
    Some(Gate { target, selector, descriptor, stack, clears_if: typ == system_type::INTERRUPT_GATE32 })
}

/// A stack pointer of the 64-bit TSS.
fn task_stack(cpu: &Cpu, offset: u64) -> Option<u64> {
    let tr = cpu.s.tr;
    if offset + 7 > u64::from(tr.limit) { None } else { read(cpu, tr.base.wrapping_add(offset)) }
}

/// Whether a descriptor is of present, accessed, 64-bit code of level 0 that does not conform.
fn is_flat_code(descriptor: u64) -> bool {
    let attr = Segment::from_descriptor(0, descriptor).attr;
    attr.is_code()
        && attr.present()
        && attr.long()
        && !attr.db()
        && attr.dpl() == 0
        && !attr.is_conforming()
        && attr.typ() & 1 != 0
}

/// Delivers a fault of the instruction at `rip`, if all is as usual: then [`frame::RIP`] is the handler. The interpreter knows the mode.
fn deliver(cpu: &Cpu, frame: &Frame, exception: Exception, rip: u64) -> Option<()> {
    let flags = frame.get(frame::SYSFLAGS) | state::status_flags(frame);
    if cpu.code_size != CodeSize::Bits64 {
        return None;
    }
    let gate = gate(cpu, frame, exception.vector())?;
    let outer = cpu.s.cpl != 0;
    let code = frame.get32(CODE_SELECTOR);
    if !outer && code != gate.selector {
        return None;
    }
    let (error, words) = match exception.error_code() {
        Some(error) => (u64::from(error), 6),
        None => (0, 5),
    };
    let stack = gate.stack & !15;
    let bottom = stack.wrapping_sub(8 * words);
    let mut to = writable(cpu, bottom, 8 * words)?;
    let image = [
        error,
        rip,
        u64::from(code),
        flags | rflags::RF,
        frame.get(STACK_POINTER),
        u64::from(frame.get32(STACK_SELECTOR)),
    ];
    for word in &image[if words == 6 { 0 } else { 1 }..] {
        cpu.mem.store(to, *word);
        to = Hva(to.0.wrapping_add(8));
    }
    frame.set(STACK_POINTER, bottom);
    frame.set(frame::RIP, gate.target);
    let cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    let cleared = if gate.clears_if { cleared | rflags::IF } else { cleared };
    frame.set(frame::SYSFLAGS, frame.get(frame::SYSFLAGS) & !cleared);
    if outer {
        frame.set32(CODE_SELECTOR, gate.selector);
        frame.set32(STACK_SELECTOR, 0);
        frame.set(frame::IRET_DESCRIPTORS, gate.descriptor);
        frame.set(frame::IRET_DESCRIPTORS + 8, 0);
        frame.set32(frame::MODE, frame::MODE_IRET);
    }
    Some(())
}

impl BtVcpu {
    /// Delivers the page fault of an access of the instruction at `rip` that the guest's tables, just walked, do not allow. The action.
    pub(crate) fn deliver_page_fault(&mut self, rip: u64, la: u64, exception: Exception) -> u64 {
        self.bt.faults += 1;
        let helped = self.knobs.helpers;
        let cpu = self.interp.cpu();
        if !helped || cpu.code_changed {
            return self.deliver_by_interpreter(rip, la, exception);
        }
        let span = cpu.stats.watch(Cause::TruePageFault);
        let delivered = deliver(cpu, &self.frame, exception, rip);
        cpu.stats.end(Cause::TruePageFault, span);
        if delivered.is_none() {
            return self.deliver_by_interpreter(rip, la, exception);
        }
        cpu.stats.count(Cause::TruePageFault);
        self.bt.delivered += 1;
        let cpu = self.interp.cpu();
        cpu.trap_suppressed = true;
        cpu.s.cr2 = la;
        self.frame.set(frame::CR2, la);
        if self.may_go_on() { action::LOOK_UP } else { action::LEAVE }
    }

    fn deliver_by_interpreter(&mut self, rip: u64, la: u64, exception: Exception) -> u64 {
        let cpu = self.interp.cpu();
        state::read(cpu, &self.frame);
        cpu.rip = crate::legacy::pointer(cpu, rip);
        cpu.s.cr2 = la;
        x86_interp::system::interrupt::deliver_exception(cpu, exception);
        self.go_on()
    }
}
