//! Control registers, MSRs, CPUID and the time-stamp counter.

use crate::harness::{Verdict, baseline_efer, clean, done, eq, fault, ok, set_efer};
use crate::mem::page;
use crate::traps::*;
use crate::{apic, code32, code64, cpu, skip, tests};

tests!("crmsr":
    cr0_pg_without_pe, cr0_nw_without_cd, cr0_upper_bits, cr0_et_fixed, cr4_reserved, cr4_pae_in_long_mode, cr3_reserved, cr8_is_tpr, cr8_reserved,
    efer_lme_while_paging, efer_reserved, efer_lma_readonly, efer_sce, msr_noncanonical, msr_unknown, msr_roundtrip, tsc_write, tsc_aux,
    rdtsc_monotonic, pat, apic_base, xcr0_rules, cpuid_leaves, cpuid_zero_extends, cpuid_osxsave_osfxsr, cr2_roundtrip, cr0_write_clears_none,
    mtrr, microcode_and_platform, cr4_osxsave_bit, cpuid_apic_id, cr_high_bits_32,
);

fn cr0_pg_without_pe() -> Verdict {
    fault(&catch(|| cpu::set_cr0(cpu::cr0() & !1)), GP, 0, "PG without PE")
}

fn cr0_nw_without_cd() -> Verdict {
    fault(&catch(|| cpu::set_cr0(cpu::cr0() | 1 << 29)), GP, 0, "NW without CD")
}

fn cr0_upper_bits() -> Verdict {
    fault(&catch(|| cpu::set_cr0(cpu::cr0() | 1 << 32)), GP, 0, "bit 32 of CR0")
}

fn cr0_et_fixed() -> Verdict {
    let mut v = 0;
    let o = catch(|| {
        cpu::set_cr0(cpu::cr0() & !0x10);
        v = cpu::cr0();
    });
    clean(&o, "clearing ET")?;
    eq(v & 0x10, 0x10, "ET is always one")
}

fn cr4_reserved() -> Verdict {
    fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 63)), GP, 0, "bit 63 of CR4")?;
    fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 15)), GP, 0, "bit 15 of CR4")?;
    if !cpu::has_smap() {
        fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 21)), GP, 0, "SMAP not announced")?;
    }
    if !cpu::has_pcid() {
        fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 17)), GP, 0, "PCIDE not announced")?;
    }
    if !cpu::has_umip() {
        fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 11)), GP, 0, "UMIP not announced")?;
    }
    clean(&catch(|| cpu::set_cr4(cpu::cr4() | 0x39f & !0x20)), "bits that every CPU has")
}

fn cr4_pae_in_long_mode() -> Verdict {
    fault(&catch(|| cpu::set_cr4(cpu::cr4() & !0x20)), GP, 0, "clearing PAE in long mode")?;
    fault(&catch(|| cpu::set_cr4(cpu::cr4() ^ 1 << 12)), GP, 0, "toggling LA57 in long mode")
}

fn cr3_reserved() -> Verdict {
    let bits = cpu::phys_bits();
    if bits < 52 {
        fault(
            &catch(|| cpu::set_cr3(cpu::cr3() | 1 << bits)),
            GP,
            0,
            "a bit beyond the physical address width",
        )?;
    }
    clean(&catch(|| cpu::set_cr3(cpu::cr3())), "the same value")
}

fn cr8_is_tpr() -> Verdict {
    cpu::set_cr8(5);
    eq(u64::from(apic::read(0x80)), 0x50, "TPR shows CR8")?;
    apic::write(0x80, 0xa3);
    eq(cpu::cr8(), 0xa, "CR8 shows the TPR's class")?;
    cpu::set_cr8(0);
    eq(u64::from(apic::read(0x80)), 0, "TPR zero")
}

fn cr8_reserved() -> Verdict {
    fault(&catch(|| cpu::set_cr8(0x10)), GP, 0, "bit 4 of CR8")?;
    fault(&catch(|| cpu::set_cr8(1 << 32)), GP, 0, "bit 32 of CR8")
}

fn efer_lme_while_paging() -> Verdict {
    fault(&catch(|| set_efer(baseline_efer() & !0x100)), GP, 0, "clearing LME while paging is on")
}

fn efer_reserved() -> Verdict {
    fault(&catch(|| set_efer(baseline_efer() | 1 << 63)), GP, 0, "bit 63 of EFER")?;
    fault(&catch(|| set_efer(baseline_efer() | 1 << 9)), GP, 0, "bit 9 of EFER")?;
    if !cpu::has_svm() {
        fault(&catch(|| set_efer(baseline_efer() | 1 << 12)), GP, 0, "SVME without SVM")?;
    }
    Ok(())
}

