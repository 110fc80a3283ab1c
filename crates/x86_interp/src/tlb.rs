//! The software TLB: guest virtual page → machine page, with the right to read and to write in the tag.
//!
//! A tag is the page's linear address with a context number in its low 12 bits, so that one compare checks both. The
//! lower and the upper half of the address space have a context each. A CR3 write gives the lower half another number
//! (the PCID's old one, if CR3 bit 63 says that it may live on); the upper half keeps its number, and its few pages that are not
//! global are [walked again](crate::local). A number is never used again before the whole table was wiped.
//!
//! INV-TLB-1: an entry with the write right names a page that is RAM, dirty in the guest's tables and not traced.
//!
//! INV-TLB-2: after a load of CR3, an entry of the upper half is a global page's, or agrees with what the tables said then.

use x86::addr::PAGE_MASK;
use x86::paging::Translation;

use crate::local::{LocalPage, LocalPages};

/// Entries for each kind of rights.
pub const SETS: usize = 8192;
/// Rights with which an access is made, as an index: supervisor, supervisor with AC (SMAP override), user.
const VARIANTS: usize = 3;
/// Numbers below 4096 fit a tag's offset bits; 0 marks an empty entry.
const LAST_CONTEXT: u64 = 4095;

/// One translation.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub struct Entry {
    /// Tag for reads, or 0.
    pub read_tag: u64,
    /// Tag for writes, or 0.
    pub write_tag: u64,
    /// Machine address minus linear address.
    pub addend: u64,
    /// The guest frame, with [`TRACED`] if only a trace withholds the right to write.
    pub gfn: u64,
}

/// In [`Entry::gfn`]: writes are allowed, but must be told to the trace.
pub const TRACED: u64 = 1 << 63;

/// Translations under one PCID.
#[derive(Clone, Copy)]
struct PcidContext {
    pcid: u64,
    context: u64,
    last_use: u64,
    /// See [`Tlb::large`].
    large: u64,
}

/// A translation of code: to a page of the decode cache.
#[derive(Clone, Copy, Default)]
struct FetchEntry {
    tag: u64,
    page: usize,
}

/// Sets of the code part.
const FETCH_SETS: usize = 256;
/// Supervisor and user, times three code sizes.
const FETCH_VARIANTS: usize = 6;

/// What an engine that keeps translations of its own must do to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlbEvent {
    /// Forget the lower half of the address space.
    FlushLower,
    /// Forget everything.
    FlushAll,
    /// Forget everything, in every context: numbers of contexts are given out anew.
    ContextsAnew,
    /// Forget the page at this linear address, in every context.
    Page(u64),
    /// Forget the right to write this frame.
    WriteProtect(u64),
}

/// The software TLB of one vCPU.
pub struct Tlb {
    /// Events since the engine last took them, if it wants them.
    pub events: Option<Vec<TlbEvent>>,
    entries: Box<[Entry]>,
    fetch: Box<[FetchEntry]>,
    frames: Box<[FetchEntry]>,
    /// Context numbers of the lower and the upper half, or 0 ("nothing matches") while accesses must be slow.
    pub context: [u64; 2],
    current: [u64; 2],
    next: u64,
    forced_slow: bool,
    /// Frames (by number, 64 a word) for which an entry with the right to write may exist.
    writable: Vec<u64>,
    /// For some of them, hashed: the frame and its only entry, or [`MANY`].
    only: Box<[(u64, usize)]>,
    /// Pages of the upper half that are not global.
    locals: LocalPages,
    /// Hashed GiBs from which a large page was filled, per half.
    large: [u64; 2],
    pcids: Vec<PcidContext>,
    pcid: u64,
    uses: u64,
    /// What [`Tlb::kept`] and [`Tlb::large`] say may have changed since another engine last looked.
    pub kept_changed: bool,
}

/// Frames whose only entry is remembered.
const HINTS: usize = 4096;
/// Instead of a number: a frame has several entries, or unknown ones.
const MANY: usize = usize::MAX;
/// Events remembered; more become a flush.
const MAX_EVENTS: usize = 64;
/// How many PCIDs keep their translations (Linux uses 6).
const PCIDS: usize = 16;

