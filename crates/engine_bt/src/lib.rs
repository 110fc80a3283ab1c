//! Runs fragments: the dispatcher of the binary translator.
//!
//! The way of a vCPU: [`BtVcpu::run`] asks the interpreter what waits between instructions, looks up the fragment at RIP, enters it
//! (`exec`), and acts on where it left. Cold code, other modes and whatever the translator does not know is interpreted: the
//! interpreter's `Cpu` is the vCPU; while fragments run its general registers and flags are in host registers and the frame.
//!
//! State: one vCPU only so far. Guest FP and SIMD instructions call out. Fragments carry their page's RIP.

#![expect(clippy::cast_possible_truncation, reason = "numbers of sites and links are bounded by code memory")]

mod code_memory;
mod exec;
mod tables;

use std::collections::HashMap;
use std::sync::Arc;

use bt::{Facts, Site, frame};
use code_memory::CodeMemory;
use engine::{ExitStats, Vcpu, VcpuExit};
use exec::{Callouts, Frame};
use guestmem::{Gfn, Hva};
use tables::Tables;
use x86::CpuState;
use x86::bits::rflags;
use x86::cpuid::{Gate, Vendor};
use x86::paging::{Access, AccessKind};
use x86::state::{Activity, sreg};
use x86_interp::cpu::CodeSize;
use x86_interp::flags::LazyFlags;
use x86_interp::memory::Target;
use x86_interp::{Interp, Parts};

/// Bytes of code memory.
const CODE_BYTES: usize = 64 << 20;
/// Times that code is interpreted before it is translated.
const WARM: u16 = 20;
const HEAT_ENTRIES: usize = 1 << 14;

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct BtStats {
    /// Fragments made.
    pub fragments: u64,
    /// Guest instructions translated.
    pub translated: u64,
    /// Entries from the dispatcher.
    pub entries: u64,
    /// Instructions executed by the interpreter for a fragment.
    pub callouts: u64,
    /// TLB entries filled.
    pub fills: u64,
    /// Blocks interpreted.
    pub blocks: u64,
    /// Times everything was forgotten.
    pub flushes: u64,
    /// Pages whose fragments were dropped because their code changed.
    pub dropped_pages: u64,
    /// Links made.
    pub links: u64,
}

/// A fragment: where its code is, and the frame it was made from.
#[derive(Clone, Copy)]
struct Entry {
    at: usize,
    gfn: Gfn,
}

/// The fragments made from one frame of guest memory, under any address.
#[derive(Default)]
struct PageCode {
    version: u32,
    keys: Vec<Key>,
}

/// RIP, and whether it is user code.
type Key = (u64, bool);

#[derive(Clone, Copy)]
struct Link {
    place: usize,
    target: u64,
    page_rip: u64,
    user: bool,
}

/// A vCPU that runs translated code.
pub struct BtVcpu {
    interp: Interp,
    frame: Frame,
    tables: Tables,
    code: CodeMemory,
    fragments: HashMap<Key, Entry>,
    pages: HashMap<Gfn, PageCode>,
    interrupts_seen: u64,
    sites: Vec<Site>,
    links: Vec<Link>,
    heat: Vec<u16>,
    unit_limit: usize,
    amd: bool,
    /// Counters.
    pub bt: BtStats,
}

