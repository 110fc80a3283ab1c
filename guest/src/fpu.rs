//! x87, SSE and AVX: state, rules of the control registers, exceptions.

use crate::harness::{Verdict, done, eq, fault, ok};
use crate::mem::{page, rd, rd32, wr, wr32};
use crate::traps::*;
use crate::{code64, cpu, skip, tests};

tests!("fpu":
    fninit_state, x87_arithmetic, x87_constants, x87_rounding, x87_compare, x87_stack_fault, x87_precision, mf_exception, mf_masked,
    xm_exception, xm_without_osxmmexcpt, mxcsr_reserved, em_rules, osfxsr_clear, mmx_em, movaps_alignment, sse_operand_alignment, fxsave_roundtrip,
    fxsave_alignment, fxrstor_bad_mxcsr, sse_arithmetic, sse_conversions, sse_nan_rules, ftz_daz, sse_integer, mmx_tags, xsave_needs_osxsave, xsave_roundtrip,
    xrstor_init, xrstor_errors, avx_rules, avx_upper_halves, avx_arithmetic, state_across_traps, ts_rules_avx, movnti_fences, fpu_env, f2xm1_family,
    xgetbv1, avx512_if_there,
);

/// Sets CR0 or CR4 bits within a snippet: RAX is clobbered.
macro_rules! cr0_or { ($bits:literal, $($l:literal),*) => { code64!("mov rax, cr0", concat!("or eax, ", $bits), "mov cr0, rax", $($l),*) }; }

fn fninit_state() -> Verdict {
    let p = page();
    let o = Ctx::kernel(code64!("fninit", "fnstcw [rdi]", "fnstsw ax", "fnstenv [rdi + 16]")).rdi(p).run();
    done(&o, "FNINIT")?;
    eq(u64::from(rd32(p) & 0xffff), 0x37f, "control word")?;
    eq(o.rax & 0xffff, 0, "status word")?;
    eq(u64::from(rd32(p + 24) & 0xffff), 0xffff, "tag word: all empty")
}

fn x87_arithmetic() -> Verdict {
    let p = page();
    (wr(p, 3.5f64.to_bits()), wr(p + 8, (-1.25f64).to_bits()));
    let c = code64!(
        "fninit",
        "fld qword ptr [rdi]",
        "fmul qword ptr [rdi + 8]",
        "fstp qword ptr [rdi + 16]",
        "fild dword ptr [rsi]",
        "fsqrt",
        "fistp dword ptr [rdi + 24]",
        "fnstsw ax"
    );
    wr32(p + 64, 144);
    let o = Ctx::kernel(c).rdi(p).rsi(p + 64).run();
    done(&o, "x87")?;
    eq(rd(p + 16), (-4.375f64).to_bits(), "product")?;
    eq(u64::from(rd32(p + 24)), 12, "square root")?;
    eq(o.rax & 0x3f, 0, "no exceptions")
}

fn x87_constants() -> Verdict {
    let p = page();
    done(
        &Ctx::kernel(code64!(
            "fninit",
            "fldpi",
            "fstp tbyte ptr [rdi]",
            "fldl2e",
            "fstp tbyte ptr [rdi + 16]"
        ))
        .rdi(p)
        .run(),
        "constants",
    )?;
    ok(rd(p) == 0xc90f_daa2_2168_c235 && rd32(p + 8) & 0xffff == 0x4000, "pi in 80 bits")?;
    ok(rd(p + 16) == 0xb8aa_3b29_5c17_f0bc && rd32(p + 24) & 0xffff == 0x3fff, "log2(e)")
}

fn x87_rounding() -> Verdict {
    let p = page();
    wr(p, 2.5f64.to_bits());
    for (cw, want) in [(0x37fu32, 2u64), (0x77f, 2), (0xb7f, 3), (0xf7f, 2)] {
        wr32(p + 8, cw);
        done(
            &Ctx::kernel(code64!(
                "fninit",
                "fldcw [rdi + 8]",
                "fld qword ptr [rdi]",
                "fistp qword ptr [rdi + 16]",
                "fninit"
            ))
            .rdi(p)
            .run(),
            "FISTP",
        )?;
        eq(rd(p + 16), want, "rounding control")?;
    }
    Ok(())
}

