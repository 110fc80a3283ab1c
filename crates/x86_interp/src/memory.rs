//! Guest memory as instructions see it: segmentation, paging, device memory.
//!
//! The fast way is one TLB compare; everything else (misses, page crossings, devices, traced pages, alignment checks, data
//! breakpoints) is `slow`.

use guestmem::{Gfn, GuestMemory, Hva, Scalar};
use x86::Exception;
use x86::addr::{Gpa, Gva, PAGE_MASK, PAGE_SIZE};
use x86::bits::is_canonical;
use x86::paging::{Access, AccessKind, Translation, WalkError, WalkMemory, walk};
use x86::state::sreg;

use crate::census::Steps;
use crate::cpu::{CodeSize, Cpu, FLAT_STACK};
use crate::local::LocalPage;
use crate::tlb::{Entry, TRACED, Tlb};

/// The walker's access to guest memory: nested paging is off, so a step is the identity.
pub struct Physical<'a>(pub &'a GuestMemory);

impl WalkMemory for Physical<'_> {
    type Fault = std::convert::Infallible;

    fn step(&mut self, gpa: Gpa, _write: bool) -> Result<Gpa, Self::Fault> {
        Ok(gpa)
    }

    fn load32(&mut self, gpa: Gpa) -> u32 {
        self.0.load_gpa(gpa).unwrap_or(u32::MAX)
    }

    fn load64(&mut self, gpa: Gpa) -> u64 {
        self.0.load_gpa(gpa).unwrap_or(u64::MAX)
    }

    fn update(&mut self, gpa: Gpa, bytes: u8, old: u64, new: u64) -> bool {
        // An entry outside of RAM reads as all ones, which has every bit set already or faults.
        let Some(hva) = self.0.hva(gpa) else { return true };
        let done = if bytes == 4 {
            self.0.cmpxchg(hva, u32::from_u64(old), u32::from_u64(new)) == u32::from_u64(old)
        } else {
            self.0.cmpxchg(hva, old, new) == old
        };
        self.0.note_write(gpa, usize::from(bytes));
        done
    }
}

/// The same, remembering the entries that were read.
struct Seen<'a> {
    memory: Physical<'a>,
    steps: Steps,
}

impl WalkMemory for Seen<'_> {
    type Fault = std::convert::Infallible;

    fn step(&mut self, gpa: Gpa, write: bool) -> Result<Gpa, Self::Fault> {
        self.memory.step(gpa, write)
    }

    fn load32(&mut self, gpa: Gpa) -> u32 {
        self.steps.push(gpa);
        self.memory.load32(gpa)
    }

    fn load64(&mut self, gpa: Gpa) -> u64 {
        self.steps.push(gpa);
        self.memory.load64(gpa)
    }

    fn update(&mut self, gpa: Gpa, bytes: u8, old: u64, new: u64) -> bool {
        self.memory.update(gpa, bytes, old, new)
    }
}

/// The same, without accessed bits: whether one would have been set.
struct Unchanged<'a> {
    memory: Physical<'a>,
    would_change: bool,
}

impl WalkMemory for Unchanged<'_> {
    type Fault = std::convert::Infallible;

    fn step(&mut self, gpa: Gpa, write: bool) -> Result<Gpa, Self::Fault> {
        self.memory.step(gpa, write)
    }

    fn load32(&mut self, gpa: Gpa) -> u32 {
        self.memory.load32(gpa)
    }

    fn load64(&mut self, gpa: Gpa) -> u64 {
        self.memory.load64(gpa)
    }

    fn update(&mut self, _gpa: Gpa, _bytes: u8, _old: u64, _new: u64) -> bool {
        self.would_change = true;
        true
    }
}

/// Where an access goes after translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// RAM.
    Ram(Hva, Gpa),
    /// A device, ROM (for writes) or nothing.
    Device(Gpa),
}

