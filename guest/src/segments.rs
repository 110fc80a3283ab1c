//! Segmentation in long and compatibility mode: selector checks, limits, gates, stacks, FS and GS bases.

use crate::harness::{Verdict, clean, done, eq, fault, ok};
use crate::mem::ALIAS;
use crate::traps::*;
use crate::{code32, code64, cpu, desc, mem, skip, tests};
use core::arch::asm;

tests!("segments":
    null_data, null_ss, load_errors, privilege_checks, accessed_bit, accessed_bit_cs, descriptor_types, compat_limit, compat_stack_limit, compat_expand_down,
    compat_readonly, compat_execute_only, compat_null_use, compat_code_limit, conforming_code, far_jump_errors, l_and_d_code,
    call_gate_64, call_gate_errors, retf_outer_and_back, retf_inner, ldt, lldt_errors, ltr, ltr_errors, ltr_null, stack_switch_rsp0,
    stack_alignment, ist_selects_stack, fs_gs_base_msr, base_noncanonical, fsgsbase, swapgs, lss_lfs_lgs, mov_cs, segment_push_pop,
    base_zero_in_long_mode, iret_nt, data_base_compat,
);

const F: u16 = desc::FREE;
/// Present writable data, DPL 3.
const DATA3: u8 = 0xf3;

fn load_ds(selector: u16) -> Outcome {
    Ctx::kernel(code64!("mov ds, edi")).rdi(u64::from(selector)).run()
}
fn user_load_ds(selector: u16) -> Outcome {
    Ctx::user(code64!("mov ds, edi")).rdi(u64::from(selector)).run()
}

fn null_data() -> Verdict {
    for s in 0..4u64 {
        let o = Ctx::kernel(code64!("mov ds, edi", "mov es, edi", "mov rax, [rsi]", "mov ecx, ds"))
            .rdi(s)
            .rsi(sys_stack())
            .run();
        done(&o, "null selectors in DS and ES")?;
        eq(o.rcx, s, "DS reads back with its RPL")?;
    }
    Ok(())
}

fn null_ss() -> Verdict {
    let c = code64!("mov ss, edi", "push rax", "pop rax", "mov ecx, ss");
    done(&Ctx::kernel(c).rdi(0).run(), "null SS at CPL 0 in 64-bit mode")?;
    fault(&Ctx::user(c).rdi(3).run(), GP, 0, "null SS at CPL 3")?;
    fault(&Ctx::kernel32(code32!("mov ss, edi")).rdi(0).run(), GP, 0, "null SS in compatibility mode")
}

fn load_errors() -> Verdict {
    fault(&load_ds(0x3f8), GP, 0x3f8, "beyond the GDT limit")?;
    fault(&load_ds(0x3fb), GP, 0x3f8, "error code without RPL")?;
    fault(&load_ds(0x0f), GP, 0x0c, "LDT selector with a null LDTR: TI in the error code")?;
    fault(&load_ds(F), GP, u64::from(F), "descriptor of type 0")?;
    fault(&load_ds(desc::TSS), GP, u64::from(desc::TSS), "system descriptor")?;
    done(&load_ds(desc::KCS), "readable code in DS")?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x99, 0xa));
    fault(&load_ds(F), GP, u64::from(F), "execute-only code in DS")?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x73, 0xc));
    fault(&load_ds(F), NP, u64::from(F), "not present")
}

fn privilege_checks() -> Verdict {
    fault(&user_load_ds(desc::KDS), GP, u64::from(desc::KDS), "DPL 0 data at CPL 3")?;
    fault(&user_load_ds(desc::KDS | 3), GP, u64::from(desc::KDS), "DPL 0 data, RPL 3")?;
    fault(&load_ds(desc::KDS | 3), GP, u64::from(desc::KDS), "RPL 3 above DPL 0 at CPL 0")?;
    done(&load_ds(desc::UDS), "DPL 3 data at CPL 0")?;
    done(&user_load_ds(desc::UDS & !3), "DPL 3 data with RPL 0 at CPL 3")?;
    let ss = |s: u16| Ctx::kernel(code64!("mov ss, edi")).rdi(u64::from(s)).run();
    fault(&ss(desc::UDS), GP, u64::from(desc::UDS & !3), "SS with RPL 3 at CPL 0")?;
    fault(&ss(desc::UDS & !3), GP, u64::from(desc::UDS & !3), "SS with DPL 3 at CPL 0")?;
    fault(&ss(desc::KCS), GP, u64::from(desc::KCS), "code in SS")?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x91, 0xc));
    fault(&ss(F), GP, u64::from(F), "read-only data in SS")?;
    // Conforming code is readable from every level.
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9f, 0xa));
    done(&user_load_ds(F), "conforming readable code of DPL 0 in DS at CPL 3")
}

