//! Entering and leaving translated code.
//!
//! `trellis_bt_enter` loads the guest's registers from the frame and jumps; fragments leave through `trellis_bt_leave`, which stores
//! them. What a fragment calls finds the number of its site or exit behind the call. `trellis_bt_slow` and `trellis_bt_callout` store the registers, call Rust, and load them again. Guest x87 and vector registers are
//! stored on the way to Rust if they are in the host's, and loaded again when code wants them (`fp`): Rust and libc may
//! use every vector register, and guest MXCSR and control words are never in force while Rust runs.
//!
//! Two lookups need no Rust, and so no stores: `refill` fills the frame's TLB from the interpreter's, `lookup` the jump cache from the second-level table
//! (`tables`). The frame is what GS points at (`bt::frame`).

#![expect(clippy::cast_possible_truncation, reason = "offsets in the frame")]
#![expect(unsafe_code, reason = "assembly that switches between Rust and translated code")]

use std::arch::{asm, global_asm};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bt::frame;
use rustix::mm::munmap;

use crate::{huge, lookup, refill};

/// Bytes of the host's stack that pairs of calls take at most, but for the last. The host's predictor has some 32; more would not be predicted.
const PAIRS_BYTES: usize = 4096;

macro_rules! save_registers {
    () => {
        "mov gs:[0], rax\nmov gs:[8], rcx\nmov gs:[16], rdx\nmov gs:[24], rbx\nmov gs:[32], r13\nmov gs:[40], rbp\n\
         mov gs:[48], rsi\nmov gs:[56], rdi\nmov gs:[64], r8\nmov gs:[72], r9\nmov gs:[80], r10\nmov gs:[88], r11\n\
         mov gs:[96], r12\n\
         cmp dword ptr gs:[{loaded}], 0\nje 9f\ncall trellis_bt_fp_store\n9:"
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
    // INV-PAIR-2: the pair below all others (`bt::lower::pair`).
    "push 0\nlea rax, [rip + trellis_bt_unpaired]\npush rax",
    "mov gs:[{pairs}], rsp\nlea rax, [rsp - {pairs_bytes}]\nmov gs:[{pairs_end}], rax",
    "mov r15, rdi\nmov r14, rsi",
    load_registers!(),
    "jmp r15",
    // The guest returned to address 0, which lies below every call.
    "trellis_bt_unpaired:",
    "mov gs:[{rip}], r14\njmp trellis_bt_leave",
    ".globl trellis_bt_take_exit",
    "trellis_bt_take_exit:",
    "pop r15\nmov r15d, [r15]\ninc r15d\nmov gs:[{exit}], r15d",
    ".globl trellis_bt_leave",
    "trellis_bt_leave:",
    "mov rsp, gs:[{pairs}]",
    save_registers!(),
    "trellis_bt_left:",
    "mov rsp, gs:[{pairs}]\nadd rsp, 24\npop r15\npop r14\npop r13\npop r12\npop rbp\npop rbx",
    "ret",
    // Behind the call that came here stand a jump of five bytes, to try again, and the number of the site.
    ".globl trellis_bt_slow",
    "trellis_bt_slow:",
    "mov r15, [rsp]\nmov r15d, [r15 + 5]\nmov gs:[{site}], r15d",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {slow}",
    "add rsp, 8",
    "test al, {leave} | {elsewhere} | {look_up}\njne 6f",
    "mov r15, rax",
    "test r15b, {fp}\nje 5f\ncall trellis_bt_fp_load\n5:",
    load_registers!(),
    "test r15b, {done}\njne 4f",
    "ret",
    "4:\nadd rsp, 8",
    "test r15b, {flags}\nje 3f",
    "push rax\nmovzx eax, word ptr gs:[{status}]\nadd al, 0x7f\nsahf\npop rax",
    "3:\njmp gs:[{behind}]",
    // Out of the cache, or at the outer entry of another fragment: something has changed (INV-PAIR-1).
    "6:\nmov rsp, gs:[{pairs}]\ntest al, {leave}\njne trellis_bt_left",
    "test al, {look_up}\njne 7f",
    load_registers!(),
    "mov r14, gs:[{rip}]\njmp gs:[{behind}]",
    // At level 0, with or without AC. No site is to blame if there is nothing: the address is canonical.
    "7:",
    load_registers!(),
    "mov r14, gs:[{rip}]\nmov dword ptr gs:[{site}], -1",
    "test dword ptr gs:[{sysflags}], {ac}\nje trellis_bt_return_0_at",
    "test dword ptr gs:[{allowed}], {smap}\nje trellis_bt_return_0_at",
    "jmp trellis_bt_return_1_at",
    // Behind the call that came here stands the number of the site.
    ".globl trellis_bt_callout",
    "trellis_bt_callout:",
    "mov r15, [rsp]\nmov r15d, [r15]\nmov gs:[{site}], r15d",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {callout}",
    "add rsp, 8",
    "test al, {leave} | {elsewhere} | {look_up}\njne 6b",
    "mov r15, rax",
    "test r15b, {fp}\nje 5f\ncall trellis_bt_fp_load\n5:",
    load_registers!(),
    "add qword ptr [rsp], 4",
    "test r15b, {flags}\nje 3f",
    "push rax\nmovzx eax, word ptr gs:[{status}]\nadd al, 0x7f\nsahf\npop rax",
    "3:\nret",
    engine = const frame::ENGINE,
    loaded = const frame::FP_LOADED,
    exit = const frame::EXIT,
    site = const frame::SITE,
    status = const frame::FLAGS,
    behind = const frame::DONE,
    rip = const frame::RIP,
    pairs = const frame::PAIRS,
    pairs_end = const frame::PAIRS_END,
    pairs_bytes = const PAIRS_BYTES,
    leave = const action::LEAVE,
    elsewhere = const action::ELSEWHERE,
    look_up = const action::LOOK_UP,
    sysflags = const frame::SYSFLAGS,
    ac = const frame::AC,
    allowed = const frame::IRET_ALLOWED,
    smap = const frame::IRET_SMAP,
    done = const action::DONE,
    flags = const action::FLAGS,
    fp = const action::FP,
    slow = sym slow_entry,
    callout = sym callout_entry,
);

/// What translated code does when Rust comes back to it; bits.
pub mod action {
    /// Leave: the frame is up to date.
    pub const LEAVE: u64 = 1;
    /// Of a missed access: go on at [`bt::frame::DONE`] instead of trying again.
    pub const DONE: u64 = 2;
    /// The guest's flags go into the host's.
    pub const FLAGS: u64 = 4;
    /// The guest's x87 and vector registers go into the host's.
    pub const FP: u64 = 8;
    /// Go on at the outer entry of another fragment: at [`bt::frame::DONE`], whose guest address is [`bt::frame::RIP`].
    pub const ELSEWHERE: u64 = 16;
    /// Go on in 64-bit code of level 0 at the guest address [`bt::frame::RIP`], wherever that is.
    pub const LOOK_UP: u64 = 32;
}

unsafe extern "C" {
    fn trellis_bt_enter(code: u64, rip: u64);
    fn trellis_bt_leave();
    fn trellis_bt_take_exit();
    fn trellis_bt_callout();
}

/// How many instructions [`Frame::without_helpers`] is about.
const HELPERS: usize = 8;

/// Code in assembly, as its address.
pub type Assembly = unsafe extern "C" fn();

/// What translated code asks of the engine.
pub trait Callouts {
    /// A memory access missed. The [`action`].
    fn slow(&mut self, site: u32) -> u64;
    /// An instruction for the interpreter. The [`action`].
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

/// The memory of a frame.
struct Memory(NonNull<u8>);

// SAFETY: plain memory; other threads reach only the alarm, an atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the last owner is gone.
        let _unmapped = unsafe { munmap(self.0.as_ptr().cast(), frame::SIZE) };
    }
}

