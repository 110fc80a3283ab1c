//! Exceptions: vectors, error codes, saved RIP, priorities.

use crate::harness::{Verdict, clean, done, eq, fault, ok};
use crate::mem::{self, NX, P, U, W, WIN};
use crate::traps::*;
use crate::{code32, code64, cpu, desc, skip, tests};
use core::arch::asm;

tests!("faults":
    nothing, divide_error, divide_overflow, int3, int_n_dpl, ud2, ud_lock, nm_task_switched, gp_noncanonical, ss_noncanonical,
    int80_from_user, into_32, bound_32, np_segment, gate_not_present, idt_limit, int_gate_dpl_error, idt_exception_bad_gate,
    double_fault_ist, alignment_check, instruction_15_bytes, instruction_16_bytes, fetch_noncanonical, ud_before_pf,
    gp_keeps_state, iretq_bad_selectors,
);

fn nothing() -> Verdict {
    clean(&catch(|| {}), "no trap")
}

fn divide_error() -> Verdict {
    let c = code64!("xor ecx, ecx", "mov eax, 7", "xor edx, edx", "mov ebx, 0x1234", "2: div ecx");
    let o = Ctx::kernel(c).run();
    fault(&o, DE, 0, "div by zero")?;
    eq(o.rip, c.end - 4, "RIP of the fault is the instruction")?;
    eq(o.rax, 7, "RAX unchanged")?;
    eq(o.rbx, 0x1234, "RBX")?;
    let o = Ctx::user(code64!("xor ecx, ecx", "div rcx")).run();
    fault(&o, DE, 0, "div by zero at CPL 3")?;
    eq(o.cs, u64::from(desc::UCS), "CS saved")?;
    eq(o.ss, u64::from(desc::UDS), "SS saved")
}

fn divide_overflow() -> Verdict {
    fault(
        &Ctx::kernel(code64!("mov eax, 0x80000000", "cdq", "mov ecx, -1", "idiv ecx")).run(),
        DE,
        0,
        "idiv 32 overflow",
    )?;
    fault(
        &Ctx::kernel(code64!("mov ax, 0x8000", "cwd", "mov cx, -1", "idiv cx")).run(),
        DE,
        0,
        "idiv 16 overflow",
    )?;
    fault(&Ctx::kernel(code64!("mov ax, 0x100", "mov cl, 1", "div cl")).run(), DE, 0, "div 8 overflow")?;
    fault(&Ctx::kernel(code64!("mov rdx, 1", "mov rcx, 1", "div rcx")).run(), DE, 0, "div 64 overflow")?;
    let o = Ctx::kernel(code64!("mov rax, -7", "cqo", "mov rcx, 2", "idiv rcx")).run();
    done(&o, "idiv")?;
    eq(o.rax, -3i64 as u64, "quotient truncates towards zero")?;
    eq(o.rdx, -1i64 as u64, "remainder has the sign of the dividend")
}

fn int3() -> Verdict {
    let c = code64!("nop", "int3");
    let o = Ctx::kernel(c).run();
    fault(&o, BP, 0, "int3")?;
    eq(o.rip, c.start + 2, "RIP of the trap is after INT3")?;
    let o = Ctx::user(c).run();
    fault(&o, BP, 0, "int3 at CPL 3, gate DPL 3")
}

fn int_n_dpl() -> Verdict {
    fault(&Ctx::kernel(code64!("int 0x41")).run(), 0x41, 0, "int 41h at CPL 0")?;
    let c = code64!("int 0x41");
    let o = Ctx::user(c).run();
    fault(&o, GP, 0x41 * 8 + 2, "int 41h at CPL 3, gate DPL 0")?;
    eq(o.rip, c.start + mem::ALIAS, "RIP at the INT")
}

fn ud2() -> Verdict {
    let c = code64!("nop", "ud2");
    let o = Ctx::kernel(c).run();
    fault(&o, UD, 0, "ud2")?;
    eq(o.rip, c.start + 1, "RIP at UD2")?;
    fault(&Ctx::kernel(code64!(".byte 0x0f, 0xff, 0xc0")).run(), UD, 0, "ud0")?;
    fault(&Ctx::kernel(code64!(".byte 0x06")).run(), UD, 0, "push es in 64-bit mode")?;
    fault(
        &Ctx::kernel(code64!(".byte 0x9a, 0, 0, 0, 0, 8, 0")).run(),
        UD,
        0,
        "direct far call in 64-bit mode",
    )?;
    fault(&Ctx::kernel(code64!(".byte 0x27")).run(), UD, 0, "daa in 64-bit mode")
}

