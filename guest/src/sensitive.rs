//! The sensitive unprivileged instructions, and what CPL 3 may not do.
//!
//! The seventeen instructions that Robin and Irvine (2000) list as sensitive but unprivileged: SGDT, SIDT,
//! SLDT, SMSW, STR, PUSHF, POPF, LAR, LSL, VERR, VERW, PUSH and POP of segments, far CALL and RET, INT n, MOV
//! of segments, far JMP. A virtual machine must show what the bare machine shows.

use crate::harness::{Verdict, clean, done, eq, fault, ok};
use crate::legacy::{Legacy, tss};
use crate::mem::ALIAS;
use crate::modes::{ldone, lfault};
use crate::traps::*;
use crate::{code32, code64, cpu, desc, mem, skip, tests};

tests!("sensitive":
    popf_user_if, popf_user_iopl, popf_iopl3, popf_kernel, pushf_shows_if, pushf_32_flags, id_flag, sgdt_sidt_user, sldt_str_user, smsw_user,
    umip, umip_kernel, lar, lsl, verr_verw, lar_lsl_user, push_pop_cs_rpl, far_ret_user, int_n_user, sgdt_sidt_32, iret_user_flags,
    vif_ac_flags,
);

const IF: u64 = 0x200;
const IOPL: u64 = 0x3000;

fn popf_user_if() -> Verdict {
    let c = code64!("push 0x2", "popfq", "pushfq", "pop rax", "push 0x202", "popfq", "pushfq", "pop rcx");
    let o = Ctx::user(c).flags(IF).run();
    done(&o, "POPF at CPL 3, IOPL 0, does not fault")?;
    eq(o.rax & IF, IF, "IF cannot be cleared")?;
    let o = Ctx::user(c).run();
    eq(o.rcx & IF, 0, "IF cannot be set")
}

fn popf_user_iopl() -> Verdict {
    let c = code64!("push 0x3cd7", "popfq", "pushfq", "pop rax");
    let o = Ctx::user(c).run();
    done(&o, "POPF")?;
    eq(o.rax & IOPL, 0, "IOPL unchanged at CPL 3")?;
    eq(o.rax & 0xcd5, 0xcd5, "arithmetic flags and DF change")
}

fn popf_iopl3() -> Verdict {
    let c = code64!(
        "push 0x2",
        "popfq",
        "pushfq",
        "pop rax",
        "push 0x3202",
        "popfq",
        "pushfq",
        "pop rcx",
        "cli",
        "pushfq",
        "pop rdx"
    );
    let o = Ctx::user(c).flags(IF | IOPL).run();
    done(&o, "POPF and CLI at CPL 3, IOPL 3")?;
    eq(o.rax & (IF | IOPL), IOPL, "IF changes, IOPL does not")?;
    eq(o.rcx & IF, IF, "IF set")?;
    eq(o.rdx & IF, 0, "CLI allowed")
}

fn popf_kernel() -> Verdict {
    let c = code64!(
        "push 0x3002",
        "popfq",
        "pushfq",
        "pop rax",
        "push 0x2",
        "popfq",
        "mov rcx, -1",
        "push rcx",
        "xor dword ptr [rsp], 0x24100",
        "popfq",
        "pushfq",
        "pop rdx",
        "push 2",
        "popfq"
    );
    set_mode(1, RESUME);
    let o = Ctx::kernel(c).run();
    done(&o, "POPF at CPL 0")?;
    eq(o.rax & IOPL, IOPL, "IOPL changes")?;
    eq(o.rdx & 0x2_8028, 0, "VM, bit 15, bit 5, bit 3 stay clear")?;
    eq(o.rdx & 0xcd7, 0xcd7, "the others are set, bit 1 is one")?;
    eq(o.rdx >> 22, 0, "bits 22 and up stay clear")
}

fn pushf_shows_if() -> Verdict {
    let o = Ctx::user(code64!("pushfq", "pop rax")).flags(IF).run();
    eq(o.rax & IF, IF, "IF set is visible at CPL 3")?;
    let o = Ctx::user(code64!("pushfq", "pop rax")).run();
    eq(o.rax & IF, 0, "IF clear is visible at CPL 3")?;
    let o = Ctx::user(code64!("pushfq", "pop rax")).flags(IOPL).run();
    eq(o.rax & IOPL, IOPL, "IOPL is visible")?;
    eq(o.rax & 0x1_0000, 0, "RF reads as zero")
}

