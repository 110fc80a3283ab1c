//! Segmentation, gates and task switches in 32-bit protected mode (SDM 3A 5, 6.12, 8; APM 2 4, 8, 12).

use crate::harness::{Verdict, eq, ok};
use crate::legacy::*;
use crate::mem::{page, rd32, wr8, wr32};
use crate::modes::{ldone, lfault};
use crate::traps::*;
use crate::{code32, desc, tests};

tests!("segments32":
    limits, call_gate_params, call_gate_same_level, retf_immediate, inner_stack_bad, task_jump, task_call_and_iret, task_busy, task_errors,
    task_gate_interrupt, task_gate_error_code, task_state_saved, task_ldt_and_segments, task_debug_trap, tss_limit, double_fault_task,
    conforming, iret_to_user, interrupt_and_trap_gates, gate_16, sixteen_bit_stack,
);

const F: u16 = desc::FREE;
const T1: u16 = desc::FREE + 0x10;

fn limits() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfff, 0x93, 4));
    let run = |c, esi| {
        let mut l = Legacy::kernel(c);
        (l.fs, l.esi) = (u32::from(F), esi);
        l.run()
    };
    ldone(&run(code32!("mov eax, fs:[esi]"), 0xffc), "below the limit")?;
    lfault(&run(code32!("mov eax, fs:[esi]"), 0xffd), GP, 0, "across the limit")?;
    lfault(&run(code32!("mov fs:[esi], al"), 0x1000), GP, 0, "above the limit")
}

fn gate(selector: u16, target: u32, code: u16, access: u8, params: u8) {
    let v = u64::from(target & 0xffff)
        | u64::from(code) << 16
        | u64::from(params) << 32
        | u64::from(access) << 40
        | u64::from(target >> 16) << 48;
    desc::set_gdt(selector, v);
}

fn call_gate_params() -> Verdict {
    let target =
        code32!("mov eax, [esp + 8]", "mov ebx, [esp + 12]", "mov ecx, esp", "mov edx, ss", "retf 8");
    gate(F, target.start as u32, desc::KCS32, 0xec, 2);
    // lcall F|3:0
    let l = Legacy::user(code32!(
        "mov ebp, esp",
        "push 22",
        "push 11",
        ".byte 0x9a, 0, 0, 0, 0, 0x8b, 0",
        "mov esi, esp",
        "mov edi, cs"
    ));
    let o = l.run();
    ldone(&o, "call through a 32-bit gate with two parameters")?;
    ok(o.eax == 11 && o.ebx == 22, "parameters are copied to the inner stack")?;
    eq(u64::from(o.edx & 0xffff), u64::from(desc::KDS), "SS0")?;
    eq(u64::from(o.esi), u64::from(o.ebp), "RETF 8 releases the outer parameters too")?;
    eq(u64::from(o.edi & 3), 3, "CPL 3 again")?;
    eq(u64::from(o.ecx), u64::from(rd32(tss() + 4)) - 24, "six words on the inner stack")
}

fn call_gate_same_level() -> Verdict {
    let target = code32!("mov eax, 77", "mov ecx, esp", "retf");
    gate(F, target.start as u32, desc::KCS32, 0xec, 3);
    let o = Legacy::kernel(code32!("mov ebx, esp", ".byte 0x9a, 0, 0, 0, 0, 0x88, 0", "mov edx, esp")).run();
    ldone(&o, "gate without a change of level")?;
    eq(u64::from(o.eax), 77, "target ran")?;
    eq(u64::from(o.ebx - o.ecx), 8, "two words pushed, no parameters copied")?;
    eq(u64::from(o.edx), u64::from(o.ebx), "ESP")
}