fn ud_lock() -> Verdict {
    fault(&Ctx::kernel(code64!(".byte 0xf0, 0x01, 0xc0")).run(), UD, 0, "lock add eax, eax")?;
    fault(
        &Ctx::kernel(code64!("mov rdi, rsp", ".byte 0xf0, 0x89, 0x07")).run(),
        UD,
        0,
        "lock mov [rdi], eax",
    )?;
    fault(&Ctx::kernel(code64!(".byte 0xf0, 0x90")).run(), UD, 0, "lock nop")?;
    fault(&Ctx::kernel(code64!("mov rdi, rsp", ".byte 0xf0, 0x3b, 0x07")).run(), UD, 0, "lock cmp")?;
    done(&Ctx::kernel(code64!("mov rdi, rsp", "lock add dword ptr [rdi], 1")).run(), "lock add [rdi], 1")
}

fn nm_task_switched() -> Verdict {
    let ts = || cpu::set_cr0(cpu::cr0() | 8);
    let o = catch(|| {
        ts();
        unsafe { asm!("fnop") };
    });
    fault(&o, NM, 0, "x87 with CR0.TS")?;
    let o = catch(|| {
        ts();
        unsafe { asm!("movaps xmm0, xmm1") };
    });
    fault(&o, NM, 0, "SSE with CR0.TS")?;
    let o = catch(|| {
        ts();
        unsafe { asm!("wait") };
    });
    fault(&o, NM, 0, "WAIT with CR0.TS and MP")?;
    let o = catch(|| {
        cpu::set_cr0((cpu::cr0() | 8) & !2);
        unsafe { asm!("wait") };
    });
    clean(&o, "WAIT with CR0.TS, MP clear")?;
    let o = catch(|| {
        ts();
        unsafe { asm!("clts", "fnop") };
    });
    clean(&o, "x87 after CLTS")
}

fn gp_noncanonical() -> Verdict {
    let o = Ctx::kernel(code64!("mov rbx, [rdi]")).rdi(0x8000_0000_0000).run();
    fault(&o, GP, 0, "load")?;
    let o = Ctx::kernel(code64!("mov [rdi], rbx")).rdi(0xffff_7fff_ffff_fff8).run();
    fault(&o, GP, 0, "store")?;
    mem::Space::active().map(0x7fff_ffff_f000, mem::page(), P | W);
    let o = Ctx::kernel(code64!("mov rbx, [rdi]")).rdi(0x7fff_ffff_fff9).run();
    fault(&o, GP, 0, "load across the canonical boundary")
}

fn ss_noncanonical() -> Verdict {
    let c = code64!("mov rbp, rdi", "mov rbx, [rbp]");
    fault(&Ctx::kernel(c).rdi(0x8000_0000_0000).run(), SS, 0, "load through RBP")?;
    let c = code64!("mov rsp, rdi", "push rax");
    fault(&Ctx::kernel(c).rdi(0x8000_0000_0008).run(), SS, 0, "push")?;
    let c = code64!("mov rsp, rdi", "pop rax");
    fault(&Ctx::kernel(c).rdi(0xffff_0000_0000_0000).run(), SS, 0, "pop")
}

fn int80_from_user() -> Verdict {
    let o = Ctx::user(code64!("mov rax, 0x1122334455667788", "mov r15, rsp")).rbx(5).run();
    done(&o, "user code")?;
    eq(o.rax, 0x1122_3344_5566_7788, "RAX")?;
    eq(o.rbx, 5, "RBX")?;
    eq(o.rsp, o.r15, "RSP")?;
    eq(o.cs & 3, 3, "CPL")?;
    eq(o.rflags & 0x1_0000, 0, "RF clear after a software interrupt")
}

fn into_32() -> Verdict {
    let c = code32!("mov al, 0x7f", "add al, 1", ".byte 0xce");
    let o = Ctx::user32(c).run();
    fault(&o, OF, 0, "into with OF")?;
    eq(o.rip, c.end - 2 + mem::ALIAS, "RIP after INTO")?;
    done(&Ctx::user32(code32!("xor eax, eax", ".byte 0xce")).run(), "into without OF")?;
    fault(&Ctx::kernel(code64!(".byte 0xce")).run(), UD, 0, "into in 64-bit mode")
}

