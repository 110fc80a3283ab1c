//! The one unsafe module here: code memory for the stubs of [`super::stub`], and the call into them.
//!
//! Code memory belongs to a thread: a memfd mapped twice, once writable, once executable, never both at one address.
//! It is bounded; when full, all stubs of the thread are dropped and compiled again as they are needed. A handle
//! carries the generation of the memory it points into, unique in the process, so that a stale or another thread's
//! handle is noticed (INV-VEC-3). A stub never runs while its memory is written: both happen in one thread.
#![expect(unsafe_code, reason = "maps executable memory and calls into it")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use x86::state::FpuArea;

/// Bytes of code memory per thread.
const CAPACITY: usize = 512 << 10;
/// No stub is longer.
pub(super) const MAX_STUB: usize = 1024;

/// What a stub gets and gives: general registers, flags, the memory operand. Offsets are in [`frame`].
#[repr(C, align(64))]
#[derive(Debug)]
pub(super) struct Frame {
    host_mxcsr: u64,
    area: u64,
    /// RAX, RCX, RDX, R8, R9, R10 of the stub.
    pub gpr: [u64; 6],
    /// RFLAGS.
    pub flags: u64,
    reserved: [u64; 7],
    /// The memory operand.
    pub bounce: [u8; 64],
}

/// Offsets of [`Frame`]'s fields, as the stub's code uses them.
pub(super) mod frame {
    pub const HOST_MXCSR: i64 = 0;
    pub const AREA: i64 = 8;
    pub const GPR: i64 = 16;
    pub const FLAGS: i64 = 64;
    pub const BOUNCE: i64 = 128;
}

const _: () = {
    assert!(std::mem::offset_of!(Frame, host_mxcsr) == 0);
    assert!(std::mem::offset_of!(Frame, area) == 8);
    assert!(std::mem::offset_of!(Frame, gpr) == 16);
    assert!(std::mem::offset_of!(Frame, flags) == 64);
    assert!(std::mem::offset_of!(Frame, bounce) == 128);
};

impl Frame {
    pub const fn new() -> Self {
        Self { host_mxcsr: 0, area: 0, gpr: [0; 6], flags: 2, reserved: [0; 7], bounce: [0; 64] }
    }
}

/// A compiled stub's bytes and where the thread's copy lies: generation in the upper half, offset in the lower.
#[derive(Debug)]
pub(super) struct Code {
    bytes: Box<[u8]>,
    place: AtomicU64,
}

impl Code {
    /// Code that [`super::stub`] built: position-independent, ends in RET, obeys INV-VEC-1 (see there). Nothing else
    /// may be passed in.
    pub(super) fn new(bytes: Box<[u8]>) -> Self {
        debug_assert!(bytes.len() <= MAX_STUB, "a stub of {} bytes", bytes.len());
        Self { bytes, place: AtomicU64::new(0) }
    }
}

struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    used: usize,
    generation: u32,
    known: HashMap<Box<[u8]>, u32>,
}

static GENERATION: AtomicU32 = AtomicU32::new(1);

fn next_generation() -> u32 {
    loop {
        let g = GENERATION.fetch_add(1, Ordering::Relaxed);
        if g != 0 {
            return g;
        }
    }
}

fn map(fd: libc::c_int, protection: libc::c_int) -> std::io::Result<NonNull<u8>> {
    // SAFETY: a fresh shared mapping of our own memfd at an address the kernel chooses; it aliases nothing.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), CAPACITY, protection, libc::MAP_SHARED, fd, 0) };
    match NonNull::new(p.cast::<u8>()) {
        Some(p) if p.as_ptr().cast() != libc::MAP_FAILED => Ok(p),
        _ => Err(std::io::Error::last_os_error()),
    }
}

impl CodeMemory {
    fn new() -> std::io::Result<Self> {
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"vector-stubs".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mapped = Self::map_both(fd);
        // SAFETY: `fd` is ours and used no more; the mappings keep the memory.
        unsafe { libc::close(fd) };
        let (writable, executable) = mapped?;
        Ok(Self { writable, executable, used: 0, generation: next_generation(), known: HashMap::new() })
    }