fn pushf_32_flags() -> Verdict {
    let o = Legacy::user(code32!("pushfd", "pop eax", "push 0x3202", "popfd", "pushfd", "pop ebx")).run();
    ldone(&o, "POPFD at CPL 3 in protected mode")?;
    eq(u64::from(o.ebx) & (IF | IOPL), 0, "IF and IOPL unchanged")?;
    let o = Legacy::user(code32!("pushf", "pop ax")).run();
    ldone(&o, "PUSHF, POP AX")
}

fn id_flag() -> Verdict {
    let o = Ctx::user(code64!(
        "pushfq",
        "pop rax",
        "mov rcx, rax",
        "xor eax, 0x200000",
        "push rax",
        "popfq",
        "pushfq",
        "pop rdx",
        "xor rdx, rcx"
    ))
    .run();
    done(&o, "POPF")?;
    eq(o.rdx, 0x20_0000, "the ID flag can be toggled")
}

fn sgdt_sidt_user() -> Verdict {
    let o = Ctx::user(code64!(
        "sgdt [rsp - 16]",
        "sidt [rsp - 32]",
        "mov rax, [rsp - 14]",
        "movzx ecx, word ptr [rsp - 16]",
        "mov rdx, [rsp - 30]",
        "movzx ebx, word ptr [rsp - 32]"
    ))
    .run();
    done(&o, "SGDT and SIDT at CPL 3")?;
    eq(o.rax, desc::gdt_base(), "GDT base")?;
    eq(o.rcx, (desc::GDT_LEN * 8 - 1) as u64, "GDT limit")?;
    eq(o.rdx, desc::idt_base(), "IDT base")?;
    eq(o.rbx, 4095, "IDT limit")
}

fn sldt_str_user() -> Verdict {
    let o = Ctx::user(code64!(
        "mov rax, -1",
        "sldt ax",
        "mov rcx, -1",
        "str ecx",
        "mov rdx, -1",
        "str rdx",
        "mov qword ptr [rsp - 8], -1",
        "str [rsp - 8]",
        "mov rbx, [rsp - 8]"
    ))
    .run();
    done(&o, "SLDT and STR at CPL 3")?;
    eq(o.rax, 0xffff_ffff_ffff_0000, "SLDT ax")?;
    eq(o.rcx, u64::from(desc::TSS), "STR ecx is zero-extended")?;
    eq(o.rdx, u64::from(desc::TSS), "STR rdx")?;
    eq(o.rbx, 0xffff_ffff_ffff_0000 | u64::from(desc::TSS), "STR m16 writes two bytes")
}

fn smsw_user() -> Verdict {
    let o = Ctx::user(code64!(
        "smsw rax",
        "mov rcx, -1",
        "smsw cx",
        "mov qword ptr [rsp - 8], 0",
        "smsw [rsp - 8]",
        "mov rdx, [rsp - 8]"
    ))
    .run();
    done(&o, "SMSW at CPL 3")?;
    eq(o.rax & 0xffff, cpu::cr0() & 0xffff, "CR0")?;
    eq(o.rcx, 0xffff_ffff_ffff_0000 | cpu::cr0() & 0xffff, "SMSW cx")?;
    eq(o.rdx, cpu::cr0() & 0xffff, "SMSW m16")
}

fn umip() -> Verdict {
    if !cpu::has_umip() {
        skip!("no UMIP");
    }
    cpu::set_cr4(cpu::cr4() | 1 << 11);
    for (c, what) in [
        (code64!("sgdt [rsp - 16]"), "SGDT"),
        (code64!("sidt [rsp - 16]"), "SIDT"),
        (code64!("sldt eax"), "SLDT"),
        (code64!("str eax"), "STR"),
        (code64!("smsw eax"), "SMSW"),
    ] {
        fault(&Ctx::user(c).run(), GP, 0, what)?;
    }
    Ok(())
}

fn umip_kernel() -> Verdict {
    if !cpu::has_umip() {
        skip!("no UMIP");
    }
    cpu::set_cr4(cpu::cr4() | 1 << 11);
    done(
        &Ctx::kernel(code64!("sgdt [rsp - 16]", "sidt [rsp - 16]", "sldt eax", "str eax", "smsw eax")).run(),
        "CPL 0 is not concerned",
    )
}

