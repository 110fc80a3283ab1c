//! Mode switches: compatibility, 32-bit protected, real, unreal and virtual-8086 mode, and back.

use crate::harness::{Verdict, done, eq, fault, ok};
use crate::legacy::*;
use crate::mem::{rd32, wr32};
use crate::traps::*;
use crate::{code16, code32, code64, cpu, desc, tests};

tests!("modes":
    compatibility, compat_to_long_and_back, protected_32, protected_32_user, real_mode, real_mode_segments, real_mode_limit,
    real_interrupt, unreal, v86_basic, v86_iopl0, v86_iopl3, v86_segments, v86_int_n, v86_io_bitmap, long_mode_state_kept,
    many_switches,
);

/// Fails unless the outcome is this vector and error.
pub fn lfault(o: &LegacyOutcome, vector: u64, error: u64, what: &str) -> Verdict {
    if o.vector != vector || o.error != error {
        crate::fail!(
            "{what}: vector {:#x} error {:#x} eip {:#x} cs {:#x} cr2 {:#x}, expected vector {vector:#x} error {error:#x}",
            o.vector,
            o.error,
            o.eip,
            o.cs,
            o.cr2
        );
    }
    Ok(())
}

/// Fails unless the snippet came to its end.
pub fn ldone(o: &LegacyOutcome, what: &str) -> Verdict {
    lfault(o, END, 0, what)
}

fn compatibility() -> Verdict {
    let o = Ctx::kernel32(code32!("mov eax, -1", "inc eax", "dec eax", "mov ecx, cs", "push eax", "pop edx"))
        .rax(1)
        .run();
    done(&o, "32-bit code at CPL 0")?;
    eq(o.rax, 0xffff_ffff, "40H to 4FH are INC and DEC, upper half zero")?;
    eq(o.rcx & 0xffff, u64::from(desc::KCS32), "CS")?;
    eq(o.rsp, sys_stack(), "PUSH and POP are 4 bytes")?;
    let o = Ctx::user32(code32!("mov eax, esp", "push eax", "push ax", "mov ecx, esp")).run();
    done(&o, "32-bit code at CPL 3")?;
    eq(o.rax - o.rcx, 6, "PUSH sizes")
}

fn compat_to_long_and_back() -> Verdict {
    // Far jump into 64-bit code, REX works there; far return to 32-bit code.
    let c = code32!(
        "call 2f",
        "2: pop ebx",
        "add ebx, 16",
        "push 0x08",
        "push ebx",
        "retf",
        ".balign 8",
        "nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop;nop",
        ".code64",
        "mov r8, 0x123456789abcdef",
        "push 0x38",
        "lea rax, [rip + 3f]",
        "push rax",
        ".byte 0x48, 0xcb",
        ".code32",
        "3: mov eax, 0x55",
        "inc eax"
    );
    let o = Ctx::kernel32(c).run();
    done(&o, "compat to long and back")?;
    eq(o.r8, 0x0123_4567_89ab_cdef, "64-bit register survives in compatibility mode")?;
    eq(o.rax, 0x56, "32-bit code ran")?;
    eq(o.cs, u64::from(desc::KCS32), "CS")
}

fn protected_32() -> Verdict {
    let mut l = Legacy::kernel(code32!(
        "mov eax, cr0",
        "mov ebx, cr4",
        "smsw ecx",
        "mov edx, cs",
        "inc esi",
        "add esi, 0xffffffff"
    ));
    l.esi = 0x1234_5678;
    let o = l.run();
    ldone(&o, "protected mode")?;
    eq(u64::from(o.eax), u64::from(CR0_PM), "CR0 without PG")?;
    eq(u64::from(o.ebx), 0x600, "CR4")?;
    eq(u64::from(o.edx & 0xffff), u64::from(desc::KCS32), "CS")?;
    eq(u64::from(o.esi), 0x1234_5678, "ESI")?;
    eq(u64::from(o.esp), u64::from(stack0()), "ESP")?;
    // EFER.LMA is clear now.
    let o = Legacy::kernel(code32!("mov ecx, 0xc0000080", "rdmsr")).run();
    ldone(&o, "rdmsr")?;
    eq(u64::from(o.eax & 0x500), 0, "LMA and LME clear")
}

fn protected_32_user() -> Verdict {
    let o = Legacy::user(code32!("mov eax, cs", "mov ebx, ss", "mov ecx, esp")).run();
    ldone(&o, "CPL 3")?;
    eq(u64::from(o.eax & 3), 3, "CPL")?;
    eq(u64::from(o.ss), u64::from(desc::UDS), "SS on the stack")?;
    eq(u64::from(o.esp), u64::from(o.ecx), "ESP on the stack")?;
    eq(u64::from(o.handler_ss), u64::from(desc::KDS), "SS0 of the TSS")?;
    lfault(&Legacy::user(code32!("cli")).run(), GP, 0, "CLI at CPL 3")?;
    lfault(&Legacy::user(code32!("int 0x42")).run(), GP, 0x42 * 8 + 2, "INT through a gate of DPL 0")
}

