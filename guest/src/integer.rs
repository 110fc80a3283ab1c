//! Integer instructions in the corners that kernels depend on. Results the manuals leave undefined are not checked.

use crate::harness::{Verdict, done, eq, fault, ok, page_fault};
use crate::mem::{P, Space, W, WIN, page, rd, wr};
use crate::traps::*;
use crate::{code32, code64, cpu, skip, tests};

tests!("integer":
    shift_by_zero, shift_masks, rotate_flags, rcl_rcr, shld_shrd, bsf_bsr, bit_test_memory, mul_flags, cmpxchg, cmpxchg8b_16b, cmpxchg16b_misaligned,
    xadd_fault, xchg_same, push_sp, enter_leave, high_bytes, upper_half, address_size_32, aam_aad, daa_das, pusha_popa, cmov_reads, setcc_jcc, loop_jrcxz, lahf_sahf, bswap, movsx_movzx,
    inc_keeps_cf, adc_sbb, neg_not, cwd_family, lea_forms, xlat, call_ret, pop_rsp, cmpxchg_fault_keeps, imul_forms, popcnt_tzcnt, rdrand,
    segment_override_ignored, nop_forms, movbe_crc32, push_imm, test_high_rip_relative,
);

/// Runs a snippet that leaves flags in RDX: appends PUSHF, POP RDX.
macro_rules! with_flags {
    ($($l:literal),* $(,)?) => { code64!($($l,)* "pushfq", "pop rdx") };
}

const CF: u64 = 1;
const PF_: u64 = 4;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF_: u64 = 0x800;
const ARITH: u64 = 0x8d5;

fn run(c: Code, rax: u64, rcx: u64) -> Outcome {
    Ctx::kernel(c).rax(rax).rcx(rcx).run()
}

fn shift_by_zero() -> Verdict {
    for (c, what) in [
        (with_flags!("push 0x8d7", "popfq", "shl eax, cl"), "SHL"),
        (with_flags!("push 0x8d7", "popfq", "shr eax, cl"), "SHR"),
        (with_flags!("push 0x8d7", "popfq", "sar eax, cl"), "SAR"),
        (with_flags!("push 0x8d7", "popfq", "rol eax, cl"), "ROL"),
        (with_flags!("push 0x8d7", "popfq", "rcl eax, cl"), "RCL"),
        (with_flags!("push 0x8d7", "popfq", "shld eax, ebx, cl"), "SHLD"),
    ] {
        for count in [0, 32, 64] {
            let o = run(c, 0xffff_ffff_1234_5678, count);
            eq(o.rdx & ARITH, ARITH, what)?;
            eq(o.rax, 0x1234_5678, "the upper half is zeroed even so")?;
        }
    }
    Ok(())
}

fn shift_masks() -> Verdict {
    eq(run(code64!("shl eax, cl"), 1, 33).rax, 2, "count modulo 32")?;
    eq(run(code64!("shl rax, cl"), 1, 65).rax, 2, "count modulo 64")?;
    eq(run(code64!("shl al, cl"), 0xff, 9).rax & 0xff, 0, "8-bit operand, count 9")?;
    eq(run(code64!("sar al, cl"), 0x80, 31).rax & 0xff, 0xff, "SAR fills with the sign")?;
    let o = run(with_flags!("shr eax, cl"), 0x8000_0001, 1);
    eq(o.rdx & (CF | OF_ | ZF), CF | OF_, "SHR by 1: CF is the bit out, OF the old sign")?;
    let o = run(with_flags!("shl eax, cl"), 0xc000_0000, 1);
    eq(o.rdx & (CF | OF_ | SF), CF | SF, "SHL by 1")
}

fn rotate_flags() -> Verdict {
    let o = run(with_flags!("push 0xd6", "popfq", "ror eax, cl"), 1, 1);
    eq(o.rax, 0x8000_0000, "ROR")?;
    eq(o.rdx & (CF | OF_ | ZF | SF | PF_), CF | OF_ | ZF | SF | PF_, "rotates change CF and OF only")?;
    let o = run(with_flags!("rol al, cl"), 0x81, 8);
    eq(o.rax & 0xff, 0x81, "ROL al, 8 leaves the value")?;
    eq(o.rdx & CF, CF, "and sets CF from bit 0")?;
    eq(run(code64!("rol ax, cl"), 0x1234, 20).rax & 0xffff, 0x2341, "16-bit rotate, count modulo 16")
}