fn bound_32() -> Verdict {
    let c = code32!("push 20", "push 10", "mov eax, edi", ".byte 0x62, 0x04, 0x24");
    done(&Ctx::user32(c).rdi(10).run(), "bound, lower limit")?;
    done(&Ctx::user32(c).rdi(20).run(), "bound, upper limit")?;
    fault(&Ctx::user32(c).rdi(21).run(), BR, 0, "bound above")?;
    fault(&Ctx::user32(c).rdi(9).run(), BR, 0, "bound below")?;
    fault(&Ctx::user32(c).rdi(0xffff_fff0).run(), BR, 0, "bound is signed")
}

fn np_segment() -> Verdict {
    desc::set_gdt(desc::FREE, desc::descriptor(0, 0xfffff, 0x13, 0xc));
    let o = Ctx::kernel(code64!("mov fs, edi")).rdi(u64::from(desc::FREE)).run();
    fault(&o, NP, u64::from(desc::FREE), "mov fs, not-present")?;
    let o = Ctx::kernel(code64!("mov ss, edi")).rdi(u64::from(desc::FREE)).run();
    fault(&o, SS, u64::from(desc::FREE), "mov ss, not-present")
}

fn gate_not_present() -> Verdict {
    let (lo, hi) = desc::gate_raw(0x42);
    desc::set_gate_raw(0x42, lo & !(1 << 47), hi);
    fault(&Ctx::kernel(code64!("int 0x42")).run(), NP, 0x42 * 8 + 2, "int through a not-present gate")
}

fn idt_limit() -> Verdict {
    desc::lidt(desc::idt_base(), 0x90 * 16 - 1);
    let o = Ctx::kernel(code64!("int 0x90")).run();
    desc::lidt(desc::idt_base(), 4095);
    fault(&o, GP, 0x90 * 8 + 2, "vector beyond the IDT limit")
}

fn int_gate_dpl_error() -> Verdict {
    desc::set_gate_raw(0x43, 0, 0);
    fault(&Ctx::kernel(code64!("int 0x43")).run(), GP, 0x43 * 8 + 2, "gate of type 0")?;
    desc::set_gate(0x44, stub(0x44), desc::KDS, 1, 0x8e);
    fault(&Ctx::kernel(code64!("int 0x44")).run(), GP, u64::from(desc::KDS), "gate to a data segment")?;
    desc::set_gate(0x45, stub(0x45), 0, 1, 0x8e);
    fault(&Ctx::kernel(code64!("int 0x45")).run(), GP, 0, "gate with a null selector")
}

fn idt_exception_bad_gate() -> Verdict {
    desc::set_gate_raw(3, 0, 0);
    let o = Ctx::kernel(code64!("int3")).run();
    fault(&o, GP, 3 * 8 + 2, "INT3, bad gate: IDT set, EXT clear")?;
    desc::set_gate_raw(6, 0, 0);
    let o = Ctx::kernel(code64!("ud2")).run();
    fault(&o, GP, 6 * 8 + 3, "#UD, bad gate: #GP with IDT and EXT")?;
    let (lo, hi) = desc::gate_raw(0x80);
    desc::set_gate_raw(7, lo & !(1 << 47), hi);
    let o = catch(|| {
        cpu::set_cr0(cpu::cr0() | 8);
        unsafe { asm!("fnop") };
    });
    fault(&o, NP, 7 * 8 + 3, "#NM, not-present gate: #NP with IDT and EXT")
}

fn double_fault_ist() -> Verdict {
    desc::set_gate_raw(14, 0, 0);
    let c = code64!("mov rbx, [rdi]");
    let o = Ctx::kernel(c).rdi(WIN).run();
    fault(&o, DF, 0, "#GP while delivering #PF")?;
    let t = desc::tss();
    let ist3 = unsafe { (&raw const (*t).ist).read_unaligned()[2] };
    ok(o.handler_rsp <= ist3 && o.handler_rsp > ist3 - 256, "handler ran on IST3")?;
    // Both #DE and #GP are contributory (SDM 3A table 7-5).
    let o = catch(|| {
        desc::set_gate_raw(13, 0, 0);
        desc::set_gate_raw(0, 0, 0);
        unsafe { asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _) };
    });
    fault(&o, DF, 0, "#GP while delivering #DE")
}

