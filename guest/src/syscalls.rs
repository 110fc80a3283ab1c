//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and the forms of IRET.

use crate::harness::{Verdict, done, eq, fault, ok};
use crate::legacy::{Legacy, stack0, stack3};
use crate::mem::ALIAS;
use crate::modes::{ldone, lfault};
use crate::traps::*;
use crate::{code32, code64, cpu, desc, skip, tests};

tests!("syscalls":
    syscall_enters, syscall_masks_flags, syscall_round_trip, sysret_32, sysret_noncanonical, sysret_loads_flags, syscall_compat, sysenter_long,
    sysexit_long, sysenter_32, sysenter_null_cs, iretq_same_level, iretq_to_user32, iretq_flags, iretd_in_long_mode, iretq_from_compat,
    iretq_noncanonical_rip, syscall_at_cpl0, syscall_tf,
);

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;

/// STAR: kernel CS 8 and SS 10H; SYSRET base 1BH, thus user SS 23H, CS64 2BH, CS32 1BH.
fn set_star(entry: u64, mask: u64) {
    cpu::wrmsr(STAR, 0x001b_0008 << 32);
    cpu::wrmsr(LSTAR, entry);
    cpu::wrmsr(CSTAR, entry);
    cpu::wrmsr(FMASK, mask);
}

fn syscall_enters() -> Verdict {
    set_star(code64!("mov r8d, cs", "mov r9d, ss", "mov r10, rsp").start, 0);
    let c = code64!("mov rbx, rsp", "syscall", "nop");
    let o = Ctx::user(c).run();
    done(&o, "SYSCALL")?;
    eq(o.rcx, c.start + ALIAS + 5, "RCX is the return address")?;
    eq(o.r8, u64::from(desc::KCS), "CS")?;
    eq(o.r9, u64::from(desc::KDS), "SS")?;
    eq(o.r10, o.rbx, "RSP is not switched")
}

fn syscall_masks_flags() -> Verdict {
    set_star(code64!("pushfq", "pop r8").start, 0x4_0701);
    let o = Ctx::user(code64!("std", "stc", "pushfq", "pop rbx", "syscall")).flags(0x4_0200).run();
    done(&o, "SYSCALL")?;
    eq(o.r11 & 0x4_0601, 0x4_0601, "R11 holds the old flags")?;
    eq(o.r8 & 0x4_0701, 0, "flags under the mask are clear")?;
    eq(o.r11 & !0x1_0000, o.rbx & !0x1_0000, "R11 is RFLAGS")
}

fn syscall_round_trip() -> Verdict {
    set_star(code64!("add rax, 1", "sysretq").start, 0x200);
    let c = code64!("mov eax, 5", "syscall", "syscall", "mov r8d, cs", "mov r9d, ss", "pushfq", "pop r10");
    let o = Ctx::user(c).flags(0x200).run();
    done(&o, "SYSCALL and SYSRET")?;
    eq(o.rax, 7, "two calls")?;
    eq(o.r8, u64::from(desc::UCS), "CS after SYSRET")?;
    eq(o.r9, u64::from(desc::UDS), "SS after SYSRET")?;
    eq(o.r10 & 0x200, 0x200, "IF is back from R11")
}

fn sysret_32() -> Verdict {
    set_star(0, 0);
    let target = code32!("inc eax", "mov edx, cs").start + ALIAS;
    let c = code64!("mov eax, 7", "mov rcx, rdi", "mov r11d, 2", ".byte 0x0f, 0x07");
    let mut x = Ctx::kernel(c).rdi(target);
    x.0.rsp = user_stack();
    let o = x.run();
    done(&o, "SYSRET to compatibility mode")?;
    eq(o.rdx & 0xffff, u64::from(desc::UCS32), "CS")?;
    eq(o.rax, 8, "40H is INC there")
}

fn sysret_noncanonical() -> Verdict {
    set_star(0, 0);
    let c = code64!("mov rcx, rdi", "mov r11d, 2", "sysretq");
    let mut x = Ctx::kernel(c).rdi(0x8000_0000_0000);
    x.0.rsp = sys_stack();
    let o = x.run();
    fault(&o, GP, 0, "SYSRET with a non-canonical RCX")?;
    // Intel raises it at CPL 0 at the SYSRET, AMD at CPL 3 at the target.
    if cpu::is_intel() {
        eq(o.cs & 3, 0, "CPL of the fault")?;
    }
    Ok(())
}

fn sysret_loads_flags() -> Verdict {
    set_star(0, 0);
    let target = code64!("pushfq", "pop rdx", "mov r8, rsp").start + ALIAS;
    let c = code64!("mov rcx, rdi", "mov r11, 0x33ed7", "sysretq");
    let mut x = Ctx::kernel(c).rdi(target);
    x.0.rsp = user_stack();
    set_mode(1, RESUME | CLEAR_TF);
    let o = x.run();
    done(&o, "SYSRET")?;
    eq(o.rdx & 0x3_0000, 0, "RF and VM are clear")?;
    eq(o.rdx & 0x3ed7 & !0x100, 0x3ed7 & !0x100, "the rest comes from R11")?;
    eq(o.r8, user_stack(), "RSP is the kernel's to load")
}

