//! Runs fragments: the dispatcher of the binary translator.
//!
//! The way of a vCPU: [`BtVcpu::run`] asks the interpreter what waits between instructions, looks up the fragment at RIP (`cache`), enters it
//! (`exec`), and acts on where it left. Cold code, other modes and whatever the translator does not know is interpreted: the
//! interpreter's `Cpu` is the vCPU; while fragments run, part of its state is in host registers and the frame (`state`).
//!
//! Threads: a vCPU has its own translation cache, tables and frame. Other threads reach it through `engine::Signals` (which ring the frame's
//! alarm) and `guestmem::Holder`: writes to code that somebody translated are told to every vCPU, which suspends its fragments of them when it next
//! leaves the cache; a vCPU leaves at a poll, and after every instruction that the interpreter does for it.

mod account;
mod adapt;
mod cache;
mod callout;
mod change;
mod classify;
mod code_memory;
mod code_pages;
mod content;
mod cpuid;
mod deliver;
mod exec;
mod fp;
mod huge;
mod invlpg;
mod iret;
mod knobs;
mod legacy;
pub mod listing;
mod lookup;
mod msr;
mod observe;
mod onward;
mod page_filter;
pub mod perf_map;
mod places;
mod profile;
mod quick;
mod refill;
mod report;
mod sample;
mod state;
mod switch;
mod switch_cost;
mod tables;
pub mod trace;
mod trap;
mod upper_code;
mod user_code;
mod xstate;

use std::sync::Arc;

use bt::unit::{Reader, Unit};
use bt::{SiteKind, frame};
use cache::{Cache, Environments, Key, NO_FRAME, New, PlacedSite};
use content::{Check, Source};
use engine::{ExitStats, Vcpu, VcpuExit};
use exec::Frame;
use guestmem::Gfn;
use iced_x86::Instruction;
pub use knobs::{Knobs, TlbKnob};
use sample::Activity;
use state::Host;
use tables::Tables;
use upper_code::UpperChange;
use x86::CpuState;
use x86::bits::is_canonical;
use x86::cpuid::{CpuModel, Gate};
use x86_interp::cpu::CodeSize;
use x86_interp::tlb::TlbEvent;
use x86_interp::{Interp, Parts};

/// Blocks of 16- and 32-bit code that cannot be translated between two looks of the dispatcher.
const LEGACY_BLOCKS: u32 = 64;
/// Pages whose decoded code the interpreter keeps: only what is cold comes to it.
const DECODED_PAGES: usize = 256;
/// Instructions that the interpreter may do in one go where nothing can be translated.
const LONG_BLOCK: u64 = 1000;

/// The frame that a unit reaches into.
struct Next {
    gfn: Gfn,
    page: Box<[u8; 4096]>,
    version: u32,
}

/// The bytes that a fragment was made of are not those in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Changed;

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct BtStats {
    /// Fragments made.
    pub fragments: u64,
    /// Guest instructions translated.
    pub translated: u64,
    /// Host bytes made of them.
    pub translated_bytes: u64,
    /// Nanoseconds that took.
    pub translation_ns: u64,
    /// Entries from the dispatcher.
    pub entries: u64,
    /// Times translated code left by an exit that could be linked.
    pub exits: u64,
    /// Instructions executed by the interpreter for a fragment.
    pub callouts: u64,
    /// Of those: done without the interpreter (`quick`).
    pub quick: u64,
    /// Times translated code went on elsewhere from an instruction that the interpreter did for it.
    pub onward: u64,
    /// Page faults delivered without the interpreter (`deliver`).
    pub delivered: u64,
    /// Page faults delivered where an access missed.
    pub faults: u64,
    /// TLB misses that came to Rust.
    pub misses: u64,
    /// Blocks interpreted.
    pub blocks: u64,
    /// Times everything was forgotten.
    pub flushes: u64,
    /// Fragments suspended because lines that they depend on were written.
    pub suspended: u64,
    /// Of those, the ones whose bytes were found to be the same.
    pub resumed: u64,
    /// Fragments dropped because their bytes had changed.
    pub dropped: u64,
    /// Fragments made that check their bytes themselves.
    pub checked: u64,
    /// Times a fragment found its bytes changed.
    pub check_failures: u64,
    /// Fragments that had checked themselves long enough without a change.
    pub acquitted: u64,
    /// Pages whose lines without code may be written without the slow way.
    pub shared_pages: u64,
    /// Links made.
    pub links: u64,
    /// Times the check of a group failed.
    pub plain_exits: u64,
    /// Direct exits in the fragments made: what links are made of.
    pub direct_exits: u64,
    /// Guest bytes translated.
    pub guest_bytes: u64,
    /// Fragments that the dispatcher looked for and found.
    pub found: u64,
    /// And did not find.
    pub not_found: u64,
}