fn accessed_bit() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x92, 0xc));
    done(&load_ds(F), "load")?;
    eq(desc::get_gdt(F) >> 40 & 0xff, 0x93, "loading sets the accessed bit")
}

fn accessed_bit_cs() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9a, 0xa));
    let c = code64!("push rdi", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", "2:");
    done(&Ctx::kernel(c).rdi(u64::from(F)).run(), "far return")?;
    eq(desc::get_gdt(F) >> 40 & 0xff, 0x9b, "a far return sets the accessed bit")
}

fn descriptor_types() -> Verdict {
    for (access, ok_in_ds) in [
        (0x91u8, true),
        (0x93, true),
        (0x95, true),
        (0x97, true),
        (0x99, false),
        (0x9b, true),
        (0x9d, false),
        (0x9f, true),
    ] {
        desc::set_gdt(F, desc::descriptor(0, 0xfffff, access, if access & 8 == 0 { 0xc } else { 0xa }));
        let o = load_ds(F);
        if ok_in_ds {
            done(&o, "DS")?;
        } else {
            fault(&o, GP, u64::from(F), "execute-only")?;
        }
    }
    for kind in [0x80u8, 0x81, 0x82, 0x83, 0x85, 0x87, 0x89, 0x8b, 0x8c, 0x8e, 0x8f] {
        desc::set_gdt(F, desc::descriptor(0, 0xfff, kind, 0));
        fault(&load_ds(F), GP, u64::from(F), "system types")?;
    }
    Ok(())
}

/// Runs 32-bit code with DS set to a segment of base `base`, this limit, access and flags.
fn compat_data(c: Code, limit: u32, access: u8, flags: u8, esi: u64) -> Outcome {
    let base = (&raw const AREA) as u32;
    desc::set_gdt(F, desc::descriptor(base, limit, access, flags));
    Ctx::user32(c).ds(F | 3).rsi(esi).run()
}
#[repr(C, align(4096))]
struct Area([u8; 8192]);
static mut AREA: Area = Area([0; 8192]);

/// Like [`compat_data`] but at CPL 0, where the base lies in supervisor memory.
fn compat_kernel(c: Code, limit: u32, access: u8, flags: u8, esi: u64) -> Outcome {
    let base = (&raw const AREA) as u32;
    desc::set_gdt(F, desc::descriptor(base, limit, access, flags));
    Ctx::kernel32(c).ds(F).rsi(esi).run()
}

fn compat_limit() -> Verdict {
    let c = code32!("mov eax, [esi]");
    done(&compat_kernel(c, 0xfff, DATA3, 4, 0xffc), "last double word")?;
    fault(&compat_kernel(c, 0xfff, DATA3, 4, 0xffd), GP, 0, "one byte beyond the limit")?;
    fault(&compat_kernel(c, 0xfff, DATA3, 4, 0x1000), GP, 0, "beyond the limit")?;
    fault(
        &compat_kernel(code32!("mov [esi], eax"), 0xfff, DATA3, 4, 0x1000),
        GP,
        0,
        "store beyond the limit",
    )?;
    done(&compat_kernel(c, 0, DATA3, 0xc, 0xffc), "granular limit 0 is FFFH")?;
    fault(&compat_kernel(c, 0, DATA3, 0xc, 0x1000), GP, 0, "beyond it")?;
    fault(&compat_kernel(code32!("lodsd"), 0xfff, DATA3, 4, 0x1000), GP, 0, "string instruction")?;
    let o = compat_data(c, 0xfff, DATA3, 4, 0x2000);
    fault(&o, GP, 0, "at CPL 3 the limit comes before the page's rights")
}

