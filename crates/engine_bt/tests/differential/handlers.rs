//! The supervisor's code: exception handlers and system-call entries, assembled with the test and copied into guest memory.
//!
//! An exception pushes its error code (or 0) and its vector, then either halts, or (as often as the counter says) goes on at the
//! address that the case names.

#![expect(unsafe_code, reason = "reads the bytes between two labels")]

use std::arch::global_asm;

use crate::machine::{COUNTER, HIGH};

global_asm!(
    ".pushsection .rodata",
    ".globl ladder_common\nladder_common:",
    "push rax",
    "mov rax, {counter}",
    "dec dword ptr [rax]",
    "js 2f",
    "mov rax, [rax + 8]",
    "mov [rsp + 24], rax",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "2:",
    "pop rax",
    "hlt",
    ".globl ladder_common_end\nladder_common_end:",
    // As Linux enters and leaves: GS of the kernel, its stack, some work, SYSRET.
    ".globl ladder_sysret\nladder_sysret:",
    "swapgs",
    "mov gs:[8], rsp",
    "mov rsp, gs:[0]",
    "push r11",
    "push rcx",
    "push rbx",
    "xor ebx, ebx",
    "3:",
    "add rbx, rax",
    "inc qword ptr gs:[24]",
    "inc bh",
    "cmp bh, 3",
    "jb 3b",
    "mov gs:[16], rbx",
    "pop rbx",
    "pop rcx",
    "pop r11",
    "mov rsp, gs:[8]",
    "swapgs",
    "sysretq",
    ".globl ladder_sysret_end\nladder_sysret_end:",
    // The long way out: interrupts on for a while, and IRET.
    ".globl ladder_iret\nladder_iret:",
    "swapgs",
    "mov gs:[8], rsp",
    "mov rsp, gs:[0]",
    "push 0x2b",
    "push qword ptr gs:[8]",
    "push r11",
    "push 0x33",
    "push rcx",
    "sti",
    "pushfq",
    "pop r11",
    "mov gs:[16], r11",
    "cld",
    "cli",
    "lea r11, [rip + 4f]",
    "call r11",
    "swapgs",
    "iretq",
    "4:",
    "push rbp",
    "mov rbp, rsp",
    "inc qword ptr gs:[32]",
    "leave",
    "ret",
    ".globl ladder_iret_end\nladder_iret_end:",
    ".popsection",
    counter = const HIGH + COUNTER,
);

unsafe extern "C" {
    static ladder_common: u8;
    static ladder_common_end: u8;
    static ladder_sysret: u8;
    static ladder_sysret_end: u8;
    static ladder_iret: u8;
    static ladder_iret_end: u8;
}

fn between(from: *const u8, to: *const u8) -> &'static [u8] {
    // SAFETY: both are labels of the section above, `to` behind `from`, and the bytes between them are constant.
    unsafe { std::slice::from_raw_parts(from, to.offset_from(from).unsigned_abs()) }
}

/// What every exception comes to.
pub fn common() -> &'static [u8] {
    between(&raw const ladder_common, &raw const ladder_common_end)
}

/// A system-call entry that ends with SYSRET.
pub fn sysret() -> &'static [u8] {
    between(&raw const ladder_sysret, &raw const ladder_sysret_end)
}

/// A system-call entry that ends with IRET.
pub fn iret() -> &'static [u8] {
    between(&raw const ladder_iret, &raw const ladder_iret_end)
}