fn rcl_rcr() -> Verdict {
    let o = run(with_flags!("stc", "rcl al, cl"), 0x80, 9);
    eq(o.rax & 0xff, 0x80, "RCL al by 9 is the identity")?;
    eq(o.rdx & CF, CF, "with CF")?;
    let o = run(with_flags!("clc", "rcr eax, cl"), 1, 1);
    eq(o.rax, 0, "RCR")?;
    eq(o.rdx & CF, CF, "bit 0 goes to CF")?;
    let o = run(code64!("stc", "rcr rax, cl"), 0, 1);
    eq(o.rax, 1 << 63, "CF goes to bit 63")?;
    eq(run(code64!("stc", "rcl ax, cl"), 0, 17).rax & 0xffff, 0, "RCL ax by 17 is the identity")
}

fn shld_shrd() -> Verdict {
    eq(
        Ctx::kernel(code64!("shld eax, ebx, 8")).rax(0x1234_5678).rbx(0xabcd_ef01).run().rax,
        0x3456_78ab,
        "SHLD",
    )?;
    eq(Ctx::kernel(code64!("shrd rax, rbx, 4")).rax(0x10).rbx(0xf).run().rax, 0xf000_0000_0000_0001, "SHRD")?;
    let o = Ctx::kernel(with_flags!("shrd eax, ebx, 1")).rax(1).rbx(0).run();
    eq(o.rdx & (CF | ZF), CF | ZF, "flags")
}

fn bsf_bsr() -> Verdict {
    let o = Ctx::kernel(with_flags!("bsf rax, rcx")).rax(0x55).rcx(0).run();
    eq(o.rdx & ZF, ZF, "BSF of zero sets ZF")?;
    eq(o.rax, 0x55, "and leaves the destination (APM 3; all CPUs do)")?;
    let o = Ctx::kernel(with_flags!("bsr eax, ecx")).rcx(0x8000_0000).run();
    eq(o.rax, 31, "BSR")?;
    eq(o.rdx & ZF, 0, "ZF")?;
    eq(Ctx::kernel(code64!("bsf rax, rcx")).rcx(1 << 40).run().rax, 40, "BSF")
}

fn bit_test_memory() -> Verdict {
    let p = page();
    wr(p + 0x100, 0);
    let o = Ctx::kernel(with_flags!("bts [rdi], rax")).rdi(p + 0x108).rax(-1i64 as u64).run();
    done(&o, "BTS with a negative bit offset")?;
    eq(rd(p + 0x100), 1 << 63, "reaches below the operand")?;
    let o = Ctx::kernel(with_flags!("btr dword ptr [rdi], eax")).rdi(p).rax(0x100 * 8 + 63).run();
    eq(o.rdx & CF, CF, "BTR reads the old bit beyond the operand")?;
    eq(rd(p + 0x100), 0, "cleared")?;
    let o = Ctx::kernel(with_flags!("bt eax, ecx")).rax(2).rcx(33).run();
    eq(o.rdx & CF, CF, "register form: offset modulo 32")?;
    Ctx::kernel(code64!("bts dword ptr [rdi], 35")).rdi(p).run();
    eq(rd(p), 8, "immediate form: offset modulo 32")
}

fn mul_flags() -> Verdict {
    let o = run(with_flags!("mul ecx"), 0xffff_ffff, 2);
    eq(o.rax, 0xffff_fffe, "low")?;
    eq(o.rdx & (CF | OF_), CF | OF_, "MUL: CF and OF when the high half is not zero")?;
    let o = run(with_flags!("imul ecx"), 0xffff_ffff, 2);
    eq(o.rdx & (CF | OF_), 0, "IMUL: -1 * 2 fits")?;
    let o = run(code64!("imul rcx"), -5i64 as u64, 7);
    eq(o.rax, -35i64 as u64, "64-bit IMUL")?;
    eq(o.rdx, u64::MAX, "high half is the sign")
}

