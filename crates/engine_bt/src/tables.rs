//! The software TLB, the jump cache and the second-level jump table, as translated code reads them, and how they forget.
//!
//! The frame's TLB and jump cache are flushed by half of the address space: what was filled is logged, so that an address-space switch costs
//! only what was filled since the last. Behind them stand the interpreter's TLB and the second-level jump table, which carry context
//! numbers in their tags, so that a process that comes back finds its own again.
//!
//! INV-TAB-1: an entry of a half was filled under the half's current context number: every change of that number comes with an event that
//! empties the half. A context number is not used again before everything was emptied. Jumps in the upper half have a number of their own, which
//! changes only when code there has moved (INV-UP-1).

#![expect(clippy::cast_possible_truncation, reason = "masked to the number of sets")]
#![expect(unsafe_code, reason = "shares the logs with assembly")]

use bt::{Variant, frame};
use guestmem::Gfn;
use x86_interp::tlb::{Entry, TRACED, TlbEvent};

use crate::exec::Frame;
use crate::huge;
use crate::knobs::Knobs;
use crate::page_filter::PageFilter;
use crate::upper_code::{UpperChange, UpperCode};
use crate::user_code::UserCode;

/// Tag and host address.
type SecondEntry = [u64; 2];

/// The tables of one frame.
pub struct Tables {
    frame: Frame,
    second: huge::Table<2>,
    /// Places in `second` that lower halves' entries were put in.
    lower: Vec<u32>,
    /// Pages that have entries in `second`.
    pages: PageFilter,
    /// Pages that have entries in `user`.
    user_pages: PageFilter,
    upper_changed: UpperChange,
    /// What the upper half's code depends on, and whether that is to be looked at.
    upper_code: UpperCode,
    upper_flushed: bool,
    user: UserCode,
    /// Entries that each log has room for; it counts as full with the last.
    log_entries: u32,
    /// The one entry of a TLB that may have no other ([`crate::TlbKnob::One`]).
    only: Option<i32>,
    /// Nothing known by linear address outlives a switch of the address space.
    distrust: bool,
    /// Of 16- and 32-bit code, by variant.
    environments: [u8; 3],
}

/// Numbers of the upper half's code, which tags have room for; when they come round, all jumps are forgotten.
const CODE_CONTEXTS: u64 = 1 << 12;

const fn half(address: u64) -> usize {
    (address >> 63) as usize
}

/// So many of the second-level table's entries are of lower halves at most: they are looked through for those of a page.
const FEW_LOWER: usize = 2048;

/// So many filled entries are looked through for those of a page; with more, all are forgotten, so that the next page costs little.
const FEW: usize = 256;

/// Which log.
#[derive(Clone, Copy)]
enum Log {
    Tlb = 0,
    Jumps = 2,
}