fn syscall_compat() -> Verdict {
    set_star(code64!("mov r8d, cs").start, 0);
    let c = code32!("mov eax, 5", "syscall", "nop");
    let o = Ctx::user32(c).run();
    if cpu::is_intel() {
        return fault(&o, UD, 0, "SYSCALL in compatibility mode on Intel");
    }
    done(&o, "SYSCALL in compatibility mode on AMD")?;
    eq(o.r8, u64::from(desc::KCS), "enters 64-bit mode through CSTAR")?;
    eq(o.rcx, c.start + ALIAS + 7, "RCX")
}

fn sysenter_msrs(cs: u64, esp: u64, eip: u64) {
    cpu::wrmsr(0x174, cs);
    cpu::wrmsr(0x175, esp);
    cpu::wrmsr(0x176, eip);
}

fn sysenter_long() -> Verdict {
    sysenter_msrs(
        8,
        sys_stack(),
        code64!("mov r8d, cs", "mov r9d, ss", "mov r10, rsp", "pushfq", "pop r11").start,
    );
    let o = Ctx::user(code64!("sysenter")).flags(0x200).run();
    if cpu::is_amd() {
        return fault(&o, UD, 0, "SYSENTER in long mode on AMD");
    }
    done(&o, "SYSENTER from 64-bit mode")?;
    eq(o.r8, 8, "CS")?;
    eq(o.r9, 0x10, "SS")?;
    eq(o.r10, sys_stack(), "RSP")?;
    eq(o.r11 & 0x200, 0, "IF is clear")?;
    let o = Ctx::user32(code32!("sysenter")).run();
    done(&o, "SYSENTER from compatibility mode")?;
    eq(o.r10, sys_stack(), "RSP")
}

fn sysexit_long() -> Verdict {
    sysenter_msrs(8, 0, 0);
    let target = code64!("mov r8d, cs", "mov r9d, ss", "mov r10, rsp").start + ALIAS;
    let o = Ctx::kernel(code64!(".byte 0x48, 0x0f, 0x35")).rdx(target).rcx(user_stack()).run();
    if cpu::is_amd() {
        return fault(&o, UD, 0, "SYSEXIT in long mode on AMD");
    }
    done(&o, "SYSEXIT to 64-bit mode")?;
    eq(o.r8, 0x2b, "CS is SYSENTER_CS + 32, RPL 3")?;
    eq(o.r9, 0x33, "SS is SYSENTER_CS + 40, RPL 3")?;
    eq(o.r10, user_stack(), "RSP")?;
    fault(&Ctx::user(code64!("sysexit")).run(), GP, 0, "SYSEXIT at CPL 3")
}

fn sysenter_32() -> Verdict {
    if !cpu::has_sep() {
        skip!("no SEP");
    }
    // Selectors: CS = SYSENTER_CS, SS + 8; SYSEXIT: CS + 16, SS + 24. 38H is 32-bit code, 40H is not data,
    // but SYSENTER reads no descriptor.
    let back = code32!("mov edx, cs", "mov esi, ss", "mov edi, esp").start;
    let entry = code32!(
        "mov ebx, cs",
        "mov edx, ss",
        "pushfd",
        "pop esi",
        "mov edi, esp",
        "mov ebp, eax",
        "mov edx, ebp",
        "mov ecx, eax",
        "mov edx, eax",
        "mov ecx, esp",
        "int 0x80"
    )
    .start;
    sysenter_msrs(u64::from(desc::KCS32), u64::from(stack0()), entry);
    let mut l = Legacy::user(code32!("sysenter"));
    l.eflags |= 0x200;
    let o = l.run();
    ldone(&o, "SYSENTER in protected mode")?;
    eq(u64::from(o.ebx & 0xffff), u64::from(desc::KCS32), "CS")?;
    eq(u64::from(o.edi), u64::from(stack0()), "ESP")?;
    eq(u64::from(o.esi) & 0x2_0200, 0, "IF and VM clear")?;
    // SYSEXIT with SYSENTER_CS 8: CS 1BH, SS 23H.
    sysenter_msrs(8, 0, 0);
    let mut l = Legacy::kernel(code32!("sysexit"));
    (l.edx, l.ecx) = (back as u32, stack3());
    let o = l.run();
    ldone(&o, "SYSEXIT in protected mode")?;
    ok(o.edx & 0xffff == 0x1b && o.esi & 0xffff == 0x23, "CS and SS")?;
    eq(u64::from(o.edi), u64::from(stack3()), "ESP")
}