fn real_mode() -> Verdict {
    let mut l = Legacy::real(
        code16!("mov eax, cr0", "mov ecx, 0x12345678", "mov dx, cs", "add bx, 1", "smsw si"),
        false,
    );
    l.ebx = 0x0001_ffff;
    let o = l.run();
    ldone(&o, "real mode")?;
    eq(u64::from(o.eax & 1), 0, "PE clear")?;
    eq(u64::from(o.ecx), 0x1234_5678, "32-bit operand in real mode")?;
    eq(u64::from(o.edx & 0xffff), u64::from(LOW >> 4), "CS")?;
    eq(u64::from(o.ebx), 0x1_0000, "16-bit addition keeps the upper half")?;
    eq(u64::from(o.esi & 1), 0, "SMSW")
}

fn real_mode_segments() -> Verdict {
    wr32(0x9800, 0xcafe_f00d);
    let o = Legacy::real(
        code16!(
            "mov ax, 0x980",
            "mov ds, ax",
            "mov eax, dword ptr ds:[0]",
            "mov bx, 0x900",
            "mov es, bx",
            "mov edx, dword ptr es:[0x800]"
        ),
        false,
    )
    .run();
    ldone(&o, "segments")?;
    eq(u64::from(o.eax), 0xcafe_f00d, "DS:0")?;
    eq(u64::from(o.edx), 0xcafe_f00d, "ES:800H")?;
    eq(u64::from(o.ds), 0x980, "DS")
}

fn real_mode_limit() -> Verdict {
    let o = Legacy::real(code16!("mov eax, dword ptr ds:[0xfffd]"), false).run();
    lfault(&o, GP, 0, "read across FFFFH raises #GP")?;
    let o = Legacy::real(code16!("mov ax, word ptr ds:[0xffff]"), false).run();
    lfault(&o, GP, 0, "word at FFFFH")?;
    let o = Legacy::real(code16!("mov ebx, 0x10000", "mov al, byte ptr ds:[ebx]"), false).run();
    lfault(&o, GP, 0, "32-bit address beyond the limit")?;
    let o = Legacy::real(code16!("mov ebp, 0x10000", "mov al, byte ptr ss:[ebp]"), false).run();
    lfault(&o, SS, 0, "stack segment: #SS")
}

fn real_interrupt() -> Verdict {
    let o = Legacy::real(code16!("xor cx, cx", "div cx"), false).run();
    lfault(&o, DE, 0, "#DE in real mode")?;
    let o = Legacy::real(code16!("sti", "stc", "int 0x21"), false).run();
    lfault(&o, 0x21, 0, "INT 21H")?;
    ok(o.eflags & 0x201 == 0x201, "IF and CF on the stack")?;
    let o = Legacy::real(code16!("lldt ax"), false).run();
    lfault(&o, UD, 0, "LLDT is undefined in real mode")
}

fn unreal() -> Verdict {
    let at = crate::mem::BIG;
    wr32(at, 0x1357_9bdf);
    let mut l = Legacy::real(code16!("mov eax, dword ptr fs:[ebx]", "mov dword ptr fs:[ebx + 4], ecx"), true);
    l.ebx = at as u32;
    l.ecx = 0x2468_ace0;
    let o = l.run();
    ldone(&o, "FS with a limit of 4 GiB in real mode")?;
    eq(u64::from(o.eax), 0x1357_9bdf, "read")?;
    eq(u64::from(rd32(at + 4)), 0x2468_ace0, "write")?;
    // Loading FS in real mode changes the base, not the limit.
    let mut l =
        Legacy::real(code16!("mov ax, 0x10", "mov fs, ax", "mov eax, dword ptr fs:[ebx - 0x100]"), true);
    l.ebx = at as u32;
    let o = l.run();
    ldone(&o, "limit stays after MOV FS")?;
    eq(u64::from(o.eax), 0x1357_9bdf, "base is selector * 16")
}

fn v86_basic() -> Verdict {
    let mut l = Legacy::v86(
        code16!(
            "mov ax, cs",
            "mov bx, ds",
            "mov cx, 0x1234",
            "mov word ptr ds:[0x700], cx",
            "mov dx, word ptr ds:[0x700]"
        ),
        3,
    );
    l.ds = 0x950;
    let o = l.run();
    ldone(&o, "V86")?;
    eq(u64::from(o.eax & 0xffff), u64::from(LOW >> 4), "CS")?;
    eq(u64::from(o.ebx & 0xffff), 0x950, "DS")?;
    eq(u64::from(rd32(0x9c00) & 0xffff), 0x1234, "store at segment * 16 + offset")?;
    ok(o.eflags & 0x2_0000 != 0, "VM in the saved EFLAGS")?;
    eq(u64::from(o.ds), 0x950, "DS saved on the stack")
}