fn compat_stack_limit() -> Verdict {
    let base = (&raw const AREA) as u32;
    desc::set_gdt(F, desc::descriptor(base, 0xfff, 0x93, 4));
    let ctx = |esp: u64, c: Code| {
        let mut x = Ctx::kernel32(c).rdi(u64::from(F)).rsi(esp);
        x.0.rbx = sys_stack();
        x.run()
    };
    let c = code32!(
        "mov ss, edi",
        "mov esp, esi",
        "push eax",
        "pop ecx",
        "mov edi, 0x10",
        "mov ss, edi",
        "mov esp, ebx"
    );
    done(&ctx(0x1000, c), "push below the limit")?;
    fault(&ctx(0x1004, c), SS, 0, "push above the limit")?;
    let c = code32!(
        "mov ss, edi",
        "mov ebp, esi",
        "mov eax, [ebp]",
        "mov edi, 0x10",
        "mov ss, edi",
        "mov esp, ebx"
    );
    fault(&ctx(0xffe, c), SS, 0, "read through EBP across the limit")
}

fn compat_expand_down() -> Verdict {
    let c = code32!("mov al, [esi]");
    fault(&compat_kernel(c, 0xfff, 0xf7, 4, 0xfff), GP, 0, "expand-down: offset at the limit")?;
    done(&compat_kernel(c, 0xfff, 0xf7, 4, 0x1000), "above the limit")?;
    fault(&compat_kernel(c, 0xfff, 0xf7, 0, 0x1_0000), GP, 0, "B clear: the upper bound is FFFFH")
}

fn compat_readonly() -> Verdict {
    fault(&compat_kernel(code32!("mov [esi], eax"), 0xfff, 0xf1, 4, 0), GP, 0, "write to read-only data")?;
    done(&compat_kernel(code32!("mov eax, [esi]"), 0xfff, 0xf1, 4, 0), "read")?;
    fault(
        &compat_kernel(code32!("mov byte ptr cs:[esi], 0"), 0xfff, DATA3, 4, 0),
        GP,
        0,
        "write through CS",
    )?;
    fault(
        &compat_kernel(code32!("add dword ptr [esi], 0"), 0xfff, 0xf1, 4, 0),
        GP,
        0,
        "RMW of read-only data",
    )
}

fn compat_execute_only() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x99, 0xc));
    let mut x = Ctx::kernel32(code32!("mov eax, cs:[esi]"));
    x.0.cs = u64::from(F);
    x.0.rsi = x.0.rip;
    fault(&x.run(), GP, 0, "read of execute-only code")?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9b, 0xc));
    done(&x.run(), "read of readable code")
}

fn compat_null_use() -> Verdict {
    let c = code32!("mov eax, [esi]");
    let o = Ctx::kernel32(c).ds(0).rsi(sys_stack()).run();
    fault(&o, GP, 0, "use of a null DS in compatibility mode")?;
    let o = Ctx::kernel32(code32!("xor eax, eax", "mov fs, eax", "mov eax, fs:[esi]")).rsi(sys_stack()).run();
    fault(&o, GP, 0, "use of a null FS")
}

fn compat_code_limit() -> Verdict {
    let c = code32!("jmp edi");
    let target = (&raw const AREA) as u64;
    mem::put(target, &[0xcd, 0x90]);
    desc::set_gdt(F, desc::descriptor(0, (c.end >> 12) as u32, 0x9b, 0xc));
    let mut x = Ctx::kernel32(c).rdi(target);
    x.0.cs = u64::from(F);
    fault(&x.run(), GP, 0, "jump beyond the code segment's limit")
}

fn conforming_code() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9f, 0xa));
    // A far return at CPL 3 to conforming code of DPL 0: CPL stays 3.
    let c = code64!("push rdi", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", "2: mov ecx, cs");
    let o = Ctx::user(c).rdi(u64::from(F) | 3).run();
    done(&o, "far return to conforming code")?;
    eq(o.rcx, u64::from(F) | 3, "CPL 3")?;
    let o = far_user(F);
    done(&o, "far jump to conforming code")?;
    eq(o.cs, u64::from(F) | 3, "CS.RPL is CPL")
}

/// At CPL 3: far indirect jump to the next instruction through this selector.
fn far_user(selector: u16) -> Outcome {
    let c = code64!(
        "lea rax, [rip + 2f]",
        "push rdi",
        "push rax",
        "mov [rsp + 4], edi",
        ".byte 0xff, 0x2c, 0x24",
        "2: nop"
    );
    Ctx::user(c).rdi(u64::from(selector)).run()
}