fn x87_compare() -> Verdict {
    let o = Ctx::kernel(code64!(
        "fninit",
        "fld1",
        "fldz",
        "fcomip st, st(1)",
        "pushfq",
        "pop rax",
        "fldz",
        "fdiv st, st(0)",
        "fucomip st, st(1)",
        "pushfq",
        "pop rcx",
        "fninit"
    ))
    .run();
    done(&o, "FCOMI")?;
    eq(o.rax & 0x45, 1, "0 < 1: CF")?;
    eq(o.rcx & 0x45, 0x45, "NaN: unordered")
}

fn x87_stack_fault() -> Verdict {
    let o = Ctx::kernel(code64!(
        "fninit",
        "fstp st(0)",
        "fnstsw ax",
        "movzx ecx, ax",
        "fninit",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fld1",
        "fnstsw ax",
        "fninit"
    ))
    .run();
    done(&o, "masked stack faults")?;
    eq(o.rcx & 0x241, 0x41, "underflow: IE, SF, C1 clear")?;
    eq(o.rax & 0x241, 0x241, "overflow: IE, SF, C1 set")
}

fn x87_precision() -> Verdict {
    let p = page();
    // 1/3 with 64-bit and with 24-bit precision.
    wr32(p, 0x007f);
    wr32(p + 4, 3);
    done(
        &Ctx::kernel(code64!(
            "fninit",
            "fld1",
            "fidiv dword ptr [rdi + 4]",
            "fstp tbyte ptr [rdi + 16]",
            "fldcw [rdi]",
            "fld1",
            "fidiv dword ptr [rdi + 4]",
            "fstp tbyte ptr [rdi + 32]",
            "fninit"
        ))
        .rdi(p)
        .run(),
        "FIDIV",
    )?;
    eq(rd(p + 16), 0xaaaa_aaaa_aaaa_aaab, "64 bits")?;
    eq(rd(p + 32), 0xaaaa_ab00_0000_0000, "24 bits")
}

fn mf_exception() -> Verdict {
    let p = page();
    wr32(p, 0x37b);
    let c = code64!(
        "fninit",
        "fldcw [rdi]",
        "fld1",
        "fldz",
        "fdivp st(1), st",
        "nop",
        "mov ebx, 5",
        "fwait",
        "mov ebx, 6"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&Ctx::kernel(code64!("fnclex", "fninit")).run(), "FNINIT")?;
    fault(&o, MF, 0, "unmasked division by zero")?;
    eq(o.rbx & 0xffff_ffff, 5, "it comes with the next waiting instruction")?;
    eq(o.rip, c.end - 8, "RIP at FWAIT")
}

fn mf_masked() -> Verdict {
    let o = Ctx::kernel(code64!("fninit", "fld1", "fldz", "fdivp st(1), st", "fwait", "fnstsw ax", "fninit"))
        .run();
    done(&o, "masked")?;
    eq(o.rax & 0x3f, 4, "ZE in the status word")
}

fn xm_code() -> Code {
    code64!(
        "push 0x1d80",
        "ldmxcsr [rsp]",
        "pop rax",
        "mov eax, 0x3f800000",
        "movd xmm0, eax",
        "xorps xmm1, xmm1",
        "divss xmm0, xmm1"
    )
}

fn xm_exception() -> Verdict {
    let o = Ctx::kernel(xm_code()).run();
    let c = code64!(
        "sub rsp, 16",
        "stmxcsr [rsp]",
        "mov eax, [rsp]",
        "mov dword ptr [rsp], 0x1f80",
        "ldmxcsr [rsp]",
        "add rsp, 16"
    );
    let after = Ctx::kernel(c).run();
    fault(&o, XM, 0, "unmasked SSE division by zero")?;
    eq(after.rax & 4, 4, "ZE in MXCSR")
}

fn xm_without_osxmmexcpt() -> Verdict {
    cpu::set_cr4(cpu::cr4() & !0x400);
    let o = Ctx::kernel(xm_code()).run();
    cpu::set_cr4(cpu::cr4() | 0x400);
    fault(&o, UD, 0, "the same with CR4.OSXMMEXCPT clear")
}

fn mxcsr_reserved() -> Verdict {
    let c = code64!("push rdi", "ldmxcsr [rsp]", "pop rdi");
    fault(&Ctx::kernel(c).rdi(0x1_0000).run(), GP, 0, "bit 16 of MXCSR")?;
    done(&Ctx::kernel(c).rdi(0x1f80).run(), "default")
}

