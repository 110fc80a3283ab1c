//! What translated code asks of Rust in the middle of a fragment: to fill the TLB, and to interpret an instruction.

use bt::{Own, SiteKind, frame};
use guestmem::Hva;
use iced_x86::{Code, Mnemonic};
use x86::Exception;
use x86::bits::is_canonical;
use x86::paging::{Access, AccessKind};
use x86::state::Activity;
use x86_interp::memory::Target;

use crate::adapt::Cause;
use crate::cache::PlacedSite;
use crate::exec::{Callouts, action};
use crate::{BtVcpu, TlbKnob, cpuid, legacy, state, xstate};

/// The mode that a fragment was translated for, as far as an instruction may change it.
#[derive(PartialEq, Eq)]
struct Mode {
    cpl: u8,
    variant: usize,
    code_size: x86_interp::cpu::CodeSize,
    control: [u64; 4],
    legacy: Option<legacy::Mode>,
}

/// Accesses of at most so many bytes need not be aligned, which would come before a page fault.
const WHOLE: usize = 8;

/// What became of a miss.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    /// Translated code finds it now.
    Done,
    /// There is nothing for translated code to find.
    Unfit(Cause),
    /// The guest's tables do not allow it.
    Fault(Exception),
}

impl BtVcpu {
    fn mode(&mut self) -> Mode {
        let cpu = self.interp.cpu();
        Mode {
            cpl: cpu.s.cpl,
            variant: cpu.variant,
            code_size: cpu.code_size,
            control: [cpu.s.cr0, cpu.s.cr4, cpu.s.msr.efer, cpu.s.xcr0],
            legacy: legacy::mode(cpu),
        }
    }

    /// The interpreter does the instruction of a site; the frame is up to date before. True if translated code may go on behind it: then it is
    /// up to date afterwards, too.
    fn interpret(&mut self, placed: &PlacedSite) -> bool {
        let site = placed.site;
        self.bt.callouts += 1;
        let linear = self.site_rip(placed);
        let rip = legacy::pointer(self.interp.cpu(), linear);
        self.interp.cpu().rip = rip;
        let before = self.mode();
        let fp = x86_interp::vector::exceptions_masked(&self.interp.cpu().s.fpu);
        let touched = self.interp.cpu().fpu_touched;
        self.interp.step();
        if saves_fpu(site.code) {
            self.interp.cpu().fpu_touched = touched;
        }
        let after = self.mode();
        let cpu = self.interp.cpu();
        let same = cpu.rip == rip.wrapping_add(u64::from(site.len)) & cpu.linear_mask
            && before == after
            && fp == x86_interp::vector::exceptions_masked(&cpu.s.fpu)
            && !cpu.code_changed
            && state::eligible(cpu)
            && !cpu.poll()
            && cpu.s.activity == Activity::Running;
        // What the fragment remembers of translations holds only if none was taken back (INV-GROUP-1).
        let untouched = !self.apply_events();
        let stays = same && untouched;
        if stays {
            state::fill(self.interp.cpu(), &self.frame, self.counter);
        }
        stays
    }

    /// Has the second-level TLB know an access within a page of plain RAM.
    fn fill(&mut self, la: u64, size: usize, write: bool) -> Fill {
        let cpu = self.interp.cpu();
        if la & 0xfff > 4096 - size as u64 || !is_canonical(la) {
            return Fill::Unfit(if is_canonical(la) { Cause::Crossing } else { Cause::Fault });
        }
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let access = Access { kind, ..cpu.data_access(kind) };
        let cr2 = cpu.s.cr2;
        let gpa = match cpu.resolve(la, access) {
            Ok(Target::Ram(Hva(_), gpa)) => gpa,
            Ok(Target::Device(_)) => return Fill::Unfit(Cause::Device),
            Err(e) => {
                // It is not certain that the guest is to see this one.
                cpu.s.cr2 = cr2;
                return Fill::Fault(e);
            }
        };
        let entry = cpu.tlb.entry(la, cpu.variant);
        let tag = cpu.tlb.tag(la);
        let there = if write { entry.write_tag == tag } else { entry.read_tag == tag };
        if there {
            return Fill::Done;
        }
        if write && !self.is_line_code(gpa, size) {
            self.note_innocent(gpa);
            return Fill::Unfit(Cause::BesideCode);
        }
        Fill::Unfit(Cause::Traced)
    }

    /// Whether a write touches lines with code, or a page without any.
    fn is_line_code(&mut self, gpa: guestmem::Gpa, size: usize) -> bool {
        let traced = self.interp.cpu().mem.traced_lines(gpa.gfn());
        traced == 0 || traced & guestmem::trace::lines(gpa.page_offset(), size) != 0
    }