fn far_kernel(selector: u16) -> Outcome {
    let c = code64!(
        "lea rax, [rip + 2f]",
        "push rdi",
        "push rax",
        "mov [rsp + 4], edi",
        ".byte 0xff, 0x2c, 0x24",
        "2: nop"
    );
    Ctx::kernel(c).rdi(u64::from(selector)).run()
}

fn far_jump_errors() -> Verdict {
    done(&far_kernel(desc::KCS), "far jump")?;
    fault(&far_kernel(0), GP, 0, "null selector")?;
    fault(&far_kernel(0x3f8), GP, 0x3f8, "beyond the GDT")?;
    fault(&far_kernel(desc::KDS), GP, u64::from(desc::KDS), "data segment")?;
    fault(&far_kernel(desc::UCS), GP, u64::from(desc::UCS & !3), "DPL is not CPL")?;
    fault(&far_kernel(desc::TSS), GP, u64::from(desc::TSS), "TSS in long mode")?;
    fault(&far_user(desc::KCS), GP, u64::from(desc::KCS), "kernel code at CPL 3")?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x1b, 0xa));
    fault(&far_kernel(F), NP, u64::from(F), "not present")
}

fn l_and_d_code() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9b, 0xe));
    fault(&far_kernel(F), GP, u64::from(F), "code segment with L and D")
}

fn gate64(selector: u16, target: u64, code: u16, dpl: u8, kind: u8) {
    let lo = target & 0xffff
        | u64::from(code) << 16
        | u64::from(0x80 | dpl << 5 | kind) << 40
        | (target >> 16 & 0xffff) << 48;
    desc::set_gdt(selector, lo);
    desc::set_gdt(selector + 8, target >> 32);
}

/// At CPL 3: far call through a gate.
fn call_gate(selector: u16) -> Outcome {
    let c = code64!("push rdi", "mov [rsp + 4], edi", ".byte 0xff, 0x1c, 0x24", "mov ecx, cs", "mov r8, rsp");
    Ctx::user(c).rdi(u64::from(selector)).run()
}

fn call_gate_64() -> Verdict {
    let target = code64!(
        "mov r9, rsp",
        "mov r10d, cs",
        "mov r11d, ss",
        "mov rbx, [rsp]",
        "mov rdx, [rsp + 8]",
        "mov rsi, [rsp + 16]",
        "mov r12, [rsp + 24]",
        ".byte 0x48, 0xcb"
    );
    gate64(F, target.start, desc::KCS, 3, 0xc);
    let o = call_gate(F | 3);
    done(&o, "call through a 64-bit gate and return")?;
    let rsp0 = unsafe { (&raw const (*desc::tss()).rsp).read_unaligned()[0] };
    eq(o.r9, rsp0 - 32, "RSP0 of the TSS, four words pushed")?;
    eq(o.r10, u64::from(desc::KCS), "CS in the target")?;
    eq(o.r11, 0, "SS is null in the target")?;
    eq(o.rdx, u64::from(desc::UCS), "CS pushed")?;
    eq(o.rsi, o.r8, "RSP pushed")?;
    eq(o.r12, u64::from(desc::UDS), "SS pushed")?;
    eq(o.rcx, u64::from(desc::UCS), "CPL 3 again")
}

fn call_gate_errors() -> Verdict {
    let target = code64!("nop").start;
    let f = u64::from(F);
    gate64(F, target, desc::KCS, 0, 0xc);
    fault(&call_gate(F), GP, f, "gate of DPL 0 at CPL 3")?;
    gate64(F, target, desc::KCS, 3, 0xc);
    desc::set_gdt(F, desc::get_gdt(F) & !(1 << 47));
    fault(&call_gate(F), NP, f, "not present")?;
    gate64(F, target, 0, 3, 0xc);
    fault(&call_gate(F), GP, 0, "null code selector")?;
    gate64(F, target, desc::KDS, 3, 0xc);
    fault(&call_gate(F), GP, u64::from(desc::KDS), "data segment behind the gate")?;
    gate64(F, target, desc::KCS32, 3, 0xc);
    fault(&call_gate(F), GP, u64::from(desc::KCS32), "32-bit code behind the gate")?;
    gate64(F, target, desc::KCS, 3, 0xc);
    desc::set_gdt(F + 8, 0x5 << 40);
    fault(&call_gate(F), GP, f, "type bits in the upper half")?;
    gate64(F, target, desc::KCS, 3, 4);
    fault(&call_gate(F), GP, f, "16-bit call gate in long mode")?;
    gate64(F, target, desc::KCS, 3, 0xc);
    let c = code64!("push rdi", "mov [rsp + 4], edi", ".byte 0xff, 0x2c, 0x24");
    fault(&Ctx::user(c).rdi(f).run(), GP, u64::from(desc::KCS), "JMP through a gate cannot raise privilege")
}

