//! The interpreter's loop: find the decoded run at RIP, execute it, act on why it stopped.

use engine::signals::Signal;
use engine::{Cause, DebugStop, VcpuExit};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use x86::addr::{Gpa, PAGE_MASK, PAGE_SIZE};
use x86::bits::{dr, rflags};
use x86::paging::{Access, AccessKind};
use x86::state::{Activity, InterruptShadow, sreg};
use x86::{Exception, bits::cr4};

use crate::Interp;
use crate::cpu::{CodeSize, Cpu, PAGE_RIP, Stop};
use crate::decode::build::{blank, build, end_of_run};
use crate::decode::{DecodeCache, PageKey};
use crate::ops::Op;
use crate::system::interrupt;

/// The longest instruction (SDM 2A 2.3.11).
const MAX_LEN: usize = 15;
/// Decoded instructions in one run.
const MAX_RUN: usize = 256;
/// Exceptions in a row without an instruction that completes (a handler that itself faults, for ever) after which the
/// budget counts as used up, for it would never be.
const MAX_STORM: u32 = 4096;

/// Code at RIP.
enum Code {
    /// In the decode cache: page and number of the instruction.
    Cached(usize, usize),
    /// Decoded for this one time: it crosses a page, or lies near the segment's limit, or in no RAM.
    Single(Op),
}

impl Interp {
    /// Runs until something concerns the machine, or until `budget` instructions are done.
    pub(crate) fn run_guest(&mut self, budget: u64) -> VcpuExit {
        let end = self.cpu.instructions.saturating_add(budget);
        let (mut storm, mut last) = (0, self.cpu.instructions);
        loop {
            if let Some(exit) = self.boundary() {
                return exit;
            }
            if self.cpu.instructions >= end || storm > MAX_STORM {
                return VcpuExit::Budget;
            }
            let raised = if self.cpu.careful() {
                match self.run_carefully(end) {
                    Ok(raised) => raised,
                    Err(stop) => return VcpuExit::Debug(stop),
                }
            } else {
                self.run_fast(end).map_err(|e| interrupt::deliver_exception(&mut self.cpu, e)).is_err()
            };
            if raised {
                storm = if self.cpu.instructions == last { storm + 1 } else { 0 };
                last = self.cpu.instructions;
            }
        }
    }

    /// Executes one instruction, or a run of them where only breakpoints elsewhere want care. True if an exception was raised.
    #[cold]
    fn run_carefully(&mut self, end: u64) -> Result<bool, DebugStop> {
        self.breakpoint()?;
        let result = if self.needs_care() { self.step_carefully() } else { self.run_fast(end) };
        let raised = result.map_err(|exception| self.deliver(exception)).is_err();
        self.cpu.debug.take_stop().map_or(Ok(raised), Err)
    }

    /// Stops before an instruction where the debugger wants it.
    fn breakpoint(&self) -> Result<(), DebugStop> {
        if self.cpu.debug.breaks_at(code_address(&self.cpu)) { Err(DebugStop::Breakpoint) } else { Ok(()) }
    }

    /// Whether the next instruction has to be executed by itself. Breakpoints of a debugger concern the code of their own
    /// page only, which [`Interp::run_fast`] does not leave.
    #[inline(always)]
    fn needs_care(&self) -> bool {
        self.cpu.careful() && (self.cpu.stepwise() || self.cpu.debug.breaks_in_page(code_address(&self.cpu)))
    }

    /// Delivers an exception of the current instruction.
    fn deliver(&mut self, exception: Exception) {
        interrupt::deliver_exception(&mut self.cpu, exception);
        self.cpu.debug.note_step(self.cpu.rip);
    }

    /// What another engine calls between its fragments: [`Interp::boundary`], and what a debugger wants of the instruction
    /// before it and of the one behind it.
    pub fn attend(&mut self) -> Option<VcpuExit> {
        if !self.cpu.debug.is_armed() {
            return self.boundary();
        }
        let stop = self.cpu.debug.take_stop().map(VcpuExit::Debug);
        stop.or_else(|| self.boundary()).or_else(|| self.breakpoint().err().map(VcpuExit::Debug))
    }

    /// Executes one instruction, exceptions delivered: another engine's callout.
    pub fn step(&mut self) {
        if let Err(exception) = self.step_carefully() {
            self.deliver(exception);
        }
    }

    /// Executes instructions up to the first jump behind `limit` of them, or some other end, exceptions delivered: another engine's
    /// cold code.
    pub fn run_block(&mut self, limit: u64) {
        let end = self.cpu.instructions + limit;
        let result = if self.needs_care() { self.step_carefully() } else { self.run_fast(end) };
        if let Err(exception) = result {
            self.deliver(exception);
        }
    }