fn retf_immediate() -> Verdict {
    let o = Legacy::kernel(code32!(
        "mov ebx, esp",
        "push 1",
        "push 2",
        "push 0x38",
        "call 2f",
        "jmp 3f",
        "2: retf 8",
        "3: mov ecx, esp"
    ))
    .run();
    ldone(&o, "RETF imm16")?;
    eq(u64::from(o.ecx), u64::from(o.ebx), "ESP")
}

fn inner_stack_bad() -> Verdict {
    let l = Legacy::user(code32!("int3"));
    wr32(tss() + 8, 0);
    lfault(&double(l), DF, 0, "null SS0: #TS, whose handler needs the same stack: #DF by a task gate")?;
    let l = Legacy::user(code32!("int3"));
    // The handler of #TS runs in its own task.
    set_task_gate(10, T1);
    wr32(tss() + 8, u32::from(desc::KCS32));
    let o = l.run();
    lfault(&o, TS, u64::from(desc::KCS32), "SS0 is a code segment")
}

/// Prepares a TSS at T1 whose task runs the handler stub of `vector`, and its gate.
fn set_task_gate(vector: u8, selector: u16) -> u64 {
    let t = make_task(selector, stub_task(vector));
    let at = idt() + u64::from(vector) * 8;
    wr32(at, u32::from(selector) << 16);
    wr32(at + 4, 0xe500);
    t
}

/// Entry for a handler task: no frame was pushed by the CPU but the error code, so build one.
fn stub_task(vector: u8) -> u32 {
    let c = match vector {
        8 => {
            code32!("pop eax", "pushfd", "push cs", "push 0", "push eax", "push 8", "jmp dword ptr [0x8f00]")
        }
        10 => {
            code32!("pop eax", "pushfd", "push cs", "push 0", "push eax", "push 10", "jmp dword ptr [0x8f00]")
        }
        _ => code32!("int 0x80"),
    };
    wr32(0x8f00, crate::legacy::stub(0x80) + 7);
    c.start as u32
}

fn double(l: Legacy) -> LegacyOutcome {
    set_task_gate(8, T1);
    l.run()
}

/// A 32-bit TSS in a fresh page under `selector`, starting at `eip`.
fn make_task(selector: u16, eip: u32) -> u64 {
    let t = page();
    wr32(t + 0x20, eip);
    wr32(t + 0x24, 2);
    wr32(t + 0x38, page() as u32 + 4096);
    for (off, sel) in [(0x48, desc::KDS), (0x4c, desc::KCS32), (0x50, desc::KDS), (0x54, desc::KDS)] {
        wr32(t + off, u32::from(sel));
    }
    wr32(t + 0x64, 104 << 16);
    desc::set_gdt(selector, desc::descriptor(t as u32, 0x67, 0x89, 0));
    t
}

fn access(selector: u16) -> u64 {
    desc::get_gdt(selector) >> 40 & 0xff
}

