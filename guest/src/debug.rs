//! Single stepping, breakpoints and the debug registers (SDM 3B 18.2, 18.3; APM 2 13.1).

use crate::harness::{Verdict, clean, done, eq, fault, ok};
use crate::traps::*;
use crate::{code64, cpu, desc, mem, tests};
use core::arch::asm;

tests!("debug":
    single_step, step_count, popf_sets_tf, mov_ss_shadow, step_rep, step_user, icebp, code_breakpoint, data_write, data_read_write,
    data_length, data_rep, io_breakpoint, general_detect, dr4_dr5, dr_upper_bits, dr6_fixed, mov_dr_user, breakpoint_len_8,
    breakpoint_disabled, rf_suppresses,
);

const TF: u64 = 0x100;

fn single_step() -> Verdict {
    let c = code64!("nop", "nop");
    cpu::set_dr6(0);
    let o = Ctx::kernel(c).flags(TF).run();
    fault(&o, DB, 0, "TF")?;
    eq(o.rip, c.start + 1, "trap after the first instruction")?;
    eq(cpu::dr6() & 0x400f, 0x4000, "DR6.BS")?;
    eq(o.rflags & TF, TF, "TF in the saved flags")
}

fn step_count() -> Verdict {
    set_mode(1, RESUME);
    let c = code64!("nop", "xor eax, eax", "2: inc eax", "cmp eax, 3", "jne 2b", "nop");
    done(&Ctx::kernel(c).flags(TF).run(), "stepped code")?;
    eq(u64::from(count(1)), 2 + 9 + 1, "a trap for every instruction, none for INT n")?;
    eq(log(0).rip, c.start + 1, "first RIP")?;
    eq(log(11).rip, c.end - 2, "last RIP")
}

fn popf_sets_tf() -> Verdict {
    set_mode(1, RESUME | CLEAR_TF);
    let c = code64!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop");
    done(&Ctx::kernel(c).run(), "code")?;
    eq(u64::from(count(1)), 1, "one trap")?;
    eq(log(0).rip, c.end - 3, "the trap comes after the instruction that follows POPF")
}

fn mov_ss_shadow() -> Verdict {
    set_mode(1, RESUME);
    let c = code64!("mov eax, 0x10", "mov ss, eax", "nop", "nop");
    done(&Ctx::kernel(c).flags(TF).run(), "code")?;
    eq(u64::from(count(1)), 3, "no trap between MOV SS and the next instruction")?;
    eq(log(1).rip, c.start + 8, "RIP of the second trap")
}

fn step_rep() -> Verdict {
    set_mode(1, RESUME);
    let buf = mem::page();
    let c = code64!("rep stosb", "nop");
    done(&Ctx::kernel(c).rdi(buf).rcx(4).flags(TF).run(), "code")?;
    eq(u64::from(count(1)), 5, "a trap for every iteration")?;
    eq(log(0).rip, c.start, "RIP stays at the string instruction")?;
    eq(log(0).rcx, 3, "RCX counts")?;
    eq(log(3).rip, c.start + 2, "after the last iteration")
}

fn step_user() -> Verdict {
    set_mode(1, RESUME);
    let c = code64!("nop", "push rax", "pop rcx");
    let o = Ctx::user(c).flags(TF).rax(5).run();
    done(&o, "code")?;
    eq(u64::from(count(1)), 3, "traps at CPL 3")?;
    eq(o.rcx, 5, "result")
}

fn icebp() -> Verdict {
    cpu::set_dr6(0);
    let c = code64!(".byte 0xf1");
    let o = Ctx::kernel(c).run();
    fault(&o, DB, 0, "F1H")?;
    eq(o.rip, c.start + 1, "a trap")?;
    eq(cpu::dr6() & 0x400f, 0, "DR6 has no cause")?;
    fault(&Ctx::user(c).run(), DB, 0, "F1H at CPL 3 does not check the gate's DPL")
}

