//! Runs a case on the host CPU, inside this process.
//!
//! The way in and out is the kernel's own: INT3 raises SIGTRAP, the handler exchanges the whole register state in the
//! signal frame (general registers, RFLAGS, CS, XSAVE area) for the case's, and returning from the signal loads it. The
//! case ends with a fault or INT3; the handler takes the state out of that frame and puts the host's back. So no
//! register is reserved, and 32-bit code runs by another CS selector.
//!
//! INV-NAT-1: one case runs at a time ([`Native`] is made once, under a lock), on the thread that called [`Native::run`].

#![expect(unsafe_code, reason = "executes generated code and exchanges register state in signal frames")]

use std::arch::{asm, naked_asm};
use std::ptr::{null_mut, slice_from_raw_parts_mut};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use crate::state::{
    AREA, CODE, CODE_BYTES, DATA, DATA_BYTES, Mode, Outcome, READ_ONLY_BYTES, Registers, component_mask,
    components, normalise,
};

/// Signals that a case can end with.
const SIGNALS: [c_int; 5] = [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP];
/// Where the signal frame keeps each general register, in encoding order.
const SLOTS: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];
/// Legacy bytes that may be loaded; the kernel keeps its own words behind them.
const LEGACY: usize = 416;
const FRAME_AREA: usize = 16384;

const IDLE: u32 = 0;
const ENTER: u32 = 1;
const RUNNING: u32 = 2;

static PHASE: AtomicU32 = AtomicU32::new(IDLE);
static EXCHANGE: AtomicPtr<Exchange> = AtomicPtr::new(null_mut());
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What the handler and [`Native::run`] pass each other.
struct Exchange {
    regs: Registers,
    cs: u16,
    host_gregs: [i64; 23],
    host_area: Box<[u8; FRAME_AREA]>,
    components: Vec<(u32, usize, usize)>,
    mask: u64,
    trap: u64,
    error: u64,
    cr2: u64,
}

/// The mapped memory and installed handlers.
pub struct Native {
    alias: *mut u8,
    exchange: Box<Exchange>,
    _lock: MutexGuard<'static, ()>,
}

