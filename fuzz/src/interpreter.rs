//! A vCPU in a random state runs random bytes over random tables: it stops, and says why.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::io::GeneralProtection;
use engine::{CpuIo, Signals, Vcpu, VcpuExit};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86::{Attr, CpuState, Segment, TableRegister};
use x86_interp::{Interp, Parts};

use crate::input::Input;

const MEMORY: u64 = 1 << 20;
/// Instructions of one run.
const BUDGET: u64 = 400;
/// Runs of one input.
const RUNS: usize = 4;

/// A mode of the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    V86,
    /// Protected mode, 16-bit code.
    Protected16,
    /// Protected mode, 32-bit code.
    Protected32,
    /// Protected mode with 32-bit paging.
    Paged32,
    /// Protected mode with PAE paging.
    Pae,
    /// Compatibility mode.
    Compatibility,
    /// 64-bit mode.
    Long,
}

/// All of them.
pub const MODES: [Mode; 8] = [
    Mode::Real,
    Mode::V86,
    Mode::Protected16,
    Mode::Protected32,
    Mode::Paged32,
    Mode::Pae,
    Mode::Compatibility,
    Mode::Long,
];

impl Mode {
    /// Default operand size as the decoder is told.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Real | Self::V86 | Self::Protected16 => 16,
            Self::Protected32 | Self::Paged32 | Self::Pae | Self::Compatibility => 32,
            Self::Long => 64,
        }
    }

    const fn is_long(self) -> bool {
        matches!(self, Self::Long | Self::Compatibility)
    }
}

/// No devices. A string instruction may make 2³² accesses to them as one instruction, and stops only for signals: every
/// so often this gives one.
struct Nothing {
    signals: Arc<Signals>,
    accesses: AtomicU32,
}

/// Accesses between two kicks.
const PATIENCE: u32 = 5_000;

impl Nothing {
    fn access(&self) {
        if self.accesses.fetch_add(1, Ordering::Relaxed) % PATIENCE == PATIENCE - 1 {
            self.signals.raise(engine::signals::Signal::KICK);
        }
    }
}

impl CpuIo for Nothing {
    fn port_in(&self, _: usize, _: u16, _: u8) -> u32 {
        self.access();
        u32::MAX
    }
    fn port_out(&self, _: usize, _: u16, _: u8, _: u32) {
        self.access();
    }
    fn mmio_read(&self, _: usize, _: Gpa, data: &mut [u8]) {
        self.access();
        data.fill(0xff);
    }
    fn mmio_write(&self, _: usize, _: Gpa, _: &[u8]) {
        self.access();
    }
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        Some(0x21)
    }
    fn cr8(&self, _: usize) -> u64 {
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, _: usize, _: u32) -> Result<u64, GeneralProtection> {
        Ok(0xfee0_0900)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        1
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    fn system_time_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
    fn tsc_offset_changed(&self, _: usize, _: u64) {}
    fn apic_init(&self, _: usize) {}
}

/// A vCPU with memory and no devices.
pub struct Machine {
    /// Its memory.
    pub mem: Arc<GuestMemory>,
    /// The vCPU.
    pub vcpu: Interp,
    signals: Arc<Signals>,
}

impl Machine {
    /// In reset.
    #[must_use]
    pub fn new() -> Self {
        let mem = GuestMemory::new(MEMORY).expect("1 MiB of memory");
        let signals = Arc::new(Signals::default());
        let vcpu = Interp::new(Parts {
            index: 0,
            vcpus: 1,
            mem: Arc::clone(&mem),
            io: Arc::new(Nothing { signals: Arc::clone(&signals), accesses: AtomicU32::new(0) }),
            signals: Arc::clone(&signals),
            model: Arc::new(CpuModel::parse("max").expect("the host's own model")),
        });
        Self { mem, vcpu, signals }
    }