impl Memory {
    fn alarm(&self) -> &AtomicU32 {
        // SAFETY: the field is aligned and lies in the mapping, which lives as long as `self`; everybody but translated code, which
        // uses single aligned accesses, reaches it through this atomic.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(frame::ALARM as usize).cast()) }
    }
}

impl engine::signals::Alarm for Memory {
    fn ring(&self) {
        self.alarm().store(1, Ordering::SeqCst);
    }
}

/// The frame: what translated code reaches through GS.
#[derive(Clone)]
pub struct Frame(Arc<Memory>);

impl Frame {
    /// A zeroed frame with the addresses that fragments jump through.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new() -> rustix::io::Result<Self> {
        let f = Self(Arc::new(Memory(huge::zeroed(frame::SIZE, frame::BUSY)?)));
        f.set_code(frame::REFILL, &refill::REFILLS);
        f.set_code(frame::REFILL_GROUP, &refill::GROUP_REFILLS);
        f.set_code(frame::SPLIT, &refill::SPLITS);
        f.set_code(frame::JOIN, &[refill::JOIN]);
        f.set(frame::BOUNCE_ADDRESS, f.address(frame::BOUNCE));
        f.set_code(frame::LOOKUP, &lookup::LOOKUPS);
        f.set_code(frame::LOOKUP_LEGACY, &lookup::LEGACY_LOOKUPS);
        f.set_code(frame::RETURN, &lookup::RETURNS);
        f.set_code(frame::TAKE_EXIT, &[trellis_bt_take_exit]);
        f.set_code(frame::LEAVE, &[trellis_bt_leave]);
        f.set_code(frame::CALLOUT, &[trellis_bt_callout]);
        f.set_helpers();
        f.set(frame::FP_LOAD, crate::fp::load_address());
        Ok(f)
    }

    /// Puts the addresses of code that fragments jump through, from a place on.
    fn set_code(&self, from: i32, code: &[Assembly]) {
        for (at, code) in (from..).step_by(8).zip(code) {
            self.set(at, *code as *const () as u64);
        }
    }

    /// Instructions that are done without Rust.
    fn set_helpers(&self) {
        self.set(frame::XSTATE_ADDRESS, self.address(frame::XSTATE));
        self.set(frame::IRET, crate::iret::address());
        self.set(frame::DO_CPUID, crate::cpuid::address());
        self.set(frame::DO_XSAVE, crate::xstate::save_address());
        self.set(frame::DO_XRSTOR, crate::xstate::restore_address());
        self.set(frame::DO_SWITCH, crate::switch::address());
        self.set(frame::DO_INVLPG, crate::invlpg::address());
        let [rdmsr, wrmsr] = crate::msr::addresses();
        self.set(frame::DO_RDMSR, rdmsr);
        self.set(frame::DO_WRMSR, wrmsr);
    }

    /// From now on the interpreter does every instruction that is not done in fragments.
    pub fn without_helpers(&self) {
        let helpers = frame::HELPERS.step_by(8).take(HELPERS);
        helpers.for_each(|at| self.set_code(at, &[trellis_bt_callout]));
    }

    /// From now on every miss comes to Rust.
    pub fn refill_in_rust(&self) {
        self.set_code(frame::REFILL, &refill::MISSES);
        self.set_code(frame::REFILL_GROUP, &refill::MISSES);
    }

    /// What others ring.
    pub fn alarm(&self) -> Arc<dyn engine::signals::Alarm> {
        Arc::clone(&self.0) as _
    }

    /// Has translated code leave at its next poll.
    pub fn ring(&self) {
        engine::signals::Alarm::ring(&*self.0);
    }

    /// Switches the alarm off; who calls this looks at the signals afterwards.
    pub fn silence(&self) {
        self.0.alarm().store(0, Ordering::SeqCst);
    }

    /// Whether somebody rang.
    pub fn is_alarmed(&self) -> bool {
        self.0.alarm().load(Ordering::Relaxed) != 0
    }

    /// The host address of a place in the frame.
    pub fn address(&self, at: i32) -> u64 {
        debug_assert!((0..=frame::SIZE as i32).contains(&at));
        // SAFETY: within the mapping, or just behind it.
        unsafe { self.0.0.as_ptr().add(at as usize) as u64 }
    }

    /// Reads a field of eight bytes.
    #[inline(always)]
    pub fn get(&self, at: i32) -> u64 {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: fields lie within the frame.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u64>().read() }
    }

    /// Writes a field of eight bytes.
    #[inline(always)]
    pub fn set(&self, at: i32, value: u64) {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u64>().write(value) }
    }

    /// Reads a field of four bytes.
    #[inline(always)]
    pub fn get32(&self, at: i32) -> u32 {
        debug_assert!((0..=frame::SIZE as i32 - 4).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u32>().read() }
    }

    /// Writes a field of four bytes.
    #[inline(always)]
    pub fn set32(&self, at: i32, value: u32) {
        debug_assert!((0..=frame::SIZE as i32 - 4).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u32>().write(value) }
    }

    /// Runs translated code until it leaves. `rip` is the guest address that the code begins with.
    ///
    /// # Safety
    /// `code` is the outer entry of a fragment that `bt` made, in code memory that changes only by links and stale entries; the frame's
    /// pointers (tables, logs, area) are valid.
    pub unsafe fn enter(&self, code: u64, rip: u64, callouts: &mut dyn Callouts) {
        let mut hook = Hook { callouts, frame: self.0.0 };
        self.set(frame::ENGINE, &raw mut hook as u64);
        // SAFETY: GS is unused by Rust and libc on x86-64 Linux; the frame stays mapped while fragments run. The
        // assembly keeps the C calling convention, and fragments touch only the registers it saves; vector registers are the caller's
        // to save in that convention, MXCSR and the x87 control word are restored when fragments are left.
        unsafe {
            asm!("wrgsbase {0}", in(reg) self.0.0.as_ptr(), options(nostack, preserves_flags));
            trellis_bt_enter(code, rip);
        }
    }
}