fn retf_outer_and_back() -> Verdict {
    let user = code64!("mov ecx, cs", "mov r8d, ss", "mov r9, rsp");
    let c = code64!("push 0x23", "push rsi", "push 0x2b", "push rdi", ".byte 0x48, 0xcb");
    let o = Ctx::kernel(c).rdi(user.start + ALIAS).rsi(user_stack() - 128).run();
    done(&o, "far return to CPL 3")?;
    eq(o.rcx, u64::from(desc::UCS), "CS")?;
    eq(o.r8, u64::from(desc::UDS), "SS")?;
    eq(o.r9, user_stack() - 128, "RSP")?;
    // Data segments that CPL 3 may not use become null.
    let c = code64!(
        "mov eax, 0x10",
        "mov ds, eax",
        "mov es, eax",
        "push 0x23",
        "push rsi",
        "push 0x2b",
        "push rdi",
        ".byte 0x48, 0xcb"
    );
    let o = Ctx::kernel(c).rdi(user.start + ALIAS).rsi(user_stack() - 128).run();
    done(&o, "far return to CPL 3")?;
    ok(o.ds == 0 && o.es == 0, "DS and ES of DPL 0 are nulled")?;
    let c = code64!("push 0x10", "push rsi", "push 0x2b", "push rdi", ".byte 0x48, 0xcb");
    fault(
        &Ctx::kernel(c).rdi(user.start + ALIAS).rsi(user_stack()).run(),
        GP,
        u64::from(desc::KDS),
        "SS of DPL 0 for CPL 3",
    )
}