    /// The page fault that an instruction's own access raises, and its address, where the check of `write` from `la` on found `exception`; None if
    /// it may be another exception, or none.
    fn own_fault(
        &mut self,
        la: u64,
        own: Own,
        write: bool,
        exception: Exception,
    ) -> Option<(u64, Exception)> {
        let la = la.wrapping_add(u64::from(own.above));
        if usize::from(own.size) > WHOLE {
            return None;
        }
        if own.write == write {
            return Some((la, exception));
        }
        match self.fill(la, usize::from(own.size), own.write) {
            Fill::Fault(exception) => Some((la, exception)),
            Fill::Done | Fill::Unfit(_) => None,
        }
    }

    /// Whether the frame's TLB already had the page: the access then missed for another reason.
    fn is_known(&self, la: u64, variant: usize, write: bool) -> bool {
        #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "one of three")]
        let entry = frame::tlb_entry(la, variant as i32);
        self.frame.get(entry + if write { 8 } else { 0 }) == la & !0xfff
    }
}

/// Whether an instruction only reads the vector state: what makes it ready to be loaded need not be done again.
const fn saves_fpu(code: Code) -> bool {
    matches!(
        code,
        Code::Xsave_mem
            | Code::Xsave64_mem
            | Code::Xsaveopt_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec_mem
            | Code::Xsavec64_mem
            | Code::Xsaves_mem
            | Code::Xsaves64_mem
    )
}

impl BtVcpu {
    /// The second form of an access did not find its pages: they are filled, and it tries again. They are neighbours, so they do not drive each other
    /// out (unless the TLB has one entry). If they cannot be, or the access does not cross, the interpreter does the instruction.
    fn split(&mut self, placed: &PlacedSite, size: usize, write: bool) -> u64 {
        self.bt.misses += 1;
        self.visit_was(Cause::Crossing);
        state::read_mode(self.interp.cpu(), &self.frame);
        let la = self.frame.get(frame::ADDRESS);
        if la & 0xfff > 4096 - size as u64 {
            let second = (la & !0xfff).wrapping_add(4096);
            let room = self.knobs.tlb != TlbKnob::One;
            if room && self.fill_frame(la, write) && self.fill_frame(second, write) {
                return again(&placed.site);
            }
        } else if let Fill::Unfit(cause) = self.fill(la, size, write) {
            self.blame(placed, cause, 1);
        }
        self.done_by_interpreter(placed)
    }

    /// The interpreter does the instruction of an access that missed. Where translated code goes on.
    fn done_by_interpreter(&mut self, placed: &PlacedSite) -> u64 {
        state::read(self.interp.cpu(), &self.frame);
        let on = match placed.site.kind {
            // Behind the instruction there is code without the group, or the second form.
            SiteKind::Group { .. } | SiteKind::Halves { .. } => 0,
            _ => placed.done,
        };
        let span = self.begin_callout(placed.site.code);
        let stays = self.interpret(placed);
        self.end_callout(placed.site.code, span);
        if !stays || on == 0 {
            return self.go_on();
        }
        self.frame.set(frame::DONE, on);
        action::DONE | behind(&placed.site)
    }

    /// Has both TLBs know a page, if it is plain RAM.
    fn fill_frame(&mut self, la: u64, write: bool) -> bool {
        if self.fill(la, 1, write) != Fill::Done {
            return false;
        }
        self.apply_events();
        let cpu = self.interp.cpu();
        let (entry, tag) = (cpu.tlb.entry(la, cpu.variant), cpu.tlb.tag(la));
        self.tables.fill_tlb(la, cpu.variant, &entry, tag);
        entry.read_tag == tag
    }
}

/// How translated code goes on behind an instruction that was done for it.
pub const fn behind(site: &bt::Site) -> u64 {
    (if site.flags_in_host { action::FLAGS } else { 0 }) | again(site)
}

/// How it goes on at an access that it tries again.
const fn again(site: &bt::Site) -> u64 {
    if site.fp_loaded { action::FP } else { 0 }
}

impl Callouts for BtVcpu {
    fn slow(&mut self, site: u32) -> u64 {
        let Some(placed) = self.cache.site(site) else { return action::LEAVE };
        let span = self.begin_visit();
        let action = self.missed(placed);
        self.publish_spaces();
        self.end_visit(span, placed.site.fp_loaded);
        action
    }

    fn callout(&mut self, site: u32) -> u64 {
        let Some(placed) = self.cache.site(site) else { return action::LEAVE };
        let span = self.begin_call(placed.site.code);
        let action = self.called_out(&placed);
        self.publish_spaces();
        self.end_call(placed.site.code, span, placed.site.fp_loaded);
        action
    }
}

