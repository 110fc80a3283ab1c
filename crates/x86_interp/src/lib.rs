//! The interpreter: one instruction, exactly, in every mode. It is the slow path of every engine and the oracle of the
//! tests, and the only place where the meaning of a system instruction is written.
//!
//! The way of an instruction: `run::find_code` looks its page up in `decode::cache` (or decodes it: `decode::build` picks a
//! handler), `run::run_page` calls the handler. Handlers of plain instructions are in `ops`, those of system instructions in
//! `system`, x87 and SIMD in `vector`. Memory accesses go through `memory` and the `tlb`.
//!
//! Threading: an [`Interp`] belongs to its vCPU's thread; others reach it only through `engine::Signals` and
//! [`holder::VcpuHolder`].

pub mod census;
pub mod cpu;
pub mod debug;
pub mod decode;
pub mod flags;
pub mod holder;
pub mod intercept;
pub mod local;
pub mod memory;
pub mod ops;
mod run;
pub mod system;
pub mod tlb;
pub mod vector;
mod vector_cpu;

pub use engine::host_tsc;

use std::collections::HashMap;
use std::sync::Arc;

use engine::{CpuIo, ExitStats, Signals, Vcpu, VcpuExit};
use guestmem::{GuestMemory, Holder};
use x86::CpuState;
use x86::cpuid::CpuModel;

use cpu::{CodeSize, Cpu};
use decode::DecodeCache;
use ops::Op;

/// What a vCPU is made of.
pub struct Parts {
    /// This vCPU's number, 0 for the bootstrap processor.
    pub index: usize,
    /// How many vCPUs the machine has.
    pub vcpus: usize,
    /// Guest memory.
    pub mem: Arc<GuestMemory>,
    /// The machine.
    pub io: Arc<dyn CpuIo>,
    /// This vCPU's signals.
    pub signals: Arc<Signals>,
    /// What CPUID announces.
    pub model: Arc<CpuModel>,
}

/// One interpreted vCPU.
pub struct Interp {
    cpu: Cpu,
    cache: DecodeCache,
    crossing: HashMap<run::CrossingKey, Op>,
}

impl Interp {
    /// A vCPU in its reset state.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let state = CpuState::reset();
        let holder = Arc::new(holder::VcpuHolder::new(parts.index as u64, Arc::clone(&parts.signals)));
        let weak: std::sync::Weak<dyn Holder> = Arc::downgrade(&holder) as _;
        parts.mem.register(weak);
        let paging = x86::paging::Paging::new(&state, parts.model.phys_bits(), false);
        let mut cpu = Cpu {
            gpr: [0; 32],
            flags: flags::LazyFlags::from_rflags(0),
            system_flags: 2,
            rip: 0,
            start_rip: 0,
            s: state.clone(),
            seg_base: [0; 8],
            seg_fast: [0; 8],
            linear_mask: 0xffff_ffff,
            stack_mask: 0xffff,
            code_size: CodeSize::Bits16,
            variant: 0,
            paging,
            poll_mask: 0,
            tlb: tlb::Tlb::default(),
            mem: parts.mem,
            io: parts.io,
            signals: parts.signals,
            holder,
            model: parts.model,
            index: parts.index,
            vcpus: parts.vcpus,
            stats: ExitStats::measuring(),
            instructions: 0,
            intercepts: intercept::Intercepts,
            ext: 0,
            code_written: false,
            code_changed: false,
            fpu_touched: true,
            cpuid_changed: true,
            trap_suppressed: false,
            pending_debug: 0,
            debug: debug::DebugState::default(),
            instruction_slab: Vec::new(),
            vector_slab: Vec::new(),
            kvmclock_version: 0,
            census: None,
            last_steps: 0,
        };
        cpu.load(&state);
        Self { cpu, cache: DecodeCache::default(), crossing: HashMap::new() }
    }

    /// Keeps the decoded code of at most so many pages.
    pub const fn limit_decoded_pages(&mut self, pages: usize) {
        self.cache.limit(pages);
    }

    /// Counts from now on what a hypervisor on hardware would have to do: see [`census`].
    pub fn take_census(&mut self) {
        self.cpu.census = Some(Box::default());
    }

    /// The vCPU's insides, for tests and tools.
    pub const fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

impl Vcpu for Interp {
    fn run(&mut self, budget: u64) -> VcpuExit {
        self.cpu.holder.enter();
        self.cpu.serve_invalidations();
        let exit = self.run_guest(budget);
        self.cpu.holder.leave();
        exit
    }

    fn save(&mut self) -> CpuState {
        self.cpu.save()
    }

    fn restore(&mut self, state: &CpuState) {
        self.cpu.load(state);
    }

    fn set_debug(&mut self, debug: &engine::Debug) {
        self.cpu.set_debug(debug);
    }

    fn wake_mask(&self) -> u32 {
        self.cpu.poll_mask
    }

    fn instructions(&self) -> u64 {
        self.cpu.instructions
    }

    fn stats(&self) -> &ExitStats {
        &self.cpu.stats
    }

    fn report(&self) -> engine::Report {
        let mut report = engine::Report::default();
        if let Some(census) = &self.cpu.census {
            census.report(&mut report);
        }
        report
    }
}