impl Default for Tlb {
    fn default() -> Self {
        let entries = vec![Entry::default(); SETS * VARIANTS].into_boxed_slice();
        Self {
            events: None,
            entries,
            fetch: vec![FetchEntry::default(); FETCH_SETS * FETCH_VARIANTS].into_boxed_slice(),
            frames: vec![FetchEntry::default(); FETCH_SETS * 2].into_boxed_slice(),
            context: [1, 2],
            current: [1, 2],
            next: 3,
            forced_slow: false,
            writable: Vec::new(),
            only: vec![(u64::MAX, MANY); HINTS].into_boxed_slice(),
            locals: LocalPages::default(),
            large: [0; 2],
            pcids: Vec::new(),
            pcid: 0,
            uses: 0,
            kept_changed: true,
        }
    }
}

const fn half(la: u64) -> usize {
    (la >> 63) as usize
}

const fn gib_bit(la: u64) -> u64 {
    1 << ((la >> 30 ^ la >> 36) & 63)
}

/// Where a frame's bit stands in [`Tlb::writable`]; frames beyond any memory (a TiB) have none, and count as writable.
fn place(gfn: u64) -> Option<(usize, u64)> {
    const FRAMES: u64 = 1 << 28;
    let word = usize::try_from(gfn / 64).ok()?;
    (gfn < FRAMES).then_some((word, 1 << (gfn % 64)))
}

/// Where a frame's only entry is remembered.
#[expect(clippy::cast_possible_truncation, reason = "below the number of hints")]
const fn hint(gfn: u64) -> usize {
    (gfn % HINTS as u64) as usize
}

impl Tlb {
    /// The tag that an entry for `la` has now; never equal to an entry's while accesses must be slow.
    #[inline(always)]
    pub fn tag(&self, la: u64) -> u64 {
        (la & !PAGE_MASK) | self.context[(la >> 63) as usize & 1]
    }

    /// Where the entry of `la` would be, as a number.
    #[inline(always)]
    pub fn slot(la: u64, variant: usize) -> usize {
        let set = (la >> 12) as usize & (SETS - 1);
        set + variant * SETS
    }

    /// The entry where `la` would be.
    #[inline(always)]
    pub fn entry(&self, la: u64, variant: usize) -> Entry {
        self.entries.get(Self::slot(la, variant)).copied().unwrap_or_default()
    }

    /// Where the entries lie: [`SETS`] for each kind of rights. For engines that look translations up in code of their own.
    pub fn address(&mut self) -> u64 {
        self.entries.as_mut_ptr() as u64
    }

    /// Hashed GiBs from which a large page was filled, per half: INVLPG of an address in one drops more than a page.
    pub const fn large(&self) -> [u64; 2] {
        self.large
    }

    /// Another engine has invalidated the page of an address in the entries at [`Tlb::address`]: the rest, in every context.
    pub fn forget_code_at(&mut self, la: u64) {
        let is_there = |e: &FetchEntry| e.tag & !PAGE_MASK == la & !PAGE_MASK;
        for variant in 0..FETCH_VARIANTS {
            let e = self.fetch.get_mut(Self::fetch_slot(la, variant)).filter(|e| is_there(e));
            e.into_iter().for_each(|e| *e = FetchEntry::default());
        }
        for user in 0..2 {
            let e = self.frames.get_mut(Self::fetch_slot(la, user)).filter(|e| is_there(e));
            e.into_iter().for_each(|e| *e = FetchEntry::default());
        }
    }

    /// The frame that holds the code at `la`, if that is remembered.
    pub fn code_frame(&self, la: u64, user: bool) -> Option<u64> {
        let e = self.frames.get(Self::fetch_slot(la, usize::from(user)))?;
        (e.tag == self.fill_tag(la)).then_some(e.page as u64)
    }

    /// Remembers the frame that holds the code at `la`.
    pub fn fill_code_frame(&mut self, la: u64, user: bool, gfn: u64, t: &Translation, global: bool) {
        self.note_filled(la, t, global);
        let tag = self.fill_tag(la);
        if let Some(e) = self.frames.get_mut(Self::fetch_slot(la, usize::from(user))) {
            *e = FetchEntry { tag, page: usize::try_from(gfn).unwrap_or(usize::MAX) };
        }
    }