fn cmpxchg() -> Verdict {
    let p = page();
    wr(p, 5);
    let o = Ctx::kernel(with_flags!("lock cmpxchg [rdi], rcx")).rdi(p).rax(5).rcx(9).run();
    eq(rd(p), 9, "equal: stored")?;
    eq(o.rdx & ZF, ZF, "ZF")?;
    let o = Ctx::kernel(with_flags!("cmpxchg [rdi], rcx")).rdi(p).rax(5).rcx(1).run();
    eq(o.rax, 9, "unequal: loaded")?;
    eq(o.rdx & (ZF | CF), CF, "flags of the comparison 5 - 9")?;
    let o = Ctx::kernel(code64!("cmpxchg ebx, ecx"))
        .rax(0xffff_ffff_0000_0007)
        .rbx(0xffff_ffff_0000_0007)
        .rcx(8)
        .run();
    eq(o.rbx, 8, "register form zero-extends")?;
    eq(o.rax, 0xffff_ffff_0000_0007, "RAX is not written when equal")
}

fn cmpxchg8b_16b() -> Verdict {
    let p = page();
    (wr(p, 0x1111_2222), wr(p + 8, 0x33));
    let o = Ctx::kernel(code64!("mov edx, 0", "lock cmpxchg8b [rdi]"))
        .rdi(p)
        .rax(0x1111_2222)
        .rbx(7)
        .rcx(8)
        .run();
    done(&o, "CMPXCHG8B")?;
    eq(rd(p), 0x8_0000_0007, "ECX:EBX stored")?;
    done(&Ctx::kernel(code64!("lock cmpxchg8b [rdi]")).rdi(p + 3).run(), "CMPXCHG8B needs no alignment")?;
    if !cpu::has_cx16() {
        skip!("no CMPXCHG16B");
    }
    let o = Ctx::kernel(code64!("mov rdx, 0x44", "lock cmpxchg16b [rdi]", "pushfq", "pop r8"))
        .rdi(p)
        .rax(1)
        .rbx(2)
        .rcx(3)
        .run();
    done(&o, "CMPXCHG16B")?;
    ok(o.rax == 0x8_0000_0007 && o.rdx == 0x33, "unequal: loaded")?;
    eq(o.r8 & ZF, 0, "ZF")?;
    let o = Ctx::kernel(code64!("mov rdx, 0x33", "lock cmpxchg16b [rdi]"))
        .rdi(p)
        .rax(0x8_0000_0007)
        .rbx(2)
        .rcx(3)
        .run();
    done(&o, "CMPXCHG16B")?;
    ok(rd(p) == 2 && rd(p + 8) == 3, "equal: stored")
}

fn cmpxchg16b_misaligned() -> Verdict {
    if !cpu::has_cx16() {
        skip!("no CMPXCHG16B");
    }
    fault(
        &Ctx::kernel(code64!("lock cmpxchg16b [rdi]")).rdi(page() + 8).run(),
        GP,
        0,
        "not aligned to 16 bytes",
    )
}

fn xadd_fault() -> Verdict {
    let (s, p) = (Space::active(), page());
    wr(p, 4);
    s.map(WIN, p, P);
    let o = Ctx::kernel(code64!("lock xadd [rdi], rax")).rdi(WIN).rax(3).run();
    page_fault(&o, 3, WIN, "XADD to a read-only page")?;
    eq(o.rax, 3, "the register is unchanged")?;
    s.map(WIN, p, P | W);
    let o = Ctx::kernel(with_flags!("lock xadd [rdi], rax")).rdi(WIN).rax(3).run();
    ok(o.rax == 4 && rd(p) == 7, "XADD")?;
    eq(Ctx::kernel(code64!("xadd eax, eax")).rax(3).run().rax, 6, "XADD eax, eax")
}

fn xchg_same() -> Verdict {
    let o = Ctx::kernel(code64!("xchg eax, ecx", "xchg rbx, rbx"))
        .rax(0xffff_ffff_0000_0001)
        .rcx(0xffff_ffff_0000_0002)
        .run();
    ok(o.rax == 2 && o.rcx == 1, "XCHG of 32-bit registers zero-extends both")?;
    let o = Ctx::kernel(code64!(".byte 0x90")).rax(0xffff_ffff_0000_0001).run();
    eq(o.rax, 0xffff_ffff_0000_0001, "NOP is no XCHG eax, eax")?;
    let o = Ctx::kernel(code64!(".byte 0x41, 0x90")).rax(1).run();
    done(&o, "XCHG r8d, eax")?;
    eq(o.r8, 1, "41 90 is XCHG r8d, eax")
}