impl BtVcpu {
    /// A vCPU in its reset state.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn new(parts: Parts) -> rustix::io::Result<Self> {
        let frame = Frame::new()?;
        let signals = Arc::clone(&parts.signals);
        frame.set(frame::SIGNALS, signals.address());
        let amd = parts.model.vendor() == Vendor::Amd;
        let mut interp = Interp::new(parts);
        interp.cpu().tlb.events = Some(Vec::new());
        // A stress knob: units of one instruction bisect a wrong translation.
        let unit_limit = std::env::var("TRELLIS_BT_UNIT").ok().and_then(|s| s.parse().ok());
        Ok(Self {
            interp,
            frame,
            tables: Tables::new(frame),
            code: CodeMemory::new(CODE_BYTES)?,
            fragments: HashMap::new(),
            pages: HashMap::new(),
            interrupts_seen: 0,
            sites: Vec::new(),
            links: Vec::new(),
            heat: vec![0; HEAT_ENTRIES],
            unit_limit: unit_limit.unwrap_or(bt::unit::MAX_INSTRUCTIONS),
            amd,
            bt: BtStats::default(),
        })
    }

    fn run_loop(&mut self) -> VcpuExit {
        loop {
            if let Some(exit) = self.interp.attend() {
                self.absorb();
                return exit;
            }
            self.absorb();
            self.notice_dma();
            if !self.eligible() {
                self.block();
                continue;
            }
            match self.find() {
                Some(at) => self.enter(at),
                None => self.block(),
            }
        }
    }

    /// A device that wrote code tells so by an interrupt, so after one all versions are compared.
    fn notice_dma(&mut self) {
        let interrupts = self.interp.stats().get(engine::Cause::Interrupt);
        if interrupts != self.interrupts_seen {
            self.interrupts_seen = interrupts;
            self.drop_stale();
        }
    }

    /// Whether the code at RIP may be translated: 64-bit, with plain memory accesses.
    fn eligible(&mut self) -> bool {
        let cpu = self.interp.cpu();
        cpu.code_size == CodeSize::Bits64
            && cpu.variant != 1
            && !cpu.careful()
            && !cpu.alignment_checked()
            && cpu.s.activity == Activity::Running
    }

    fn block(&mut self) {
        self.bt.blocks += 1;
        self.interp.run_block();
        self.absorb();
    }

    /// Takes over what the interpreter did to translations.
    fn apply_events(&mut self) {
        if let Some(events) = &mut self.interp.cpu().tlb.events {
            for event in events.drain(..) {
                self.tables.apply(event);
            }
        }
    }

    /// Takes over what the interpreter did to translations and code.
    fn absorb(&mut self) {
        self.apply_events();
        if std::mem::take(&mut self.interp.cpu().code_changed) {
            self.drop_stale();
        }
    }

    /// Forgets fragments of pages whose code changed. Links never leave a page, so nothing leads to them any more.
    fn drop_stale(&mut self) {
        let mem = Arc::clone(&self.interp.cpu().mem);
        let stale: Vec<Gfn> = self
            .pages
            .iter()
            .filter(|(gfn, p)| mem.code_version(**gfn) != p.version)
            .map(|(gfn, _)| *gfn)
            .collect();
        for gfn in stale {
            self.drop_page(gfn);
        }
    }

    fn drop_page(&mut self, gfn: Gfn) {
        self.bt.dropped_pages += 1;
        for key in self.pages.remove(&gfn).map(|p| p.keys).unwrap_or_default() {
            if self.fragments.get(&key).is_some_and(|e| e.gfn == gfn) {
                self.fragments.remove(&key);
            }
            self.tables.forget_jumps_in(key.0 & !0xfff);
        }
    }

    fn flush_code(&mut self) {
        self.bt.flushes += 1;
        self.fragments.clear();
        self.pages.clear();
        self.sites.clear();
        self.links.clear();
        self.code.clear();
        self.tables.forget_jumps();
    }

    /// The fragment at RIP, translated if the place is warm.
    fn find(&mut self) -> Option<usize> {
        let gfn = self.interp.code_frame()?;
        let cpu = self.interp.cpu();
        let key = (cpu.rip, cpu.s.cpl == 3);
        let version = cpu.mem.code_version(gfn);
        if self.pages.get(&gfn).is_some_and(|p| p.version != version) {
            self.drop_page(gfn);
        }
        match self.fragments.get(&key) {
            Some(e) if e.gfn == gfn => return Some(e.at),
            // Another page is mapped at this address now; the other one's fragments may come back with it.
            Some(_) => {
                self.fragments.remove(&key);
            }
            None => {}
        }
        let slot = ((key.0 ^ key.0 >> 14) as usize) & (HEAT_ENTRIES - 1);
        self.heat[slot] = self.heat[slot].saturating_add(1);
        if self.heat[slot] < WARM {
            return None;
        }
        self.translate(key, gfn)
    }

    fn translate(&mut self, key: (u64, bool), gfn: Gfn) -> Option<usize> {
        let (rip, user) = key;
        let cpu = self.interp.cpu();
        let offset = (rip & 0xfff) as usize;
        let version = cpu.mem.code_version(gfn);
        let hva = cpu.mem.page(gfn)?.hva;
        let mut page = [0; 4096];
        cpu.mem.read_machine(hva, &mut page);
        let unit = bt::unit::form(&page, offset, self.unit_limit, self.amd);
        if unit.instructions.is_empty() {
            return None;
        }
        let facts = Facts { page_rip: rip & !0xfff, user, amd: self.amd, limit: self.unit_limit };
        let model = Arc::clone(&cpu.model);
        let announced = |i: &_| model.gate(i) == Gate::Announced;
        let bases = (self.sites.len() as u32, self.links.len() as u32);
        let fragment = bt::translate(&unit, &page, facts, bases.0, bases.1, &announced);
        // The bytes are traced only now that it is known which; if they changed meanwhile, another time.
        let cpu = self.interp.cpu();
        cpu.trace_code(gfn, fragment.lines);
        let mut again = [0; 4096];
        cpu.mem.read_machine(hva, &mut again);
        if again != page || cpu.mem.code_version(gfn) != version {
            return None;
        }
        let Some(at) = self.code.add(&fragment.code) else {
            self.flush_code();
            return None;
        };
        self.bt.fragments += 1;
        self.bt.translated += fragment.guest_instructions as u64;
        self.sites.extend(&fragment.sites);
        let page_rip = facts.page_rip;
        self.links.extend(fragment.exits.iter().map(|e| Link {
            place: at + e.place,
            target: e.target,
            page_rip,
            user,
        }));
        self.fragments.insert(key, Entry { at, gfn });
        let page_code = self.pages.entry(gfn).or_insert_with(|| PageCode { version, keys: Vec::new() });
        page_code.keys.push(key);
        self.absorb();
        Some(at)
    }

    fn enter(&mut self, at: usize) {
        self.bt.entries += 1;
        let code = self.code.address(at);
        let rip = self.interp.cpu().rip;
        self.tables.set_jump(rip, code);
        self.fill_frame();
        self.frame.set32(frame::EXIT, 0);
        let frame = self.frame;
        #[expect(unsafe_code, reason = "runs translated code")]
        // SAFETY: `at` is the entry of a fragment in our code memory, which is only linked while no fragment runs.
        unsafe {
            frame.enter(code, self)
        };
        self.read_frame();
        let exit = self.frame.get32(frame::EXIT);
        if exit != 0 {
            self.link(exit as usize - 1);
        }
    }

    /// Links a direct exit to its target in the same page, if that is translated.
    fn link(&mut self, number: usize) {
        let Some(&link) = self.links.get(number) else { return };
        let cpu = self.interp.cpu();
        if cpu.rip != link.target || (cpu.s.cpl == 3) != link.user || !self.eligible() {
            return;
        }
        if let Some(target) = self.find()
            && self
                .links
                .get(number)
                .is_some_and(|l| l.place == link.place && l.page_rip == link.target & !0xfff)
        {
            self.bt.links += 1;
            self.code.link(link.place, target);
        }
    }

    // ---- state in and out of the frame --------------------------------------------------------------------------

    fn fill_frame(&mut self) {
        let cpu = self.interp.cpu();
        for i in 0..16 {
            self.frame.set(frame::GPR + 8 * i, cpu.gpr[i as usize]);
        }
        let f = cpu.flags.to_rflags();
        let flags = (f & 0xd5 | 2) << 8 | (f >> 11 & 1);
        // SITE shares the eight bytes; it is written before each use.
        self.frame.set(frame::FLAGS, flags);
        self.frame.set(frame::RIP, cpu.rip);
        self.frame.set32(frame::POLL_MASK, cpu.poll_mask);
        self.frame.set(frame::FS_BASE, cpu.s.seg[sreg::FS].base);
        self.frame.set(frame::GS_BASE, cpu.s.seg[sreg::GS].base);
    }

    fn read_registers(&mut self) {
        let cpu = self.interp.cpu();
        for i in 0..16 {
            cpu.gpr[i as usize] = self.frame.get(frame::GPR + 8 * i);
        }
        let f = u64::from(self.frame.get32(frame::FLAGS));
        let of = if f & 1 != 0 { rflags::OF } else { 0 };
        cpu.flags = LazyFlags::from_rflags(f >> 8 & 0xd5 | of);
    }

    fn read_frame(&mut self) {
        self.read_registers();
        self.interp.cpu().rip = self.frame.get(frame::RIP);
    }

    /// The interpreter does the instruction of a site. True if translated code may go on behind it.
    fn interpret(&mut self, site: Site) -> bool {
        self.bt.callouts += 1;
        self.read_registers();
        let cpu = self.interp.cpu();
        cpu.rip = site.rip;
        let before = (cpu.s.cpl, cpu.variant, cpu.code_size);
        self.interp.step();
        let cpu = self.interp.cpu();
        let same = cpu.rip == site.next
            && before == (cpu.s.cpl, cpu.variant, cpu.code_size)
            && !cpu.code_changed
            && !cpu.careful()
            && !cpu.poll()
            && cpu.s.activity == Activity::Running;
        // Translations may have changed under the fragment's feet; its own code has not.
        self.apply_events();
        self.fill_frame();
        same && self.tables.jumps_intact()
    }
}