    /// Remembers a translation, as the walk found it; `global`: and CR4.PGE is set.
    pub fn fill(&mut self, la: u64, variant: usize, entry: Entry, t: &Translation, global: bool) {
        self.note_filled(la, t, global);
        if entry.write_tag != 0 {
            self.note_writable(entry.gfn, Self::slot(la, variant));
        }
        if let Some(slot) = self.entries.get_mut(Self::slot(la, variant)) {
            *slot = entry;
        }
    }

    /// Empties a slot if its entry has this tag.
    pub fn evict(&mut self, slot: usize, tag: u64) {
        if let Some(entry) = self.entries.get_mut(slot).filter(|entry| entry.read_tag == tag) {
            *entry = Entry::default();
        }
    }

    fn note_writable(&mut self, gfn: u64, slot: usize) {
        let known = self.may_be_writable(gfn);
        let Some(only) = self.only.get_mut(hint(gfn)) else { return };
        *only = match *only {
            (frame, s) if frame == gfn && (s == slot || !known) => (gfn, slot),
            (frame, _) if frame == gfn => (gfn, MANY),
            // Entries of a frame that lost its place are found by search.
            _ => (gfn, if known { MANY } else { slot }),
        };
        let Some((word, bit)) = place(gfn) else { return };
        if word >= self.writable.len() {
            self.writable.resize(word + 1, 0);
        }
        if let Some(w) = self.writable.get_mut(word) {
            *w |= bit;
        }
    }

    fn may_be_writable(&self, gfn: u64) -> bool {
        place(gfn).is_none_or(|(word, bit)| self.writable.get(word).is_some_and(|w| w & bit != 0))
    }

    /// Whether an entry with the right to write a frame may exist; from now on none does.
    fn take_writable(&mut self, gfn: u64) -> bool {
        let was = self.may_be_writable(gfn);
        if let Some((word, bit)) = place(gfn)
            && let Some(w) = self.writable.get_mut(word)
        {
            *w &= !bit;
        }
        was
    }

    fn note_filled(&mut self, la: u64, t: &Translation, global: bool) {
        let half = half(la);
        if half == 1 && !global {
            self.kept_changed |= self.locals.is_empty();
            self.locals.add(la, t);
        }
        if t.page_shift > 12 && self.large[half] & gib_bit(la) == 0 {
            self.large[half] |= gib_bit(la);
            self.kept_changed = true;
        }
    }

    /// The tag to store in an entry for `la`, whatever the forced slowness.
    pub fn fill_tag(&self, la: u64) -> u64 {
        (la & !PAGE_MASK) | self.current[half(la)]
    }

    /// While set, no lookup hits: every access takes the slow way (alignment checks, data breakpoints).
    pub fn force_slow(&mut self, slow: bool) {
        self.forced_slow = slow;
        self.publish();
    }

    fn tell(&mut self, event: TlbEvent) {
        if let Some(events) = &mut self.events {
            if events.len() >= MAX_EVENTS {
                events.clear();
                events.push(TlbEvent::ContextsAnew);
            }
            events.push(event);
        }
    }

    fn publish(&mut self) {
        self.kept_changed = true;
        // No entry has a tag with context 0, but an empty entry has tag 0: use a number never given out instead.
        self.context = if self.forced_slow { [LAST_CONTEXT; 2] } else { self.current };
    }

    fn fresh(&mut self) -> u64 {
        if self.next >= LAST_CONTEXT {
            self.entries.fill(Entry::default());
            self.forget_code();
            self.next = 1;
            self.pcids.clear();
            self.tell(TlbEvent::ContextsAnew);
            // Both halves need new numbers: the old ones may be given out again.
            let both = [self.next, self.next + 1];
            self.next += 2;
            self.current = both;
            self.large = [0; 2];
            self.locals.take();
        }
        self.next += 1;
        self.next - 1
    }

    /// Forgets everything.
    pub fn flush_all(&mut self) {
        self.tell(TlbEvent::FlushAll);
        self.pcids.clear();
        let lower = self.fresh();
        let upper = self.fresh();
        self.current = [lower, upper];
        self.large = [0; 2];
        self.locals.take();
        self.publish();
    }

    /// Forgets all but global pages of the current address space. The upper half's that are to be [looked at](Tlb::keep).
    #[must_use = "INV-TLB-2"]
    pub fn flush_local(&mut self) -> Vec<LocalPage> {
        self.tell(TlbEvent::FlushLower);
        let pcid = self.pcid;
        self.pcids.retain(|p| p.pcid != pcid);
        self.current[0] = self.fresh();
        self.large[0] = 0;
        self.take_locals()
    }