fn push_sp() -> Verdict {
    let o = Ctx::kernel(code64!(
        "mov rcx, rsp",
        "push rsp",
        "mov rax, [rsp]",
        "push qword ptr [rsp]",
        "mov rdx, [rsp]"
    ))
    .run();
    eq(o.rax, o.rcx, "PUSH RSP stores the old value")?;
    eq(o.rdx, o.rcx, "PUSH [RSP] reads with the old RSP")?;
    let o = Ctx::kernel(code64!(
        "mov rcx, rsp",
        "mov [rsp - 16], rcx",
        "push 0x66",
        "pop qword ptr [rsp - 8]",
        "mov rax, [rsp - 8]"
    ))
    .run();
    eq(o.rax, 0x66, "POP [RSP+x] uses the RSP after the increment")?;
    let o = Ctx::kernel(code64!("mov rcx, rsp", "push ax", "sub rcx, rsp")).run();
    eq(o.rcx, 2, "PUSH ax moves RSP by 2")
}

fn enter_leave() -> Verdict {
    let o = Ctx::kernel(code64!(
        "mov rbp, 0x1234",
        "mov rcx, rsp",
        "enter 32, 0",
        "mov rax, rbp",
        "mov rdx, rsp",
        "mov rbx, [rbp]",
        "leave",
        "mov rsi, rbp",
        "mov rdi, rsp"
    ))
    .run();
    done(&o, "ENTER and LEAVE")?;
    eq(o.rax, o.rcx - 8, "RBP")?;
    eq(o.rdx, o.rcx - 40, "RSP")?;
    ok(o.rbx == 0x1234 && o.rsi == 0x1234, "old RBP saved and restored")?;
    eq(o.rdi, o.rcx, "RSP restored")?;
    let o = Ctx::kernel(code64!(
        "mov rcx, rsp",
        "mov rbp, rsp",
        "mov qword ptr [rbp - 8], 0x77",
        "enter 16, 2",
        "mov rax, [rbp - 8]",
        "mov rdx, [rbp - 16]",
        "mov rbx, rbp",
        "mov rsi, rsp"
    ))
    .run();
    done(&o, "ENTER with nesting level 2")?;
    eq(o.rbx, o.rcx - 8, "frame pointer")?;
    eq(o.rdx, o.rbx, "the new frame pointer is pushed last")?;
    eq(o.rsi, o.rcx - 8 - 16 - 16, "RSP")
}

fn high_bytes() -> Verdict {
    let o = Ctx::kernel(code64!("mov ah, 0x12", "mov ch, ah", "add dh, ch", "mov sil, 0x55"))
        .rax(0xff)
        .rsi(0x1100)
        .run();
    ok(o.rax == 0x12ff && o.rcx == 0x1200 && o.rdx == 0x1200, "AH, CH, DH")?;
    eq(o.rsi, 0x1155, "SIL with REX")?;
    eq(
        Ctx::kernel(code64!(".byte 0x40, 0x88, 0xc4")).rax(1).run().rsp & 0xff,
        1,
        "with REX, register 4 is SPL",
    )
}

fn upper_half() -> Verdict {
    let all = u64::MAX;
    eq(run(code64!("mov eax, ecx"), all, all).rax, 0xffff_ffff, "MOV r32")?;
    eq(run(code64!("add eax, 1"), all, 0).rax, 0, "ADD r32")?;
    eq(run(code64!("mov ax, cx"), all, 0).rax, 0xffff_ffff_ffff_0000, "MOV r16 keeps")?;
    eq(run(code64!("mov al, cl"), all, 0).rax, 0xffff_ffff_ffff_ff00, "MOV r8 keeps")?;
    eq(run(code64!("xor al, al"), all, 0).rax, 0xffff_ffff_ffff_ff00, "XOR r8 keeps")?;
    eq(run(code64!("movsxd rax, ecx"), 0, 0x8000_0000).rax, 0xffff_ffff_8000_0000, "MOVSXD")
}

fn address_size_32() -> Verdict {
    let p = page();
    wr(p, 0x4711);
    let o = Ctx::kernel(code64!("mov rax, [edi + 0x10]", "lea rcx, [edi + 0x10]", "lea ecx, [rdi + 0x10]"))
        .rdi((p - 0x10) | 0xdead_0000_0000_0000)
        .run();
    done(&o, "67H truncates the address to 32 bits")?;
    eq(o.rax, 0x4711, "data")?;
    let o = Ctx::kernel(code64!("mov rax, [edi + esi]")).rdi(0xffff_fff0).rsi(p + 0x10).run();
    done(&o, "32-bit address arithmetic wraps")?;
    eq(o.rax, 0x4711, "data")
}