    /// Into a plain state of `mode`.
    pub fn enter(&mut self, mode: Mode) {
        self.vcpu.restore(&plain(mode));
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers of `mode`; flat segments, tables in low memory.
fn plain(mode: Mode) -> CpuState {
    let mut s = CpuState::reset();
    let real = matches!(mode, Mode::Real | Mode::V86);
    let (data, code) = match mode {
        Mode::Real => (0x93, 0x9b),
        Mode::V86 => (0xf3, 0xf3),
        Mode::Protected16 => (0x93, 0x9b),
        Mode::Long => (0xc093, 0xa09b),
        _ => (0xc093, 0xc09b),
    };
    let limit = if real { 0xffff } else { u32::MAX };
    s.seg = [Segment { selector: 0x10, base: 0, limit, attr: Attr(data) }; 6];
    s.seg[1] = Segment { selector: 8, base: 0, limit, attr: Attr(code) };
    s.tr = Segment { selector: 0x28, base: 0x5000, limit: 0x67, attr: Attr(0x8b) };
    s.gdtr = TableRegister { base: 0x4000, limit: 0xff };
    s.idtr = TableRegister { base: if real { 0 } else { 0x6000 }, limit: 0x7ff };
    s.cr0 = if mode == Mode::Real { 0x10 } else { 0x31 };
    s.cr4 = 0x0004_0600;
    s.xcr0 = 7;
    match mode {
        Mode::Paged32 => s.cr0 |= 1 << 31,
        Mode::Pae => {
            s.cr0 |= 1 << 31;
            s.cr4 |= 1 << 5;
        }
        _ if mode.is_long() => {
            s.cr0 |= 1 << 31;
            s.cr4 |= 1 << 5;
            s.msr.efer = 0xd01;
        }
        _ => {}
    }
    s.cr3 = 0x1000;
    if mode == Mode::V86 {
        s.rflags |= 1 << 17;
        s.cpl = 3;
    }
    s.rip = 0x8000;
    s.gpr[4] = 0xf000;
    s
}

/// Makes the state and memory of the input.
fn scatter(input: &mut Input<'_>, machine: &mut Machine) {
    let mode = MODES[usize::from(input.byte()) % MODES.len()];
    let mut s = plain(mode);
    for (n, value) in s.gpr.iter_mut().enumerate() {
        if n != 4 {
            *value = input.number();
        }
        if !mode.is_long() {
            *value &= 0xffff_ffff;
        }
    }
    let flags = input.half();
    s.rflags |= u64::from(flags & 0x0fd5);
    let twists = input.byte();
    if twists & 1 != 0 && matches!(mode, Mode::Protected32 | Mode::Paged32 | Mode::Pae | Mode::Long) {
        s.cpl = 3;
        for seg in &mut s.seg {
            seg.attr.0 |= 3 << 5;
            seg.selector |= 3;
        }
    }
    if twists & 2 != 0 {
        s.dr7 |= u64::from(input.half());
        s.dr = std::array::from_fn(|_| 0x8000 + u64::from(input.byte()));
    }
    if twists & 4 != 0 {
        let n = usize::from(input.below(6));
        s.seg[n].limit = u32::from(input.half());
        s.seg[n].base = u64::from(input.half()) << 4;
    }
    if twists & 8 != 0 {
        s.rflags |= 1 << 8;
    }
    if twists & 16 != 0 {
        s.gpr[4] = if mode.is_long() { input.number() } else { input.number() & 0xffff_ffff };
    }
    lay_memory(input, machine, mode);
    machine.vcpu.restore(&s);
}

/// Page tables of the first MiB (with some entries spoilt), tables of nonsense, code from the input.
fn lay_memory(input: &mut Input<'_>, machine: &Machine, mode: Mode) {
    let put = |at: u64, bytes: &[u8]| machine.mem.write(Gpa(at), bytes).expect("within memory");
    let mut noise = vec![0u8; 0x8000];
    let mut seed = input.word() | 1;
    for chunk in noise.chunks_mut(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        chunk.copy_from_slice(&seed.to_le_bytes());
    }
    put(0, &noise);
    let wide = mode != Mode::Paged32;
    let entry =
        |value: u64| if wide { value.to_le_bytes().to_vec() } else { value.to_le_bytes()[..4].to_vec() };
    put(
        0x1000,
        &entry(if mode == Mode::Pae {
            0x2001
        } else if wide {
            0x2007
        } else {
            0x3007
        }),
    );
    put(0x2000, &entry(0x3007));
    if mode.is_long() {
        put(0x3000, &entry(0x87));
    } else if wide {
        // PAE: PDPT at 1000H, directory at 2000H, a 2-MiB page.
        put(0x2000, &entry(0x87));
    } else {
        for n in 0..256 {
            put(0x3000 + 4 * n, &entry(n << 12 | 7));
        }
    }
    // Gates that lead back to the code.
    for n in 0..32u64 {
        let gate: u64 = 0x8000 | 8 << 16 | 0x8e << 40;
        put(0x6000 + n * if mode.is_long() { 16 } else { 8 }, &gate.to_le_bytes());
        if mode.is_long() {
            put(0x6008 + n * 16, &[0; 8]);
        }
    }
    put(
        0x4008,
        &(if mode == Mode::Long { 0x00af_9b00_0000_ffffu64 } else { 0x00cf_9b00_0000_ffff }).to_le_bytes(),
    );
    put(0x4010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    let mut code = [0u8; 256];
    input.fill(&mut code);
    put(0x8000, &code);
}

/// Runs the input for a bounded number of instructions, with an event now and then.
pub fn target(data: &[u8]) {
    thread_local! {
        static MACHINE: std::cell::RefCell<Machine> = std::cell::RefCell::new(Machine::new());
    }
    MACHINE.with_borrow_mut(|machine| {
        let mut input = Input::new(data);
        scatter(&mut input, machine);
        for _ in 0..RUNS {
            let before = machine.vcpu.instructions();
            let exit = machine.vcpu.run(BUDGET);
            let done = machine.vcpu.instructions() - before;
            assert!(done <= 2 * BUDGET + 0x1_0000, "{done} instructions for a budget of {BUDGET}");
            match exit {
                VcpuExit::TripleFault => return,
                VcpuExit::Halted => machine.signals.raise(engine::signals::Signal::NMI),
                _ => {}
            }
            // A saved state can be taken on again.
            let state = machine.vcpu.save();
            machine.vcpu.restore(&state);
            assert!(machine.vcpu.save() == state, "save and restore change the state");
        }
    });
}