fn retf_inner() -> Verdict {
    let c = code64!("push rdi", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", "2:");
    fault(&Ctx::user(c).rdi(u64::from(desc::KCS)).run(), GP, u64::from(desc::KCS), "RETF to an inner level")?;
    let c = code64!(
        "push 0x10",
        "push rsp",
        "push 2",
        "push rdi",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2:"
    );
    fault(&Ctx::user(c).rdi(u64::from(desc::KCS)).run(), GP, u64::from(desc::KCS), "IRETQ to an inner level")
}

fn lldt(selector: u16) -> Outcome {
    Ctx::kernel(code64!("lldt di")).rdi(u64::from(selector)).run()
}

fn ldt() -> Verdict {
    let p = mem::page();
    mem::wr(p + 8, desc::descriptor(0x1000, 0xfffff, 0xf3, 0xc));
    desc::set_system(F, p, 15, 0x82);
    done(&lldt(F), "LLDT")?;
    let o = Ctx::kernel(code64!("mov fs, edi", "mov rax, fs:[rsi]", "sldt ecx"))
        .rdi(0xf)
        .rsi(sys_stack() - 0x1000)
        .run();
    done(&o, "a segment of the LDT")?;
    eq(o.rcx, u64::from(F), "SLDT")?;
    fault(&load_ds(0x17), GP, 0x14, "beyond the LDT's limit")?;
    done(&lldt(0), "null LLDT")?;
    fault(&load_ds(0xf), GP, 0xc, "no LDT any more")
}

fn lldt_errors() -> Verdict {
    fault(&lldt(desc::KDS), GP, u64::from(desc::KDS), "not an LDT")?;
    fault(&lldt(F | 4), GP, u64::from(F | 4), "selector with TI")?;
    desc::set_system(F, 0x1000, 15, 0x02);
    fault(&lldt(F), NP, u64::from(F), "not present")?;
    fault(&lldt(0x3f8), GP, 0x3f8, "beyond the GDT")?;
    fault(&Ctx::user(code64!("lldt di")).run(), GP, 0, "LLDT at CPL 3")
}

fn ltr_to(selector: u16) -> Outcome {
    Ctx::kernel(code64!("ltr di", "str ecx")).rdi(u64::from(selector)).run()
}

fn ltr() -> Verdict {
    desc::set_system(F, desc::tss() as u64, 0x2067, 0x89);
    let o = ltr_to(F);
    eq(o.rcx, u64::from(F), "STR")?;
    eq(desc::get_gdt(F) >> 40 & 0xff, 0x8b, "LTR marks the TSS busy")?;
    let again = ltr_to(F);
    desc::load_tr();
    done(&o, "LTR")?;
    fault(&again, GP, u64::from(F), "LTR of a busy TSS")
}

fn ltr_errors() -> Verdict {
    fault(&ltr_to(desc::KDS), GP, u64::from(desc::KDS), "data")?;
    desc::set_system(F, desc::tss() as u64, 0x67, 0x09);
    fault(&ltr_to(F), NP, u64::from(F), "not present")?;
    fault(&Ctx::user(code64!("ltr di")).rdi(u64::from(F)).run(), GP, 0, "LTR at CPL 3")?;
    fault(&ltr_to(0x3f8), GP, 0x3f8, "beyond the GDT")
}

fn ltr_null() -> Verdict {
    fault(&ltr_to(0), GP, 0, "LTR of a null selector")
}

fn stack_switch_rsp0() -> Verdict {
    desc::set_gate(0x81, stub(0x81), desc::KCS, 0, 0xee);
    let rsp0 = unsafe { (&raw const (*desc::tss()).rsp).read_unaligned()[0] };
    let o = Ctx::user(code64!("mov rbx, rsp", "int 0x81")).run();
    fault(&o, 0x81, 0, "INT through a gate without IST")?;
    eq(o.handler_rsp, rsp0 - 40, "RSP0 less five words")?;
    eq(o.handler_ss, 0, "SS is null")?;
    eq(o.rsp, o.rbx, "RSP saved")?;
    eq(o.ss, u64::from(desc::UDS), "SS saved")
}

fn stack_alignment() -> Verdict {
    desc::set_gate(0x81, stub(0x81), desc::KCS, 0, 0x8e);
    for i in 0..16u64 {
        let o = Ctx::kernel(code64!("sub rsp, rdi", "int 0x81")).rdi(i).run();
        fault(&o, 0x81, 0, "INT at CPL 0")?;
        eq(o.rsp, sys_stack() - i, "RSP saved exactly")?;
        eq(o.handler_rsp, ((sys_stack() - i) & !15) - 40, "the frame is aligned to 16 bytes")?;
    }
    Ok(())
}

fn ist_selects_stack() -> Verdict {
    let t = desc::tss();
    for ist in 1..=7u8 {
        desc::set_gate(0x81, stub(0x81), desc::KCS, ist, 0x8e);
        let top = unsafe { (&raw const (*t).ist).read_unaligned()[usize::from(ist) - 1] };
        let o = Ctx::kernel(code64!("int 0x81")).run();
        fault(&o, 0x81, 0, "INT")?;
        eq(o.handler_rsp, top - 40, "the stack of the IST")?;
    }
    Ok(())
}

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

fn fs_gs_base_msr() -> Verdict {
    let p = mem::page();
    (mem::wr(p + 0x10, 0xf5), mem::wr(p + 0x810, 0x65));
    cpu::wrmsr(FS_BASE, p);
    cpu::wrmsr(GS_BASE, p + 0x800);
    let o = Ctx::kernel(code64!("mov rax, fs:[0x10]", "mov rcx, gs:[0x10]", "lea rdx, fs:[0x10]")).run();
    done(&o, "FS and GS")?;
    eq(o.rax, 0xf5, "FS base")?;
    eq(o.rcx, 0x65, "GS base")?;
    eq(o.rdx, 0x10, "LEA ignores the base")?;
    cpu::wrmsr(FS_BASE, 0x1234_5678_9000);
    eq(cpu::rdmsr(FS_BASE), 0x1234_5678_9000, "64-bit base")?;
    // Loading a selector replaces the base by the descriptor's 32 bits.
    desc::set_gdt(F, desc::descriptor(0x1000, 0xfffff, 0xf3, 0xc));
    done(&Ctx::kernel(code64!("mov fs, edi")).rdi(u64::from(F)).run(), "mov fs")?;
    eq(cpu::rdmsr(FS_BASE), 0x1000, "base of the descriptor")
}

fn base_noncanonical() -> Verdict {
    for msr in [FS_BASE, GS_BASE, KERNEL_GS_BASE] {
        fault(&catch(|| cpu::wrmsr(msr, 0x8000_0000_0000)), GP, 0, "non-canonical base")?;
        clean(&catch(|| cpu::wrmsr(msr, 0xffff_8000_0000_0000)), "canonical base")?;
        eq(cpu::rdmsr(msr), 0xffff_8000_0000_0000, "reads back")?;
    }
    cpu::wrmsr(FS_BASE, 0x7fff_ffff_f000);
    fault(
        &Ctx::kernel(code64!("mov rax, fs:[0x1000]")).run(),
        GP,
        0,
        "base plus offset becomes non-canonical",
    )
}

fn fsgsbase() -> Verdict {
    if !cpu::has_fsgsbase() {
        skip!("no FSGSBASE");
    }
    fault(&Ctx::kernel(code64!("rdfsbase rax")).run(), UD, 0, "CR4.FSGSBASE clear")?;
    cpu::set_cr4(cpu::cr4() | 1 << 16);
    let o = Ctx::user(code64!("wrfsbase rdi", "rdfsbase rax", "wrgsbase rsi", "rdgsbase rcx"))
        .rdi(0x7000_1234_5678)
        .rsi(0x1111)
        .run();
    done(&o, "at CPL 3")?;
    eq(o.rax, 0x7000_1234_5678, "FS base")?;
    eq(o.rcx, 0x1111, "GS base")?;
    eq(cpu::rdmsr(FS_BASE), 0x7000_1234_5678, "the MSR is the same register")?;
    let o = Ctx::kernel(code64!("wrfsbase edi", "rdfsbase rax", "wrgsbase rsi", "rdgsbase ecx"))
        .rdi(0x1_8000_0000)
        .rsi(0x7fff_8765_4321)
        .run();
    eq(o.rax, 0x8000_0000, "32-bit WRFSBASE zero-extends")?;
    eq(o.rcx, 0x8765_4321, "32-bit RDGSBASE truncates")?;
    fault(&Ctx::user(code64!("wrfsbase rdi")).rdi(1 << 47).run(), GP, 0, "non-canonical")?;
    fault(&Ctx::user32(code32!(".byte 0xf3, 0x0f, 0xae, 0xc0")).run(), UD, 0, "in compatibility mode")
}

fn swapgs() -> Verdict {
    cpu::wrmsr(GS_BASE, 0x1111);
    cpu::wrmsr(KERNEL_GS_BASE, 0x2222);
    done(&Ctx::kernel(code64!("swapgs")).run(), "SWAPGS")?;
    eq(cpu::rdmsr(GS_BASE), 0x2222, "GS base")?;
    eq(cpu::rdmsr(KERNEL_GS_BASE), 0x1111, "kernel GS base")?;
    fault(&Ctx::user(code64!("swapgs")).run(), GP, 0, "SWAPGS at CPL 3")?;
    fault(&Ctx::kernel32(code32!(".byte 0x0f, 0x01, 0xf8")).run(), UD, 0, "SWAPGS in compatibility mode")
}

fn lss_lfs_lgs() -> Verdict {
    let m = [0x0000_1234_5678_9abc_u64, 0x10];
    let p = (&raw const m) as u64;
    // AMD has no 80-bit form: it takes the selector from offset 4 (APM 3, LFS).
    if cpu::is_intel() {
        let o = Ctx::kernel(code64!(".byte 0x48, 0x0f, 0xb4, 0x07", "mov ecx, fs")).rdi(p).run();
        done(&o, "LFS r64, m16:64")?;
        eq(o.rax, m[0], "offset")?;
        eq(o.rcx, 0x10, "selector")?;
    }
    let m = 0x0010_8765_4321_u64;
    let o = Ctx::kernel(code64!("lfs eax, [rdi]", "mov ecx, fs", "lgs edx, [rdi]"))
        .rdi((&raw const m) as u64)
        .run();
    done(&o, "LFS r32, m16:32")?;
    eq(o.rax, 0x8765_4321, "offset")?;
    eq(o.rcx, 0x10, "selector")?;
    let m = 0x3f8_1234_5678_u64;
    let o = Ctx::kernel(code64!("lss eax, [rdi]")).rdi((&raw const m) as u64).rax(5).run();
    fault(&o, GP, 0x3f8, "LSS of a bad selector")?;
    eq(o.rax, 5, "the register is not written")
}

fn mov_cs() -> Verdict {
    fault(&Ctx::kernel(code64!(".byte 0x8e, 0xc8")).run(), UD, 0, "MOV CS")?;
    fault(&Ctx::kernel(code64!(".byte 0x8e, 0xf0")).run(), UD, 0, "MOV to segment register 6")?;
    fault(&Ctx::kernel(code64!(".byte 0x8c, 0xf8")).run(), UD, 0, "MOV from segment register 7")
}

fn segment_push_pop() -> Verdict {
    let o = Ctx::kernel(code64!(
        "mov eax, 0x23",
        "mov fs, eax",
        // The assembler would give these an operand-size prefix.
        ".byte 0x0f, 0xa0",
        "mov rcx, [rsp]",
        "push 0x10",
        ".byte 0x0f, 0xa9",
        "mov edx, gs",
        "pop rax"
    ))
    .run();
    done(&o, "PUSH FS, POP GS")?;
    eq(o.rcx, 0x23, "PUSH FS writes eight bytes, zero-extended")?;
    eq(o.rdx, 0x10, "GS")?;
    let o = Ctx::kernel(code64!(
        "mov rax, -1",
        ".byte 0x66, 0x8c, 0xc8",
        "mov rcx, -1",
        "mov ecx, cs",
        "mov qword ptr [rsp - 8], -1",
        "mov word ptr [rsp - 8], ds",
        "mov rdx, [rsp - 8]"
    ))
    .run();
    done(&o, "MOV from segments")?;
    eq(o.rax, 0xffff_ffff_ffff_0008, "16-bit register: upper bits kept")?;
    eq(o.rcx, 8, "32-bit register: zero-extended")?;
    eq(o.rdx >> 16, 0xffff_ffff_ffff, "memory form writes two bytes")
}

fn base_zero_in_long_mode() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0x1000, 0xf, 0xf3, 4));
    let o = Ctx::kernel(code64!(
        "mov ds, edi",
        "mov es, edi",
        "mov rax, [rsi + 0x100]",
        "mov rcx, es:[rsi + 0x100]"
    ))
    .rdi(u64::from(F))
    .rsi(sys_stack() - 0x400)
    .run();
    done(&o, "base and limit of DS and ES are ignored in 64-bit mode")
}