fn map(at: u64, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut u8 {
    let hint = std::ptr::with_exposed_provenance_mut::<c_void>(at as usize);
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: a new mapping; MAP_FIXED_NOREPLACE never replaces one.
    let p = unsafe { libc::mmap(hint, len, prot, flags | fixed | libc::MAP_POPULATE, fd, offset) };
    assert!(p != libc::MAP_FAILED && (at == 0 || p == hint), "cannot map {len:#x} bytes at {at:#x}");
    p.cast()
}

impl Native {
    /// Maps code and data and installs the handlers for the life of the process.
    pub fn new() -> Self {
        let lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        static ALIAS: AtomicPtr<u8> = AtomicPtr::new(null_mut());
        if ALIAS.load(Ordering::Relaxed).is_null() {
            ALIAS.store(map_all(), Ordering::Relaxed);
            install_handlers();
        }
        install_stack_and_segments();
        let exchange = Box::new(Exchange {
            regs: Registers { gpr: [0; 16], rip: 0, rflags: 0, fpu: Box::new([0; AREA]) },
            cs: 0,
            host_gregs: [0; 23],
            host_area: Box::new([0; FRAME_AREA]),
            components: components(),
            mask: component_mask(),
            trap: 0,
            error: 0,
            cr2: 0,
        });
        Self { alias: ALIAS.load(Ordering::Relaxed), exchange, _lock: lock }
    }

    /// Runs `code` (all of the code pages) on `data` from `regs` until it traps.
    pub fn run(
        &mut self,
        mode: Mode,
        regs: &Registers,
        code: &[u8],
        data: &[u8],
        read_only: &[u8],
    ) -> Outcome {
        assert_eq!((code.len(), data.len(), read_only.len()), (CODE_BYTES, DATA_BYTES, READ_ONLY_BYTES));
        let memory = std::ptr::with_exposed_provenance_mut::<u8>(DATA as usize);
        // SAFETY: `map_all` mapped these bytes writable; nothing holds a reference into them.
        unsafe {
            self.alias.copy_from_nonoverlapping(code.as_ptr(), CODE_BYTES);
            self.alias.add(CODE_BYTES).copy_from_nonoverlapping(read_only.as_ptr(), READ_ONLY_BYTES);
            memory.copy_from_nonoverlapping(data.as_ptr(), DATA_BYTES);
        }
        self.exchange.regs = regs.clone();
        self.exchange.cs = mode.cs();
        EXCHANGE.store(&raw mut *self.exchange, Ordering::Release);
        PHASE.store(ENTER, Ordering::Release);
        // SAFETY: the handler runs the case and puts every register back as it was here (INV-NAT-1). The case can
        // write only what its registers and memory point to: its own data, for they hold no host address.
        // RFLAGS.NT and ID are not in the signal frame's power, so they are cleared before.
        unsafe { asm!("pushfq", "and dword ptr [rsp], 0xffdfbfff", "popfq", "int3") };
        assert_eq!(PHASE.load(Ordering::Acquire), IDLE, "the case did not end");
        EXCHANGE.store(null_mut(), Ordering::Release);
        let x = &mut *self.exchange;
        normalise(&mut x.regs.fpu, mode);
        let mut after = vec![0; DATA_BYTES];
        // SAFETY: as above.
        unsafe { memory.copy_to_nonoverlapping(after.as_mut_ptr(), DATA_BYTES) };
        let cr2 = if x.trap == 14 { x.cr2 } else { 0 };
        Outcome { regs: x.regs.clone(), vector: x.trap as u8, error: x.error, cr2, data: after }
    }
}

/// Maps the regions; the writable alias of the code and the read-only data is returned.
fn map_all() -> *mut u8 {
    // SAFETY: makes a file descriptor.
    let fd = unsafe { libc::memfd_create(c"differential".as_ptr(), 0) };
    assert!(fd >= 0, "cannot create a memory file");
    let len = CODE_BYTES + READ_ONLY_BYTES;
    // SAFETY: `fd` is ours.
    assert_eq!(unsafe { libc::ftruncate(fd, len as i64) }, 0);
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let alias = map(0, len, rw, libc::MAP_SHARED, fd, 0);
    map(CODE, CODE_BYTES, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd, 0);
    map(DATA, DATA_BYTES, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    let read_only = DATA + DATA_BYTES as u64;
    map(read_only, READ_ONLY_BYTES, libc::PROT_READ, libc::MAP_SHARED, fd, CODE_BYTES as i64);
    alias
}

fn install_handlers() {
    for signal in SIGNALS {
        // SAFETY: a zeroed sigaction is a valid value; the handler has the right signature and only touches the frame
        // and the exchange.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = entry as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(signal, &raw const action, null_mut()), 0);
        }
    }
}

/// Per thread: an alternate stack (the case's RSP is anything), and DS and ES as 32-bit programs have them.
fn install_stack_and_segments() {
    const STACK: usize = 256 << 10;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let stack = map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, private, -1, 0);
    let s = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: STACK };
    // SAFETY: the memory is never unmapped. 0x2b is Linux's flat user data segment; 64-bit code ignores DS and ES.
    unsafe {
        assert_eq!(libc::sigaltstack(&raw const s, null_mut()), 0);
        asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) 0x2b);
    }
}

/// The kernel leaves RFLAGS.AC to the handler: alignment checks would kill it.
#[unsafe(naked)]
extern "C" fn entry() {
    naked_asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq", "jmp {h}", h = sym handler)
}