fn aam_aad() -> Verdict {
    let o = Ctx::user32(code32!("mov eax, 0x4f", ".byte 0xd4, 10", "mov ecx, eax", ".byte 0xd5, 10")).run();
    done(&o, "AAM and AAD")?;
    eq(o.rcx & 0xffff, 0x0709, "AAM")?;
    eq(o.rax & 0xffff, 0x4f, "AAD")?;
    fault(&Ctx::user32(code32!("mov eax, 5", ".byte 0xd4, 0")).run(), DE, 0, "AAM 0")?;
    fault(&Ctx::user(code64!(".byte 0xd4, 10")).run(), UD, 0, "AAM in 64-bit mode")
}

fn daa_das() -> Verdict {
    let o = Ctx::user32(code32!("mov al, 0x79", "add al, 0x35", "daa", "pushfd", "pop ecx")).run();
    done(&o, "DAA")?;
    eq(o.rax & 0xff, 0x14, "79 + 35")?;
    eq(o.rcx & 0x11, 0x11, "CF and AF")?;
    let o = Ctx::user32(code32!("mov al, 0x35", "sub al, 0x47", "das", "pushfd", "pop ecx")).run();
    eq(o.rax & 0xff, 0x88, "35 - 47")?;
    eq(o.rcx & 1, 1, "CF")?;
    let o = Ctx::user32(code32!("mov ax, 0x000f", "aaa", "mov ecx, eax", "aas")).run();
    eq(o.rcx & 0xffff, 0x0105, "AAA")
}

fn pusha_popa() -> Verdict {
    let o = Ctx::user32(code32!(
        "mov eax, 1",
        "mov ebx, 2",
        "mov ebp, 3",
        "mov edi, 4",
        "mov ecx, esp",
        "pushad",
        "mov edx, [esp + 12]",
        "xor eax, eax",
        "xor edi, edi",
        "mov [esp + 20], edx",
        "popad",
        "mov esi, esp"
    ))
    .run();
    done(&o, "PUSHA and POPA")?;
    ok(o.rax == 1 && o.rdi == 4 && o.rbp == 3, "registers")?;
    eq(o.rdx, o.rcx, "PUSHA stores the old ESP")?;
    eq(o.rsi, o.rcx, "POPA ignores the stored ESP")
}

fn cmov_reads() -> Verdict {
    let s = Space::active();
    let o = Ctx::kernel(code64!("clc", "cmovc rax, [rdi]")).rdi(WIN).run();
    page_fault(&o, 0, WIN, "CMOV reads its operand whatever the condition")?;
    s.map(WIN, page(), P);
    let o = Ctx::kernel(code64!("clc", "cmovc eax, ecx")).rax(u64::MAX).run();
    eq(o.rax, 0xffff_ffff, "a 32-bit CMOV zero-extends whatever the condition")
}

fn setcc_jcc() -> Verdict {
    let c = code64!(
        "push rax",
        "popfq",
        "seto bl",
        "setb bh",
        "setz cl",
        "sets ch",
        "setp dl",
        "setl dh",
        "setle r8b",
        "seta r9b"
    );
    let go = |f: u64| Ctx::kernel(c).rax(f | 2).run();
    let o = go(OF_);
    ok(
        o.rbx & 0xffff == 1 && o.rdx >> 8 & 0xff == 1 && o.r8 & 0xff == 1 && o.r9 & 0xff == 1,
        "OF: O, L, LE, A",
    )?;
    let o = go(SF | OF_ | CF);
    ok(o.rdx >> 8 & 0xff == 0 && o.rbx >> 8 & 0xff == 1 && o.r9 & 0xff == 0, "SF = OF: not L; CF: B, not A")?;
    let o = go(ZF | PF_);
    ok(o.rcx & 0xff == 1 && o.rdx & 0xff == 1 && o.r8 & 0xff == 1 && o.r9 & 0xff == 0, "ZF: Z, LE, not A")?;
    let o = Ctx::kernel(code64!(
        "mov al, 0x80",
        "cmp al, 1",
        "jl 2f",
        "ud2",
        "2: ja 3f",
        "ud2",
        "3: jo 4f",
        "ud2",
        "4: jns 5f",
        "ud2",
        "5: nop"
    ))
    .run();
    done(&o, "conditional jumps on -128 - 1")
}