fn iret_nt() -> Verdict {
    let c = code64!(
        "pushfq",
        "or qword ptr [rsp], 0x4000",
        "popfq",
        "push 0x10",
        "push rsp",
        "push 2",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2:"
    );
    fault(&Ctx::kernel(c).run(), GP, 0, "IRET with NT in long mode")
}

fn data_base_compat() -> Verdict {
    let base = (&raw const AREA) as u64;
    mem::wr32(base + 0x20, 0x5151);
    let o = compat_kernel(code32!("mov eax, [esi]", "mov ecx, ds"), 0xfff, DATA3, 4, 0x20);
    done(&o, "read")?;
    eq(o.rax, 0x5151, "the base counts in compatibility mode")?;
    // Effective addresses wrap at 4 GiB.
    desc::set_gdt(F, desc::descriptor(base as u32, 0xfffff, DATA3, 0xc));
    let o = Ctx::kernel32(code32!("mov eax, [esi + 0x40]")).ds(F).rsi(0xffff_ffe0).run();
    done(&o, "wrap")?;
    eq(o.rax, 0x5151, "address arithmetic is modulo 2^32")?;
    desc::set_gdt(F, desc::descriptor(0xffff_f000, 0xfffff, DATA3, 0xc));
    let o = Ctx::kernel32(code32!("mov eax, [esi]")).ds(F).rsi(base + 0x1020).run();
    done(&o, "linear wrap")?;
    eq(o.rax, 0x5151, "base plus offset is modulo 2^32")?;
    unsafe { asm!("nop") };
    Ok(())
}