/// Where the engine's assembly is, and what it does.
pub fn assembly() -> Vec<(u64, &'static str)> {
    let switches: [Assembly; 3] = [trellis_bt_take_exit, trellis_bt_leave, trellis_bt_callout];
    let named =
        |code: &[Assembly], name| code.iter().map(|c| (*c as *const () as u64, name)).collect::<Vec<_>>();
    let mut all = named(&refill::REFILLS, "TLB refills");
    all.extend(named(&refill::GROUP_REFILLS, "TLB refills"));
    all.extend(named(&refill::SPLITS, "accesses on two pages"));
    all.extend(named(&[refill::JOIN], "accesses on two pages"));
    all.extend(named(&lookup::LOOKUPS, "jump-cache refills"));
    all.extend(named(&lookup::LEGACY_LOOKUPS, "jump-cache refills"));
    all.extend(named(&lookup::RETURNS, "returns without their pair"));
    all.extend(named(&switches, "switches"));
    all.push((trellis_bt_enter as *const () as u64, "switches"));
    all.push((crate::fp::load_address(), "vector registers"));
    all.push((crate::fp::store_address(), "vector registers"));
    all.push((crate::iret::address(), "IRET"));
    all.push((crate::cpuid::address(), "CPUID"));
    all.push((crate::xstate::save_address(), "XSAVEC"));
    all.push((crate::xstate::restore_address(), "XRSTOR"));
    all.push((crate::switch::address(), "MOV to CR3"));
    all.push((crate::invlpg::address(), "INVLPG"));
    all.extend(crate::msr::addresses().map(|code| (code, "RDMSR and WRMSR")));
    all
}
