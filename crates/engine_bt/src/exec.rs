//! Entering and leaving translated code.
//!
//! `trellis_bt_enter` loads the guest's registers from the frame and jumps; fragments leave through `trellis_bt_leave`, which stores
//! them. `trellis_bt_slow` and `trellis_bt_callout` are called by fragments: they store the registers, call Rust, and load them again.
//! The frame is what GS points at (`bt::frame`).

#![expect(clippy::cast_possible_truncation, reason = "offsets in the frame")]
#![expect(unsafe_code, reason = "assembly that switches between Rust and translated code")]

use std::arch::{asm, global_asm};
use std::ptr::NonNull;

use bt::frame;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

macro_rules! save_registers {
    () => {
        "mov gs:[0], rax\nmov gs:[8], rcx\nmov gs:[16], rdx\nmov gs:[24], rbx\nmov gs:[32], r13\nmov gs:[40], rbp\n\
         mov gs:[48], rsi\nmov gs:[56], rdi\nmov gs:[64], r8\nmov gs:[72], r9\nmov gs:[80], r10\nmov gs:[88], r11\n\
         mov gs:[96], r12"
    };
}
macro_rules! load_registers {
    () => {
        "mov rax, gs:[0]\nmov rcx, gs:[8]\nmov rdx, gs:[16]\nmov rbx, gs:[24]\nmov r13, gs:[32]\nmov rbp, gs:[40]\n\
         mov rsi, gs:[48]\nmov rdi, gs:[56]\nmov r8, gs:[64]\nmov r9, gs:[72]\nmov r10, gs:[80]\nmov r11, gs:[88]\n\
         mov r12, gs:[96]"
    };
}

global_asm!(
    ".globl trellis_bt_enter",
    "trellis_bt_enter:",
    "push rbx\npush rbp\npush r12\npush r13\npush r14\npush r15\nsub rsp, 8",
    "mov r15, rdi",
    load_registers!(),
    "jmp r15",
    ".globl trellis_bt_leave",
    "trellis_bt_leave:",
    save_registers!(),
    "add rsp, 8\npop r15\npop r14\npop r13\npop r12\npop rbp\npop rbx",
    "ret",
    ".globl trellis_bt_slow",
    "trellis_bt_slow:",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {slow}",
    "mov r15, rax",
    load_registers!(),
    "add rsp, 8",
    "ret",
    ".globl trellis_bt_callout",
    "trellis_bt_callout:",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {callout}",
    "mov r15, rax",
    load_registers!(),
    "add rsp, 8",
    "ret",
    engine = const frame::ENGINE,
    slow = sym slow_entry,
    callout = sym callout_entry,
);

unsafe extern "C" {
    fn trellis_bt_enter(code: u64);
    fn trellis_bt_leave();
    fn trellis_bt_slow();
    fn trellis_bt_callout();
}

/// What translated code asks of the engine.
pub trait Callouts {
    /// A memory access missed: 0 it is filled, try again; 1 the instruction is done; 2 leave.
    fn slow(&mut self, site: u32) -> u64;
    /// An instruction for the interpreter: 0 it is done, go on; 1 leave.
    fn callout(&mut self, site: u32) -> u64;
}

/// What [`frame::ENGINE`] points at while fragments run.
struct Hook<'a> {
    callouts: &'a mut dyn Callouts,
    frame: NonNull<u8>,
}

extern "C" fn slow_entry(hook: *mut Hook<'_>) -> u64 {
    // SAFETY: `Frame::enter` put a live hook there, and nothing else uses it while fragments run.
    let hook = unsafe { &mut *hook };
    // SAFETY: the frame outlives the hook; the field is aligned.
    let site = unsafe { hook.frame.as_ptr().add(frame::SITE as usize).cast::<u32>().read() };
    hook.callouts.slow(site)
}

extern "C" fn callout_entry(hook: *mut Hook<'_>) -> u64 {
    // SAFETY: as in `slow_entry`.
    let hook = unsafe { &mut *hook };
    // SAFETY: as in `slow_entry`.
    let site = unsafe { hook.frame.as_ptr().add(frame::SITE as usize).cast::<u32>().read() };
    hook.callouts.callout(site)
}

/// The frame: what translated code reaches through GS.
#[derive(Clone, Copy)]
pub struct Frame(NonNull<u8>);

// SAFETY: plain memory, used by one thread at a time.
unsafe impl Send for Frame {}

impl Frame {
    /// A zeroed frame with the addresses that fragments jump through. It lives until [`Frame::free`].
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new() -> rustix::io::Result<Self> {
        // SAFETY: a fresh anonymous mapping.
        let p = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                frame::SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        let f = Self(NonNull::new(p.cast()).ok_or(rustix::io::Errno::NOMEM)?);
        f.set(frame::LEAVE, trellis_bt_leave as *const () as u64);
        f.set(frame::SLOW, trellis_bt_slow as *const () as u64);
        f.set(frame::CALLOUT, trellis_bt_callout as *const () as u64);
        Ok(f)
    }

    /// Gives the memory back. Nothing may use the frame any more.
    pub fn free(self) {
        // SAFETY: our own mapping.
        let _unmapped = unsafe { munmap(self.0.as_ptr().cast(), frame::SIZE) };
    }

    /// Reads a field of eight bytes.
    pub fn get(self, at: i32) -> u64 {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: fields lie within the frame.
        unsafe { self.0.as_ptr().add(at as usize).cast::<u64>().read() }
    }

    /// Writes a field of eight bytes.
    pub fn set(self, at: i32, value: u64) {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.as_ptr().add(at as usize).cast::<u64>().write(value) }
    }

    /// Reads a field of four bytes.
    pub fn get32(self, at: i32) -> u32 {
        // SAFETY: as above.
        unsafe { self.0.as_ptr().add(at as usize).cast::<u32>().read_unaligned() }
    }

    /// Writes a field of four bytes.
    pub fn set32(self, at: i32, value: u32) {
        // SAFETY: as above.
        unsafe { self.0.as_ptr().add(at as usize).cast::<u32>().write_unaligned(value) }
    }

    /// Runs translated code until it leaves.
    ///
    /// # Safety
    /// `code` is the entry of a fragment that `bt` made, in code memory that stays as it is but for links.
    pub unsafe fn enter(self, code: u64, callouts: &mut dyn Callouts) {
        let mut hook = Hook { callouts, frame: self.0 };
        self.set(frame::ENGINE, &raw mut hook as u64);
        // SAFETY: GS is unused by Rust and libc on x86-64 Linux; the frame stays mapped while fragments run. The
        // assembly keeps the C calling convention, and fragments touch only the registers it saves.
        unsafe {
            asm!("wrgsbase {0}", in(reg) self.0.as_ptr(), options(nostack, preserves_flags));
            trellis_bt_enter(code);
        }
    }
}