impl Tables {
    /// Empty tables, under the stress that `knobs` ask for.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new(frame: Frame, knobs: &Knobs) -> rustix::io::Result<Self> {
        let mut second = huge::Table::new(frame::SECOND_JUMP_ENTRIES as usize, true)?;
        second.fill([frame::NO_SECOND_TAG, 0]);
        let t = Self {
            user: UserCode::new(frame.clone())?,
            frame,
            second,
            lower: Vec::with_capacity(FEW_LOWER),
            pages: PageFilter::new(),
            user_pages: PageFilter::new(),
            upper_changed: UpperChange::None,
            upper_code: UpperCode::default(),
            upper_flushed: false,
            log_entries: knobs.log.clamp(1, frame::LOG_ENTRIES),
            only: None,
            distrust: !knobs.context,
            environments: [0; 3],
        };
        for variant in 0..frame::VARIANTS {
            for i in 0..frame::TLB_ENTRIES as i32 {
                t.clear_entry(frame::TLB + variant * frame::TLB_STRIDE + 32 * i);
            }
        }
        for class in 0..frame::JUMP_CLASSES {
            // The rest of them are zero, which is empty.
            t.clear_jump(frame::JUMPS + class * frame::JUMP_STRIDE);
        }
        t.frame.set(frame::SECOND_JUMPS, t.second.as_ptr() as u64);
        t.frame.set(frame::PAGE_FILTERS, t.pages.address());
        t.frame.set(frame::PAGE_FILTERS + 8, t.user_pages.address());
        for (log, at, end) in [
            (Log::Tlb, frame::TLB_LOG, frame::TLB_LOG_END),
            (Log::Jumps, frame::JUMP_LOG, frame::JUMP_LOG_END),
        ] {
            for half in 0..2 {
                let start = t.log_start(log, half);
                t.frame.set(at + 8 * half as i32, start);
                if half == 0 {
                    t.frame.set(frame::LOG_STARTS + 4 * log as i32, start);
                }
                t.frame.set(end + 8 * half as i32, start + 4 * u64::from(t.log_entries));
            }
        }
        Ok(t)
    }

    fn log_start(&self, log: Log, half: usize) -> u64 {
        let number = log as i32 + half as i32;
        self.frame.address(frame::LOGS + number * 4 * frame::LOG_ENTRIES as i32)
    }

    const fn log_field(log: Log, half: usize) -> i32 {
        half as i32 * 8
            + match log {
                Log::Tlb => frame::TLB_LOG,
                Log::Jumps => frame::JUMP_LOG,
            }
    }

    /// What was logged, as displacements in the frame. None: the log is full, so anything may have been filled.
    fn logged(&self, log: Log, half: usize) -> Option<&[u32]> {
        let start = self.log_start(log, half);
        let len = (self.frame.get(Self::log_field(log, half)).saturating_sub(start) / 4) as usize;
        // SAFETY: the assembly advances the pointer only up to the log's end, having written what lies below; no translated code runs now.
        (len < self.log_entries as usize)
            .then(|| unsafe { std::slice::from_raw_parts(start as *const u32, len) })
    }

    /// Every entry that may have been filled for a half, as displacements in the frame: those logged, or all of the table.
    fn for_each_filled(&self, log: Log, half: usize, mut act: impl FnMut(i32)) {
        if let Some(logged) = self.logged(log, half) {
            return logged.iter().for_each(|&at| act(at as i32));
        }
        match log {
            Log::Tlb => {
                (0..frame::VARIANTS * frame::TLB_ENTRIES as i32).for_each(|n| act(frame::TLB + 32 * n))
            }
            Log::Jumps => (0..frame::JUMP_CLASSES).flat_map(frame::jump_entries).for_each(act),
        }
    }

    fn clear_log(&self, log: Log, half: usize) {
        self.frame.set(Self::log_field(log, half), self.log_start(log, half));
    }

    fn clear_entry(&self, at: i32) {
        self.frame.set(at, frame::no_page(at));
        self.frame.set(at + 8, frame::no_page(at));
    }

    fn clear_jump(&self, at: i32) {
        self.frame.set(at, frame::no_target(at));
    }

    /// Remembers where the code at `rip` (if `legacy`: 16- or 32-bit code, at a linear address) is, under the context of its half.
    pub fn set_jump(&mut self, rip: u64, code: u64, variant: Variant, legacy: bool) {
        let class = frame::jump_class(variant, legacy);
        let environment = if legacy { self.environments[variant as usize] } else { 0 };
        let context = self.frame.get(frame::CODE_CONTEXT + 8 * half(rip) as i32);
        let at = frame::second_set(rip, context) as usize;
        if self.lower.len() == FEW_LOWER {
            for at in self.lower.drain(..) {
                self.second.get_mut(at as usize).into_iter().for_each(|e| e[0] = frame::NO_SECOND_TAG);
            }
        }
        if let Some(e) = self.second.get_mut(at) {
            let before = e[0];
            *e = [frame::second_tag(rip, context, class as u64, environment), code];
            if half(rip) == 0 && e[0] != before {
                self.lower.push(at as u32);
            }
        }
        self.pages.add(rip);
        self.cache_jump(rip, code, class);
    }

    /// Where the code at `rip`, a canonical address, is, if that is known. `None` does not mean that there is none.
    pub fn find_jump(&self, rip: u64, variant: Variant, legacy: bool) -> Option<u64> {
        let class = frame::jump_class(variant, legacy);
        let environment = if legacy { self.environments[variant as usize] } else { 0 };
        if legacy && let Some(code) = self.user.find_legacy(rip, variant) {
            return Some(code);
        }
        let context = self.frame.get(frame::CODE_CONTEXT + 8 * half(rip) as i32);
        if variant == Variant::User && half(rip) == 0 {
            return self.user.find(rip);
        }
        let e = self.second.get(frame::second_set(rip, context) as usize)?;
        (e[0] == frame::second_tag(rip, context, class as u64, environment)).then_some(e[1])
    }

    /// What 16- and 32-bit code of these rights relies on, as last set.
    pub const fn legacy_environment(&self, variant: Variant) -> u8 {
        self.environments[variant as usize]
    }

    /// Tells the frame's jump cache.
    fn cache_jump(&self, rip: u64, code: u64, class: i32) {
        let field = Self::log_field(Log::Jumps, half(rip));
        let at = frame::JUMPS + class * frame::JUMP_STRIDE + 8 * frame::jump_set(rip) as i32;
        if self.frame.get(at) == rip && self.frame.get(at + frame::JUMP_HOSTS) == code {
            return;
        }
        self.note_filled(field, frame::JUMP_LOG_END - frame::JUMP_LOG, at);
        self.frame.set(at + frame::JUMP_HOSTS, code);
        self.frame.set(at, rip);
    }

    /// Logs a filled entry, unless the log is full. `field` says where the log's pointer is, `end` how far behind it where the log ends.
    fn note_filled(&self, field: i32, end: i32, at: i32) {
        let next = self.frame.get(field);
        if next < self.frame.get(field + end) {
            // SAFETY: the log has room at its pointer.
            unsafe { (next as *mut u32).write(at as u32) };
            self.frame.set(field, next + 4);
        }
    }

    /// Fills the TLB's entry for the page of `la` as the refills do: from the interpreter's, whose tag for it is `tag`. Its place in the frame.
    pub fn fill_tlb(&mut self, la: u64, variant: usize, entry: &Entry, tag: u64) -> i32 {
        let page = la & !0xfff;
        let at = frame::tlb_entry(la, variant as i32);
        let field = Self::log_field(Log::Tlb, half(la));
        self.note_filled(field, frame::TLB_LOG_END - frame::TLB_LOG, at);
        let distance = entry.addend.wrapping_add(self.frame.get(frame::MEMORY));
        self.frame.set(at, page);
        self.frame.set(at + 8, if entry.write_tag == tag { page } else { !page });
        self.frame.set(at + 16, page.wrapping_add(distance));
        self.frame.set(at + 24, distance);
        self.frame.set(frame::frame_of(at), entry.gfn & !TRACED);
        at
    }

    /// Makes the translation of `la` the only one of the frame's TLB.
    pub fn fill_only(&mut self, la: u64, variant: usize, entry: &Entry, tag: u64) {
        if let Some(other) = self.only {
            self.clear_entry(other);
        }
        self.only = Some(self.fill_tlb(la, variant, entry, tag));
    }

    /// As [`Tables::set_jump`], for code that lies in one frame and does not know its RIP: every process that has this frame finds it.
    pub fn set_user_jump(&mut self, rip: u64, gfn: Gfn, code: u64, variant: Variant, legacy: bool) {
        if self.user_pages.is_crowded() {
            self.forget_cached_jumps(0);
            self.user.forget_pages();
            self.user_pages.clear();
        }
        self.user_pages.add(rip);
        self.user.set(rip, gfn, code, variant, legacy);
        self.cache_jump(rip, code, frame::jump_class(variant, legacy));
    }

    /// Fragments made for another environment are not found from now on.
    pub fn set_environment(&mut self, environment: u8) {
        self.forget_targets();
        self.user.set_environment(environment);
    }

    /// 16- and 32-bit code of these rights now relies on the facts with this number. What the jump cache knows of it relied on others; in the
    /// second-level table the number is in the tags.
    pub fn set_legacy_environment(&mut self, variant: Variant, number: u8) {
        let known = &mut self.environments[variant as usize];
        if std::mem::replace(known, number) == number {
            return;
        }
        self.frame.set(frame::ENVIRONMENTS + 8 * variant as i32, u64::from(number) << 32);
        self.user.set_legacy_environment(variant, number);
        let start = frame::JUMPS + frame::jump_class(variant, true) * frame::JUMP_STRIDE;
        self.for_each_filled(Log::Jumps, 0, |at| {
            if (start..start + frame::JUMP_STRIDE).contains(&at) {
                self.clear_jump(at);
            }
        });
    }

    /// Forgets all code.
    pub fn forget_jumps(&mut self) {
        self.forget_targets();
        self.user.forget_fragments();
    }

    /// Forgets which code is at which address.
    fn forget_targets(&mut self) {
        self.forget_cached_jumps(0);
        self.forget_cached_jumps(1);
        self.second.fill([frame::NO_SECOND_TAG, 0]);
        self.user.forget_pages();
        self.pages.clear();
        self.upper_code.clear();
        self.lower.clear();
        self.user_pages.clear();
    }

    /// Forgets where code is, if it is in a range of host addresses (INV-TC-3).
    pub fn forget_code(&mut self, range: &std::ops::Range<u64>) {
        self.user.forget_code(range);
        for e in &mut *self.second {
            if range.contains(&e[1]) {
                *e = [frame::NO_SECOND_TAG, 0];
            }
        }
        for half in 0..2 {
            self.for_each_filled(Log::Jumps, half, |at| {
                if range.contains(&self.frame.get(at + frame::JUMP_HOSTS)) {
                    self.clear_jump(at);
                }
            });
        }
    }

    fn forget_cached_jumps(&mut self, half: usize) {
        self.for_each_filled(Log::Jumps, half, |at| {
            // The slot may hold the other half's entry by now, and memory that was never used stays so.
            let rip = self.frame.get(at);
            if self::half(rip) == half && rip != frame::no_target(at) {
                self.clear_jump(at);
            }
        });
        self.clear_log(Log::Jumps, half);
    }

    fn forget_tlb(&mut self, which: usize) {
        self.for_each_filled(Log::Tlb, which, |at| {
            // The slot may hold the other half's entry by now.
            let tag = self.frame.get(at);
            if tag == frame::no_page(at) || half(tag) == which {
                self.clear_entry(at);
            }
        });
        self.clear_log(Log::Tlb, which);
    }

    fn forget_half(&mut self, which: usize) {
        self.forget_tlb(which);
        self.forget_cached_jumps(which);
    }

    /// Acts on an event of the interpreter's TLB.
    pub fn apply(&mut self, event: TlbEvent) {
        let switched = matches!(event, TlbEvent::FlushLower | TlbEvent::FlushAll);
        let event = if self.distrust && switched { TlbEvent::ContextsAnew } else { event };
        match event {
            TlbEvent::FlushLower => self.forget_half(0),
            TlbEvent::FlushAll => {
                self.forget_half(0);
                self.forget_tlb(1);
                self.upper_flushed = true;
            }
            TlbEvent::ContextsAnew => {
                self.forget_tlb(0);
                self.forget_tlb(1);
                self.forget_targets();
                self.upper_changed = UpperChange::Anything;
            }
            TlbEvent::Page(la) => {
                for variant in 0..frame::VARIANTS {
                    let at = frame::tlb_entry(la, variant);
                    if self.frame.get(at) == la & !0xfff {
                        self.clear_entry(at);
                    }
                }
                if half(la) == 0 || self.upper_code.remove(la) {
                    self.upper_changed.add(la);
                    self.forget_jumps_in(la & !0xfff);
                }
            }
            TlbEvent::WriteProtect(gfn) => self.write_protect(gfn),
        }
    }

    /// Whether jumps into the page of an address may be known.
    fn has_jumps(&self, la: u64) -> bool {
        self.pages.has(la) || self.user_pages.has(la)
    }

    /// Of which code in the upper half the mapping may have changed since this was last asked.
    pub const fn take_upper_changed(&mut self) -> UpperChange {
        std::mem::replace(&mut self.upper_changed, UpperChange::None)
    }

    /// Forgets where code in the page at a linear address is, in every context; and in the page before, whose last instruction may reach
    /// into it.
    fn forget_jumps_in(&mut self, page: u64) {
        self.forget_jumps_of_page(page);
        self.forget_jumps_of_page(page.wrapping_sub(0x1000));
    }

    fn forget_jumps_of_page(&mut self, page: u64) {
        const OFFSETS: u64 = 0x0fff;
        if !self.has_jumps(page) {
            return;
        }
        if self.user_pages.has(page) {
            self.user.forget_page(page);
        }
        if self.pages.has(page) {
            self.forget_second(page);
        }
        let half = half(page);
        match self.logged(Log::Jumps, half) {
            Some(few) if few.len() <= FEW => {
                for &at in few {
                    if self.frame.get(at as i32) & !OFFSETS == page {
                        self.clear_jump(at as i32);
                    }
                }
            }
            _ => self.forget_cached_jumps(half),
        }
    }

    fn forget_second(&mut self, page: u64) {
        let forget = |e: &mut SecondEntry| {
            if frame::tag_is_in(e[0], page) {
                e[0] = frame::NO_SECOND_TAG;
            }
        };
        if half(page) == 1 {
            return self.second.iter_mut().for_each(forget);
        }
        for &at in &self.lower {
            self.second.get_mut(at as usize).into_iter().for_each(forget);
        }
    }

    /// Code in the page at `rip` was found in a frame (INV-UP-1).
    pub fn note_upper_code(&mut self, rip: u64, gfn: Gfn, user: bool) {
        if half(rip) == 1 {
            self.pages.add(rip);
            self.upper_code.note(rip, gfn, user);
        }
    }

    /// Behind events: if the upper half was flushed, code there stays known only if all of it is where it was. `find` as for [`UpperCode::still`].
    pub fn look_again_at_code(&mut self, find: impl FnMut(u64, bool) -> Option<Gfn>) {
        if !std::mem::take(&mut self.upper_flushed) || self.upper_code.still(find) {
            return;
        }
        self.upper_code.clear();
        self.upper_changed = UpperChange::Anything;
        self.forget_cached_jumps(1);
        let context = (self.frame.get(frame::CODE_CONTEXT + 8) + 1) % CODE_CONTEXTS;
        if context == 0 {
            self.forget_targets();
        }
        self.frame.set(frame::CODE_CONTEXT + 8, context);
    }

    fn write_protect(&mut self, gfn: u64) {
        for half in 0..2 {
            self.for_each_filled(Log::Tlb, half, |at| {
                if self.frame.get(frame::frame_of(at)) == gfn {
                    self.frame.set(at + 8, frame::no_page(at));
                }
            });
        }
    }
}
