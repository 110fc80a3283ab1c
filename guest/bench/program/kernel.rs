//! Into the kernel and back: system calls, page faults, signals.

use core::arch::{asm, global_asm};

use crate::{Bench, Ctx, Mem, no_setup, no_teardown, sys, with_memory};

pub const BENCHES: &[Bench] = &[
    Bench { name: "getppid", ops: 1, setup: no_setup, run: getppid, teardown: no_teardown },
    Bench { name: "pipe-rw", ops: 1, setup: pipe_setup, run: pipe_rw, teardown: close_all },
    Bench { name: "pgfault", ops: 64, setup: no_setup, run: page_fault, teardown: no_teardown },
    Bench { name: "mprotect", ops: 1, setup: protect_setup, run: protect, teardown: no_teardown },
    Bench { name: "divzero", ops: 1, setup: divide_setup, run: divide_by_zero, teardown: no_teardown },
];

fn getppid(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        sys::call3(sys::SYS_GETPPID, 0, 0, 0);
    }
    0
}

fn pipe_setup() -> Result<Ctx, &'static str> {
    let fds = sys::pipe();
    Ok(Ctx { fds: [fds[0], fds[1], -1, -1], ..Ctx::default() })
}

pub fn close_all(ctx: &mut Ctx) {
    ctx.fds.iter().filter(|fd| **fd > 2).for_each(|fd| sys::close(*fd));
}

/// A byte into a pipe and out of it, by the same process.
fn pipe_rw(ctx: &mut Ctx, n: u64) -> u64 {
    let mut byte = [0];
    for _ in 0..n {
        sys::write_all(ctx.fds[1], b"x");
        sys::read(ctx.fds[0], &mut byte);
    }
    u64::from(byte[0])
}

/// 64 fresh pages: mapped, touched, unmapped.
fn page_fault(_: &mut Ctx, n: u64) -> u64 {
    const LEN: usize = 64 * 4096;
    let mut zeros = 0;
    for _ in 0..n {
        zeros = 0;
        let Some(at) = sys::map(LEN, sys::READ_WRITE) else { return u64::MAX };
        for page in (0..LEN).step_by(4096) {
            // SAFETY: inside the mapping.
            unsafe {
                at.add(page).write_volatile(1);
                zeros += u64::from(at.add(page + 1).read_volatile() == 0);
            }
        }
        sys::unmap(at, LEN);
    }
    zeros
}

fn protect_setup() -> Result<Ctx, &'static str> {
    with_memory(4096)
}

/// A page made read-only and writable again, and written.
fn protect(ctx: &mut Ctx, n: u64) -> u64 {
    let Mem { at, len } = ctx.mem;
    for _ in 0..n {
        sys::call3(sys::SYS_MPROTECT, at as usize, len, 1);
        sys::call3(sys::SYS_MPROTECT, at as usize, len, 3);
        // SAFETY: mapped, and writable again.
        unsafe { at.write_volatile(7) };
    }
    // SAFETY: mapped.
    u64::from(unsafe { at.read() })
}

// The handler steps over the two bytes of `div ecx` (ucontext: gregs at 40, RIP is number 16) and says how often it ran.
global_asm!(
    r#"
.section .text
.global divide_handler
.global signal_restorer
divide_handler:
    add qword ptr [rdx + 40 + 16 * 8], 2
    add qword ptr [rdx + 40 + 8 * 8], 1
    ret
signal_restorer:
    mov eax, 15
    syscall
"#
);

unsafe extern "C" {
    fn divide_handler();
    fn signal_restorer();
}

/// Makes `handler` the handler of a signal; returns whether the kernel agrees.
pub fn handle(signal: usize, handler: usize) -> bool {
    const SA_SIGINFO: usize = 4;
    const SA_RESTORER: usize = 0x0400_0000;
    let action = [handler, SA_SIGINFO | SA_RESTORER, signal_restorer as *const () as usize, 0];
    sys::call(sys::SYS_RT_SIGACTION, [signal, action.as_ptr() as usize, 0, 8, 0, 0]) == 0
}

pub fn divide_setup() -> Result<Ctx, &'static str> {
    const SIGFPE: usize = 8;
    if handle(SIGFPE, divide_handler as *const () as usize) { Ok(Ctx::default()) } else { Err("no signal handler") }
}

pub fn divide_by_zero(_: &mut Ctx, n: u64) -> u64 {
    let mut hits = 0u64;
    for _ in 0..n {
        // SAFETY: the handler adds to the saved RDI (greg 8) and skips the division; registers else are as they were.
        unsafe {
            asm!("xor edx, edx", "mov eax, 1", "div ecx", in("ecx") 0, inout("rdi") 0u64 => hits, out("eax") _, out("edx") _);
        }
    }
    hits
}