fn em_rules() -> Verdict {
    fault(&Ctx::kernel(cr0_or!("4", "fnop")).run(), NM, 0, "x87 with CR0.EM")?;
    fault(&Ctx::kernel(cr0_or!("4", "movaps xmm0, xmm1")).run(), UD, 0, "SSE with CR0.EM")?;
    fault(
        &Ctx::kernel(cr0_or!("0xc", "movaps xmm0, xmm1")).run(),
        UD,
        0,
        "#UD by EM comes before #NM by TS",
    )?;
    fault(&Ctx::kernel(cr0_or!("8", "fxsave [rsp - 1024]")).run(), NM, 0, "FXSAVE with TS")?;
    done(
        &Ctx::kernel(cr0_or!("4", "mov eax, 1", "cpuid", "sfence", "prefetcht0 [rsp]")).run(),
        "fences and prefetches do not care",
    )
}

fn osfxsr_clear() -> Verdict {
    let c = code64!("mov rax, cr4", "and eax, 0xfffffdff", "mov cr4, rax", "movaps xmm0, xmm1");
    fault(&Ctx::kernel(c).run(), UD, 0, "SSE with CR4.OSFXSR clear")?;
    let c = code64!("mov rax, cr4", "and eax, 0xfffffdff", "mov cr4, rax", "ldmxcsr [rsp]");
    fault(&Ctx::kernel(c).run(), UD, 0, "LDMXCSR with CR4.OSFXSR clear")?;
    let c = code64!("mov rax, cr4", "and eax, 0xfffffdff", "mov cr4, rax", "fnop", "movd mm0, eax", "emms");
    done(&Ctx::kernel(c).run(), "x87 and MMX work")
}

fn mmx_em() -> Verdict {
    fault(&Ctx::kernel(cr0_or!("4", "movd mm0, eax")).run(), UD, 0, "MMX with CR0.EM")?;
    fault(&Ctx::kernel(cr0_or!("8", "movd mm0, eax")).run(), NM, 0, "MMX with CR0.TS")
}

fn movaps_alignment() -> Verdict {
    let p = page();
    for (c, what) in [
        (code64!("movaps xmm0, [rdi]"), "MOVAPS load"),
        (code64!("movaps [rdi], xmm0"), "MOVAPS store"),
        (code64!("movdqa xmm0, [rdi]"), "MOVDQA load"),
        (code64!("movntps [rdi], xmm0"), "MOVNTPS"),
    ] {
        fault(&Ctx::kernel(c).rdi(p + 8).run(), GP, 0, what)?;
        done(&Ctx::kernel(c).rdi(p + 16).run(), what)?;
    }
    done(
        &Ctx::kernel(code64!("movups xmm0, [rdi]", "movdqu [rdi], xmm0", "lddqu xmm1, [rdi]"))
            .rdi(p + 1)
            .run(),
        "unaligned forms",
    )
}

fn sse_operand_alignment() -> Verdict {
    let p = page();
    fault(
        &Ctx::kernel(code64!("addps xmm0, [rdi]")).rdi(p + 4).run(),
        GP,
        0,
        "ADDPS with a misaligned operand",
    )?;
    fault(
        &Ctx::kernel(code64!("pxor xmm0, [rdi]")).rdi(p + 4).run(),
        GP,
        0,
        "PXOR with a misaligned operand",
    )?;
    done(
        &Ctx::kernel(code64!("addss xmm0, [rdi]", "paddq mm0, [rdi]", "emms")).rdi(p + 3).run(),
        "scalar and MMX operands",
    )
}