/// A place that was found writable, for read-modify-write instructions.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// RAM within one page, not traced.
    Direct(Hva),
    /// Anything else: one or two targets.
    Slow {
        /// Linear address.
        la: u64,
        /// Target of the first byte.
        first: Target,
        /// Target of the first byte on the second page, if the access crosses into one.
        second: Option<Target>,
    },
}

impl Cpu {
    // ---- addresses -----------------------------------------------------------------------------------------

    /// Linear address of `offset` in a segment after the checks for an access of `size` bytes.
    #[inline(always)]
    pub fn linear(&mut self, seg: u8, offset: u64, size: usize, write: bool) -> Result<u64, Exception> {
        let i = usize::from(seg & 7);
        if self.seg_fast[i] >> u8::from(write) & 1 == 0 {
            self.check_segment(i, offset, size, write)?;
        }
        Ok(self.seg_base[i].wrapping_add(offset) & self.linear_mask)
    }

    /// Checks of a segment that is not flat (SDM 3A 5.3 to 5.5, real mode SDM 3B 20.1).
    #[cold]
    fn check_segment(&mut self, i: usize, offset: u64, size: usize, write: bool) -> Result<(), Exception> {
        let fault = if i == sreg::SS { Exception::SS0 } else { Exception::GP0 };
        let seg = &self.s.seg[i];
        let real = !self.s.protected() || self.s.v86();
        if !real {
            let attr = seg.attr;
            let right = if write { attr.is_writable() } else { attr.is_readable() };
            if !attr.present() || !right {
                return Err(fault);
            }
        }
        let limit = u64::from(seg.limit);
        let last = offset.wrapping_add(size as u64 - 1);
        let ok = if seg.attr.is_expand_down() {
            let top = if seg.attr.db() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top && last >= offset
        } else {
            last <= limit && last >= offset
        };
        if ok { Ok(()) } else { Err(fault) }
    }

    // ---- data accesses through a segment ---------------------------------------------------------------------

    /// Reads an integer at `seg:offset`.
    #[inline(always)]
    pub fn read<T: Scalar>(&mut self, seg: u8, offset: u64) -> Result<T, Exception> {
        let la = self.linear(seg, offset, T::SIZE, false)?;
        let entry = self.tlb.entry(la, self.variant);
        if entry.read_tag == self.tlb.tag(la) && la & PAGE_MASK <= PAGE_SIZE - T::SIZE as u64 {
            return Ok(self.mem.load(Hva(la.wrapping_add(entry.addend))));
        }
        self.read_slow(seg, la)
    }

    /// Writes an integer at `seg:offset`.
    #[inline(always)]
    pub fn write<T: Scalar>(&mut self, seg: u8, offset: u64, value: T) -> Result<(), Exception> {
        let la = self.linear(seg, offset, T::SIZE, true)?;
        let entry = self.tlb.entry(la, self.variant);
        if entry.write_tag == self.tlb.tag(la) && la & PAGE_MASK <= PAGE_SIZE - T::SIZE as u64 {
            self.mem.store(Hva(la.wrapping_add(entry.addend)), value);
            return Ok(());
        }
        self.write_slow(seg, la, value)
    }

    /// Finds the place of a read-modify-write, with the right to write.
    #[inline(always)]
    pub fn place(&mut self, seg: u8, offset: u64, size: usize) -> Result<Place, Exception> {
        let la = self.linear(seg, offset, size, true)?;
        let entry = self.tlb.entry(la, self.variant);
        if entry.write_tag == self.tlb.tag(la) && la & PAGE_MASK <= PAGE_SIZE - size as u64 {
            return Ok(Place::Direct(Hva(la.wrapping_add(entry.addend))));
        }
        self.debug.note_access(la, size, false);
        self.place_slow(seg, la, size)
    }

    /// Reads from a place.
    #[inline(always)]
    pub fn place_load<T: Scalar>(&mut self, place: &Place) -> T {
        match *place {
            Place::Direct(hva) => self.mem.load(hva),
            Place::Slow { la, first, second } => {
                let mut bytes = [0; 8];
                self.load_targets(la, first, second, &mut bytes[..T::SIZE]);
                T::from_u64(u64::from_le_bytes(bytes))
            }
        }
    }