fn alignment_check() -> Verdict {
    const AM: u64 = 1 << 18;
    let run = |am: bool, ac: u64, offset: u64| {
        catch(|| {
            cpu::set_cr0(if am { cpu::cr0() | AM } else { cpu::cr0() & !AM });
            let c = code64!("mov eax, [rdi]");
            let o = Ctx::user(c).rdi(user_stack() - 64 + offset).flags(ac).run();
            unsafe { core::ptr::write_volatile(&raw mut SEEN, o.vector << 32 | o.error) };
        });
        unsafe { core::ptr::read_volatile(&raw const SEEN) }
    };
    static mut SEEN: u64 = 0;
    eq(run(true, 1 << 18, 1), AC << 32, "AM, AC, CPL 3, misaligned: #AC(0)")?;
    eq(run(true, 1 << 18, 4), END << 32, "aligned")?;
    eq(run(true, 0, 1), END << 32, "AC clear")?;
    eq(run(false, 1 << 18, 1), END << 32, "AM clear")?;
    let o = catch(|| {
        cpu::set_cr0(cpu::cr0() | AM);
        Ctx::kernel(code64!("mov eax, [rsp + 1]")).flags(1 << 18).run();
    });
    clean(&o, "CPL 0 is exempt")
}

fn instruction_15_bytes() -> Verdict {
    let c = code64!(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90");
    done(&Ctx::kernel(c).run(), "15 bytes")
}

fn instruction_16_bytes() -> Verdict {
    let c = code64!(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90");
    let o = Ctx::kernel(c).run();
    fault(&o, GP, 0, "16 bytes")?;
    eq(o.rip, c.start, "RIP at the first prefix")
}

fn fetch_noncanonical() -> Verdict {
    let o = Ctx::kernel(code64!("jmp rdi")).rdi(0x8000_0000_0000).run();
    fault(&o, GP, 0, "jump to a non-canonical address")?;
    let o = Ctx::kernel(code64!("push rdi", "ret")).rdi(0x8000_0000_0000).run();
    fault(&o, GP, 0, "return to a non-canonical address")
}

fn ud_before_pf() -> Verdict {
    // The first page ends within an instruction; the second is absent: #PF on the fetch, not #UD.
    let s = mem::Space::active();
    let p = mem::page();
    s.map(WIN, p, P | W);
    mem::put(p + 4094, &[0x48, 0x8b]);
    let o = Ctx::kernel(code64!("jmp rdi")).rdi(WIN + 4094).run();
    crate::harness::page_fault(&o, if fetch_bit() { 0x10 } else { 0 }, WIN + 4096, "fetch across a page")?;
    eq(o.rip, WIN + 4094, "RIP at the first byte")?;
    mem::put(p + 4094, &[0x0f, 0x0b]);
    fault(&Ctx::kernel(code64!("jmp rdi")).rdi(WIN + 4094).run(), UD, 0, "UD2 that ends with the page")?;
    if !cpu::has_nx() {
        skip!("no NX");
    }
    s.map(WIN + 4096, p, P | W | U | NX);
    mem::put(p + 4094, &[0x48, 0x8b]);
    let o = Ctx::kernel(code64!("jmp rdi")).rdi(WIN + 4094).run();
    crate::harness::page_fault(&o, 0x11, WIN + 4096, "fetch into a no-execute page")
}

/// The I bit of the error code is there with NX or SMEP (SDM 3A 4.7).
fn fetch_bit() -> bool {
    cpu::rdmsr(0xc000_0080) & 0x800 != 0
}

fn gp_keeps_state() -> Verdict {
    let c = code64!("mov rsi, 0x8000000000000000", "mov rdi, rsp", "mov ecx, 3", "rep movsq");
    let o = Ctx::kernel(c).run();
    fault(&o, GP, 0, "movs from a non-canonical address")?;
    eq(o.rcx, 3, "RCX")?;
    eq(o.rdi, sys_stack(), "RDI")?;
    let o = Ctx::kernel(code64!("push qword ptr [rdi]")).rdi(1 << 63).run();
    fault(&o, GP, 0, "push of a bad operand")?;
    eq(o.rsp, sys_stack(), "RSP unchanged")
}

fn iretq_bad_selectors() -> Verdict {
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
    done(&Ctx::kernel(c).rdi(u64::from(desc::KCS)).run(), "iretq")?;
    fault(&Ctx::kernel(c).rdi(0).run(), GP, 0, "null CS")?;
    fault(&Ctx::kernel(c).rdi(u64::from(desc::KDS)).run(), GP, u64::from(desc::KDS), "CS is data")?;
    fault(&Ctx::kernel(c).rdi(0x3f8).run(), GP, 0x3f8, "CS beyond the GDT")?;
    let c = code64!(
        "push rdi",
        "push rsp",
        "push 2",
        "push 0x2b",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2:"
    );
    fault(
        &Ctx::kernel(c).rdi(u64::from(desc::KDS)).run(),
        GP,
        u64::from(desc::KDS),
        "SS of the wrong privilege",
    )
}