fn loop_jrcxz() -> Verdict {
    let o = Ctx::kernel(code64!(
        "xor eax, eax",
        "mov ecx, 5",
        "2: inc eax",
        "loop 2b",
        "jrcxz 3f",
        "ud2",
        "3: mov ecx, 3",
        "xor edx, edx",
        "4: inc edx",
        "cmp edx, 2",
        "loopne 4b"
    ))
    .run();
    done(&o, "LOOP")?;
    eq(o.rax, 5, "rounds")?;
    ok(o.rdx == 2 && o.rcx == 1, "LOOPNE")?;
    let o = Ctx::kernel(code64!(
        "mov rcx, 0x100000000",
        "jecxz 2f",
        "ud2",
        "2: jrcxz 3f",
        "jmp 4f",
        "3: ud2",
        "4: nop"
    ))
    .run();
    done(&o, "JECXZ looks at ECX, JRCXZ at RCX")
}

fn lahf_sahf() -> Verdict {
    let o = Ctx::kernel(with_flags!("mov ah, 0xff", "sahf", "lahf")).run();
    done(&o, "LAHF and SAHF")?;
    eq(o.rax >> 8 & 0xff, 0xd7, "fixed bits")?;
    eq(o.rdx & 0xd5, 0xd5, "flags")
}

fn bswap() -> Verdict {
    eq(run(code64!("bswap rax"), 0x0102_0304_0506_0708, 0).rax, 0x0807_0605_0403_0201, "64 bits")?;
    eq(run(code64!("bswap eax"), 0xffff_ffff_0102_0304, 0).rax, 0x0403_0201, "32 bits")
}

fn movsx_movzx() -> Verdict {
    eq(run(code64!("movsx rax, cl"), 0, 0x80).rax, 0xffff_ffff_ffff_ff80, "MOVSX r64, r8")?;
    eq(run(code64!("movsx eax, cx"), u64::MAX, 0x8000).rax, 0xffff_8000, "MOVSX r32, r16")?;
    eq(run(code64!("movsx ax, cl"), 0, 0x80).rax, 0xff80, "MOVSX r16, r8")?;
    eq(run(code64!("movzx eax, ch"), u64::MAX, 0x1234).rax, 0x12, "MOVZX r32, CH")
}

fn inc_keeps_cf() -> Verdict {
    let o = run(with_flags!("stc", "inc eax"), 0x7fff_ffff, 0);
    eq(o.rdx & (CF | OF_ | SF), CF | OF_ | SF, "INC keeps CF and sets OF")?;
    let o = run(with_flags!("clc", "dec rax"), 0, 0);
    eq(o.rdx & (CF | SF), SF, "DEC keeps CF")
}

fn adc_sbb() -> Verdict {
    let o = run(with_flags!("stc", "adc rax, rcx"), u64::MAX, 0);
    ok(o.rax == 0 && o.rdx & (CF | ZF) == CF | ZF, "ADC carries through")?;
    let o = run(with_flags!("stc", "sbb eax, ecx"), 0, 0xffff_ffff);
    ok(o.rax == 0 && o.rdx & CF != 0, "SBB 0 - FFFFFFFF - 1")?;
    let o = run(with_flags!("stc", "adc al, cl"), 0x7f, 0);
    ok(o.rax & 0xff == 0x80 && o.rdx & OF_ != 0, "ADC overflow")
}

fn neg_not() -> Verdict {
    let o = run(with_flags!("neg eax"), 0x8000_0000, 0);
    eq(o.rdx & (CF | OF_ | SF), CF | OF_ | SF, "NEG of the smallest number")?;
    let o = run(with_flags!("neg rax"), 0, 0);
    eq(o.rdx & (CF | ZF), ZF, "NEG of zero clears CF")?;
    let o = run(with_flags!("push 0x8d7", "popfq", "not eax"), 0, 0);
    ok(o.rax == 0xffff_ffff && o.rdx & ARITH == ARITH, "NOT changes no flags")
}