fn task_jump() -> Verdict {
    let t = make_task(F, code32!("mov ebx, cr0", "str ecx").start as u32);
    wr32(t + 0x28, 0x1234);
    let o = Legacy::kernel(code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0", "nop")).run();
    lfault(&o, END, 0, "JMP to a TSS")?;
    eq(u64::from(o.eax), 0x1234, "EAX of the TSS")?;
    eq(u64::from(o.ecx), u64::from(F), "TR")?;
    ok(o.ebx & 8 != 0, "CR0.TS is set by a task switch")?;
    eq(access(F), 0x8b, "new task busy")?;
    eq(access(desc::TSS32), 0x89, "JMP clears the old task's busy bit")?;
    eq(u64::from(o.eflags & 0x4000), 0, "NT clear")
}

fn task_call_and_iret() -> Verdict {
    let t = make_task(
        F,
        code32!("mov edx, 0x55", "pushfd", "pop esi", "iretd", "mov edx, 0x66", "iretd").start as u32,
    );
    let c = code32!("mov edx, 1", ".byte 0x9a, 0, 0, 0, 0, 0x88, 0", "inc edx", "mov ebx, 3", "str ecx");
    let o = Legacy::kernel(c).run();
    ldone(&o, "CALL to a TSS and IRET back")?;
    eq(u64::from(o.edx), 2, "registers of the caller come back from its TSS")?;
    eq(u64::from(o.ecx), u64::from(desc::TSS32), "TR")?;
    eq(u64::from(rd32(t + 0x30)), 0x55, "EDX of the callee saved in its TSS")?;
    ok(rd32(t + 0x40) & 0x4000 != 0, "NT was set in the callee")?;
    eq(u64::from(rd32(t) & 0xffff), u64::from(desc::TSS32), "back link")?;
    eq(access(F), 0x89, "callee no longer busy")?;
    eq(access(desc::TSS32), 0x8b, "caller busy all the time")
}

fn task_busy() -> Verdict {
    make_task(F, 0);
    desc::set_gdt(F, desc::get_gdt(F) | 2 << 40);
    lfault(
        &Legacy::kernel(code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0")).run(),
        GP,
        u64::from(F),
        "JMP to a busy TSS",
    )?;
    lfault(
        &Legacy::kernel(code32!(".byte 0x9a, 0, 0, 0, 0, 0x60, 0")).run(),
        GP,
        u64::from(desc::TSS32),
        "CALL to the own TSS",
    )
}

fn task_errors() -> Verdict {
    make_task(F, 0);
    desc::set_gdt(F, desc::get_gdt(F) & !(1 << 47));
    let c = code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0");
    lfault(&Legacy::kernel(c).run(), NP, u64::from(F), "TSS not present")?;
    make_task(F, 0);
    lfault(&Legacy::user(c).run(), GP, u64::from(F), "TSS of DPL 0 at CPL 3")?;
    let o = Legacy::kernel(code32!("pushfd", "or dword ptr [esp], 0x4000", "popfd", "iretd")).run();
    lfault(&o, TS, 0, "IRET with NT and a null back link")
}

fn task_gate_interrupt() -> Verdict {
    let l = Legacy::kernel(code32!("mov edx, 5", "int 0x55", "inc edx", "str ecx"));
    let t = make_task(F, code32!("mov ebx, 0x99", "iretd").start as u32);
    wr32(idt() + 0x55 * 8, u32::from(F) << 16);
    wr32(idt() + 0x55 * 8 + 4, 0x8500);
    let o = l.run();
    ldone(&o, "INT through a task gate")?;
    eq(u64::from(o.edx), 6, "went on after IRET")?;
    eq(u64::from(rd32(t + 0x34)), 0x99, "the task ran")?;
    eq(u64::from(o.ecx), u64::from(desc::TSS32), "TR")
}

fn task_gate_error_code() -> Verdict {
    let l = Legacy::kernel(code32!("mov fs, edi"));
    let t = make_task(F, code32!("pop edx", "mov ecx, esp").start as u32);
    wr32(idt() + 13 * 8, u32::from(F) << 16);
    wr32(idt() + 13 * 8 + 4, 0x8500);
    let esp = rd32(t + 0x38);
    let mut l = l;
    l.edi = 0x3f8;
    let o = l.run();
    ldone(&o, "#GP through a task gate")?;
    eq(u64::from(o.edx), 0x3f8, "the error code is on the new task's stack")?;
    eq(u64::from(o.ecx), u64::from(esp), "and nothing else")?;
    eq(u64::from(rd32(tss() + 0x20)), u64::from(l.eip), "EIP of the fault in the old TSS")
}

fn task_state_saved() -> Verdict {
    make_task(F, code32!("nop").start as u32);
    let mut l = Legacy::kernel(code32!("stc", ".byte 0xea, 0, 0, 0, 0, 0x88, 0", "nop"));
    (l.eax, l.ebx, l.ecx, l.edx) = (1, 2, 3, 4);
    (l.esi, l.edi, l.ebp) = (5, 6, 7);
    l.gs = u32::from(desc::KDS);
    let eip = l.eip;
    ldone(&l.run(), "switch")?;
    let t = tss();
    for (off, want) in [(0x28, 1), (0x2c, 3), (0x30, 4), (0x34, 2), (0x3c, 7), (0x40, 5), (0x44, 6)] {
        eq(u64::from(rd32(t + off)), want, "general registers in the old TSS")?;
    }
    eq(u64::from(rd32(t + 0x20)), u64::from(eip) + 8, "EIP after the jump")?;
    eq(u64::from(rd32(t + 0x24)) & 0x203, 3, "EFLAGS")?;
    eq(u64::from(rd32(t + 0x38)), u64::from(stack0()), "ESP")?;
    eq(u64::from(rd32(t + 0x4c) & 0xffff), u64::from(desc::KCS32), "CS")?;
    eq(u64::from(rd32(t + 0x5c) & 0xffff), u64::from(desc::KDS), "GS")
}

fn task_ldt_and_segments() -> Verdict {
    let ldt = page();
    crate::mem::wr(ldt + 8, desc::descriptor(0x100, 0xfffff, 0xf3, 0xc));
    desc::set_gdt(T1 + 0x10, desc::descriptor(ldt as u32, 15, 0x82, 0));
    let t = make_task(F, code32!("mov eax, fs:[0x500]", "sldt ecx").start as u32);
    wr32(t + 0x60, u32::from(T1 + 0x10));
    wr32(t + 0x58, 0xf);
    wr32(0x600, 0xfeed);
    let c = code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0");
    let o = Legacy::kernel(c).run();
    ldone(&o, "task with an LDT")?;
    eq(u64::from(o.eax), 0xfeed, "FS from the LDT")?;
    eq(u64::from(o.ecx), u64::from(T1 + 0x10), "LDTR")?;
    let t = make_task(F, 0);
    wr32(t + 0x60, u32::from(desc::KDS));
    lfault(&invalid_tss(c), TS, u64::from(desc::KDS), "LDT selector of another type")?;
    let t = make_task(F, 0);
    wr32(t + 0x54, 0x3f8);
    lfault(&invalid_tss(c), TS, 0x3f8, "bad DS in the new TSS")?;
    let t = make_task(F, 0);
    wr32(t + 0x4c, u32::from(desc::KDS));
    lfault(&invalid_tss(c), TS, u64::from(desc::KDS), "CS that is no code")
}

/// Runs code whose task switch fails after its point of no return: #TS comes in the new task with its
/// segments not loaded, so that only a task gate can handle it (SDM 3A 8.3, 6.15 interrupt 10).
fn invalid_tss(c: Code) -> LegacyOutcome {
    let l = Legacy::kernel(c);
    set_task_gate(10, T1);
    l.run()
}

fn task_debug_trap() -> Verdict {
    crate::cpu::set_dr6(0);
    let t = make_task(F, code32!("nop", "nop").start as u32);
    wr8(t + 0x64, 1);
    let o = Legacy::kernel(code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0")).run();
    lfault(&o, DB, 0, "T bit of the TSS")?;
    eq(crate::cpu::dr6() & 0xe00f, 0x8000, "DR6.BT")?;
    eq(u64::from(o.eip), u64::from(rd32(t + 0x20)), "before the first instruction")
}

fn tss_limit() -> Verdict {
    let t = make_task(F, 0);
    desc::set_gdt(F, desc::descriptor(t as u32, 0x66, 0x89, 0));
    let o = Legacy::kernel(code32!(".byte 0xea, 0, 0, 0, 0, 0x88, 0")).run();
    lfault(&o, TS, u64::from(F), "TSS with a limit below 67H")
}

fn double_fault_task() -> Verdict {
    // The classic use: the stack is gone, #PF or #GP cannot be delivered, #DF has its own task.
    let mut l = Legacy::kernel(code32!("mov esp, edi", "push eax"));
    l.edi = 0x1000;
    desc::set_gdt(F, desc::descriptor(0, 0xfff, 0x97, 4));
    l.ss = u32::from(F);
    l.esp = 0x8000;
    // Expand-down with limit FFFH: a push at 1000H is below the segment: #SS, and its delivery fails again.
    let o = double(l);
    lfault(&o, DF, 0, "push on an exhausted stack")?;
    eq(u64::from(o.tr), u64::from(T1), "handler task")
}

fn conforming() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9f, 0xc));
    let c = code32!(
        "call 2f",
        "2: pop eax",
        ".byte 0x8d, 0x40, 3f - 2b",
        "push edi",
        "push eax",
        "retf",
        "3: mov ecx, cs"
    );
    let mut l = Legacy::user(c);
    l.edi = 0x88;
    lfault(&l.run(), GP, 0x88, "RETF to RPL 0 at CPL 3")?;
    l.edi = 0x8b;
    let o = l.run();
    ldone(&o, "RETF to conforming code")?;
    eq(u64::from(o.ecx & 0xffff), 0x8b, "CPL stays 3")
}