fn fxsave_roundtrip() -> Verdict {
    let (p, q) = (page(), page());
    for i in 0..64 {
        wr(p + 0x800 + i * 8, 0x0101_0101_0101_0101 * i);
    }
    let c = code64!(
        "fninit",
        "fldpi",
        "fld1",
        "movups xmm0, [rdi + 0x800]",
        "movups xmm1, [rdi + 0x810]",
        "movups xmm7, [rdi + 0x870]",
        "movups xmm8, [rdi + 0x880]",
        "movups xmm15, [rdi + 0x8f0]",
        "push 0x9fc0",
        "ldmxcsr [rsp]",
        "pop rax",
        "fxsave64 [rdi]",
        "fninit",
        "xorps xmm0, xmm0",
        "xorps xmm1, xmm1",
        "xorps xmm7, xmm7",
        "xorps xmm8, xmm8",
        "xorps xmm15, xmm15",
        "push 0x1f80",
        "ldmxcsr [rsp]",
        "pop rax",
        "fxrstor64 [rdi]",
        "fxsave64 [rsi]",
        "fninit",
        "push 0x1f80",
        "ldmxcsr [rsp]",
        "pop rax"
    );
    done(&Ctx::kernel(c).rdi(p).rsi(q).run(), "FXSAVE, FXRSTOR, FXSAVE")?;
    for i in (0..52).filter(|i| !(1..3).contains(i)) {
        eq(rd(q + i * 8), rd(p + i * 8), "image")?;
    }
    eq(rd(p) & 0xffff, 0x37f, "FCW")?;
    eq(rd(p) >> 32 & 0xff, 0xc0, "abridged tag word: two registers in use")?;
    eq(u64::from(rd32(p + 24)), 0x9fc0, "MXCSR")?;
    eq(rd(p + 48), 0xc90f_daa2_2168_c235, "ST1 is pi")?;
    eq(rd(p + 160 + 15 * 16), 0x0101_0101_0101_0101u64 * 30, "XMM15")
}

fn fxsave_alignment() -> Verdict {
    fault(&Ctx::kernel(code64!("fxsave [rdi]")).rdi(page() + 8).run(), GP, 0, "FXSAVE, misaligned")?;
    fault(&Ctx::kernel(code64!("fxrstor [rdi]")).rdi(page() + 8).run(), GP, 0, "FXRSTOR, misaligned")
}

fn fxrstor_bad_mxcsr() -> Verdict {
    let p = page();
    done(&Ctx::kernel(code64!("fxsave [rdi]", "or dword ptr [rdi + 24], 0x10000")).rdi(p).run(), "FXSAVE")?;
    fault(&Ctx::kernel(code64!("fxrstor [rdi]")).rdi(p).run(), GP, 0, "FXRSTOR of a reserved MXCSR bit")
}

fn sse_arithmetic() -> Verdict {
    let o = Ctx::kernel(code64!(
        "cvtsi2sd xmm0, rax",
        "cvtsi2sd xmm1, rcx",
        "divsd xmm0, xmm1",
        "sqrtsd xmm1, xmm0",
        "movq rax, xmm0",
        "movq rdx, xmm1"
    ))
    .rax(9)
    .rcx(4)
    .run();
    done(&o, "SSE2")?;
    eq(o.rax, 2.25f64.to_bits(), "9 / 4")?;
    eq(o.rdx, 1.5f64.to_bits(), "square root")
}

fn sse_conversions() -> Verdict {
    let c = code64!("movq xmm0, rax", "cvttsd2si rax, xmm0", "cvtsd2si ecx, xmm0");
    let o = Ctx::kernel(c).rax((-2.5f64).to_bits()).run();
    ok(o.rax == -2i64 as u64 && o.rcx == 0xffff_fffe, "truncation and rounding to even")?;
    let o = Ctx::kernel(c).rax(1e300f64.to_bits()).run();
    ok(o.rax == 1 << 63 && o.rcx == 0x8000_0000, "overflow gives the integer indefinite")?;
    let o = Ctx::kernel(c).rax(f64::NAN.to_bits()).run();
    eq(o.rax, 1 << 63, "NaN gives the integer indefinite")
}

fn sse_nan_rules() -> Verdict {
    let nan = f64::NAN.to_bits() | 0x123;
    let c = code64!(
        "movq xmm0, rax",
        "movq xmm1, rcx",
        "movaps xmm2, xmm0",
        "minsd xmm2, xmm1",
        "movq rbx, xmm2",
        "addsd xmm0, xmm1",
        "movq rax, xmm0",
        "ucomisd xmm0, xmm1",
        "pushfq",
        "pop rdx"
    );
    let o = Ctx::kernel(c).rax(nan).rcx(1.0f64.to_bits()).run();
    eq(o.rbx, 1.0f64.to_bits(), "MINSD returns the second operand")?;
    eq(o.rax, nan, "a NaN operand goes through")?;
    eq(o.rdx & 0x45, 0x45, "unordered")?;
    let o = Ctx::kernel(code64!("xorps xmm0, xmm0", "divsd xmm0, xmm0", "movq rax, xmm0")).run();
    eq(o.rax, 0xfff8_0000_0000_0000, "0 / 0 is the real indefinite, with the sign set")
}