fn efer_lma_readonly() -> Verdict {
    let v = cpu::rdmsr(0xc000_0080);
    eq(v & 0x500, 0x500, "LME and LMA set in long mode")?;
    clean(&catch(|| set_efer(v)), "writing what was read")?;
    eq(cpu::rdmsr(0xc000_0080), v, "unchanged")
}

fn efer_sce() -> Verdict {
    set_efer(baseline_efer() & !1);
    fault(&Ctx::kernel(code64!("syscall")).run(), UD, 0, "SYSCALL with EFER.SCE clear")?;
    fault(&Ctx::kernel(code64!("sysretq")).run(), UD, 0, "SYSRET with EFER.SCE clear")
}

fn msr_noncanonical() -> Verdict {
    for msr in [0xc000_0082u32, 0xc000_0083] {
        fault(&catch(|| cpu::wrmsr(msr, 0x8000_0000_0000)), GP, 0, "LSTAR, CSTAR")?;
    }
    if cpu::is_intel() {
        for msr in [0x175u32, 0x176] {
            fault(&catch(|| cpu::wrmsr(msr, 1 << 63)), GP, 0, "SYSENTER_ESP, SYSENTER_EIP")?;
        }
    }
    Ok(())
}

fn msr_unknown() -> Verdict {
    for msr in [0x0000_8fffu32, 0x3fff_0000, 0xc000_3fff, 0xdead_beef] {
        let mut v = 0;
        fault(&catch(|| v = cpu::rdmsr(msr)), GP, 0, "RDMSR of an unknown MSR")?;
        fault(&catch(|| cpu::wrmsr(msr, v)), GP, 0, "WRMSR of an unknown MSR")?;
    }
    Ok(())
}

fn msr_roundtrip() -> Verdict {
    for (msr, v) in [
        (0xc000_0081u32, 0x0023_0010_0000_0000u64),
        (0xc000_0082, 0xffff_8000_1234_5678),
        (0xc000_0084, 0x4_7700),
        (0xc000_0102, 0x7fff_ffff_f000),
        (0x174, 0x8),
        (0x175, 0x1234_5000),
        (0x176, 0x1234_6000),
    ] {
        cpu::wrmsr(msr, v);
        eq(cpu::rdmsr(msr), v, "MSR reads back")?;
    }
    let o = Ctx::kernel(code64!("mov rax, -1", "mov rdx, -1", "mov rcx, 0xffffffffc0000102", "rdmsr")).run();
    done(&o, "RDMSR ignores the upper half of RCX")?;
    eq(o.rax, 0xffff_f000, "upper half of RAX is zero")?;
    eq(o.rdx, 0x7fff, "upper half of RDX is zero")
}

fn tsc_write() -> Verdict {
    cpu::wrmsr(0x10, 0x1234_0000_0000);
    let t = cpu::rdtsc();
    ok((0x1234_0000_0000..0x1235_0000_0000).contains(&t), "RDTSC goes on from what was written to IA32_TSC")?;
    let m = cpu::rdmsr(0x10);
    ok(m >= t && m < t + (1 << 32), "the MSR is the counter")
}

fn tsc_aux() -> Verdict {
    if !cpu::has_rdtscp() {
        skip!("no RDTSCP");
    }
    cpu::wrmsr(0xc000_0103, 0x1234_5678);
    let o = Ctx::user(code64!("mov rax, -1", "mov rcx, -1", "mov rdx, -1", "rdtscp")).run();
    done(&o, "RDTSCP")?;
    eq(o.rcx, 0x1234_5678, "TSC_AUX in ECX, zero-extended")?;
    eq(o.rax >> 32 | o.rdx >> 32, 0, "upper halves zero")?;
    if cpu::has_rdpid() {
        let o = Ctx::user(code64!("mov rax, -1", ".byte 0xf3, 0x0f, 0xc7, 0xf8")).run();
        done(&o, "RDPID")?;
        eq(o.rax, 0x1234_5678, "RDPID")?;
    }
    cpu::wrmsr(0xc000_0103, 0);
    Ok(())
}

fn rdtsc_monotonic() -> Verdict {
    let mut last = cpu::rdtsc();
    let first = last;
    for _ in 0..1000 {
        let t = cpu::rdtsc();
        ok(t >= last, "RDTSC does not go backwards")?;
        last = t;
    }
    ok(last > first, "RDTSC advances")
}