impl BtVcpu {
    /// A memory access missed. The [`action`].
    fn missed(&mut self, placed: PlacedSite) -> u64 {
        let own_of = |size, write| Own { above: 0, size, write };
        let (size, write, own) = match placed.site.kind {
            SiteKind::Access { size, write } | SiteKind::Halves { size, write } => {
                (usize::from(size), write, own_of(size, write))
            }
            SiteKind::Group { size, write, own } => (usize::from(size), write, own),
            SiteKind::Split { size, write } => return self.split(&placed, usize::from(size), write),
            _ => return action::LEAVE,
        };
        let group = matches!(placed.site.kind, SiteKind::Group { .. });
        self.bt.misses += 1;
        let weight = self.sample_weight();
        state::read_mode(self.interp.cpu(), &self.frame);
        let la = self.frame.get(frame::ADDRESS);
        let variant = self.interp.cpu().variant;
        let filled = if self.is_known(la, variant, write) {
            let crosses = la & 0xfff > 4096 - size as u64;
            Fill::Unfit(if crosses { Cause::Crossing } else { Cause::Alignment })
        } else {
            self.fill(la, size, write)
        };
        match filled {
            Fill::Done => {}
            Fill::Unfit(cause) => self.visit_was(cause),
            Fill::Fault(_) => self.visit_was(Cause::Fault),
        }
        match filled {
            // Somebody's write has just made the page writable (INV-TR-3): what was made of it goes before this vCPU writes there.
            Fill::Done if write && self.interp.cpu().holder.has_written() => {
                self.done_by_interpreter(&placed)
            }
            Fill::Done => {
                self.apply_events();
                if self.knobs.tlb == TlbKnob::One {
                    let cpu = self.interp.cpu();
                    self.tables.fill_only(la, variant, &cpu.tlb.entry(la, variant), cpu.tlb.tag(la));
                }
                again(&placed.site)
            }
            Fill::Fault(exception) if placed.site.faults_first => {
                self.blame(&placed, Cause::Fault, 1);
                if let Some((la, exception)) = self.own_fault(la, own, write, exception) {
                    return self.deliver_page_fault(self.site_rip(&placed), la, exception);
                }
                self.done_by_interpreter(&placed)
            }
            Fill::Unfit(cause) if group => {
                // Guest state is as it was: the same instruction is next, in code without groups.
                self.blame_group(&placed, cause, weight);
                self.bt.plain_exits += u64::from(weight);
                self.frame.set(frame::DONE, placed.done);
                action::DONE
            }
            Fill::Unfit(cause) if matches!(placed.site.kind, SiteKind::Halves { .. }) => {
                // Guest state is as it was, for the second form.
                if cause == Cause::Crossing {
                    self.blame_adapted(&placed, weight);
                }
                self.frame.set(frame::DONE, placed.done);
                action::DONE | again(&placed.site)
            }
            Fill::Unfit(_) | Fill::Fault(_) => {
                let cause = if let Fill::Unfit(cause) = filled { cause } else { Cause::Fault };
                self.blame(&placed, cause, 1);
                self.done_by_interpreter(&placed)
            }
        }
    }

    /// An instruction for the interpreter. The [`action`].
    fn called_out(&mut self, placed: &PlacedSite) -> u64 {
        state::read_mode(self.interp.cpu(), &self.frame);
        match placed.site.kind {
            SiteKind::Direct { size, write } => {
                let la = self.frame.get(frame::ADDRESS);
                self.visit_direct(placed, |v| {
                    // Writes beside code pass (`exec`).
                    matches!(
                        v.fill(la, usize::from(size), write),
                        Fill::Done | Fill::Unfit(Cause::BesideCode)
                    )
                });
            }
            _ if matches!(placed.site.code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) => {
                self.blame(placed, Cause::Division, 1);
            }
            _ => {}
        }
        if let Some(action) = self.quick(placed) {
            return action;
        }
        state::read(self.interp.cpu(), &self.frame);
        let mnemonic = placed.site.code.mnemonic();
        let leaf = cpuid::key(&self.frame);
        xstate::learn(self.interp.cpu(), &self.frame, mnemonic);
        if !self.interpret(placed) {
            return self.go_on();
        }
        if mnemonic == Mnemonic::Cpuid {
            cpuid::remember(self.interp.cpu(), &self.frame, leaf);
        }
        if self.knobs.helpers && self.knobs.tlb != TlbKnob::One {
            xstate::learn_pages(self.interp.cpu(), &self.frame, &mut self.tables, mnemonic);
        }
        behind(&placed.site)
    }
}