fn cwd_family() -> Verdict {
    let o = run(code64!("cbw", "cwde", "cdqe", "cqo"), 0x80, 0);
    ok(o.rax == 0xffff_ffff_ffff_ff80 && o.rdx == u64::MAX, "CBW, CWDE, CDQE, CQO")?;
    let o = Ctx::kernel(code64!("cdq")).rax(0xffff_ffff_7fff_ffff).rdx(u64::MAX).run();
    ok(o.rdx == 0 && o.rax == 0xffff_ffff_7fff_ffff, "CDQ")?;
    let o = Ctx::kernel(code64!("cwd")).rax(0x8000).rdx(0).run();
    eq(o.rdx, 0xffff, "CWD")
}

fn lea_forms() -> Verdict {
    eq(run(code64!("lea ax, [rcx * 8 + 5]"), u64::MAX, 0x1000).rax, 0xffff_ffff_ffff_8005, "LEA r16")?;
    eq(run(code64!("lea eax, [rcx + rcx * 2]"), 0, 0xffff_ffff_ffff).rax, 0xffff_fffd, "LEA r32 truncates")?;
    fault(&run(code64!(".byte 0x8d, 0xc0"), 0, 0), UD, 0, "LEA of a register")
}

fn xlat() -> Verdict {
    let p = page();
    wr(p + 0xf8, 0x77 << 56);
    eq(Ctx::kernel(code64!("xlatb")).rbx(p).rax(0xff).run().rax, 0x77, "XLAT: AL is unsigned")
}

fn call_ret() -> Verdict {
    let o = Ctx::kernel(code64!(
        "mov rbx, rsp",
        "push 7",
        "call 2f",
        "jmp 3f",
        "2: mov rax, [rsp + 8]",
        "ret 8",
        "3: mov rcx, rsp"
    ))
    .run();
    done(&o, "CALL and RET 8")?;
    ok(o.rax == 7 && o.rcx == o.rbx, "argument and RSP")?;
    let o = Ctx::kernel(code64!(
        "lea rax, [rip + 2f]",
        "mov [rsp - 64], rax",
        "lea rbx, [rsp - 72]",
        "jmp [rbx + 8]",
        "ud2",
        "2: lea rax, [rip + 3f]",
        "push rax",
        "call [rsp]",
        "jmp 4f",
        "3: ret",
        "4: nop"
    ))
    .run();
    done(&o, "indirect JMP and CALL through memory")
}

fn pop_rsp() -> Verdict {
    let o = Ctx::kernel(code64!(
        "mov rcx, rsp",
        "push rcx",
        "mov qword ptr [rsp - 8], 0",
        "pop rsp",
        "mov rax, rsp",
        "pushfq",
        "pop r8"
    ))
    .run();
    done(&o, "POP RSP")?;
    eq(o.rax, o.rcx, "RSP is the popped value")
}

fn cmpxchg_fault_keeps() -> Verdict {
    let (s, p) = (Space::active(), page());
    wr(p, 9);
    s.map(WIN, p, P);
    let o = Ctx::kernel(code64!("push 0x2", "popfq", "lock cmpxchg [rdi], rcx")).rdi(WIN).rax(5).rcx(1).run();
    page_fault(&o, 3, WIN, "CMPXCHG of a read-only page")?;
    eq(o.rax, 5, "RAX unchanged")?;
    eq(o.rflags & ZF, 0, "flags unchanged")
}

fn imul_forms() -> Verdict {
    let o = run(with_flags!("imul eax, ecx, -3"), 0, 5);
    ok(o.rax == 0xffff_fff1 && o.rdx & (CF | OF_) == 0, "three operands")?;
    let o = run(with_flags!("imul rax, rcx"), 1 << 62, 4);
    ok(o.rax == 0 && o.rdx & (CF | OF_) == CF | OF_, "overflow")?;
    let o = run(code64!("imul cl"), 0x80, 0x80);
    eq(o.rax & 0xffff, 0x4000, "IMUL r8")
}

fn popcnt_tzcnt() -> Verdict {
    if cpu::leaf(1, 0).c >> 23 & 1 == 0 {
        skip!("no POPCNT");
    }
    let o = run(with_flags!("popcnt rax, rcx"), 0, 0xf0f0_0000_0000_0001);
    eq(o.rax, 9, "POPCNT")?;
    eq(o.rdx & ARITH, 0, "flags clear")?;
    let o = run(with_flags!(".byte 0xf3, 0x0f, 0xbc, 0xc1"), 0x55, 0);
    if cpu::has_bmi1() {
        ok(o.rax == 32 && o.rdx & CF != 0, "TZCNT of zero is the width, with CF")
    } else {
        ok(o.rdx & ZF != 0, "without BMI1 it is BSF")
    }
}

