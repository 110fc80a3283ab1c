//! The engine's trace: fragments as they are made, their code, leaves of the cache, and instructions one by one.
//!
//! Off, it costs the dispatcher one test of an `Option` at each leave and nothing in translated code. Instructions are traced by interpreting
//! the pages of the range one instruction at a time: no fragment is made there and none is entered (INV-TRACE-1), and neither fragments nor
//! the interpreter's blocks run from one page into another; so nothing goes by unseen. Code elsewhere runs translated.

use std::fmt::{Arguments, Write as _};

use bt::{SiteKind, frame};
use iced_x86::{Decoder, DecoderOptions};
use x86_interp::cpu::{CodeSize, Cpu};

use crate::BtVcpu;
use crate::listing::formatter;

/// The longest instruction (SDM 2A 2.3.11).
const MAX_LEN: usize = 15;

/// What is traced.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Levels {
    /// A line for each fragment made.
    pub fragments: bool,
    /// A line for each leave of the cache.
    pub exits: bool,
    /// A line for each instruction.
    pub instructions: bool,
    /// The code of each fragment made.
    pub code: bool,
}

impl Levels {
    /// Anything at all.
    #[must_use]
    pub const fn any(self) -> bool {
        self.fragments || self.exits || self.instructions || self.code
    }
}

/// Guest linear addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressRange {
    /// The first.
    pub start: u64,
    /// The last.
    pub last: u64,
}

impl Default for AddressRange {
    /// All addresses.
    fn default() -> Self {
        Self { start: 0, last: u64::MAX }
    }
}

impl AddressRange {
    /// Whether an address lies in it.
    #[must_use]
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address <= self.last
    }

    /// The pages that it touches.
    const fn pages(self) -> Self {
        Self { start: self.start & !0xfff, last: self.last | 0xfff }
    }
}

/// Takes an event's text.
pub type Write = Box<dyn Fn(Arguments<'_>) + Send>;

/// A trace of one vCPU.
pub struct Trace {
    /// What.
    pub levels: Levels,
    /// Where.
    pub range: AddressRange,
    /// Whither.
    pub write: Write,
}

/// Why translated code was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// By a direct jump that was not linked.
    Unlinked,
    /// By a poll: a signal waits.
    Signal,
    /// By a fragment whose guest code has changed.
    Stale,
    /// By an instruction that the interpreter did: it jumped, faulted, or changed what the code relied on.
    Instruction,
    /// By a jump to another page or by register or memory, whose target was not found.
    Target,
}

impl Leave {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Unlinked, Self::Signal, Self::Stale, Self::Instruction, Self::Target];

    /// The name in statistics and traces.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unlinked => "unlinked",
            Self::Signal => "signal",
            Self::Stale => "stale",
            Self::Instruction => "instruction",
            Self::Target => "target",
        }
    }
}

/// What an instruction may change, as far as it is shown.
struct Registers {
    gpr: [u64; 16],
    rflags: u64,
    selectors: [u64; 6],
    bases: [u64; 6],
    control: [u64; 5],
}

const GPRS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SELECTORS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
const BASES: [&str; 6] = ["es.base", "cs.base", "ss.base", "ds.base", "fs.base", "gs.base"];
const CONTROLS: [&str; 5] = ["cr0", "cr2", "cr3", "cr4", "cpl"];

impl Registers {
    fn of(cpu: &Cpu) -> Self {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        let s = &cpu.s;
        Self {
            gpr,
            rflags: cpu.flags.to_rflags() | cpu.system_flags,
            selectors: s.seg.each_ref().map(|segment| u64::from(segment.selector)),
            bases: s.seg.each_ref().map(|segment| segment.base),
            control: [s.cr0, s.cr2, s.cr3, s.cr4, u64::from(s.cpl)],
        }
    }

    /// What `after` has that `self` has not, as ` name=value`.
    fn changes(&self, after: &Self) -> String {
        let mut text = String::new();
        let mut compare = |names: &[&str], old: &[u64], new: &[u64]| {
            for ((name, old), new) in names.iter().zip(old).zip(new).filter(|((_, old), new)| old != new) {
                let _ = (old, write!(text, " {name}={new:#x}"));
            }
        };
        compare(&GPRS, &self.gpr, &after.gpr);
        compare(&["rflags"], &[self.rflags], &[after.rflags]);
        compare(&SELECTORS, &self.selectors, &after.selectors);
        compare(&BASES, &self.bases, &after.bases);
        compare(&CONTROLS, &self.control, &after.control);
        text
    }
}