fn pat() -> Verdict {
    if !cpu::has_pat() {
        skip!("no PAT");
    }
    let old = cpu::rdmsr(0x277);
    fault(&catch(|| cpu::wrmsr(0x277, 2)), GP, 0, "memory type 2")?;
    fault(&catch(|| cpu::wrmsr(0x277, 3 << 56)), GP, 0, "memory type 3")?;
    fault(&catch(|| cpu::wrmsr(0x277, 8 << 8)), GP, 0, "memory type 8")?;
    eq(cpu::rdmsr(0x277), old, "unchanged by the faults")?;
    cpu::wrmsr(0x277, 0x0007_0406_0007_0401);
    eq(cpu::rdmsr(0x277), 0x0007_0406_0007_0401, "reads back")?;
    cpu::wrmsr(0x277, old);
    Ok(())
}

fn apic_base() -> Verdict {
    let v = cpu::rdmsr(0x1b);
    eq(v & 0xf_ffff_f000, 0xfee0_0000, "base")?;
    eq(v & 0x900, 0x900, "BSP and enabled")?;
    fault(&catch(|| cpu::wrmsr(0x1b, v | 1 << 0)), GP, 0, "reserved bit 0")?;
    if cpu::phys_bits() < 52 {
        fault(&catch(|| cpu::wrmsr(0x1b, v | 1 << 51)), GP, 0, "a bit beyond the physical address width")?;
    }
    Ok(())
}

fn xcr0_rules() -> Verdict {
    if !cpu::has_xsave() {
        skip!("no XSAVE");
    }
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    let set = |v: u64, index: u64| Ctx::kernel(code64!("xsetbv")).rax(v).rdx(v >> 32).rcx(index).run();
    done(&set(1, 0), "x87 alone")?;
    done(&set(3, 0), "x87 and SSE")?;
    fault(&set(0, 0), GP, 0, "x87 clear")?;
    fault(&set(5, 0), GP, 0, "AVX without SSE")?;
    fault(&set(1 << 63 | 3, 0), GP, 0, "bit 63")?;
    fault(&set(3, 1), GP, 0, "XCR1")?;
    fault(&Ctx::kernel(code64!("mov ecx, 77", "xgetbv")).run(), GP, 0, "XGETBV of an unknown XCR")?;
    let mask = cpu::leaf(0xd, 0);
    let all = u64::from(mask.d) << 32 | u64::from(mask.a);
    done(&set(all, 0), "everything that leaf 0DH announces")?;
    ok(cpu::leaf(0xd, 0).b <= cpu::leaf(0xd, 0).c, "the enabled size is not larger than the largest")?;
    if all & 4 != 0 {
        fault(&set(4 | 1, 0), GP, 0, "YMM without XMM")?;
        done(&set(7, 0), "AVX")?;
        ok(cpu::leaf(0xd, 0).b >= 576 + 256, "size with AVX")?;
    }
    if all & 0xe0 == 0xe0 {
        fault(&set(0x27, 0), GP, 0, "part of the AVX-512 state")?;
    }
    done(&set(3, 0), "back")?;
    eq(u64::from(cpu::leaf(0xd, 0).b), 576, "size with x87 and SSE")
}

fn cpuid_leaves() -> Verdict {
    let l = cpu::cpuid(0, 0);
    ok(l.a >= 1 && l.a < 0x100, "largest basic leaf")?;
    ok(cpu::is_intel() || cpu::is_amd() || l.b != 0, "vendor")?;
    ok(cpu::cpuid(0x8000_0000, 0).a >= 0x8000_0008, "largest extended leaf")?;
    let d = cpu::cpuid(1, 0).d;
    // What every x86-64 CPU has: FPU, TSC, MSR, PAE, CX8, APIC, SEP, PGE, CMOV, FXSR, SSE, SSE2.
    eq(u64::from(d & 0x0700_a371), 0x0700_a371, "features of x86-64 in leaf 1")?;
    let e = cpu::cpuid(0x8000_0001, 0).d;
    eq(u64::from(e & 0x2000_0000), 0x2000_0000, "long mode")?;
    eq(u64::from(e & 0x800), 0x800, "SYSCALL in 64-bit mode")?;
    if cpu::is_intel() {
        let (top, beyond) = (cpu::cpuid(l.a, 0), cpu::cpuid(0x4fff_ffff - 0x3000_0000, 0));
        ok(
            top.a == beyond.a && top.b == beyond.b,
            "Intel: a leaf beyond the maximum returns the highest basic leaf",
        )?;
    }
    let sizes = cpu::cpuid(0x8000_0008, 0).a;
    ok((36..=52).contains(&(sizes & 0xff)) && matches!(sizes >> 8 & 0xff, 48 | 57), "address sizes")
}

fn cpuid_zero_extends() -> Verdict {
    let c = code64!("mov rax, 0xffffffff00000000", "mov rcx, -1", "mov rbx, -1", "mov rdx, -1", "cpuid");
    let o = Ctx::user(c).run();
    done(&o, "CPUID at CPL 3")?;
    eq((o.rax | o.rbx | o.rcx | o.rdx) >> 32, 0, "upper halves are zero")
}