fn sysenter_null_cs() -> Verdict {
    sysenter_msrs(0, 0, 0);
    lfault(&Legacy::user(code32!("sysenter")).run(), GP, 0, "SYSENTER_CS is null")?;
    lfault(&Legacy::kernel(code32!("sysexit")).run(), GP, 0, "SYSEXIT with a null SYSENTER_CS")
}

fn iretq_same_level() -> Verdict {
    let c = code64!(
        "mov rax, rsp",
        "sub rax, 64",
        "push 0x10",
        "push rax",
        "push 0x2",
        "push 8",
        "lea rdx, [rip + 2f]",
        "push rdx",
        "iretq",
        "2: mov rcx, rsp"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "IRETQ at CPL 0")?;
    eq(o.rcx, sys_stack() - 64, "RSP is popped even without a change of level")?;
    let c = code64!(
        "push 0",
        "push rsp",
        "push 2",
        "push 8",
        "lea rdx, [rip + 2f]",
        "push rdx",
        "iretq",
        "2: mov ecx, ss"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "IRETQ with a null SS to CPL 0 in 64-bit mode")?;
    eq(o.rcx, 0, "SS")
}

fn iretq_to_user32() -> Verdict {
    let target = code32!("mov ecx, cs", "mov edx, esp", "inc eax").start + ALIAS;
    let c = code64!("push 0x23", "push rsi", "push 2", "push 0x1b", "push rdi", "iretq");
    let o = Ctx::kernel(c).rdi(target).rsi(user_stack()).rax(4).run();
    done(&o, "IRETQ to compatibility mode")?;
    eq(o.rcx & 0xffff, u64::from(desc::UCS32), "CS")?;
    eq(o.rdx, user_stack(), "ESP")?;
    eq(o.rax, 5, "INC")
}

fn iretq_flags() -> Verdict {
    let c = code64!(
        "push 0x10",
        "push rsp",
        "push 0x3cd7",
        "push 8",
        "lea rdx, [rip + 2f]",
        "push rdx",
        "iretq",
        "2: pushfq",
        "pop rcx",
        "push 2",
        "popfq"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "IRETQ")?;
    eq(o.rcx & 0x3cd7, 0x3cd7, "flags")
}

fn iretd_in_long_mode() -> Verdict {
    // IRETD in 64-bit mode pops five double words.
    let c = code64!(
        "sub rsp, 20",
        "lea rdx, [rip + 2f]",
        "mov [rsp], edx",
        "mov dword ptr [rsp + 4], 8",
        "mov dword ptr [rsp + 8], 3",
        "lea eax, [rsp + 20]",
        "mov [rsp + 12], eax",
        "mov dword ptr [rsp + 16], 0x10",
        ".byte 0xcf",
        "2: mov rcx, rsp",
        "pushfq",
        "pop rax"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "IRETD")?;
    eq(o.rcx, sys_stack(), "RSP")?;
    eq(o.rax & 1, 1, "CF from the frame")
}

fn iretq_from_compat() -> Verdict {
    // IRETD in compatibility mode at the same level pops three double words.
    let c = code32!(
        "mov ebx, esp",
        "push 0x3",
        "push 0x38",
        "call 2f",
        "2: pop eax",
        ".byte 0x83, 0xc0, 3f - 2b",
        "push eax",
        "iretd",
        "3: mov ecx, esp",
        "pushfd",
        "pop eax"
    );
    let o = Ctx::kernel32(c).run();
    done(&o, "IRETD in compatibility mode")?;
    eq(o.rcx, o.rbx, "ESP")?;
    eq(o.rax & 1, 1, "CF")
}

fn iretq_noncanonical_rip() -> Verdict {
    let c = code64!("push 0x10", "push rsp", "push 2", "push 8", "push rdi", "iretq");
    fault(&Ctx::kernel(c).rdi(0x8000_0000_0000).run(), GP, 0, "non-canonical RIP")
}

fn syscall_at_cpl0() -> Verdict {
    set_star(code64!("mov rbx, rcx").start, 0);
    let c = code64!("syscall");
    let o = Ctx::kernel(c).run();
    done(&o, "SYSCALL at CPL 0")?;
    eq(o.rbx, c.start + 2, "RCX")
}

fn syscall_tf() -> Verdict {
    // TF under the mask: no trap after SYSCALL; TF in R11: SYSRET restores it and traps.
    set_star(code64!("mov rbx, r11", "sysretq").start, 0x100);
    set_mode(1, RESUME | CLEAR_TF);
    let c = code64!("pushfq", "or dword ptr [rsp], 0x100", "popfq", "syscall", "nop", "nop");
    let o = Ctx::user(c).run();
    done(&o, "code")?;
    eq(u64::from(count(1)), 1, "one trap")?;
    eq(o.rbx & 0x100, 0x100, "R11 has TF")?;
    ok(log(0).rip >= c.end - 4 + ALIAS && log(0).rip < c.end + ALIAS, "after SYSRET, at CPL 3")
}