    /// The frame of RAM that holds the code at RIP, if that is mapped executable. Raises nothing.
    pub fn code_frame(&mut self) -> Option<guestmem::Gfn> {
        self.code_frame_at(code_address(&self.cpu))
    }

    /// The frame of RAM that holds the code at a linear address, if that is mapped executable. Raises nothing.
    pub fn code_frame_at(&mut self, la: u64) -> Option<guestmem::Gfn> {
        let user = self.cpu.s.cpl == 3;
        if let Some(gfn) = self.cpu.tlb.code_frame(la, user) {
            return Some(guestmem::Gfn(gfn));
        }
        if !x86::bits::is_canonical(la) {
            return None;
        }
        let cr2 = self.cpu.s.cr2;
        let access = Access { kind: AccessKind::Fetch, user, ac: false };
        let Ok(t) = self.cpu.walk(la, access) else {
            self.cpu.s.cr2 = cr2;
            return None;
        };
        let gfn = t.gpa.gfn();
        self.cpu.mem.page(gfn)?;
        let global = t.global && self.cpu.s.cr4 & cr4::PGE != 0;
        self.cpu.tlb.fill_code_frame(la, user, gfn.0, &t, global);
        Some(gfn)
    }

    /// What happens between instructions: requests, INIT, SIPI, NMI, interrupts (SDM 3A 6.9).
    fn boundary(&mut self) -> Option<VcpuExit> {
        let cpu = &mut self.cpu;
        if cpu.poll() {
            if cpu.signals.has(Signal::INVALIDATE) {
                cpu.serve_invalidations();
            }
            if cpu.signals.take(Signal::KICK) {
                cpu.stats.count(Cause::Kick);
                return Some(VcpuExit::Kicked);
            }
            if cpu.signals.take(Signal::INIT) {
                init(cpu);
            }
            // A start-up IPI to a processor that does not wait for one is lost (SDM 3A 8.4.4.1).
            if let Some(vector) = cpu.signals.take_sipi()
                && cpu.s.activity == Activity::WaitForSipi
            {
                sipi(cpu, vector);
            }
            if cpu.poll_mask & Signal::NMI.0 != 0 && cpu.signals.take(Signal::NMI) {
                interrupt::deliver_nmi(cpu);
            } else if cpu.poll_mask & Signal::INTERRUPT.0 != 0 && cpu.signals.has(Signal::INTERRUPT) {
                interrupt::deliver_external(cpu);
            }
        }
        match cpu.s.activity {
            Activity::Running => None,
            Activity::Shutdown => Some(VcpuExit::TripleFault),
            Activity::Halted | Activity::WaitForSipi => Some(VcpuExit::Halted),
        }
    }

    /// Executes runs of decoded instructions until something asks for attention.
    fn run_fast(&mut self, end: u64) -> Result<(), Exception> {
        match self.find_code()? {
            Code::Cached(page, number) => self.run_page(page, number, end),
            Code::Single(op) => {
                let stop = (op.run)(&mut self.cpu, &op).err();
                self.cpu.instructions += u64::from(completes(stop));
                finish(&mut self.cpu, &op, stop)
            }
        }
    }

    /// The innermost loop: instruction after instruction, jump after jump, within one page.
    fn run_page(&mut self, page: usize, number: usize, end: u64) -> Result<(), Exception> {
        let Self { cpu, cache, .. } = self;
        let Some(page) = cache.get(page) else { return Ok(()) };
        let ops = page.ops.as_slice();
        let limit = end - cpu.instructions;
        let base = cpu.gpr[usize::from(PAGE_RIP)];
        let mut executed = 0u64;
        let mut n = number;
        // INV-RUN-1: `n` is the number of an instruction; every run ends with one that stops.
        while let Some(op) = ops.get(n) {
            let Err(stop) = (op.run)(cpu, op) else {
                executed += 1;
                n += 1;
                continue;
            };
            executed += u64::from(completes(Some(stop)));
            if stop == Stop::Jump && !cpu.poll() && executed < limit {
                let offset = cpu.rip.wrapping_sub(base);
                if offset <= PAGE_MASK
                    && let Some(next) = page.at((offset & PAGE_MASK) as usize)
                    && cpu.mem.code_version(page.key.gfn) == page.version
                {
                    n = next;
                    continue;
                }
            }
            cpu.instructions += executed;
            return finish(cpu, op, Some(stop));
        }
        debug_assert!(false, "INV-RUN-1: a run ends with an instruction that stops");
        cpu.instructions += executed;
        Ok(())
    }