    /// The pages of the upper half that are not global, unless there are too many: then the upper half is dropped.
    fn take_locals(&mut self) -> Vec<LocalPage> {
        let many = self.locals.many;
        let mut pages = self.locals.take();
        if many {
            pages.clear();
            self.tell(TlbEvent::FlushAll);
            self.current[1] = self.fresh();
            self.large[1] = 0;
        }
        self.publish();
        pages
    }

    /// The entries of a page that [`Tlb::switch`] gave out agree with the tables: they stay.
    pub fn keep(&mut self, page: LocalPage) {
        let la = page.la;
        if !self.locals.keep(page) {
            self.invalidate_page(la);
        }
    }

    /// A CR3 write: another address space, whose old translations live on if `keep`. The pages of the upper half that are not global: each
    /// is to be [kept](Tlb::keep) or [dropped](Tlb::invalidate_page).
    #[must_use = "INV-TLB-2"]
    pub fn switch(&mut self, pcid: u64, keep: bool) -> Vec<LocalPage> {
        self.tell(TlbEvent::FlushLower);
        self.change_space(pcid, keep);
        self.take_locals()
    }

    /// PCIDs, the current one among them, with the numbers of their contexts and their part of [`Tlb::large`], between which [`Tlb::switch`] with `keep` does
    /// nothing but exchange those of the lower half, and tell that; none where it does more.
    pub fn kept(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let plain = self.locals.is_empty() && !self.forced_slow;
        let current = (self.pcid, self.current[0], self.large[0]);
        let others = self.pcids.iter().map(|p| (p.pcid, p.context, p.large));
        let all = others.filter(|p| p.0 != self.pcid).chain(std::iter::once(current));
        all.filter(move |_| plain)
    }

    /// Another engine has switched, to one of [`Tlb::kept`] and maybe back and forth, and told everybody.
    pub fn adopt(&mut self, pcid: u64) {
        debug_assert!(self.locals.is_empty(), "INV-TLB-2");
        self.change_space(pcid, true);
        self.publish();
    }

    fn change_space(&mut self, pcid: u64, keep: bool) {
        self.uses += 1;
        self.remember_current();
        self.pcid = pcid;
        let kept = self.pcids.iter().position(|p| p.pcid == pcid).map(|at| self.pcids.swap_remove(at));
        match kept {
            Some(old) if keep => {
                self.current[0] = old.context;
                self.large[0] = old.large;
            }
            _ => {
                self.current[0] = self.fresh();
                self.large[0] = 0;
            }
        }
    }

    fn remember_current(&mut self) {
        let (context, large) = (self.current[0], self.large[0]);
        let now = PcidContext { pcid: self.pcid, context, last_use: self.uses, large };
        self.pcids.retain(|p| p.pcid != now.pcid);
        if self.pcids.len() >= PCIDS {
            let oldest = self.pcids.iter().enumerate().min_by_key(|(_, p)| p.last_use).map(|(i, _)| i);
            self.pcids.swap_remove(oldest.unwrap_or(0));
        }
        self.pcids.push(now);
    }

    /// INVPCID of another PCID: its translations do not live on.
    pub fn forget_pcid(&mut self, pcid: u64) {
        self.kept_changed = true;
        self.pcids.retain(|p| p.pcid != pcid);
    }

    /// INVPCID type 3: all PCIDs, global pages excepted. As [`Tlb::flush_local`].
    #[must_use = "INV-TLB-2"]
    pub fn flush_all_local(&mut self) -> Vec<LocalPage> {
        self.pcids.clear();
        self.flush_local()
    }