fn cpuid_osxsave_osfxsr() -> Verdict {
    if !cpu::has_xsave() {
        skip!("no XSAVE");
    }
    eq(u64::from(cpu::cpuid(1, 0).c >> 27 & 1), 0, "OSXSAVE shows CR4.OSXSAVE clear")?;
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    eq(u64::from(cpu::cpuid(1, 0).c >> 27 & 1), 1, "OSXSAVE shows CR4.OSXSAVE set")
}

fn cr2_roundtrip() -> Verdict {
    cpu::set_cr2(0x1234_5678_9abc_def0);
    eq(cpu::cr2(), 0x1234_5678_9abc_def0, "CR2")?;
    cpu::set_cr2(0);
    fault(&Ctx::kernel(code64!("ud2")).run(), UD, 0, "ud2")?;
    eq(cpu::cr2(), 0, "only #PF writes CR2")
}

fn cr0_write_clears_none() -> Verdict {
    let before = cpu::cr0();
    clean(&catch(|| cpu::set_cr0(before)), "same value")?;
    eq(cpu::cr0(), before, "CR0")?;
    let o = Ctx::kernel(code64!("mov rax, cr0", "or eax, 0x40000", "mov cr0, rax", "mov rcx, cr0")).run();
    done(&o, "AM")?;
    eq(o.rcx & 0x4_0000, 0x4_0000, "AM set")
}

fn mtrr() -> Verdict {
    if cpu::cpuid(1, 0).d >> 12 & 1 == 0 {
        skip!("no MTRR");
    }
    let cap = cpu::rdmsr(0xfe);
    let old = cpu::rdmsr(0x2ff);
    cpu::wrmsr(0x2ff, old & !0xff | 6);
    eq(cpu::rdmsr(0x2ff) & 0xff, 6, "default type")?;
    cpu::wrmsr(0x2ff, old);
    if cap & 0xff > 0 {
        let (base, mask) = (cpu::rdmsr(0x200), cpu::rdmsr(0x201));
        cpu::wrmsr(0x200, 0x8000_0000);
        cpu::wrmsr(0x201, 0xf_c000_0000 & ((1 << cpu::phys_bits().min(36)) - 1));
        eq(cpu::rdmsr(0x200), 0x8000_0000, "PhysBase0 reads back")?;
        cpu::wrmsr(0x200, base);
        cpu::wrmsr(0x201, mask);
    }
    fault(&catch(|| cpu::wrmsr(0xfe, 0)), GP, 0, "MTRRcap is read-only")
}

fn microcode_and_platform() -> Verdict {
    let mut v = 0;
    clean(&catch(|| v = cpu::rdmsr(0x8b)), "IA32_BIOS_SIGN_ID")?;
    if cpu::is_intel() {
        clean(&catch(|| v = cpu::rdmsr(0x1a0)), "IA32_MISC_ENABLE")?;
    } else {
        // APM 2 13.2.1: four counters on every CPU; a hypervisor's watchdog writes them without asking.
        for msr in 0xc001_0000..=0xc001_0007 {
            clean(&catch(|| cpu::wrmsr(msr, 0)), "PerfEvtSel and PerfCtr can be written")?;
            clean(&catch(|| v = cpu::rdmsr(msr)), "PerfEvtSel and PerfCtr can be read")?;
        }
        v = 0;
    }
    ok(v != 1, "")
}

fn cr4_osxsave_bit() -> Verdict {
    if cpu::has_xsave() {
        return clean(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 18)), "OSXSAVE");
    }
    fault(&catch(|| cpu::set_cr4(cpu::cr4() | 1 << 18)), GP, 0, "OSXSAVE not announced")
}

fn cpuid_apic_id() -> Verdict {
    eq(u64::from(cpu::cpuid(1, 0).b >> 24), u64::from(apic::read(0x20) >> 24), "initial APIC ID")?;
    if cpu::leaf(0xb, 0).b != 0 {
        eq(u64::from(cpu::cpuid(0xb, 0).d), u64::from(apic::read(0x20) >> 24), "x2APIC ID of leaf 0BH")?;
    }
    ok(page() != 0, "")
}

fn cr_high_bits_32() -> Verdict {
    // In compatibility mode MOV CR is 32 bits wide and leaves the upper half of GPRs undefined, not the register.
    let o = Ctx::kernel32(code32!("mov eax, cr0", "mov cr0, eax", "mov ecx, cr4", "mov cr4, ecx")).run();
    done(&o, "MOV CR in compatibility mode")?;
    eq(o.rax & 0xffff_ffff, cpu::cr0(), "CR0")
}