/// Which instructions the CPU model announces, asked once for each form.
struct Announced(Vec<Option<bool>>);

impl Announced {
    fn ask(&mut self, i: &Instruction, model: &CpuModel) -> bool {
        let number = i.code() as usize;
        if self.0.len() <= number {
            self.0.resize(number + 1, None);
        }
        let Some(known) = self.0.get_mut(number) else { return false };
        *known.get_or_insert_with(|| model.gate(i) == Gate::Announced)
    }
}

/// A vCPU that runs translated code.
pub struct BtVcpu {
    interp: Interp,
    frame: Frame,
    tables: Tables,
    cache: Cache,
    environments: Environments,
    /// The environment of the jump tables' entries.
    environment: u8,
    places: places::Places,
    code_pages: code_pages::CodePages,
    /// Writes to traced pages that hit no code, by hashed frame.
    innocent: Box<[u8; change::INNOCENT]>,
    /// The frame whose code was written last, and how often in a row.
    written_last: Gfn,
    written_in_a_row: u8,
    knobs: Knobs,
    host: Host,
    announced: Announced,
    /// What the guest's TSC (before its offset) is ahead of the host's, while the vCPU runs.
    counter: Option<u64>,
    /// The next fragment is one without groups.
    next_plain: bool,
    account: account::Account,
    profiler: Option<Box<profile::Profiler>>,
    observers: observe::Observers,
    adapt: adapt::Adaptation,
    /// Keeps the traps of our code memory; before it is unmapped, they go.
    trapped: Option<trap::Trapped>,
    /// Counters.
    pub bt: BtStats,
}