/// The linear address of the code at RIP.
fn code_address(cpu: &Cpu) -> u64 {
    match cpu.code_size {
        CodeSize::Bits64 => cpu.rip,
        _ => cpu.s.seg[x86::state::sreg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff,
    }
}

impl BtVcpu {
    /// Whether the code at RIP is traced instruction by instruction, so that it must not run translated.
    pub(crate) fn is_stepped(&mut self) -> bool {
        let Some(trace) = &self.observers.trace else { return false };
        trace.levels.instructions && trace.range.pages().contains(code_address(self.interp.cpu()))
    }

    /// Interprets one instruction and says what it did.
    pub(crate) fn step_traced(&mut self) {
        let at = code_address(self.interp.cpu());
        let shown = self.observers.trace.as_ref().is_some_and(|t| t.range.contains(at));
        if !shown {
            self.interp.step();
            return self.absorb();
        }
        let (text, len) = self.disassemble(at);
        let (rip, before) = (self.interp.cpu().rip, Registers::of(self.interp.cpu()));
        self.interp.step();
        let (next, after) = (self.interp.cpu().rip, Registers::of(self.interp.cpu()));
        self.absorb();
        if let Some(trace) = &self.observers.trace {
            let mut changes = before.changes(&after);
            if next != rip.wrapping_add(len) {
                let _ = write!(changes, " rip={next:#x}");
            }
            let line = format!("instruction {rip:016x} {text:<40}{changes}");
            (trace.write)(format_args!("{}", line.trim_end()));
        }
    }

    /// The instruction at a linear address, and its length; what cannot be read is said so.
    fn disassemble(&mut self, at: u64) -> (String, u64) {
        let mut bytes = Vec::with_capacity(MAX_LEN);
        let mut place = at;
        while bytes.len() < MAX_LEN {
            let Some(gfn) = self.interp.code_frame_at(place) else { break };
            let Some((page, _)) = self.read_frame(gfn) else { break };
            let offset = usize::try_from(place & 0xfff).unwrap_or(0);
            let take = (MAX_LEN - bytes.len()).min(4096 - offset);
            bytes.extend_from_slice(&page[offset..offset + take]);
            place = (place & !0xfff).wrapping_add(0x1000);
        }
        let cpu = self.interp.cpu();
        let (bits, rip) = (cpu.code_size.bits(), cpu.rip);
        let i = Decoder::with_ip(bits, &bytes, rip, DecoderOptions::NONE).decode();
        if bytes.is_empty() || i.is_invalid() {
            return (format!("(cannot be read or decoded: {bytes:02x?})"), 0);
        }
        let mut text = String::new();
        formatter().format(&i, &mut text);
        (text, i.len() as u64)
    }

    /// Counts a leave of the cache, with RIP where the guest is to go on.
    pub(crate) fn note_leave(&mut self) -> Leave {
        let reason = self.leave_reason();
        self.observers.leaves[reason as usize] += 1;
        if let Some(trace) = self.observers.trace.as_ref().filter(|t| t.levels.exits) {
            let rip = self.left_to();
            if trace.range.contains(rip) {
                (trace.write)(format_args!("exit {} {rip:016x}", reason.name()));
            }
        }
        reason
    }

    /// RIP where the guest is to go on.
    fn left_to(&self) -> u64 {
        let exit = self.frame.get32(frame::EXIT);
        match self.cache.target(exit.wrapping_sub(1)) {
            Some(target) if exit != 0 => {
                let base = target.from.page_rip;
                let base = if base == 0 { self.frame.get(frame::PAGE_RIP) } else { base };
                base.wrapping_add_signed(i64::from(target.offset))
            }
            _ => self.frame.get(frame::RIP),
        }
    }

    fn leave_reason(&mut self) -> Leave {
        if std::mem::take(&mut self.observers.refused) {
            return Leave::Instruction;
        }
        let (exit, alarmed) = (self.frame.get32(frame::EXIT), self.frame.is_alarmed());
        if exit != 0 && self.cache.may_link(exit - 1) {
            return Leave::Unlinked;
        }
        if alarmed || exit != 0 {
            return if alarmed { Leave::Signal } else { Leave::Stale };
        }
        match self.cache.site(self.frame.get32(frame::SITE)).map(|placed| placed.site.kind) {
            Some(SiteKind::Branch { .. }) | None => Leave::Target,
            Some(_) => Leave::Instruction,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_covers_both_ends_and_whole_pages() {
        let range = AddressRange { start: 0x1234, last: 0x2000 };
        assert!(range.contains(0x1234) && range.contains(0x2000) && !range.contains(0x2001));
        assert_eq!(range.pages(), AddressRange { start: 0x1000, last: 0x2fff });
        assert!(AddressRange::default().contains(u64::MAX));
        assert_eq!(AddressRange::default().pages(), AddressRange::default());
    }

    #[test]
    fn changes_name_only_what_changed() {
        let plain =
            || Registers { gpr: [0; 16], rflags: 2, selectors: [0; 6], bases: [0; 6], control: [0; 5] };
        let mut after = plain();
        after.gpr[3] = 0x10;
        after.rflags = 0x46;
        after.control[2] = 0x1000;
        assert_eq!(plain().changes(&after), " rbx=0x10 rflags=0x46 cr3=0x1000");
        assert_eq!(plain().changes(&plain()), "");
    }
}
