//! The single operations that a user program can do, beside those of the bare-metal guest. Each iteration is 64 of them,
//! as there; those that need the kernel's help get it from this host's.

use core::arch::{asm, global_asm};

use crate::{Bench, Ctx, Mem, kernel, no_setup, no_teardown, sys};

pub const BENCHES: &[Bench] = &[
    Bench { name: "nano-syscall", ops: 64, setup: no_setup, run: system_call, teardown: no_teardown },
    Bench { name: "nano-callret", ops: 64, setup: no_setup, run: call_ret, teardown: no_teardown },
    Bench { name: "nano-pgfault", ops: 64, setup: fault_setup, run: page_fault, teardown: no_teardown },
    Bench { name: "nano-divzero", ops: 64, setup: kernel::divide_setup, run: divide, teardown: no_teardown },
    Bench { name: "nano-cpuid", ops: 64, setup: no_setup, run: cpuid, teardown: no_teardown },
    Bench { name: "nano-rdtsc", ops: 64, setup: no_setup, run: time_stamp, teardown: no_teardown },
];

fn system_call(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n * 64 {
        sys::call3(sys::SYS_GETPPID, 0, 0, 0);
    }
    0
}

fn call_ret(_: &mut Ctx, n: u64) -> u64 {
    // SAFETY: calls within the block; the stack is as before at its end.
    unsafe {
        asm!("jmp 4f", ".balign 64", "3: ret", ".balign 64", "4:", ".rept 64", "call 3b", ".endr", "dec {i}", "jnz 4b",
             i = inout(reg) n.max(1) => _);
    }
    0
}

fn cpuid(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n * 64 {
        core::hint::black_box(core::arch::x86_64::__cpuid(0));
    }
    0
}

fn time_stamp(_: &mut Ctx, n: u64) -> u64 {
    // SAFETY: registers only.
    unsafe {
        asm!("2:", ".rept 64", "rdtsc", ".endr", "dec {i}", "jnz 2b", i = inout(reg) n.max(1) => _, out("eax") _, out("edx") _,
             options(nomem, nostack));
    }
    0
}

fn divide(ctx: &mut Ctx, n: u64) -> u64 {
    (0..n * 64).for_each(|_| {
        kernel::divide_by_zero(ctx, 1);
    });
    0
}

// The handler steps over the four bytes of the load (ucontext: gregs at 40, RIP is number 16).
global_asm!(
    r#"
.section .text
.global fault_handler
fault_handler:
    add qword ptr [rdx + 40 + 16 * 8], 4
    ret
"#
);

unsafe extern "C" {
    fn fault_handler();
}

fn fault_setup() -> Result<Ctx, &'static str> {
    const SIGSEGV: usize = 11;
    let at = sys::map(4096, 0).ok_or("not enough memory")?;
    let mem = Mem { at, len: 4096 };
    if kernel::handle(SIGSEGV, fault_handler as *const () as usize) {
        Ok(Ctx { mem, ..Ctx::default() })
    } else {
        Err("no signal handler")
    }
}

/// Loads from a page that is not accessible.
fn page_fault(ctx: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n * 64 {
        // SAFETY: the load faults, and the handler steps over it.
        unsafe { asm!("mov rax, [r12]", in("r12") ctx.mem.at, out("rax") _) };
    }
    0
}