const ZF: u64 = 0x40;

fn lar() -> Verdict {
    let run =
        |s: u64| Ctx::kernel(code64!("mov eax, 0x77", "lar eax, edi", "pushfq", "pop rcx")).rdi(s).run();
    let o = run(u64::from(desc::KDS));
    done(&o, "LAR")?;
    eq(o.rcx & ZF, ZF, "ZF")?;
    eq(o.rax & 0x00f0_ff00, 0x00c0_9300, "access rights of the data segment")?;
    let o = run(u64::from(desc::KCS));
    eq(o.rax & 0x00f0_ff00, 0x00a0_9b00, "code segment")?;
    for s in [0, 0x3f8, u64::from(desc::FREE)] {
        let o = run(s);
        eq(o.rcx & ZF, 0, "ZF clear for null, out of limit and type 0")?;
        eq(o.rax, 0x77, "destination unchanged")?;
    }
    let o = run(u64::from(desc::TSS));
    eq(o.rax & 0xff00, 0x8b00, "TSS")?;
    // Types that LAR does not show in long mode: interrupt and trap gates, task gate.
    for kind in [0x8eu8, 0x8f, 0x85, 0x86, 0x84] {
        desc::set_gdt(desc::FREE, desc::descriptor(0, 0, kind, 0));
        eq(run(u64::from(desc::FREE)).rcx & ZF, 0, "gate types are not valid for LAR in long mode")?;
    }
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0, 0x8c, 0));
    eq(run(u64::from(desc::FREE)).rcx & ZF, ZF, "call gates are valid for LAR")
}

fn lsl() -> Verdict {
    let run = |s: u64| Ctx::kernel(code64!("mov rax, -1", "lsl eax, edi", "pushfq", "pop rcx")).rdi(s).run();
    let o = run(u64::from(desc::KDS));
    done(&o, "LSL")?;
    eq(o.rax, 0xffff_ffff, "limit in bytes of a granular segment")?;
    let o = run(u64::from(desc::TSS));
    eq(o.rcx & ZF, ZF, "TSS")?;
    eq(o.rax, 104 + 8193 - 1, "limit of the TSS")?;
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0x123, 0x93, 4));
    eq(run(u64::from(desc::FREE)).rax, 0x123, "byte-granular limit")?;
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0x123, 0x8c, 0));
    eq(run(u64::from(desc::FREE)).rcx & ZF, 0, "no limit of a call gate")?;
    let o = Ctx::kernel(code64!("mov rax, -1", "lsl ax, edi")).rdi(u64::from(desc::KDS)).run();
    eq(o.rax, u64::MAX, "16-bit form")
}

fn verr_verw() -> Verdict {
    let run = |s: u16| {
        let o = Ctx::kernel(code64!("verr di", "pushfq", "pop rax", "verw di", "pushfq", "pop rcx"))
            .rdi(u64::from(s))
            .run();
        (o.rax & ZF != 0, o.rcx & ZF != 0)
    };
    ok(run(desc::KDS) == (true, true), "writable data")?;
    ok(run(desc::KCS) == (true, false), "readable code")?;
    ok(run(0) == (false, false), "null")?;
    ok(run(desc::TSS) == (false, false), "TSS")?;
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0, 0x91, 0));
    ok(run(desc::FREE) == (true, false), "read-only data")?;
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0, 0x99, 0));
    ok(run(desc::FREE) == (false, false), "execute-only code")?;
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0, 0x13, 0));
    ok(run(desc::FREE) == (true, true), "VERR and VERW do not look at the present bit")
}

fn lar_lsl_user() -> Verdict {
    let o = Ctx::user(code64!(
        "lar eax, edi",
        "pushfq",
        "pop rax",
        "lsl ecx, edi",
        "pushfq",
        "pop rcx",
        "verr di",
        "pushfq",
        "pop rdx",
        "lar ebx, esi",
        "pushfq",
        "pop rbx"
    ))
    .rdi(u64::from(desc::KDS))
    .rsi(u64::from(desc::UDS))
    .run();
    done(&o, "at CPL 3")?;
    eq((o.rax | o.rcx | o.rdx) & ZF, 0, "a DPL 0 segment is not visible to CPL 3")?;
    eq(o.rbx & ZF, ZF, "a DPL 3 segment is")?;
    let o = Ctx::kernel(code64!("lar eax, edi", "pushfq", "pop rax")).rdi(u64::from(desc::KDS | 3)).run();
    eq(o.rax & ZF, 0, "RPL counts")
}