extern "C" fn handler(signal: c_int, _info: *mut siginfo_t, context: *mut c_void) {
    let x = EXCHANGE.load(Ordering::Acquire);
    let phase = PHASE.load(Ordering::Acquire);
    if x.is_null() || phase == IDLE {
        // Not ours: let it happen again, with the default effect.
        // SAFETY: async-signal-safe.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: `run` waits inside its INT3 while the phase is not IDLE, so nothing else uses the exchange; the kernel gives
    // a valid frame, whose XSAVE area is as long as its software words say.
    unsafe {
        let context = &mut *context.cast::<ucontext_t>();
        let gregs = &mut context.uc_mcontext.gregs;
        let area: *mut u8 = context.uc_mcontext.fpregs.cast();
        let len = area.add(464 + 16).cast::<u32>().read_unaligned() as usize;
        let len = len.clamp(512, FRAME_AREA);
        let area = &mut *slice_from_raw_parts_mut(area, len);
        if phase == ENTER {
            enter(&mut *x, gregs, area);
            PHASE.store(RUNNING, Ordering::Release);
        } else {
            leave(&mut *x, gregs, area);
            PHASE.store(IDLE, Ordering::Release);
        }
    }
}

fn slot(register: c_int) -> usize {
    register as usize
}

fn enter(x: &mut Exchange, gregs: &mut [i64; 23], area: &mut [u8]) {
    x.host_gregs = *gregs;
    x.host_area[..area.len()].copy_from_slice(area);
    for (value, register) in x.regs.gpr.iter().zip(SLOTS) {
        gregs[slot(register)] = value.cast_signed();
    }
    gregs[slot(libc::REG_RIP)] = x.regs.rip.cast_signed();
    gregs[slot(libc::REG_EFL)] = x.regs.rflags.cast_signed();
    let selectors = &mut gregs[slot(libc::REG_CSGSFS)];
    *selectors = *selectors & !0xffff | i64::from(x.cs);
    let fpu = &x.regs.fpu;
    area[..28].copy_from_slice(&fpu[..28]);
    area[32..LEGACY].copy_from_slice(&fpu[32..LEGACY]);
    for &(_, at, len) in &x.components {
        area[at..at + len].copy_from_slice(&fpu[at..at + len]);
    }
    let bv = u64::from_le_bytes(std::array::from_fn(|i| area[512 + i])) | x.mask;
    area[512..520].copy_from_slice(&bv.to_le_bytes());
}

fn leave(x: &mut Exchange, gregs: &mut [i64; 23], area: &mut [u8]) {
    for (value, register) in x.regs.gpr.iter_mut().zip(SLOTS) {
        *value = gregs[slot(register)].cast_unsigned();
    }
    x.regs.rip = gregs[slot(libc::REG_RIP)].cast_unsigned();
    x.regs.rflags = gregs[slot(libc::REG_EFL)].cast_unsigned();
    x.trap = gregs[slot(libc::REG_TRAPNO)].cast_unsigned();
    x.error = gregs[slot(libc::REG_ERR)].cast_unsigned();
    x.cr2 = gregs[slot(libc::REG_CR2)].cast_unsigned();
    take_area(x, area);
    area.copy_from_slice(&x.host_area[..area.len()]);
    *gregs = x.host_gregs;
}

/// Copies the components; those that the processor did not save are in their initial state (SDM 1 13.6).
fn take_area(x: &mut Exchange, area: &[u8]) {
    let bv = u64::from_le_bytes(std::array::from_fn(|i| area[512 + i]));
    let fpu = &mut x.regs.fpu;
    fpu.fill(0);
    fpu[24..28].copy_from_slice(&area[24..28]);
    if bv & 1 != 0 {
        fpu[..24].copy_from_slice(&area[..24]);
        fpu[32..160].copy_from_slice(&area[32..160]);
    } else {
        fpu[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
    if bv & 2 != 0 {
        fpu[160..LEGACY].copy_from_slice(&area[160..LEGACY]);
    }
    for &(bit, at, len) in &x.components {
        if bv >> bit & 1 != 0 {
            fpu[at..at + len].copy_from_slice(&area[at..at + len]);
        }
    }
}