fn ftz_daz() -> Verdict {
    let c = code64!(
        "push rdi",
        "ldmxcsr [rsp]",
        "movd xmm0, eax",
        "movd xmm1, ecx",
        "mulss xmm0, xmm1",
        "movd eax, xmm0",
        "mov dword ptr [rsp], 0x1f80",
        "ldmxcsr [rsp]",
        "pop rdi"
    );
    let tiny = 0x0080_0000u64;
    let half = u64::from(0.5f32.to_bits());
    eq(Ctx::kernel(c).rdi(0x1f80).rax(tiny).rcx(half).run().rax, 0x0040_0000, "a denormal result")?;
    eq(Ctx::kernel(c).rdi(0x9f80).rax(tiny).rcx(half).run().rax, 0, "FTZ flushes it")?;
    let two = u64::from(2.0f32.to_bits());
    eq(Ctx::kernel(c).rdi(0x1f80).rax(1).rcx(two).run().rax, 2, "a denormal operand")?;
    eq(Ctx::kernel(c).rdi(0x1fc0).rax(1).rcx(two).run().rax, 0, "DAZ takes it as zero")
}

fn sse_integer() -> Verdict {
    let c = code64!(
        "movq xmm0, rax",
        "movq xmm1, rcx",
        "movaps xmm2, xmm0",
        "paddb xmm2, xmm1",
        "movq rbx, xmm2",
        "pmuludq xmm0, xmm1",
        "movq rdx, xmm0",
        "movq xmm0, rax",
        "punpcklbw xmm0, xmm1",
        "movq r8, xmm0",
        "pmovmskb r9d, xmm1",
        "pshufd xmm3, xmm1, 0x11",
        "movq r10, xmm3"
    );
    let o = Ctx::kernel(c).rax(0x01ff_0203_0405_0607).rcx(0x8001_0203_8405_0607).run();
    done(&o, "SSE2 integer")?;
    eq(o.rbx, 0x8100_0406_880a_0c0e, "PADDB")?;
    eq(o.rdx, 0x0405_0607 * 0x8405_0607, "PMULUDQ")?;
    eq(o.r8, 0x8404_0505_0606_0707, "PUNPCKLBW")?;
    eq(o.r9, 0x88, "PMOVMSKB")?;
    eq(o.r10, 0x8001_0203_8001_0203 & 0xffff_ffff_ffff_ffff, "PSHUFD").or(eq(
        o.r10,
        0x8405_0607_8001_0203,
        "PSHUFD",
    ))
}

fn mmx_tags() -> Verdict {
    let p = page();
    let c = code64!(
        "fninit",
        "mov rax, 0x1122334455667788",
        "movq mm3, rax",
        "fnstenv [rdi]",
        "fldenv [rdi]",
        "paddb mm3, mm3",
        "movq rcx, mm3",
        "emms",
        "fnstenv [rdi + 32]"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "MMX")?;
    eq(u64::from(rd32(p + 8) & 0xffff) & 0xff3f, u64::from(rd32(p + 8) & 0xff3f), "")?;
    ok(rd32(p + 8) & 0xffff != 0xffff, "an MMX instruction marks the x87 registers as used")?;
    eq(o.rcx, 0x2244_6688_aacc_ee10, "PADDB")?;
    eq(u64::from(rd32(p + 40) & 0xffff), 0xffff, "EMMS empties them")
}

fn enable_xsave(xcr0: u64) -> bool {
    if !cpu::has_xsave() || u64::from(cpu::leaf(0xd, 0).a) & xcr0 != xcr0 {
        return false;
    }
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    Ctx::kernel(code64!("xor ecx, ecx", "xor edx, edx", "xsetbv")).rax(xcr0).run().vector == END
}