    fn map_both(fd: libc::c_int) -> std::io::Result<(NonNull<u8>, NonNull<u8>)> {
        let size = libc::off_t::try_from(CAPACITY).map_err(std::io::Error::other)?;
        // SAFETY: `fd` is an open memfd.
        if unsafe { libc::ftruncate(fd, size) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let writable = map(fd, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(fd, libc::PROT_READ | libc::PROT_EXEC).inspect_err(|_| {
            // SAFETY: mapped just above, no one else has it.
            unsafe { libc::munmap(writable.as_ptr().cast(), CAPACITY) };
        })?;
        Ok((writable, executable))
    }

    /// Offset of the stub, copied in if it is not there.
    fn place(&mut self, code: &Code) -> u32 {
        let word = code.place.load(Ordering::Relaxed);
        if (word >> 32) as u32 == self.generation {
            return (word & 0xffff_ffff) as u32;
        }
        self.place_slow(code)
    }

    #[cold]
    fn place_slow(&mut self, code: &Code) -> u32 {
        let offset = self.known.get(&code.bytes).copied().unwrap_or_else(|| self.append(&code.bytes));
        code.place.store(u64::from(self.generation) << 32 | u64::from(offset), Ordering::Relaxed);
        offset
    }

    fn append(&mut self, code: &[u8]) -> u32 {
        assert!(code.len() <= MAX_STUB, "a stub of {} bytes", code.len());
        if self.used + code.len() > CAPACITY {
            self.used = 0;
            self.known.clear();
            self.generation = next_generation();
        }
        let at = self.used;
        // SAFETY: `at + code.len() <= CAPACITY`, checked above; no stub of this thread runs now and no other thread
        // has the mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(at), code.len());
        }
        // Code written through another linear address needs a serialising instruction before it is executed
        // (SDM 3A 8.1.3): CPUID.
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
        self.used = (at + code.len()).next_multiple_of(32);
        let offset = u32::try_from(at).expect("code memory is smaller than 4 GiB");
        self.known.insert(code.into(), offset);
        offset
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for p in [self.writable, self.executable] {
            // SAFETY: both mappings are ours, of this size, and nothing points into them any more: handles are
            // checked by generation, which is never used again.
            unsafe { libc::munmap(p.as_ptr().cast(), CAPACITY) };
        }
    }
}

thread_local! {
    static MEMORY: RefCell<Option<CodeMemory>> = const { RefCell::new(None) };
}

/// Makes this thread's code memory now, so that later executions need no system call (before seccomp).
///
/// # Errors
/// The host's, if it gives no memfd or no executable mapping.
pub fn warm_up() -> std::io::Result<()> {
    MEMORY.with_borrow_mut(|m| {
        if m.is_none() {
            *m = Some(CodeMemory::new()?);
        }
        Ok(())
    })
}

/// Runs a stub on `frame` and `area`.
///
/// # Panics
/// If the host gives no executable memory (see [`warm_up`]).
pub(super) fn call(code: &Code, frame: &mut Frame, area: &mut FpuArea) {
    MEMORY.with_borrow_mut(|slot| {
        let memory = match slot {
            Some(m) => m,
            None => slot.insert(
                CodeMemory::new()
                    .expect("the host gives executable memory to the interpreter (memfd, PROT_EXEC)"),
            ),
        };
        let at = memory.place(code) as usize;
        frame.area = std::ptr::from_mut(area).expose_provenance() as u64;
        // SAFETY: the generation matched (INV-VEC-3), so `at` is the start of this stub within the mapping, complete
        // and no longer written. The stub obeys INV-VEC-1: it follows the System V convention, writes only `frame`,
        // `area` and its own stack below RSP, and leaves MXCSR and the x87 control word as it found them.
        unsafe {
            let entry = memory.executable.as_ptr().add(at);
            let stub: extern "sysv64" fn(*mut Frame) = std::mem::transmute(entry);
            stub(std::ptr::from_mut(frame));
        }
    })
}

/// The host's MXCSR_MASK (SDM 1 11.6.6).
pub(super) fn mxcsr_mask() -> u32 {
    let mut area = FpuArea::default();
    // SAFETY: FXSAVE64 writes 512 bytes to a 64-byte aligned area of 4096.
    unsafe { std::arch::x86_64::_fxsave64(area.0.as_mut_ptr()) };
    let mask = super::layout::u32_at(&area, super::layout::at::MXCSR_MASK);
    if mask == 0 { 0xffbf } else { mask }
}