    /// INVLPG: forgets the page at `la`; all pieces of it, should it have been a large one.
    pub fn invalidate_page(&mut self, la: u64) {
        let half = half(la);
        if self.large[half] & gib_bit(la) != 0 {
            self.tell(if half == 0 { TlbEvent::FlushLower } else { TlbEvent::FlushAll });
            self.current[half] = self.fresh();
            self.large[half] = 0;
            if half == 1 {
                self.locals.take();
            }
            self.publish();
            return;
        }
        self.tell(TlbEvent::Page(la));
        if half == 1 {
            self.locals.remove(la);
        }
        let tag = self.fill_tag(la);
        for variant in 0..FETCH_VARIANTS {
            if let Some(e) = self.fetch.get_mut(Self::fetch_slot(la, variant))
                && e.tag == tag
            {
                *e = FetchEntry::default();
            }
        }
        for user in 0..2 {
            if let Some(e) = self.frames.get_mut(Self::fetch_slot(la, user))
                && e.tag == tag
            {
                *e = FetchEntry::default();
            }
        }
        for variant in 0..VARIANTS {
            if let Some(e) = self.entries.get_mut(Self::slot(la, variant))
                && (e.read_tag == tag || e.write_tag == tag)
            {
                *e = Entry::default();
            }
        }
    }

    fn fetch_slot(la: u64, variant: usize) -> usize {
        let set = (la >> 12) as usize & (FETCH_SETS - 1);
        set + variant * FETCH_SETS
    }

    /// The decoded page that `la` lies in. `variant` is 3 for user code, plus 0 to 2 for its size.
    #[inline(always)]
    pub fn code_page(&self, la: u64, variant: usize) -> Option<usize> {
        let e = self.fetch.get(Self::fetch_slot(la, variant))?;
        (e.tag == self.fill_tag(la)).then_some(e.page)
    }

    /// Remembers the decoded page of `la`.
    pub fn fill_code(&mut self, la: u64, variant: usize, page: usize, t: &Translation, global: bool) {
        self.note_filled(la, t, global);
        let tag = self.fill_tag(la);
        if let Some(e) = self.fetch.get_mut(Self::fetch_slot(la, variant)) {
            *e = FetchEntry { tag, page };
        }
    }

    /// Forgets all translations of code (the decode cache was emptied).
    pub fn forget_code(&mut self) {
        self.fetch.fill(FetchEntry::default());
        self.frames.fill(FetchEntry::default());
    }