fn iret_to_user() -> Verdict {
    let user = code32!("mov ecx, cs", "mov edx, ss", "mov esi, esp", "mov edi, ds");
    let mut l = Legacy::kernel(code32!("push 0x23", "push ebx", "push 2", "push 0x1b", "push eax", "iretd"));
    (l.eax, l.ebx) = (user.start as u32, stack3());
    let o = l.run();
    ldone(&o, "IRET to CPL 3")?;
    ok(o.ecx & 0xffff == 0x1b && o.edx & 0xffff == 0x23, "CS and SS")?;
    eq(u64::from(o.esi), u64::from(stack3()), "ESP")?;
    eq(u64::from(o.edi & 0xffff), 0, "DS of DPL 0 is nulled")
}

fn interrupt_and_trap_gates() -> Verdict {
    let handler = code32!("pushfd", "pop eax").start as u32;
    for (kind, want) in [(0x8e, 0), (0x8f, 0x200)] {
        let l = Legacy::kernel(code32!("sti", "nop", "int 0x56"));
        set_gate(0x56, handler, desc::KCS32, kind);
        let o = l.run();
        ldone(&o, "INT")?;
        eq(u64::from(o.eax & 0x200), want, "IF: cleared by an interrupt gate, kept by a trap gate")?;
    }
    Ok(())
}