    /// Executes one instruction with all debug features (SDM 3B 17.3).
    fn step_carefully(&mut self) -> Result<(), Exception> {
        let tf = self.cpu.system_flag(rflags::TF);
        let rf = self.cpu.system_flag(rflags::RF);
        let shadow = self.cpu.s.shadow;
        if shadow != InterruptShadow::MovSs && self.deliver_debug_trap() {
            // The trap bit of a TSS: before the first instruction of the task.
            self.cpu.debug.note_step(self.cpu.rip);
            return Ok(());
        }
        if !rf && shadow != InterruptShadow::MovSs {
            self.instruction_breakpoint()?;
        }
        let code = self.find_code()?;
        let op = match code {
            Code::Single(op) => op,
            Code::Cached(page, number) => match self.cache.get(page).and_then(|p| p.ops.get(number)) {
                Some(op) => *op,
                None => return Ok(()),
            },
        };
        let cpu = &mut self.cpu;
        cpu.system_flags &= !rflags::RF;
        cpu.s.shadow = InterruptShadow::None;
        cpu.trap_suppressed = false;
        let stop = (op.run)(cpu, &op).err();
        if stop.is_none() {
            cpu.rip = op.next_rip(cpu);
        }
        if rf && !completes(stop) {
            cpu.system_flags |= rflags::RF;
        }
        if stop == Some(Stop::EndOfRun) {
            cpu.s.shadow = shadow;
            return Ok(());
        }
        if matches!(stop, Some(Stop::Fault(_))) {
            // The shadow belongs to an instruction that did not complete; an exception ends it.
            cpu.pending_debug = 0;
            cpu.debug.forget_access();
        }
        cpu.instructions += u64::from(completes(stop));
        finish(cpu, &op, stop)?;
        cpu.derive_poll_mask();
        if tf && !cpu.trap_suppressed {
            cpu.pending_debug |= dr::DR6_BS;
        }
        if cpu.s.shadow != InterruptShadow::MovSs {
            self.deliver_debug_trap();
        }
        self.cpu.debug.note_step(self.cpu.rip);
        Ok(())
    }

    /// Delivers #DB for the conditions that wait. True if there were any.
    fn deliver_debug_trap(&mut self) -> bool {
        let conditions = std::mem::take(&mut self.cpu.pending_debug);
        if conditions != 0 {
            self.cpu.s.dr6 |= conditions;
            interrupt::deliver_trap(&mut self.cpu, Exception::DB);
        }
        conditions != 0
    }

    /// Instruction breakpoints are faults, before the instruction (SDM 3B 17.3.1.1).
    fn instruction_breakpoint(&mut self) -> Result<(), Exception> {
        let cpu = &mut self.cpu;
        let dr7 = cpu.s.dr7;
        if dr7 & dr::DR7_ENABLES == 0 {
            return Ok(());
        }
        let la = code_address(cpu);
        let hits = (0..4u32)
            .filter(|i| dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 0)
            .filter(|&i| cpu.s.dr[i as usize] == la)
            .fold(0u64, |bits, i| bits | 1 << i);
        if hits == 0 {
            return Ok(());
        }
        cpu.s.dr6 |= hits;
        Err(Exception::DB)
    }

    /// The decoded code at RIP, decoding it if need be. Sets the page's RIP.
    fn find_code(&mut self) -> Result<Code, Exception> {
        let la = code_address(&self.cpu);
        let offset = (la & PAGE_MASK) as usize;
        let cpu = &mut self.cpu;
        cpu.gpr[usize::from(PAGE_RIP)] = cpu.rip.wrapping_sub(la & PAGE_MASK);
        if cpu.code_size == CodeSize::Bits64 {
            if !x86::bits::is_canonical(la) {
                return Err(Exception::GP0);
            }
        } else if cpu.rip.wrapping_add(PAGE_MASK - (la & PAGE_MASK)) > u64::from(cpu.s.seg[sreg::CS].limit) {
            return self.decode_single(la).map(Code::Single);
        }
        let Some(at) = self.code_page(la)? else { return self.decode_single(la).map(Code::Single) };
        let Some(page) = self.cache.get_mut(at) else { return Ok(Code::Cached(0, usize::MAX)) };
        let version = self.cpu.mem.code_version(page.key.gfn);
        if page.version != version || page.is_full() {
            page.reset(version);
        }
        if let Some(number) = page.at(offset) {
            return Ok(Code::Cached(at, number));
        }
        match decode_run(&mut self.cpu, &mut self.cache, at, offset) {
            Some(number) => Ok(Code::Cached(at, number)),
            None => self.decode_single(la).map(Code::Single),
        }
    }