fn arm(n: u64, addr: u64, kind: u64, len: u64) {
    match n {
        0 => cpu::set_dr0(addr),
        _ => cpu::set_dr1(addr),
    }
    cpu::set_dr6(0);
    cpu::set_dr7(0x400 | 2 << (n * 2) | kind << (16 + n * 4) | len << (18 + n * 4));
}

fn code_breakpoint() -> Verdict {
    let c = code64!("xor ecx, ecx", "2: inc ecx", "cmp ecx, 3", "jne 2b");
    arm(0, c.start + 2, 0, 0);
    let o = Ctx::kernel(c).run();
    fault(&o, DB, 0, "instruction breakpoint")?;
    eq(o.rip, c.start + 2, "a fault: RIP at the instruction")?;
    eq(o.rcx & 0xffff_ffff, 0, "not executed")?;
    eq(cpu::dr6() & 0x400f, 1, "DR6.B0")?;
    set_mode(1, RESUME | SET_RF);
    done(&Ctx::kernel(c).run(), "resumed with RF")?;
    eq(u64::from(count(1)), 3, "hit in every round")
}

fn data_write() -> Verdict {
    let p = mem::page();
    arm(1, p + 8, 1, 3);
    let c = code64!("mov eax, [rdi + 8]", "mov [rdi + 4], eax", "mov [rdi + 8], ebx", "nop");
    let o = Ctx::kernel(c).rdi(p).rbx(7).run();
    fault(&o, DB, 0, "data write breakpoint")?;
    eq(o.rip, c.end - 3, "a trap: RIP after the write")?;
    eq(u64::from(mem::rd32(p + 8)), 7, "written")?;
    eq(cpu::dr6() & 0x400f, 2, "DR6.B1")
}

fn data_read_write() -> Verdict {
    let p = mem::page();
    arm(0, p, 3, 3);
    let c = code64!("mov eax, [rdi]", "nop");
    let o = Ctx::kernel(c).rdi(p).run();
    fault(&o, DB, 0, "data read breakpoint")?;
    eq(o.rip, c.start + 2, "RIP")?;
    set_mode(1, RESUME);
    done(&Ctx::kernel(code64!("add [rdi], eax", "push qword ptr [rdi]", "pop rax")).rdi(p).run(), "code")?;
    eq(u64::from(count(1)), 2, "RMW and PUSH hit once each")
}

fn data_length() -> Verdict {
    let p = mem::page();
    set_mode(1, RESUME);
    arm(0, p + 4, 1, 1);
    let c = code64!(
        "mov byte ptr [rdi + 3], 1",
        "mov byte ptr [rdi + 4], 1",
        "mov byte ptr [rdi + 5], 1",
        "mov byte ptr [rdi + 6], 1",
        "mov dword ptr [rdi + 2], 1",
        "mov qword ptr [rdi - 3], 1"
    );
    done(&Ctx::kernel(c).rdi(p + 0).run(), "stores")?;
    eq(u64::from(count(1)), 4, "hits of a two-byte breakpoint")?;
    ok(log(0).rip == c.start + 8 && log(1).rip == c.start + 12, "where")
}

fn data_rep() -> Verdict {
    let p = mem::page();
    arm(0, p + 4, 1, 0);
    let c = code64!("rep stosb", "nop");
    let o = Ctx::kernel(c).rdi(p).rcx(16).run();
    fault(&o, DB, 0, "breakpoint inside REP STOSB")?;
    ok(o.rcx < 12 || o.rip == c.start + 2, "RCX counts what was done")?;
    eq(o.rdi, p + 16 - o.rcx, "RDI agrees with RCX")
}

fn io_breakpoint() -> Verdict {
    cpu::set_cr4(cpu::cr4() | 8);
    arm(0, 0x61, 2, 0);
    let c = code64!("in al, 0x60 + 4", "in al, 0x61", "nop");
    let o = Ctx::kernel(c).run();
    cpu::set_dr7(0x400);
    fault(&o, DB, 0, "I/O breakpoint")?;
    eq(o.rip, c.end - 3, "a trap after IN")?;
    eq(cpu::dr6() & 0x400f, 1, "DR6.B0")
}