impl Callouts for BtVcpu {
    fn slow(&mut self, site: u32) -> u64 {
        let Some(&site) = self.sites.get(site as usize) else { return 2 };
        let la = self.frame.get(frame::ADDRESS);
        if self.fill(la, site) {
            return 0;
        }
        if self.interpret(site) { 1 } else { 2 }
    }

    fn callout(&mut self, site: u32) -> u64 {
        let Some(&site) = self.sites.get(site as usize) else { return 1 };
        u64::from(!self.interpret(site))
    }
}

impl BtVcpu {
    /// Fills the TLB for an access within a page of plain RAM.
    fn fill(&mut self, la: u64, site: Site) -> bool {
        let cpu = self.interp.cpu();
        if la & 0xfff > 4096 - site.size as u64 || !x86::bits::is_canonical(la) {
            return false;
        }
        let kind = if site.write { AccessKind::Write } else { AccessKind::Read };
        let access = Access { kind, ..cpu.data_access(kind) };
        let Ok(Target::Ram(hva, gpa)) = cpu.resolve(la, access) else { return false };
        let gfn = gpa.gfn();
        if site.write && cpu.mem.is_traced(gfn) {
            return false;
        }
        let page_la = la & !0xfff;
        let host = cpu.mem.host_base() as u64 + Hva(hva.0 & !0xfff).0;
        let user = cpu.s.cpl == 3;
        // The interpreter's entry says whether writes are fine too.
        let entry = cpu.tlb.entry(la, cpu.variant);
        let writable = site.write || entry.write_tag == cpu.tlb.fill_tag(la);
        self.bt.fills += 1;
        self.tables.fill(page_la, user, writable, host, gfn.0);
        true
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self, _budget: u64) -> VcpuExit {
        let holder = Arc::clone(&self.interp.cpu().holder);
        holder.enter();
        self.interp.cpu().serve_invalidations();
        let exit = self.run_loop();
        holder.leave();
        exit
    }

    fn save(&mut self) -> CpuState {
        self.interp.save()
    }

    fn restore(&mut self, state: &CpuState) {
        self.interp.restore(state);
        self.flush_code();
        self.absorb();
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
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        tracing::debug!(stats = ?self.bt, code_bytes = self.code.used(), "binary translator");
        self.frame.free();
    }
}