fn xsave_needs_osxsave() -> Verdict {
    fault(
        &Ctx::kernel(code64!("mov eax, 3", "xor edx, edx", "xsave [rdi]")).rdi(page()).run(),
        UD,
        0,
        "XSAVE with CR4.OSXSAVE clear",
    )?;
    fault(&Ctx::kernel(code64!("xor ecx, ecx", "xgetbv")).run(), UD, 0, "XGETBV")
}

fn xsave_roundtrip() -> Verdict {
    if !enable_xsave(3) {
        skip!("no XSAVE");
    }
    let p = page();
    (wr(p + 0x800, 0x1111), wr(p + 0x808, 0x2222));
    let c = code64!(
        "fninit",
        "fldpi",
        "movups xmm5, [rdi + 0x800]",
        "mov eax, 3",
        "xor edx, edx",
        "xsave64 [rdi]",
        "fninit",
        "xorps xmm5, xmm5",
        "mov eax, 3",
        "xor edx, edx",
        "xrstor64 [rdi]",
        "movups [rdi + 0x820], xmm5",
        "fstp tbyte ptr [rdi + 0x840]",
        "fninit"
    );
    done(&Ctx::kernel(c).rdi(p).run(), "XSAVE and XRSTOR")?;
    eq(rd(p + 512) & 3, 3, "XSTATE_BV")?;
    ok(rd(p + 0x820) == 0x1111 && rd(p + 0x828) == 0x2222, "XMM5")?;
    eq(rd(p + 0x840), 0xc90f_daa2_2168_c235, "ST0")
}

fn xrstor_init() -> Verdict {
    if !enable_xsave(3) {
        skip!("no XSAVE");
    }
    let p = page();
    let c = code64!(
        "fninit",
        "fld1",
        "pcmpeqd xmm5, xmm5",
        "mov eax, 3",
        "xor edx, edx",
        "xsave64 [rdi]",
        "mov qword ptr [rdi + 512], 0",
        "mov eax, 2",
        "xrstor64 [rdi]",
        "movq rbx, xmm5",
        "fnstsw ax",
        "movzx ecx, ax",
        "mov eax, 1",
        "xrstor64 [rdi]",
        "fnstsw ax",
        "fninit"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "XRSTOR")?;
    eq(o.rbx, 0, "a component with its XSTATE_BV bit clear gets its initial state")?;
    eq(o.rcx & 0x3800, 0x3800, "a component that was not asked for is not touched")?;
    eq(o.rax & 0x3800, 0, "x87 initialised")
}

fn xrstor_errors() -> Verdict {
    if !enable_xsave(3) {
        skip!("no XSAVE");
    }
    let p = page();
    let restore = code64!("mov eax, 3", "xor edx, edx", "xrstor64 [rdi]");
    done(&Ctx::kernel(code64!("mov eax, 3", "xor edx, edx", "xsave64 [rdi]")).rdi(p).run(), "XSAVE")?;
    fault(&Ctx::kernel(restore).rdi(p + 16).run(), GP, 0, "misaligned")?;
    let bv = rd(p + 512);
    wr(p + 512, bv | 1 << 62);
    fault(&Ctx::kernel(restore).rdi(p).run(), GP, 0, "XSTATE_BV beyond XCR0")?;
    wr(p + 512, bv);
    wr(p + 528, 1);
    fault(&Ctx::kernel(restore).rdi(p).run(), GP, 0, "reserved header bytes")?;
    wr(p + 528, 0);
    done(&Ctx::kernel(restore).rdi(p).run(), "a good image")
}

fn avx_rules() -> Verdict {
    let c = code64!("vxorps ymm0, ymm0, ymm0");
    if !cpu::has_avx() || !cpu::has_xsave() {
        return fault(&Ctx::kernel(c).run(), UD, 0, "AVX not announced");
    }
    fault(&Ctx::kernel(c).run(), UD, 0, "AVX with CR4.OSXSAVE clear")?;
    ok(enable_xsave(3), "XCR0 = 3")?;
    fault(&Ctx::kernel(c).run(), UD, 0, "AVX with XCR0.AVX clear")?;
    ok(enable_xsave(7), "XCR0 = 7")?;
    done(&Ctx::kernel(c).run(), "AVX")?;
    fault(
        &Ctx::kernel(code64!("vmovaps ymm0, [rdi]")).rdi(page() + 16).run(),
        GP,
        0,
        "VMOVAPS ymm, misaligned",
    )?;
    done(
        &Ctx::kernel(code64!("vaddps ymm0, ymm0, [rdi]")).rdi(page() + 1).run(),
        "VEX arithmetic takes misaligned operands",
    )?;
    fault(&Ctx::kernel(code64!(".byte 0xf0, 0xc5, 0xfc, 0x57, 0xc0")).run(), UD, 0, "LOCK before VEX")?;
    fault(&Ctx::kernel(code64!(".byte 0x66, 0xc5, 0xfc, 0x57, 0xc0")).run(), UD, 0, "66H before VEX")
}