fn gate_16() -> Verdict {
    // A 16-bit interrupt gate pushes words; its handler must lie below 64 KiB.
    let code = crate::code16!("nop");
    crate::mem::put(0x9000, code.bytes());
    let l = Legacy::kernel(code32!("mov ebx, esp", "int 0x57"));
    set_gate(0x57, 0x9000, desc::KCS16, 0x86);
    set_gate(0x80, crate::legacy::stub(0x80), desc::KCS32, 0xee);
    let o = l.run();
    ldone(&o, "16-bit gate")?;
    eq(u64::from(o.ebx) - u64::from(o.esp), 6, "three words pushed")
}

fn sixteen_bit_stack() -> Verdict {
    // With SS.B clear the stack pointer is SP: it wraps at 64 KiB and the upper half stays.
    let mut l = Legacy::kernel(code32!(
        "mov esp, 0x12340004",
        "push 1",
        "push 2",
        "mov ecx, esp",
        "mov eax, 0x10",
        "mov ss, eax",
        "mov esp, ebx"
    ));
    l.ss = u32::from(desc::KDS16);
    l.ebx = stack0();
    l.esp = 0x6700;
    let keep = rd32(0xfffc);
    let o = l.run();
    wr32(0xfffc, keep);
    ldone(&o, "16-bit stack")?;
    eq(u64::from(o.ecx), 0x1234_fffc, "SP wraps, the upper half of ESP stays")
}