fn general_detect() -> Verdict {
    cpu::set_dr6(0);
    let c = code64!("mov rax, dr0");
    cpu::set_dr7(0x2400);
    let o = Ctx::kernel(c).run();
    fault(&o, DB, 0, "DR7.GD")?;
    eq(o.rip, c.start, "a fault before MOV DR")?;
    eq(cpu::dr6() & 0x600f, 0x2000, "DR6.BD")?;
    eq(cpu::dr7() & 0x2000, 0, "GD is clear in the handler")
}

fn dr4_dr5() -> Verdict {
    cpu::set_cr4(cpu::cr4() & !8);
    let c = code64!("mov rax, dr5");
    let o = Ctx::kernel(c).run();
    done(&o, "DR5 with CR4.DE clear")?;
    eq(o.rax, cpu::dr7(), "DR5 is DR7")?;
    cpu::set_cr4(cpu::cr4() | 8);
    fault(&Ctx::kernel(c).run(), UD, 0, "DR5 with CR4.DE set")?;
    fault(&Ctx::kernel(code64!("mov dr4, rax")).run(), UD, 0, "DR4 with CR4.DE set")
}

fn dr_upper_bits() -> Verdict {
    fault(&catch(|| cpu::set_dr7(1 << 32 | 0x400)), GP, 0, "upper half of DR7")?;
    fault(&catch(|| cpu::set_dr6(1 << 32)), GP, 0, "upper half of DR6")?;
    clean(&catch(|| cpu::set_dr0(0xffff_8000_0000_0000)), "64-bit address in DR0")?;
    eq(cpu::dr0(), 0xffff_8000_0000_0000, "DR0")
}

fn dr6_fixed() -> Verdict {
    cpu::set_dr6(0);
    eq(cpu::dr6() & 0xfffe_f7f0, 0xfffe_07f0, "bits that read as one, bit 12 as zero")?;
    cpu::set_dr6(0xffff_ffff);
    eq(cpu::dr6() & 0x1000, 0, "bit 12")?;
    cpu::set_dr7(0);
    eq(cpu::dr7() & 0xdc00, 0x400, "DR7: bit 10 is one, 11, 12, 14, 15 zero")
}

fn mov_dr_user() -> Verdict {
    fault(&Ctx::user(code64!("mov rax, dr0")).run(), GP, 0, "read at CPL 3")?;
    fault(&Ctx::user(code64!("mov dr7, rax")).run(), GP, 0, "write at CPL 3")
}

fn breakpoint_len_8() -> Verdict {
    let p = mem::page();
    arm(0, p + 8, 1, 2);
    set_mode(1, RESUME);
    let c = code64!("mov byte ptr [rdi + 15], 1", "mov byte ptr [rdi + 16], 1", "mov byte ptr [rdi + 7], 1");
    done(&Ctx::kernel(c).rdi(p).run(), "stores")?;
    eq(u64::from(count(1)), 1, "eight-byte breakpoint")
}

fn breakpoint_disabled() -> Verdict {
    let p = mem::page();
    arm(0, p, 3, 3);
    cpu::set_dr7(0x400 | 3 << 16 | 3 << 18);
    clean(&catch(|| mem::wr(p, 1)), "no enable bit, no trap")?;
    let o = catch(|| unsafe { asm!("mov dr7, {}", in(reg) 0x401u64 | 0xf << 16) });
    clean(&o, "L0")?;
    fault(&catch(|| mem::wr(p, 1)), DB, 0, "L0 works as G0")?;
    eq(u64::from(desc::KCS), 8, "")
}

fn rf_suppresses() -> Verdict {
    let c = code64!("nop", "nop");
    arm(0, c.start, 0, 0);
    done(&Ctx::kernel(c).flags(1 << 16).run(), "RF loaded by IRETQ suppresses one instruction breakpoint")?;
    fault(&Ctx::kernel(c).run(), DB, 0, "without RF")
}