fn avx_upper_halves() -> Verdict {
    if !cpu::has_avx() || !enable_xsave(7) {
        skip!("no AVX");
    }
    let p = page();
    let c = code64!(
        "vpcmpeqd xmm1, xmm1, xmm1",
        "vinsertf128 ymm1, ymm1, xmm1, 1",
        "vmovaps ymm2, ymm1",
        "vmovaps ymm3, ymm1",
        "xorps xmm1, xmm1",
        "vxorps xmm2, xmm2, xmm2",
        "vmovups [rdi], ymm1",
        "vmovups [rdi + 32], ymm2",
        "vzeroupper",
        "vmovups [rdi + 64], ymm3"
    );
    done(&Ctx::kernel(c).rdi(p).run(), "AVX")?;
    ok(rd(p) == 0 && rd(p + 16) == u64::MAX, "legacy SSE keeps the upper half")?;
    ok(rd(p + 32) == 0 && rd(p + 48) == 0, "VEX.128 zeroes the upper half")?;
    ok(rd(p + 64) == u64::MAX && rd(p + 80) == 0, "VZEROUPPER")?;
    // And through XSAVE.
    let c = code64!(
        "vpcmpeqd xmm1, xmm1, xmm1",
        "vinsertf128 ymm1, ymm1, xmm1, 1",
        "mov eax, 7",
        "xor edx, edx",
        "xsave64 [rdi]",
        "vzeroall",
        "mov eax, 7",
        "xrstor64 [rdi]",
        "vextractf128 xmm2, ymm1, 1",
        "vmovq rcx, xmm2",
        "vzeroupper"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "XSAVE with AVX")?;
    eq(o.rcx, u64::MAX, "upper half restored")
}

fn avx_arithmetic() -> Verdict {
    if !cpu::has_avx() || !enable_xsave(7) {
        skip!("no AVX");
    }
    let p = page();
    for i in 0..4 {
        wr(p + i * 8, (i as f64 + 0.5).to_bits());
    }
    done(
        &Ctx::kernel(code64!(
            "vmovupd ymm0, [rdi]",
            "vaddpd ymm1, ymm0, [rdi]",
            "vhaddpd ymm2, ymm1, ymm0",
            "vmovupd [rdi + 32], ymm1",
            "vmovupd [rdi + 64], ymm2",
            "vzeroupper"
        ))
        .rdi(p)
        .run(),
        "AVX",
    )?;
    for i in 0..4 {
        eq(rd(p + 32 + i * 8), (2.0 * i as f64 + 1.0).to_bits(), "VADDPD")?;
    }
    eq(rd(p + 64), 4.0f64.to_bits(), "VHADDPD, low lane")?;
    eq(rd(p + 80), 12.0f64.to_bits(), "VHADDPD, high lane")
}

fn state_across_traps() -> Verdict {
    // A trap and its return leave x87 and SSE registers alone.
    set_mode(3, RESUME);
    let p = page();
    let c = code64!(
        "fninit",
        "fldpi",
        "mov rax, 0x123456789abcdef0",
        "movq xmm9, rax",
        "int3",
        "int3",
        "movq rcx, xmm9",
        "fstp tbyte ptr [rdi]",
        "fninit"
    );
    let o = Ctx::user(c).rdi(p + crate::mem::ALIAS).run();
    done(&o, "code")?;
    eq(u64::from(count(3)), 2, "two traps")?;
    eq(o.rcx, 0x1234_5678_9abc_def0, "XMM9")?;
    eq(rd(p), 0xc90f_daa2_2168_c235, "ST0")
}