    /// Takes away the right to write (or every right, if `all`) to guest frames, under every context. A reverse map would
    /// cost each fill; the table is small, so it is searched.
    pub fn revoke(&mut self, gfns: &std::ops::Range<u64>, all: bool) {
        let one = gfns.end.wrapping_sub(gfns.start) == 1 && !all;
        if one && !self.take_writable(gfns.start) {
            return;
        }
        self.tell(if one { TlbEvent::WriteProtect(gfns.start) } else { TlbEvent::FlushAll });
        let only = self.only[hint(gfns.start)];
        let searched = match only {
            (frame, slot) if one && frame == gfns.start && slot != MANY => slot..slot + 1,
            _ => 0..self.entries.len(),
        };
        for e in self
            .entries
            .get_mut(searched)
            .unwrap_or_default()
            .iter_mut()
            .filter(|e| gfns.contains(&(e.gfn & !TRACED)))
        {
            if e.write_tag != 0 {
                e.write_tag = 0;
                e.gfn |= TRACED;
            }
            if all {
                e.read_tag = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translation(la: u64, page_shift: u32, global: bool) -> Translation {
        let gpa = x86::addr::Gpa(la & 0xffff_f000);
        Translation { gpa, page_shift, user: false, writable: true, dirty: true, executable: true, global }
    }
    /// A switch after which local pages are dropped.
    fn switch(tlb: &mut Tlb, pcid: u64, keep: bool) {
        for page in tlb.switch(pcid, keep) {
            tlb.invalidate_page(page.la);
        }
    }
    fn fill(tlb: &mut Tlb, la: u64, shift: u32, global: bool) {
        let tag = tlb.fill_tag(la);
        let entry = Entry { read_tag: tag, write_tag: tag, addend: 0, gfn: la >> 12 };
        tlb.fill(la, 0, entry, &translation(la, shift, global), global);
    }
    fn hits(tlb: &Tlb, la: u64) -> bool {
        tlb.entry(la, 0).read_tag == tlb.tag(la)
    }

    const KERNEL: u64 = 0xffff_8000_0000_5000;

    #[test]
    fn switch_without_pcid_keeps_only_globals() {
        let mut tlb = Tlb::default();
        fill(&mut tlb, 0x1000, 12, false);
        fill(&mut tlb, KERNEL, 12, true);
        switch(&mut tlb, 0, false);
        assert!(!hits(&tlb, 0x1000) && hits(&tlb, KERNEL));
        fill(&mut tlb, KERNEL + 0x1000, 12, false);
        switch(&mut tlb, 0, false);
        assert!(!hits(&tlb, KERNEL + 0x1000) && hits(&tlb, KERNEL));
    }

    #[test]
    fn local_pages_are_given_out_at_each_switch_and_may_be_kept() {
        let mut tlb = Tlb { events: Some(Vec::new()), ..Tlb::default() };
        fill(&mut tlb, KERNEL, 12, false);
        assert_eq!(tlb.kept().count(), 0);
        for _ in 0..3 {
            let pages = tlb.switch(0, false);
            assert_eq!(pages.iter().map(|p| p.la).collect::<Vec<_>>(), [KERNEL]);
            pages.into_iter().for_each(|p| tlb.keep(p));
            assert!(hits(&tlb, KERNEL));
        }
        tlb.invalidate_page(KERNEL);
        assert!(!hits(&tlb, KERNEL));
        assert!(tlb.switch(0, false).is_empty() && tlb.kept().count() > 0);
        assert!(!tlb.events.unwrap().contains(&TlbEvent::FlushAll));
    }

    #[test]
    fn too_many_local_pages_drop_the_upper_half() {
        let mut tlb = Tlb::default();
        (0..200).for_each(|n| fill(&mut tlb, KERNEL + (n << 12), 12, false));
        fill(&mut tlb, KERNEL - 0x1000, 12, true);
        assert!(tlb.switch(0, false).is_empty());
        assert!((-1..200).all(|n| !hits(&tlb, KERNEL.wrapping_add_signed(n << 12))));
    }

    #[test]
    fn switch_back_with_keep_finds_old_entries() {
        let mut tlb = Tlb::default();
        switch(&mut tlb, 1, false);
        fill(&mut tlb, 0x1000, 12, false);
        switch(&mut tlb, 2, false);
        assert!(!hits(&tlb, 0x1000));
        switch(&mut tlb, 1, true);
        assert!(hits(&tlb, 0x1000));
        switch(&mut tlb, 2, true);
        tlb.forget_pcid(1);
        switch(&mut tlb, 1, true);
        assert!(!hits(&tlb, 0x1000));
    }

    #[test]
    fn invalidate_page_in_large_page_drops_its_pieces() {
        let mut tlb = Tlb::default();
        fill(&mut tlb, 0x20_1000, 21, false);
        tlb.invalidate_page(0x20_7000);
        assert!(!hits(&tlb, 0x20_1000));
        fill(&mut tlb, 0x1000, 12, false);
        fill(&mut tlb, 0x2000, 12, false);
        tlb.invalidate_page(0x1000);
        assert!(!hits(&tlb, 0x1000) && hits(&tlb, 0x2000));
    }

    #[test]
    fn large_pages_of_a_space_that_lives_on_are_remembered() {
        let mut tlb = Tlb::default();
        switch(&mut tlb, 1, false);
        fill(&mut tlb, 0x20_1000, 21, false);
        switch(&mut tlb, 2, false);
        fill(&mut tlb, 0x20_4000, 12, false);
        fill(&mut tlb, 0x20_2000, 12, false);
        tlb.invalidate_page(0x20_4000);
        assert!(!hits(&tlb, 0x20_4000) && hits(&tlb, 0x20_2000));
        switch(&mut tlb, 1, true);
        assert!(hits(&tlb, 0x20_1000));
        tlb.invalidate_page(0x20_7000);
        assert!(!hits(&tlb, 0x20_1000));
        switch(&mut tlb, 2, true);
        assert!(hits(&tlb, 0x20_2000));
        tlb.invalidate_page(0x20_2000);
        assert!(!hits(&tlb, 0x20_2000));
    }

    #[test]
    fn context_numbers_wrap_without_false_hits() {
        let mut tlb = Tlb::default();
        for _ in 0..10_000 {
            fill(&mut tlb, 0x1000, 12, false);
            fill(&mut tlb, KERNEL, 12, true);
            switch(&mut tlb, 0, false);
            assert!(!hits(&tlb, 0x1000));
        }
        fill(&mut tlb, 0x1000, 12, false);
        tlb.force_slow(true);
        assert!(!hits(&tlb, 0x1000));
        tlb.force_slow(false);
        assert!(hits(&tlb, 0x1000));
        assert!(!hits(&tlb, 0));
    }
}