fn rdrand() -> Verdict {
    if !cpu::has_rdrand() {
        return fault(&Ctx::kernel(code64!("rdrand rax")).run(), UD, 0, "RDRAND not announced");
    }
    for _ in 0..1000 {
        let o = Ctx::kernel(with_flags!("rdrand eax")).rax(u64::MAX).run();
        done(&o, "RDRAND")?;
        eq(o.rax >> 32, 0, "zero-extends")?;
        eq(o.rdx & (ARITH & !CF), 0, "OF, SF, ZF, AF and PF are clear")?;
        if o.rdx & CF != 0 {
            return Ok(());
        }
    }
    crate::fail!("no random number in 1000 attempts")
}

fn segment_override_ignored() -> Verdict {
    let o = Ctx::kernel(code64!("mov rax, cs:[rsp]", "mov rcx, es:[rsp]", "mov rdx, ss:[rsp]")).run();
    done(&o, "CS, DS, ES and SS overrides do nothing in 64-bit mode")
}

fn nop_forms() -> Verdict {
    let c = code64!(
        ".byte 0x0f, 0x1f, 0x00",
        ".byte 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00",
        ".byte 0xf3, 0x90",
        ".byte 0xf3, 0x0f, 0x1e, 0xfa",
        ".byte 0x0f, 0x18, 0x07",
        ".byte 0x0f, 0x0d, 0x0f"
    );
    done(
        &Ctx::kernel(c).rax(1 << 63).rdi(1 << 63).run(),
        "NOP with a bad address, PAUSE, ENDBR64, PREFETCH touch nothing",
    )
}

fn movbe_crc32() -> Verdict {
    let p = page();
    wr(p, 0x0102_0304_0506_0708);
    if cpu::leaf(1, 0).c >> 22 & 1 != 0 {
        eq(Ctx::kernel(code64!("movbe rax, [rdi]")).rdi(p).run().rax, 0x0807_0605_0403_0201, "MOVBE")?;
    }
    if cpu::leaf(1, 0).c >> 20 & 1 == 0 {
        skip!("no SSE4.2");
    }
    // CRC-32C of the nine bytes "123456789" is E3069283H.
    let mut crc = 0xffff_ffffu64;
    for b in b"123456789" {
        crc = Ctx::kernel(code64!("crc32 eax, cl")).rax(crc).rcx(u64::from(*b)).run().rax;
    }
    eq(crc ^ 0xffff_ffff, 0xe306_9283, "CRC32")
}

fn push_imm() -> Verdict {
    let o = Ctx::kernel(code64!(
        ".byte 0x68, 0, 0, 0, 0x80",
        "pop rax",
        ".byte 0x6a, 0xff",
        "pop rcx",
        ".byte 0x66, 0x68, 0x34, 0x12",
        "mov rdx, rsp",
        "pop bx"
    ))
    .run();
    ok(o.rax == 0xffff_ffff_8000_0000 && o.rcx == u64::MAX, "immediates are sign-extended")?;
    ok(o.rdx == sys_stack() - 2 && o.rbx & 0xffff == 0x1234, "66H pushes two bytes")
}

fn test_high_rip_relative() -> Verdict {
    // A RIP-relative operand with an immediate: the base is the end of the whole instruction.
    let o = Ctx::kernel(with_flags!(
        "cmp dword ptr [rip + 2f], 0x11223344",
        "jmp 3f",
        "2: .long 0x11223344",
        "3: nop"
    ))
    .run();
    done(&o, "CMP [RIP + x], imm32")?;
    let o2 = Ctx::kernel(code64!("mov eax, dword ptr [rip + 2f]", "jmp 3f", "2: .long 0x55667788", "3: nop"))
        .run();
    eq(o2.rax, 0x5566_7788, "MOV [RIP + x]")?;
    let o3 = Ctx::kernel(code64!(
        "cmp dword ptr [rip + 2f], 0x11223344",
        "sete al",
        "movzx eax, al",
        "jmp 3f",
        "2: .long 0x11223344",
        "3: nop"
    ))
    .run();
    eq(o3.rax, 1, "equal")
}