    /// The number of the decoded page that holds `la`; None where there is no RAM.
    fn code_page(&mut self, la: u64) -> Result<Option<usize>, Exception> {
        let variant = if self.cpu.s.cpl == 3 { 3 } else { 0 } + self.cpu.code_size as usize;
        if let Some(at) = self.cpu.tlb.code_page(la, variant) {
            return Ok(Some(at));
        }
        let access = Access { kind: AccessKind::Fetch, user: self.cpu.s.cpl == 3, ac: false };
        let t = self.cpu.walk(la, access)?;
        let gfn = t.gpa.gfn();
        if self.cpu.mem.page(gfn).is_none() {
            return Ok(None);
        }
        if self.cache.is_full() || self.cpu.instruction_slab.len() + self.cpu.vector_slab.len() > MAX_SLABS {
            self.forget_code();
        }
        let key = PageKey { gfn, size: self.cpu.code_size };
        let at = self.cache.page(key, self.cpu.mem.code_version(gfn));
        let global = t.global && self.cpu.s.cr4 & cr4::PGE != 0;
        self.cpu.tlb.fill_code(la, variant, at, &t, global);
        Ok(Some(at))
    }

    /// Forgets all decoded code: another engine let the guest run, whose writes are not traced.
    pub fn forget_code(&mut self) {
        self.cache.clear();
        self.crossing.clear();
        self.cpu.tlb.forget_code();
        self.cpu.instruction_slab.clear();
        self.cpu.vector_slab.clear();
    }

    /// Decodes the one instruction at `la`, wherever its bytes lie.
    fn decode_single(&mut self, la: u64) -> Result<Op, Exception> {
        #[expect(clippy::cast_possible_truncation, reason = "at most a page")]
        let room = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
        let allowed = self.fetch_limit()?;
        let mut bytes = [0; MAX_LEN];
        let head = room.min(allowed).min(MAX_LEN);
        let first = self.fetch_single(la, &mut bytes[..head])?;
        let offset = (la & PAGE_MASK) as u16;
        let mut decoded = decode(&self.cpu, &bytes[..head], offset);
        let mut second = None;
        if decoded.is_none() && head == room && head < allowed.min(MAX_LEN) {
            let fetched = allowed.min(MAX_LEN);
            let next = la.wrapping_add(room as u64) & self.cpu.linear_mask;
            second = Some(self.fetch_single(next, &mut bytes[head..fetched])?);
            decoded = decode(&self.cpu, &bytes[..fetched], offset);
        }
        // Too long, or beyond the segment's limit.
        let Some(instruction) = decoded else { return Err(Exception::GP0) };
        let key = CrossingKey { first, second, offset, size: self.cpu.code_size, bytes };
        if let Some(op) = self.crossing.get(&key) {
            return Ok(*op);
        }
        if self.crossing.len() >= MAX_CROSSING {
            self.forget_code();
        }
        let built = build(&mut self.cpu, &instruction, offset);
        self.crossing.insert(key, built.op);
        Ok(built.op)
    }

    /// How many bytes from RIP lie within the code segment.
    fn fetch_limit(&self) -> Result<usize, Exception> {
        if self.cpu.code_size == CodeSize::Bits64 {
            return Ok(MAX_LEN);
        }
        let limit = u64::from(self.cpu.s.seg[sreg::CS].limit);
        if self.cpu.rip > limit {
            return Err(Exception::GP0);
        }
        #[expect(clippy::cast_possible_truncation, reason = "cut to 15")]
        let allowed = (limit - self.cpu.rip + 1).min(MAX_LEN as u64) as usize;
        Ok(allowed)
    }

    /// Reads instruction bytes within one page. The bytes are read anew each time, so no trace is needed.
    fn fetch_single(&mut self, la: u64, bytes: &mut [u8]) -> Result<Gpa, Exception> {
        let gpa = self.cpu.fetch_gpa(la)?;
        match self.cpu.mem.hva(gpa) {
            Some(hva) => self.cpu.mem.read_machine(hva, bytes),
            None => self.cpu.io.mmio_read(self.cpu.index, gpa, bytes),
        }
        Ok(gpa)
    }
}

/// Instructions that cross pages are remembered by their bytes.
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct CrossingKey {
    first: Gpa,
    second: Option<Gpa>,
    offset: u16,
    size: CodeSize,
    bytes: [u8; MAX_LEN],
}

const MAX_CROSSING: usize = 16_384;
/// Instructions in the slabs.
const MAX_SLABS: usize = 1_000_000;