fn push_pop_cs_rpl() -> Verdict {
    let o = Ctx::user(code64!("mov eax, cs", "mov ecx, ss", "push fs", "pop rdx")).run();
    done(&o, "MOV of CS")?;
    eq(o.rax, u64::from(desc::UCS), "CS shows CPL 3")?;
    eq(o.rcx, u64::from(desc::UDS), "SS shows RPL 3")?;
    let o = Ctx::user32(code32!("push cs", "pop eax", "push ss", "pop ecx")).run();
    done(&o, "PUSH CS in compatibility mode")?;
    eq(o.rax & 0xffff, u64::from(desc::UCS32), "CS")?;
    let o = Ctx::kernel(code64!("mov eax, cs")).run();
    eq(o.rax & 3, 0, "CPL 0 at CPL 0")
}

fn far_ret_user() -> Verdict {
    let c = code64!("push 0x2b", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", "2: mov ecx, cs");
    let o = Ctx::user(c).run();
    done(&o, "far return at the same level")?;
    eq(o.rcx, u64::from(desc::UCS), "CS")?;
    let c = code64!("push 0x28", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", "2:");
    fault(&Ctx::user(c).run(), GP, 0x28, "RPL 0 in a far return at CPL 3")
}

fn int_n_user() -> Verdict {
    fault(&Ctx::user(code64!("int 0x20")).run(), GP, 0x20 * 8 + 2, "INT 20H, DPL 0")?;
    fault(&Ctx::user(code64!("int 14")).run(), GP, 14 * 8 + 2, "INT 14 at CPL 3")?;
    let o = Ctx::kernel(code64!("push 0", "int 0x21")).run();
    fault(&o, 0x21, 0, "INT 21H at CPL 0")?;
    fault(&Ctx::user32(code32!("int 0x20")).run(), GP, 0x20 * 8 + 2, "INT 20H in compatibility mode")
}

fn sgdt_sidt_32() -> Verdict {
    let o = Legacy::user(code32!(
        "sgdt [esp - 8]",
        "sidt [esp - 16]",
        "mov eax, [esp - 6]",
        "movzx ecx, word ptr [esp - 8]",
        "mov edx, [esp - 14]",
        "sldt esi",
        "str edi",
        "smsw ebx"
    ))
    .run();
    ldone(&o, "at CPL 3 in protected mode")?;
    eq(u64::from(o.eax), desc::gdt_base(), "GDT base")?;
    eq(u64::from(o.ecx), (desc::GDT_LEN * 8 - 1) as u64, "GDT limit")?;
    eq(u64::from(o.edx), crate::legacy::idt(), "IDT base")?;
    eq(u64::from(o.edi & 0xffff), u64::from(desc::TSS32), "STR")?;
    ok(tss() != 0, "")?;
    lfault(&Legacy::user(code32!("lgdt [esp]")).run(), GP, 0, "LGDT at CPL 3")
}

fn iret_user_flags() -> Verdict {
    // IRETQ at CPL 3 treats IF and IOPL as POPF does.
    let c = code64!(
        "mov rcx, rsp",
        "push 0x23",
        "push rcx",
        "push 0x3002",
        "push 0x2b",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: pushfq",
        "pop rax"
    );
    let o = Ctx::user(c).flags(IF).run();
    done(&o, "IRETQ at CPL 3")?;
    eq(o.rax & (IF | IOPL), IF, "IF and IOPL unchanged")
}

fn vif_ac_flags() -> Verdict {
    let o = Ctx::user(code64!("push 0x40002", "popfq", "pushfq", "pop rax")).run();
    done(&o, "AC")?;
    eq(o.rax & 0x4_0000, 0x4_0000, "AC can be set at CPL 3")?;
    clean(&catch(|| mem::wr(desc::gdt_base() + 0x80, 0)), "store")?;
    eq(ALIAS, 0x4000_0000, "")
}