    /// Writes to a place.
    #[inline(always)]
    pub fn place_store<T: Scalar>(&mut self, place: &Place, value: T) {
        match *place {
            Place::Direct(hva) => self.mem.store(hva, value),
            Place::Slow { la, first, second } => {
                self.store_targets(la, first, second, &value.to_u64().to_le_bytes()[..T::SIZE]);
            }
        }
    }

    /// LOCK CMPXCHG on a place: the value found. A device, or a place on two pages, is exchanged while no other
    /// vCPU does the same (INV-LOCK-1: all such accesses hold one lock).
    pub fn place_cmpxchg<T: Scalar>(&mut self, place: &Place, old: T, new: T) -> T {
        match *place {
            Place::Direct(hva) => self.mem.cmpxchg(hva, old, new),
            Place::Slow { first: Target::Ram(hva, gpa), second: None, .. } => {
                let found = self.mem.cmpxchg(hva, old, new);
                if found == old {
                    self.note_write(gpa, T::SIZE);
                }
                found
            }
            Place::Slow { .. } => {
                static SPLIT: std::sync::Mutex<()> = std::sync::Mutex::new(());
                // DEVIATION: a locked access across two pages is atomic towards other split accesses only, not
                // towards plain locked ones to one of its halves; Linux kills programs that do it (split-lock detection).
                let _held = SPLIT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let found: T = self.place_load(place);
                if found == old {
                    self.place_store(place, new);
                }
                found
            }
        }
    }