/// Linear address of the next instruction.
fn code_address(cpu: &Cpu) -> u64 {
    let base = if cpu.code_size == CodeSize::Bits64 { 0 } else { cpu.s.seg[sreg::CS].base };
    base.wrapping_add(cpu.rip) & cpu.linear_mask
}

/// Whether the instruction that stopped so is complete.
const fn completes(stop: Option<Stop>) -> bool {
    !matches!(stop, Some(Stop::Fault(_) | Stop::Again | Stop::EndOfRun))
}

/// Makes RIP exact after a run stopped at `op`.
fn finish(cpu: &mut Cpu, op: &Op, stop: Option<Stop>) -> Result<(), Exception> {
    match stop {
        Some(Stop::Jump | Stop::Resync | Stop::EndOfRun) => {}
        None | Some(Stop::CodeWritten) => cpu.rip = op.next_rip(cpu),
        Some(Stop::Again) => cpu.rip = op.rip(cpu),
        Some(Stop::Fault(e)) => {
            cpu.rip = op.rip(cpu);
            cpu.code_changed |= std::mem::take(&mut cpu.code_written);
            return Err(e);
        }
    }
    if std::mem::take(&mut cpu.code_written) {
        cpu.code_changed = true;
        cpu.stats.count(Cause::CodeWrite);
    }
    Ok(())
}

/// One instruction from bytes; None if they do not suffice.
fn decode(cpu: &Cpu, bytes: &[u8], offset: u16) -> Option<Instruction> {
    let options = if cpu.model.vendor() == x86::cpuid::Vendor::Amd {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    };
    let mut decoder = Decoder::with_ip(cpu.code_size.bits(), bytes, u64::from(offset), options);
    let instruction = decoder.decode();
    // An instruction that needs a sixteenth byte shows as invalid after fifteen.
    let too_long = instruction.is_invalid() && instruction.len() >= MAX_LEN;
    (decoder.last_error() != DecoderError::NoMoreBytes && !too_long).then_some(instruction)
}

/// Decodes from `offset` to an unconditional transfer or the page's end. None if the first instruction crosses it.
fn decode_run(cpu: &mut Cpu, cache: &mut DecodeCache, at: usize, offset: usize) -> Option<usize> {
    let key = cache.get(at)?.key;
    let hva = cpu.mem.page(key.gfn)?.hva;
    let span = cpu.stats.begin(Cause::CodeDecode);
    let decoded = decode_run_at(cpu, cache, at, offset, key, hva);
    cpu.stats.end(Cause::CodeDecode, span);
    decoded
}

/// The same, of the code at `hva`.
fn decode_run_at(
    cpu: &mut Cpu,
    cache: &mut DecodeCache,
    at: usize,
    offset: usize,
    key: PageKey,
    hva: guestmem::Hva,
) -> Option<usize> {
    let first = cache.get(at)?.ops.len();
    let mut offset = offset;
    let mut count = 0;
    loop {
        let page = cache.get_mut(at)?;
        // Falling into code that is decoded already: a jump to it is cheaper than a copy.
        if count == MAX_RUN || offset >= 4096 || count > 0 && page.at(offset).is_some() {
            break;
        }
        let mut bytes = [0; MAX_LEN];
        let room = MAX_LEN.min(4096 - offset);
        cpu.trace_code(key.gfn, guestmem::trace::lines(offset, room));
        cpu.mem.read_machine(guestmem::Hva(hva.0 + offset as u64), &mut bytes[..room]);
        #[expect(clippy::cast_possible_truncation, reason = "below 4096")]
        let ip = offset as u16;
        let Some(instruction) = decode(cpu, &bytes[..room], ip) else {
            if count == 0 {
                return None;
            }
            break;
        };
        let built = build(cpu, &instruction, ip);
        cache.get_mut(at)?.push(offset, built.op);
        offset += instruction.len().max(1);
        count += 1;
        if built.ends_run {
            break;
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "at most 4096 plus an instruction")]
    let end = blank(end_of_run, offset as u16, 0);
    cache.get_mut(at)?.end_run(end);
    cache.count(count + 1);
    Some(first)
}

/// INIT (SDM 3A 9.1.1).
fn init(cpu: &mut Cpu) {
    cpu.stats.count(Cause::InitSipi);
    let mut state = cpu.save();
    state.init();
    if cpu.index == 0 {
        // The bootstrap processor starts at the reset vector instead of waiting.
        state.activity = Activity::Running;
    }
    cpu.io.apic_init(cpu.index);
    cpu.load(&state);
}

fn sipi(cpu: &mut Cpu, vector: u8) {
    cpu.stats.count(Cause::InitSipi);
    let mut state = cpu.save();
    state.sipi(vector);
    cpu.load(&state);
}