fn ts_rules_avx() -> Verdict {
    if !cpu::has_avx() || !enable_xsave(7) {
        skip!("no AVX");
    }
    fault(&Ctx::kernel(cr0_or!("8", "vxorps ymm0, ymm0, ymm0")).run(), NM, 0, "AVX with CR0.TS")?;
    fault(
        &Ctx::kernel(cr0_or!("8", "mov eax, 3", "xor edx, edx", "xsave64 [rdi]")).rdi(page()).run(),
        NM,
        0,
        "XSAVE with CR0.TS",
    )?;
    done(&Ctx::kernel(cr0_or!("8", "clts", "vxorps ymm0, ymm0, ymm0", "vzeroupper")).run(), "after CLTS")
}

fn movnti_fences() -> Verdict {
    let p = page();
    done(
        &Ctx::kernel(code64!(
            "movnti [rdi], rax",
            "sfence",
            "lfence",
            "mfence",
            "clflush [rdi]",
            "movd xmm0, eax",
            "movntdq [rdi + 16], xmm0",
            "sfence"
        ))
        .rdi(p)
        .rax(0x77)
        .run(),
        "non-temporal stores and fences",
    )?;
    ok(rd(p) == 0x77 && rd(p + 16) == 0x77, "stored")
}

fn fpu_env() -> Verdict {
    let p = page();
    let c = code64!(
        "fninit",
        "fld1",
        "fnsave [rdi]",
        "fnstsw ax",
        "movzx ecx, ax",
        "frstor [rdi]",
        "fnstsw ax",
        "fstp qword ptr [rdi + 128]",
        "fninit"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "FNSAVE and FRSTOR")?;
    eq(o.rcx & 0x3800, 0, "FNSAVE initialises")?;
    eq(o.rax & 0x3800, 0x3800, "FRSTOR restores TOP")?;
    eq(rd(p + 128), 1.0f64.to_bits(), "ST0")
}

fn f2xm1_family() -> Verdict {
    let p = page();
    wr(p, 0.5f64.to_bits());
    let c = code64!(
        "fninit",
        "fld qword ptr [rdi]",
        "fsin",
        "fstp qword ptr [rdi + 8]",
        "fld1",
        "fld1",
        "fpatan",
        "fstp qword ptr [rdi + 16]",
        "fld1",
        "fld qword ptr [rdi]",
        "fscale",
        "fstp qword ptr [rdi + 24]",
        "fninit"
    );
    done(&Ctx::kernel(c).rdi(p).run(), "FSIN, FPATAN, FSCALE")?;
    eq(rd(p + 8), 0x3fde_aee8_744b_05f0, "sin 0.5").or(eq(rd(p + 8), 0x3fde_aee8_744b_05ef, "sin 0.5"))?;
    eq(rd(p + 16), 0x3fe9_21fb_5444_2d18, "pi / 4")?;
    eq(rd(p + 24), 1.0f64.to_bits(), "0.5 * 2^1")
}

fn xgetbv1() -> Verdict {
    if !enable_xsave(3) || !cpu::has_xgetbv1() {
        skip!("no XGETBV with ECX = 1");
    }
    let o = Ctx::kernel(code64!("pcmpeqd xmm0, xmm0", "mov ecx, 1", "xgetbv")).run();
    done(&o, "XGETBV 1")?;
    eq(o.rax & !3, 0, "no more than XCR0")?;
    eq(o.rax & 2, 2, "SSE is in use")
}

fn avx512_if_there() -> Verdict {
    if cpu::leaf(7, 0).b >> 16 & 1 == 0 || !enable_xsave(0xe7) {
        skip!("no AVX-512");
    }
    let p = page();
    let c = code64!(
        "vpternlogd zmm17, zmm17, zmm17, 0xff",
        "mov eax, 0x5555",
        "kmovw k1, eax",
        "vmovdqu32 [rdi] {{k1}}, zmm17",
        "vzeroupper"
    );
    done(&Ctx::kernel(c).rdi(p).run(), "AVX-512")?;
    eq(rd(p), 0xffff_ffff, "masked store")?;
    let s = crate::mem::Space::active();
    s.map(crate::mem::WIN, p, 3);
    let c = code64!("mov eax, 0x00ff", "kmovw k1, eax", "vmovdqu32 zmm1 {{k1}}{{z}}, [rdi]", "vzeroupper");
    done(&Ctx::kernel(c).rdi(crate::mem::WIN + 4096 - 32).run(), "masked-out elements do not fault")
}