    /// Reads bytes at `seg:offset` (any length up to a page), page by page.
    pub fn read_bytes(&mut self, seg: u8, offset: u64, data: &mut [u8]) -> Result<(), Exception> {
        let la = self.linear(seg, offset, data.len().max(1), false)?;
        self.check_canonical(seg, la, data.len())?;
        self.debug_data(la, data.len(), false);
        let access = self.data_access(AccessKind::Read);
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, data.len(), access)?;
        self.load_targets(la, first, second, data);
        Ok(())
    }

    /// Writes bytes at `seg:offset` (any length up to a page): both pages are checked before a byte is written.
    pub fn write_bytes(&mut self, seg: u8, offset: u64, data: &[u8]) -> Result<(), Exception> {
        let place = self.probe_write(seg, offset, data.len())?;
        if let Place::Slow { la, first, second } = place {
            self.store_targets(la, first, second, data);
        }
        Ok(())
    }

    /// Checks that bytes can be written; the place is always [`Place::Slow`].
    pub fn probe_write(&mut self, seg: u8, offset: u64, len: usize) -> Result<Place, Exception> {
        let la = self.linear(seg, offset, len.max(1), true)?;
        self.check_canonical(seg, la, len)?;
        self.debug_data(la, len, true);
        let access = self.data_access(AccessKind::Write);
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, len, access)?;
        Ok(Place::Slow { la, first, second })
    }

    // ---- implicit supervisor accesses (descriptor tables, TSS, interrupt stacks) --------------------------------

    /// Reads an integer at a linear address with supervisor rights.
    pub fn system_read<T: Scalar>(&mut self, la: u64) -> Result<T, Exception> {
        self.linear_read(la, Self::SYSTEM_READ)
    }

    /// Reads bytes at a linear address with supervisor rights.
    pub fn system_read_bytes(&mut self, la: u64, data: &mut [u8]) -> Result<(), Exception> {
        self.linear_read_bytes(la, data, Self::SYSTEM_READ)
    }

    /// Writes an integer at a linear address with supervisor rights.
    pub fn system_write<T: Scalar>(&mut self, la: u64, value: T) -> Result<(), Exception> {
        self.linear_write(la, value, Self::SYSTEM_WRITE)
    }

    /// Reads an integer at a linear address with the rights given.
    #[inline]
    pub fn linear_read<T: Scalar>(&mut self, la: u64, access: Access) -> Result<T, Exception> {
        let la = la & self.system_linear_mask();
        let entry = self.tlb.entry(la, Self::variant_of(access));
        if entry.read_tag == self.tlb.tag(la) && la & PAGE_MASK <= PAGE_SIZE - T::SIZE as u64 {
            return Ok(self.mem.load(Hva(la.wrapping_add(entry.addend))));
        }
        let mut bytes = [0; 8];
        self.linear_read_bytes(la, &mut bytes[..T::SIZE], access)?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// Writes an integer at a linear address with the rights given.
    #[inline]
    pub fn linear_write<T: Scalar>(&mut self, la: u64, value: T, access: Access) -> Result<(), Exception> {
        let la = la & self.system_linear_mask();
        let entry = self.tlb.entry(la, Self::variant_of(access));
        if entry.write_tag == self.tlb.tag(la) && la & PAGE_MASK <= PAGE_SIZE - T::SIZE as u64 {
            self.mem.store(Hva(la.wrapping_add(entry.addend)), value);
            return Ok(());
        }
        self.linear_write_bytes(la, &value.to_u64().to_le_bytes()[..T::SIZE], access)
    }

    /// Which of the TLB's parts accesses with these rights use.
    fn variant_of(access: Access) -> usize {
        if access.user { 2 } else { usize::from(access.ac) }
    }

    const SYSTEM_READ: Access = Access { kind: AccessKind::Read, user: false, ac: false };
    const SYSTEM_WRITE: Access = Access { kind: AccessKind::Write, user: false, ac: false };

    /// Reads bytes at a linear address with the rights given.
    pub fn linear_read_bytes(&mut self, la: u64, data: &mut [u8], access: Access) -> Result<(), Exception> {
        let la = la & self.system_linear_mask();
        self.check_canonical(0, la, data.len())?;
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, data.len(), access)?;
        self.load_targets(la, first, second, data);
        Ok(())
    }

    /// Writes bytes at a linear address with the rights given, all or none.
    pub fn linear_write_bytes(&mut self, la: u64, data: &[u8], access: Access) -> Result<(), Exception> {
        let la = la & self.system_linear_mask();
        self.check_canonical(0, la, data.len())?;
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, data.len(), access)?;
        self.store_targets(la, first, second, data);
        Ok(())
    }

    const fn system_linear_mask(&self) -> u64 {
        if self.s.long_mode() { u64::MAX } else { 0xffff_ffff }
    }

    // ---- the slow way -----------------------------------------------------------------------------------------

    #[cold]
    #[inline(never)]
    fn read_slow<T: Scalar>(&mut self, seg: u8, la: u64) -> Result<T, Exception> {
        self.check_canonical(seg, la, T::SIZE)?;
        self.check_alignment(la, T::SIZE)?;
        self.debug_data(la, T::SIZE, false);
        let access = self.data_access(AccessKind::Read);
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, T::SIZE, access)?;
        if let (Target::Ram(hva, _), None) = (first, second) {
            return Ok(self.mem.load(hva));
        }
        let mut bytes = [0; 8];
        self.load_targets(la, first, second, &mut bytes[..T::SIZE]);
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Scalar>(&mut self, seg: u8, la: u64, value: T) -> Result<(), Exception> {
        let place = self.place_slow(seg, la, T::SIZE)?;
        if let Place::Slow { first: Target::Ram(hva, gpa), second: None, .. } = place {
            self.mem.store(hva, value);
            self.note_write(gpa, T::SIZE);
        } else {
            self.place_store(&place, value);
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn place_slow(&mut self, seg: u8, la: u64, size: usize) -> Result<Place, Exception> {
        self.check_canonical(seg, la, size)?;
        self.check_alignment(la, size)?;
        self.debug_data(la, size, true);
        let access = self.data_access(AccessKind::Write);
        let first = self.resolve(la, access)?;
        let second = self.resolve_second(la, size, access)?;
        Ok(Place::Slow { la, first, second })
    }

    /// Rights of an instruction's own data accesses.
    pub fn data_access(&self, kind: AccessKind) -> Access {
        Access { kind, user: self.variant == 2, ac: self.variant == 1 }
    }

    fn check_canonical(&self, seg: u8, la: u64, len: usize) -> Result<(), Exception> {
        if self.code_size != CodeSize::Bits64 && !self.s.long_mode() {
            return Ok(());
        }
        let last = la.wrapping_add(len.max(1) as u64 - 1);
        if is_canonical(la) && (is_canonical(last) || self.linear_mask != u64::MAX) {
            return Ok(());
        }
        let stack = seg == FLAT_STACK || usize::from(seg) == sreg::SS;
        Err(if stack { Exception::SS0 } else { Exception::GP0 })
    }

    fn check_alignment(&self, la: u64, size: usize) -> Result<(), Exception> {
        let misaligned = size.is_power_of_two() && la & (size as u64 - 1) != 0;
        if misaligned && self.alignment_checked() { Err(Exception::AC) } else { Ok(()) }
    }

    /// Data breakpoints (SDM 3B 17.2.4) and a debugger's watchpoints: remembers the hit; the trap or stop comes after the
    /// instruction.
    pub fn debug_data(&mut self, la: u64, len: usize, write: bool) {
        self.debug.note_access(la, len, write);
        if self.s.dr7 & x86::bits::dr::DR7_ENABLES == 0 {
            return;
        }
        for i in 0..4u32 {
            let enabled = self.s.dr7 >> (2 * i) & 3 != 0;
            let kind = self.s.dr7 >> (16 + 4 * i) & 3;
            if !enabled || !(kind == 3 || kind == 1 && write) {
                continue;
            }
            let size = [1u64, 2, 8, 4][(self.s.dr7 >> (18 + 4 * i) & 3) as usize];
            let start = self.s.dr[i as usize] & !(size - 1);
            if la < start.wrapping_add(size) && start < la.wrapping_add(len as u64) {
                self.pending_debug |= 1 << i;
            }
        }
    }

    /// Translates one address and remembers the translation.
    pub fn resolve(&mut self, la: u64, access: Access) -> Result<Target, Exception> {
        let variant = Self::variant_of(access);
        let entry = self.tlb.entry(la, variant);
        let tag = self.tlb.fill_tag(la);
        let hit = match access.kind {
            AccessKind::Write => entry.write_tag == tag || entry.read_tag == tag && self.still_traced(&entry),
            AccessKind::Read => entry.read_tag == tag,
            AccessKind::Fetch => false,
        };
        if hit {
            let hva = Hva(la.wrapping_add(entry.addend));
            return Ok(Target::Ram(hva, Gpa((entry.gfn & !TRACED) << 12 | la & PAGE_MASK)));
        }
        let span = self.stats.watch(engine::Cause::TlbFill);
        let walked = self.walk(la, access).map(|t| self.remember(la, variant, access, &t));
        self.stats.end(engine::Cause::TlbFill, span);
        walked
    }

    /// Whether an entry lacks the right to write only because of a trace that still stands.
    fn still_traced(&self, entry: &Entry) -> bool {
        entry.gfn & TRACED != 0 && self.traces(Gfn(entry.gfn & !TRACED))
    }

    /// Whether writes to a frame must be told to somebody.
    fn traces(&self, gfn: Gfn) -> bool {
        self.mem.is_traced(gfn) || self.census.as_ref().is_some_and(|census| census.is_table(gfn.0))
    }

    /// RAM was written without the TLB's leave.
    pub fn note_write(&mut self, gpa: Gpa, len: usize) {
        self.code_written |= self.mem.note_write(gpa, len);
        if let Some(census) = &mut self.census {
            census.written(gpa, len);
        }
    }

    /// Walks the guest's tables; a page fault sets CR2.
    pub fn walk(&mut self, la: u64, access: Access) -> Result<Translation, Exception> {
        if self.census.is_some() {
            return self.counted_walk(la, access);
        }
        match walk(&mut Physical(&self.mem), &self.paging, Gva(la), access) {
            Ok(t) => Ok(t),
            Err(WalkError::PageFault(code)) => {
                self.s.cr2 = la;
                Err(Exception::pf(code))
            }
            Err(WalkError::Step(never)) => match never {},
        }
    }

    /// Walks the tables again for pages whose entries a flush would have dropped: those that agree with them stay (INV-TLB-2). The census counts what
    /// a processor's flush drops.
    pub(crate) fn look_again(&mut self, pages: Vec<LocalPage>) {
        let access = Access { kind: AccessKind::Read, user: false, ac: true };
        for page in pages {
            match self.glance(page.la, access) {
                Some(now) if self.census.is_none() && page.agrees(&now) => self.tlb.keep(page),
                _ => self.tlb.invalidate_page(page.la),
            }
        }
    }

    /// The translation of `la`, if walking the tables for it changes nothing in them and raises nothing.
    fn glance(&self, la: u64, access: Access) -> Option<Translation> {
        let mut tables = Unchanged { memory: Physical(&self.mem), would_change: false };
        let t = walk(&mut tables, &self.paging, Gva(la), access).ok()?;
        (!tables.would_change).then_some(t)
    }

    /// The frame of the code at `la`, as [`Cpu::walk`] would find it without a change.
    #[must_use]
    pub fn glance_at_code(&self, la: u64, user: bool) -> Option<Gfn> {
        let access = Access { kind: AccessKind::Fetch, user, ac: false };
        self.glance(la, access).map(|t| t.gpa.gfn())
    }

    /// A walk of which the census hears.
    #[cold]
    fn counted_walk(&mut self, la: u64, access: Access) -> Result<Translation, Exception> {
        let mut memory = Seen { memory: Physical(&self.mem), steps: Steps::default() };
        let walked = walk(&mut memory, &self.paging, Gva(la), access);
        let steps = memory.steps;
        match walked {
            Ok(t) => {
                let write = access.kind == AccessKind::Write;
                let Some(census) = &mut self.census else { return Ok(t) };
                if access.kind == AccessKind::Fetch {
                    census.fetched(&steps);
                }
                for gfn in census.walked(&steps, write) {
                    self.tlb.revoke(&(gfn..gfn + 1), false);
                }
                self.last_steps = steps.len as u64;
                Ok(t)
            }
            Err(WalkError::PageFault(code)) => {
                self.s.cr2 = la;
                Err(Exception::pf(code))
            }
            Err(WalkError::Step(never)) => match never {},
        }
    }

    /// The census's TLB is smaller than ours: the oldest entry goes.
    fn count_fill(&mut self, la: u64, variant: usize, tag: u64, shift: u32) {
        let steps = self.last_steps;
        let Some(census) = &mut self.census else { return };
        if let Some((slot, tag)) = census.filled(Tlb::slot(la, variant), tag, shift, steps) {
            self.tlb.evict(slot, tag);
        }
    }

    /// Makes the TLB entry of a walk's result.
    fn remember(&mut self, la: u64, variant: usize, access: Access, t: &Translation) -> Target {
        let gfn = t.gpa.gfn();
        let Some(page) = self.mem.page(gfn) else { return Target::Device(t.gpa) };
        let write = access.kind == AccessKind::Write;
        if access.kind != AccessKind::Fetch {
            self.stats.count(engine::Cause::TlbFill);
            let tag = self.tlb.fill_tag(la);
            let may_write = write || t.dirty && self.may_write(t, access);
            let writable = may_write && page.writable;
            let traced = self.traces(gfn);
            let entry = Entry {
                read_tag: tag,
                write_tag: if writable && !traced { tag } else { 0 },
                addend: page.hva.0.wrapping_sub(la & !PAGE_MASK),
                gfn: gfn.0 | if writable && traced { TRACED } else { 0 },
            };
            self.tlb.fill(la, variant, entry, t, t.global && self.s.cr4 & x86::bits::cr4::PGE != 0);
            if self.census.is_some() {
                self.count_fill(la, variant, tag, t.page_shift);
            }
        }
        if write && !page.writable {
            return Target::Device(t.gpa);
        }
        Target::Ram(Hva(page.hva.0 | la & PAGE_MASK), t.gpa)
    }

    /// Whether the rights that the walk found allow writes of this kind too (see `x86::paging`).
    fn may_write(&self, t: &Translation, access: Access) -> bool {
        if access.user { t.user && t.writable } else { t.writable || !self.paging.wp }
    }

    fn resolve_second(&mut self, la: u64, len: usize, access: Access) -> Result<Option<Target>, Exception> {
        if la & PAGE_MASK <= PAGE_SIZE.saturating_sub(len as u64) {
            return Ok(None);
        }
        let next = (la & !PAGE_MASK).wrapping_add(PAGE_SIZE) & self.system_linear_mask();
        self.resolve(next, access).map(Some)
    }

    fn split(la: u64, len: usize) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "at most a page")]
        let room = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
        room.min(len)
    }

    fn load_targets(&mut self, la: u64, first: Target, second: Option<Target>, data: &mut [u8]) {
        let (head, tail) = data.split_at_mut(Self::split(la, data.len()));
        self.load_target(first, head);
        if let Some(second) = second {
            self.load_target(second, tail);
        }
    }

    fn store_targets(&mut self, la: u64, first: Target, second: Option<Target>, data: &[u8]) {
        let (head, tail) = data.split_at(Self::split(la, data.len()));
        self.store_target(first, head);
        if let Some(second) = second {
            self.store_target(second, tail);
        }
    }

    fn load_target(&mut self, target: Target, data: &mut [u8]) {
        match target {
            Target::Ram(hva, _) => self.mem.read_machine(hva, data),
            Target::Device(gpa) => {
                let span = self.stats.begin(engine::Cause::MmioRead);
                self.io.mmio_read(self.index, gpa, data);
                self.stats.end(engine::Cause::MmioRead, span);
            }
        }
    }

    fn store_target(&mut self, target: Target, data: &[u8]) {
        match target {
            Target::Ram(hva, gpa) => {
                self.store_ram(hva, data);
                self.note_write(gpa, data.len());
            }
            Target::Device(gpa) => {
                let span = self.stats.begin(engine::Cause::MmioWrite);
                self.io.mmio_write(self.index, gpa, data);
                self.stats.end(engine::Cause::MmioWrite, span);
            }
        }
    }

    /// Stores an integer's bytes as one access, as other vCPUs must see it.
    fn store_ram(&self, hva: Hva, data: &[u8]) {
        match *data {
            [a] => self.mem.store(hva, a),
            [a, b] => self.mem.store(hva, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.mem.store(hva, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => self.mem.store(hva, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            _ => self.mem.write_machine(hva, data),
        }
    }

    // ---- fetch ------------------------------------------------------------------------------------------------

    /// Physical address of the instruction byte at `la`.
    pub fn fetch_gpa(&mut self, la: u64) -> Result<Gpa, Exception> {
        let access = Access { kind: AccessKind::Fetch, user: self.s.cpl == 3, ac: false };
        Ok(self.walk(la, access)?.gpa)
    }

    /// Acts on requests of other threads to give up translations.
    pub fn serve_invalidations(&mut self) {
        let (number, requests) = self.holder.take();
        for (gfns, what) in requests {
            self.stats.count(engine::Cause::Invalidate);
            self.tlb.revoke(&(gfns.start.0..gfns.end.0), what == guestmem::Invalidation::Unmap);
        }
        self.holder.done(number);
    }

    /// Traces lines of a code page before it is decoded. Outside of the guest, because it may wait for the other vCPUs.
    pub fn trace_code(&mut self, gfn: Gfn, lines: u64) {
        if self.mem.is_line_traced(gfn, lines) {
            return;
        }
        self.holder.leave();
        let waited = self.mem.trace_code(gfn, lines, Some(guestmem::Holder::id(&*self.holder)));
        if waited {
            self.tlb.revoke(&(gfn.0..gfn.0 + 1), false);
        }
        self.holder.enter();
        self.serve_invalidations();
    }
}