fn v86_iopl0() -> Verdict {
    for (c, what) in [
        (code16!("cli"), "CLI"),
        (code16!("sti"), "STI"),
        (code16!("pushf"), "PUSHF"),
        (code16!("popf"), "POPF"),
        (code16!("iret"), "IRET"),
        (code16!("int 0x80"), "INT n"),
        (code16!("hlt"), "HLT"),
    ] {
        let o = Legacy::v86(c, 0).run();
        lfault(&o, GP, 0, what)?;
        eq(u64::from(o.eip), 0, "EIP at the instruction")?;
    }
    lfault(&Legacy::v86(code16!("int3"), 0).run(), BP, 0, "INT3 is not IOPL-sensitive")
}

fn v86_iopl3() -> Verdict {
    let o = Legacy::v86(
        code16!("sti", "pushf", "pop ax", "cli", "pushf", "pop bx", "push 0x3202", "popf", "pushf", "pop cx"),
        3,
    )
    .run();
    ldone(&o, "IOPL 3")?;
    eq(u64::from(o.eax & 0x200), 0x200, "STI sets IF")?;
    eq(u64::from(o.ebx & 0x200), 0, "CLI clears IF")?;
    eq(u64::from(o.ecx & 0x3200), 0x3200, "POPF changes IF")?;
    lfault(&Legacy::v86(code16!("hlt"), 3).run(), GP, 0, "HLT stays privileged")?;
    lfault(&Legacy::v86(code16!("mov eax, cr0"), 3).run(), GP, 0, "MOV CR stays privileged")?;
    lfault(&Legacy::v86(code16!("sldt ax"), 3).run(), UD, 0, "SLDT is undefined in V86 mode")
}

fn v86_segments() -> Verdict {
    wr32(0x9d00, 0x600d_600d);
    let o = Legacy::v86(
        code16!(
            "mov ax, 0x9d0",
            "mov es, ax",
            "mov ebx, dword ptr es:[0]",
            "push es",
            "pop fs",
            "mov cx, fs"
        ),
        3,
    )
    .run();
    ldone(&o, "segment loads in V86 mode")?;
    eq(u64::from(o.ebx), 0x600d_600d, "base is selector * 16")?;
    eq(u64::from(o.fs), 0x9d0, "FS")?;
    lfault(&Legacy::v86(code16!("mov ax, word ptr ds:[0xffff]"), 3).run(), GP, 0, "limit 64 KiB")
}

fn v86_int_n() -> Verdict {
    let mut l = Legacy::v86(code16!("nop", "int 0x80"), 3);
    (l.fs, l.gs, l.ds, l.es) = (0x111, 0x222, 0x333, 0x444);
    let o = l.run();
    ldone(&o, "INT at IOPL 3 goes through the IDT")?;
    eq(u64::from(o.eip), 3, "EIP")?;
    ok(
        o.fs == 0x111 && o.gs == 0x222 && o.ds == 0x333 && o.es == 0x444,
        "segments saved on the CPL 0 stack",
    )?;
    eq(u64::from(o.esp), 0x6700, "ESP")
}

fn v86_io_bitmap() -> Verdict {
    lfault(&Legacy::v86(code16!("in al, 0x61"), 3).run(), GP, 0, "IN, bitmap set, even at IOPL 3")?;
    let l = Legacy::v86(code16!("in al, 0x61"), 0);
    crate::mem::wr8(tss() + 104 + 0x61 / 8, 0xff & !(1 << (0x61 & 7)));
    let o = l.run();
    lfault(&o, GP, 0, "INT 80H at IOPL 0")?;
    eq(u64::from(o.eip), 2, "IN, bitmap clear, is allowed even at IOPL 0")
}

fn long_mode_state_kept() -> Verdict {
    let before = (cpu::cr0(), cpu::cr3(), cpu::cr4(), cpu::rdmsr(0xc000_0080));
    ldone(&Legacy::kernel(code32!("nop")).run(), "to protected mode and back")?;
    let after = (cpu::cr0(), cpu::cr3(), cpu::cr4(), cpu::rdmsr(0xc000_0080));
    ok(before == after, "CR0, CR3, CR4, EFER as before")?;
    let o = Ctx::kernel(code64!("mov r9, 0x8877665544332211", "str ax")).run();
    done(&o, "64-bit code again")?;
    eq(o.rax & 0xffff, u64::from(desc::TSS), "task register")?;
    fault(&Ctx::kernel(code64!("ud2")).run(), UD, 0, "exceptions again")
}

fn many_switches() -> Verdict {
    for i in 0..20u32 {
        let mut l = Legacy::real(code16!("inc ebx"), false);
        l.ebx = i;
        let o = l.run();
        ldone(&o, "real")?;
        eq(u64::from(o.ebx), u64::from(i) + 1, "EBX")?;
        let o = Ctx::user32(code32!("inc ebx")).rbx(u64::from(i)).run();
        done(&o, "compat")?;
        eq(o.rbx, u64::from(i) + 1, "EBX in compatibility mode")?;
    }
    Ok(())
}