impl BtVcpu {
    /// A vCPU in its reset state.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn new(parts: Parts) -> rustix::io::Result<Self> {
        Self::with_knobs(parts, Knobs::from_environment())
    }

    /// A vCPU in its reset state, under the stress that `knobs` ask for.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn with_knobs(parts: Parts, knobs: Knobs) -> rustix::io::Result<Self> {
        let frame = Frame::new()?;
        if knobs.tlb == TlbKnob::One {
            frame.refill_in_rust();
        }
        if !knobs.helpers {
            frame.without_helpers();
        }
        let signals = Arc::clone(&parts.signals);
        frame.set(frame::SIGNALS, signals.address());
        signals.set_alarm(frame.alarm());
        let mut interp = Interp::new(parts);
        interp.cpu().tlb.events = Some(Vec::new());
        interp.cpu().holder.watch_code();
        interp.limit_decoded_pages(DECODED_PAGES);
        let host = Host::detect();
        let cache = Cache::new(knobs.code_bytes)?;
        let traps = knobs.rdtsc == bt::TimeStamp::Trap;
        let trapped = if traps { trap::Trapped::new(&cache.code_range()) } else { None };
        let rdtsc = if traps && trapped.is_none() { bt::TimeStamp::Callout } else { knobs.rdtsc };
        let mut vcpu = Self {
            interp,
            tables: Tables::new(frame.clone(), &knobs)?,
            frame,
            cache,
            trapped,
            environments: Environments::default(),
            environment: 0,
            places: places::Places::default(),
            code_pages: code_pages::CodePages::default(),
            innocent: Box::new([0; change::INNOCENT]),
            written_last: NO_FRAME,
            written_in_a_row: 0,
            host: if knobs.fp { host } else { host.without_fp() }.with_time_stamp(rdtsc),
            adapt: adapt::Adaptation::new(adapt::Settings::new(knobs.adapt)),
            knobs,
            announced: Announced(Vec::new()),
            counter: None,
            next_plain: false,
            account: account::Account::default(),
            profiler: None,
            observers: observe::Observers::default(),
            bt: BtStats::default(),
        };
        vcpu.begin_sampling();
        vcpu.begin_accounting();
        Ok(vcpu)
    }

    fn run_loop(&mut self) -> VcpuExit {
        self.begin_dispatch(account::START);
        let exit = loop {
            if let Some(exit) = self.dispatch() {
                break exit;
            }
        };
        self.end_dispatch();
        exit
    }

    /// From what waits between instructions to the next leave of the cache, or through a block of cold code. Some: the run ends.
    fn dispatch(&mut self) -> Option<VcpuExit> {
        self.look_at_samples();
        self.frame.silence();
        let exit = self.interp.attend();
        self.absorb();
        if exit.is_some() {
            return exit;
        }
        state::drop_resume_flag(self.interp.cpu());
        if !state::eligible(self.interp.cpu()) {
            self.block(LONG_BLOCK);
            return None;
        }
        self.stress();
        self.adapt();
        let fragment = self.find();
        self.unlink_if_remapped();
        // Tracing code serves requests, and takes with them the signal of what was told of code meanwhile (INV-SMC-2).
        if self.interp.cpu().holder.has_written() {
            return None;
        }
        match fragment {
            Some(fragment) => self.enter(fragment),
            None => self.block(1),
        }
        None
    }

    /// Forgets what the knobs say, before an entry.
    fn stress(&mut self) {
        if self.knobs.tlb == TlbKnob::Entry {
            self.tables.apply(TlbEvent::FlushAll);
        }
        let entries = self.bt.entries + self.bt.onward;
        if self.knobs.evict != 0 && entries.is_multiple_of(self.knobs.evict) {
            self.cache.advance();
            self.wipe_emptied();
        }
        if self.knobs.forget != 0 && entries.is_multiple_of(self.knobs.forget) {
            self.flush_code();
        }
    }

    fn block(&mut self, limit: u64) {
        let span = self.begin_cold();
        self.does(Activity::Interpretation);
        self.interpret_block(limit);
        self.end_cold(span);
        self.end_dispatch();
        self.begin_dispatch(account::COLD);
    }

    fn interpret_block(&mut self, limit: u64) {
        if self.is_stepped() {
            return self.step_traced();
        }
        // Whole runs of legacy code that is not eligible: nothing of it can be translated.
        for _ in 0..LEGACY_BLOCKS {
            self.bt.blocks += 1;
            self.interp.run_block(limit);
            if !state::only_legacy(self.interp.cpu()) || self.is_stepped() {
                break;
            }
        }
        self.absorb();
    }

    /// Takes over what the interpreter did to translations; true if it took back any.
    fn apply_events(&mut self) -> bool {
        let Some(events) = &mut self.interp.cpu().tlb.events else { return false };
        let any = !events.is_empty();
        for event in events.drain(..) {
            self.tables.apply(event);
        }
        let interp = &mut self.interp;
        self.tables.look_again_at_code(|la, user| interp.cpu().glance_at_code(la, user));
        any
    }

    /// Takes over what the interpreter did to translations and everybody to code. No fragment runs.
    fn absorb(&mut self) {
        self.apply_events();
        let cpu = self.interp.cpu();
        let own = std::mem::take(&mut cpu.code_changed);
        let holder = Arc::clone(&cpu.holder);
        loop {
            let written = holder.take_written();
            if written.is_empty() {
                return;
            }
            written.into_iter().for_each(|(gfn, lines)| self.code_written(gfn, lines, own));
        }
    }

    fn flush_code(&mut self) {
        self.bt.flushes += 1;
        self.note_flush();
        self.cache.clear();
        self.adapt.fragments_gone();
        self.tables.forget_jumps();
    }

    /// Undoes the links between pages whose mapping may have changed.
    fn unlink_if_remapped(&mut self) {
        match self.tables.take_upper_changed() {
            UpperChange::None => {}
            UpperChange::Page(page) => self.cache.unlink_page(page),
            UpperChange::Anything => self.cache.unlink_pages(),
        }
    }

    /// What the code at RIP is known by. None: it lies in no RAM, or is not mapped.
    fn key(&mut self) -> Option<(Key, bt::Facts)> {
        let gfn = self.interp.code_frame()?;
        let cpu = self.interp.cpu();
        let facts = state::facts(cpu, self.host, self.counter);
        let offset = (legacy::linear_rip(cpu) & 0xfff) as u16;
        self.unlink_if_remapped();
        let env = self.environments.number(facts).unwrap_or_else(|| {
            self.flush_code();
            self.environments = Environments::default();
            self.environments.number(facts).unwrap_or_default()
        });
        if facts.legacy.is_some() {
            self.tables.set_legacy_environment(facts.variant, env);
        } else if env != self.environment {
            self.environment = env;
            self.tables.set_environment(env);
        }
        let page_rip = facts.page_rip.unwrap_or(0);
        let plain = std::mem::take(&mut self.next_plain);
        let facts = bt::Facts { plain, ..facts };
        let key = Key { gfn, offset, env, variant: facts.variant, page_rip, plain, second: NO_FRAME };
        Some((key, facts))
    }

    /// The fragment at RIP, translated if the place is warm.
    fn find(&mut self) -> Option<u32> {
        let (key, facts) = self.key()?;
        self.find_key(key, facts)
    }

    fn find_key(&mut self, key: Key, facts: bt::Facts) -> Option<u32> {
        if self.is_stepped() {
            return None;
        }
        if let Some(fragment) = self.cache.find(&key).or_else(|| self.find_crossing(key))
            && self.make_ready(fragment)
        {
            self.bt.found += 1;
            if self.knobs.again == 0 || !self.bt.found.is_multiple_of(self.knobs.again) {
                return Some(fragment);
            }
            self.cache.drop_frame(key.gfn);
        }
        self.bt.not_found += 1;
        if !self.places.is_warm(&key, self.knobs.warm) {
            return None;
        }
        let span = self.begin_translation();
        let before = self.does(Activity::Translation);
        let fragment = self.translate(key, facts);
        self.did(before);
        self.end_translation(span);
        fragment
    }

    /// The frame behind the page at RIP, if an instruction may reach into it.
    fn second_frame(&mut self, offset: u16) -> Option<Gfn> {
        let cpu = self.interp.cpu();
        let next = (legacy::linear_rip(cpu) & !0xfff).wrapping_add(0x1000) & cpu.linear_mask;
        let within = legacy::may_run(cpu, next);
        if within && bt::unit::may_cross(u64::from(offset)) { self.interp.code_frame_at(next) } else { None }
    }

    /// The fragment of the instruction at RIP that reaches into the next page.
    fn find_crossing(&mut self, key: Key) -> Option<u32> {
        let second = self.second_frame(key.offset)?;
        self.cache.find(&Key { second, ..key })
    }

    /// The bytes of a frame, and their version before they were read.
    fn read_frame(&mut self, gfn: Gfn) -> Option<(Box<[u8; 4096]>, u32)> {
        let cpu = self.interp.cpu();
        let version = cpu.mem.code_version(gfn);
        let hva = cpu.mem.page(gfn)?.hva;
        let mut page = Box::new([0; 4096]);
        cpu.mem.read_machine(hva, &mut page[..]);
        Some((page, version))
    }

    /// The unit at a key, and if it reaches there, the next frame and what is in it.
    fn unit(
        &mut self,
        key: Key,
        reader: &mut Reader<'_>,
        facts: bt::Facts,
        checked: bool,
    ) -> Option<(Unit, Option<Next>)> {
        let offset = usize::from(key.offset);
        let unit = if checked {
            bt::unit::form_checked(reader, offset, self.knobs.unit)
        } else {
            reader.form(offset, self.knobs.unit)
        };
        if !unit.instructions.is_empty() {
            return Some((unit, None));
        }
        let gfn = self.second_frame(key.offset)?;
        let (next, version) = self.read_frame(gfn)?;
        let mut head = [0; bt::unit::MAX_LEN];
        head.copy_from_slice(&next[..bt::unit::MAX_LEN]);
        let unit = bt::unit::form_crossing(reader.page(), &head, offset, facts.decoding());
        (!unit.instructions.is_empty()).then_some((unit, Some(Next { gfn, page: next, version })))
    }

    fn translate(&mut self, key: Key, facts: bt::Facts) -> Option<u32> {
        let start = std::time::Instant::now();
        let (gfn, version) = (key.gfn, self.interp.cpu().mem.code_version(key.gfn));
        let (mut page, kept) = self.code_pages.take(gfn, version);
        let begin = if kept { usize::from(key.offset) & !63 } else { 0 };
        let end = if kept { (begin + code_pages::FRESH).min(4096) } else { 4096 };
        self.read_bytes(gfn, begin, &mut page[begin..end])?;
        let mut number = self.translate_from(&page, version, key, facts);
        if kept && number == Err(Changed) {
            self.read_bytes(gfn, 0, &mut page[..])?;
            number = self.translate_from(&page, version, key, facts);
        }
        self.code_pages.keep(gfn, version, page);
        self.bt.translation_ns += u64::try_from(start.elapsed().as_nanos()).unwrap_or(0);
        number.ok().flatten()
    }

    /// Bytes of a frame, from an offset on. None if it is none.
    fn read_bytes(&mut self, gfn: Gfn, offset: usize, bytes: &mut [u8]) -> Option<()> {
        let cpu = self.interp.cpu();
        let hva = cpu.mem.page(gfn)?.hva;
        cpu.mem.read_machine(guestmem::Hva(hva.0 + offset as u64), bytes);
        Some(())
    }

    /// Makes a fragment of the page's bytes, if they are what is in memory.
    fn translate_from(
        &mut self,
        page: &[u8; 4096],
        version: u32,
        key: Key,
        facts: bt::Facts,
    ) -> Result<Option<u32>, Changed> {
        self.note_code(key.gfn);
        let wants_check = facts.legacy.is_none() && (self.knobs.check || self.places.changes_often(&key));
        let mut reader = Reader::new(page, facts.decoding());
        let Some((mut unit, next)) = self.unit(key, &mut reader, facts, wants_check) else { return Ok(None) };
        let second = next.as_ref().map_or(NO_FRAME, |next| next.gfn);
        let key = Key { second, ..key };
        let (sites, links) = self.cache.bases();
        let check =
            if wants_check && next.is_none() { self.check_of(&key, self.cache.next_number()) } else { None };
        // Code that changes often is not worth learning of, and other forms are for 64-bit addresses.
        if check.is_none() && facts.legacy.is_none() {
            unit.hints = self.adapt.hints(key.gfn, &unit);
        }
        let model = Arc::clone(&self.interp.cpu().model);
        let gates = std::cell::RefCell::new(&mut self.announced);
        let announced = |i: &Instruction| gates.borrow_mut().ask(i, &model);
        let fragment = match check {
            Some(check) => {
                bt::translate_checked(&unit, &mut reader, facts, check, (sites, links), &announced)
            }
            None => bt::translate(&unit, &mut reader, facts, sites, links, &announced),
        };
        let beyond = unit.end.saturating_sub(4096);
        let head = next.as_ref().map_or(&[][..], |next| &next.page[..beyond]);
        let source = Source::new(&fragment, page, head);
        let check = check.map(|_| Check { sample: None, variable: fragment.variable });
        // The bytes are traced only now that it is known which; if they changed meanwhile, another time. Those that a fragment looks at itself need
        // no trace.
        let mut unchanged = check.is_some() || self.trace(key.gfn, source.lines(), page);
        if let Some(next) = &next {
            unchanged &= self.trace(key.second, 1, &next.page);
        }
        self.apply_events();
        if !unchanged {
            return Err(Changed);
        }
        let second_version = next.as_ref().map_or(0, |next| next.version);
        let number =
            self.cache.insert(&New { key, fragment: &fragment, source, check, version, second_version });
        self.wipe_emptied();
        let head = next.as_ref().map_or(&[][..], |next| &next.page[..bt::unit::MAX_LEN]);
        self.note_made(number, &observe::Made::new(&unit, page, head, &fragment, facts, (sites, links)));
        self.bt.fragments += 1;
        self.bt.translated += fragment.map.len() as u64;
        self.bt.translated_bytes += fragment.code.len() as u64;
        self.bt.guest_bytes += (unit.end - usize::from(key.offset)) as u64;
        self.bt.direct_exits += fragment.exits.iter().filter(|e| e.place.is_some()).count() as u64;
        Ok(number)
    }

    /// Traces lines of a frame; true if its bytes are still those given. Writes after this are told ([`BtVcpu::code_written`]).
    fn trace(&mut self, gfn: Gfn, lines: u64, bytes: &[u8; 4096]) -> bool {
        let cpu = self.interp.cpu();
        cpu.trace_code(gfn, lines);
        let Some(page) = cpu.mem.page(gfn) else { return false };
        let mut now = [0; 64];
        bytes.as_chunks::<64>().0.iter().enumerate().filter(|(n, _)| lines >> n & 1 != 0).all(|(n, line)| {
            cpu.mem.read_machine(guestmem::Hva(page.hva.0 + 64 * n as u64), &mut now);
            now == *line
        })
    }

    fn enter(&mut self, fragment: u32) {
        self.bt.entries += 1;
        let code = self.cache.address(fragment);
        let cpu = self.interp.cpu();
        let rip = legacy::linear_rip(cpu);
        let variant = state::variant(cpu);
        let is_legacy = cpu.code_size != CodeSize::Bits64;
        state::fill(cpu, &self.frame, self.counter);
        self.publish_spaces();
        self.remember(fragment, rip, code, variant, is_legacy);
        self.frame.set32(frame::EXIT, 0);
        let frame = self.frame.clone();
        self.end_dispatch();
        self.does(Activity::Fragments);
        #[expect(unsafe_code, reason = "runs translated code")]
        // SAFETY: `code` is the entry of a fragment in our cache, which changes only while no fragment runs; `state::begin` and the
        // tables have set the frame's pointers.
        unsafe {
            frame.enter(code, rip, self)
        };
        let why = self.note_leave();
        self.begin_dispatch(why as usize);
        self.left();
    }

    /// See INV-CR3-1.
    fn publish_spaces(&mut self) {
        let trusted = self.knobs.context;
        switch::publish(self.interp.cpu(), &self.frame, trusted);
    }

    /// Has jumps to `rip` find a fragment.
    fn remember(&mut self, fragment: u32, rip: u64, code: u64, variant: bt::Variant, legacy: bool) {
        if let Some(key) = self.cache.key(fragment) {
            self.note_upper_code(rip, key);
        }
        match self.cache.key(fragment) {
            // For ranges that cross pages only: jumps do not lead to it.
            Some(key) if key.plain => {}
            Some(key)
                if (legacy || variant == bt::Variant::User) && key.second == NO_FRAME && rip >> 63 == 0 =>
            {
                self.tables.set_user_jump(rip, key.gfn, code, variant, legacy);
            }
            _ => self.tables.set_jump(rip, code, variant, legacy),
        }
    }

    /// Jumps and links are about to lead to the code at `rip`, which has this key (INV-UP-1).
    fn note_upper_code(&mut self, rip: u64, key: Key) {
        let user = key.variant == bt::Variant::User;
        self.tables.note_upper_code(rip, key.gfn, user);
        if key.second != NO_FRAME {
            self.tables.note_upper_code(rip.wrapping_add(0x1000), key.second, user);
        }
    }

    /// Acts on where translated code left.
    fn left(&mut self) {
        let cpu = self.interp.cpu();
        state::read(cpu, &self.frame);
        cpu.rip = legacy::pointer(cpu, self.frame.get(frame::RIP));
        let exit = self.frame.get32(frame::EXIT);
        if exit != 0 {
            self.bt.exits += 1;
            self.left_by(exit - 1);
        } else if !is_canonical(cpu.rip) {
            self.refuse_target();
        }
    }

    /// Goes on where an exit leads; links it if its target is translated.
    fn left_by(&mut self, number: u32) {
        if let Some(fragment) = self.cache.checked_by(number) {
            self.look_at(fragment);
        }
        let Some(target) = self.cache.target(number) else { return };
        let from = target.from;
        let base = if from.page_rip == 0 { self.frame.get(frame::PAGE_RIP) } else { from.page_rip };
        let cpu = self.interp.cpu();
        cpu.rip = legacy::pointer(cpu, base.wrapping_add(i64::from(target.offset) as u64));
        self.next_plain = target.plain;
        if !self.knobs.chain || cpu.poll() || !state::eligible(cpu) {
            return;
        }
        let Some((key, facts)) = self.key() else { return };
        self.next_plain = target.plain;
        let other_page = !(0..4096).contains(&target.offset);
        let here = (key.env, key.variant, key.plain) == (from.env, target.variant, target.plain);
        if !here || !other_page && (key.gfn, key.page_rip) != (from.gfn, from.page_rip) {
            return;
        }
        let epoch = self.cache.epoch();
        if let Some(fragment) = self.find_key(key, facts)
            && epoch == self.cache.epoch()
        {
            let rip = legacy::linear_rip(self.interp.cpu());
            self.note_upper_code(rip, self.cache.key(fragment).unwrap_or(key));
            let reach = other_page || bt::unit::may_cross(u64::from(key.offset));
            if self.cache.link(number, fragment, reach) {
                self.bt.links += 1;
            } else {
                self.cache.forward(number, fragment);
            }
        }
    }

    /// An indirect jump to an address that is none: the instruction itself faults (SDM 2A JMP), so it is undone. It is not executed again: a
    /// call may have pushed its return address over its target.
    fn refuse_target(&mut self) {
        let Some(site) = self.cache.site(self.frame.get32(frame::SITE)) else { return };
        let SiteKind::Branch { popped } = site.site.kind else { return };
        let rip = self.site_rip(&site);
        let cpu = self.interp.cpu();
        cpu.gpr[4] = cpu.gpr[4].wrapping_sub(i64::from(popped) as u64);
        cpu.rip = rip;
        x86_interp::system::interrupt::deliver_exception(cpu, x86::Exception::GP0);
        self.absorb();
    }

    /// RIP of a site: fragments of user code know only offsets in the page.
    fn site_rip(&self, site: &PlacedSite) -> u64 {
        let base = if site.page_rip == 0 { self.frame.get(frame::PAGE_RIP) } else { site.page_rip };
        base.wrapping_add(u64::from(site.site.guest))
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self, _budget: u64) -> VcpuExit {
        let holder = Arc::clone(&self.interp.cpu().holder);
        holder.enter();
        let cpu = self.interp.cpu();
        cpu.serve_invalidations();
        state::begin(cpu, self.host, &self.frame);
        self.counter = cpu.io.tsc_delta();
        self.sample(true);
        let exit = self.run_loop();
        self.sample(false);
        self.look_at_samples();
        holder.leave();
        exit
    }

    fn save(&mut self) -> CpuState {
        self.interp.save()
    }

    fn restore(&mut self, state: &CpuState) {
        self.interp.restore(state);
        self.next_plain = false;
        self.adapt.forget_all();
        self.flush_code();
        self.absorb();
    }

    fn set_debug(&mut self, debug: &engine::Debug) {
        self.interp.set_debug(debug);
    }

    fn wake_mask(&self) -> u32 {
        self.interp.wake_mask()
    }

    fn instructions(&self) -> u64 {
        self.interp.instructions()
    }

    fn stats(&self) -> &ExitStats {
        self.interp.stats()
    }

    fn report(&self) -> engine::Report {
        self.make_report()
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        // Before code memory is unmapped.
        self.trapped = None;
    }
}
