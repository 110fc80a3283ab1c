//! Save, restore and go on. Each test writes 5AH to port F5H; a machine monitor that was asked to saves the whole
//! machine there, restores it into a fresh one and continues. Elsewhere the port write does nothing.

use crate::apic::{self, io_route, pit, read, write};
use crate::harness::{Verdict, done, eq, ok, wait};
use crate::legacy::{Legacy, tss};
use crate::mem::{P, Space, W, WIN, page, rd, wr, wr8};
use crate::modes::ldone;
use crate::traps::*;
use crate::{code16, code32, code64, cpu, desc, tests};
use core::arch::asm;

tests!("snapshot":
    save_restore_continue, save_restore_user, save_restore_compat, save_restore_real_and_v86, save_restore_interrupts, save_restore_timers,
    save_restore_paging, save_restore_fpu, save_restore_debug,
);

/// QEMU's isa-debug-exit with iosize=4 covers F5H too and would end the machine; it reads as zero.
pub fn usable() -> Verdict {
    let tcg = cpu::cpuid(1, 0).c >> 31 != 0 && cpu::cpuid(0x4000_0000, 0).b == 0x5447_4354;
    if tcg && cpu::inb(0xf5) == 0 {
        crate::skip!("port F5H ends QEMU; run it with iosize=1");
    }
    Ok(())
}

/// Asks for the save.
pub fn mark() {
    cpu::outb(0xf5, 0x5a);
}

fn save_restore_continue() -> Verdict {
    usable()?;
    let p = page();
    for i in 0..512 {
        wr(p + i * 8, i * 0x9e37_79b9_7f4a_7c15);
    }
    cpu::wrmsr(0xc000_0100, 0x1234_5000);
    cpu::wrmsr(0xc000_0102, 0x7fff_0000_1000);
    cpu::wrmsr(0xc000_0081, 0x1b_0008 << 32);
    cpu::wrmsr(0xc000_0082, 0xffff_8000_0000_1000);
    cpu::set_cr8(3);
    let before = (cpu::cr0(), cpu::cr3(), cpu::cr4(), cpu::rdmsr(0xc000_0080));
    let t0 = cpu::rdtsc();
    let c = code64!(
        "mov r12, 0x1212121212121212",
        "mov r13, 0x1313131313131313",
        "mov r14, 0x1414141414141414",
        "mov r15, 0x1515151515151515",
        "mov r8, 0x0808080808080808",
        "mov r9, -9",
        "mov r10, 10",
        "mov r11, 11",
        "mov rbp, 0x5555555555",
        "stc",
        "std",
        "mov al, 0x5a",
        "out 0xf5, al",
        "pushfq",
        "cld",
        "pop rcx",
        "mov ebx, ds",
        "str edx"
    );
    let o = Ctx::kernel(c).rsi(6).rdi(7).run();
    let t1 = cpu::rdtsc();
    let after = (cpu::cr0(), cpu::cr3(), cpu::cr4(), cpu::rdmsr(0xc000_0080));
    done(&o, "the code goes on")?;
    ok(o.r8 == 0x0808_0808_0808_0808 && o.r9 == -9i64 as u64 && o.r10 == 10 && o.r11 == 11, "R8 to R11")?;
    ok(o.r12 == 0x1212_1212_1212_1212 && o.r13 == 0x1313_1313_1313_1313, "R12, R13")?;
    ok(o.r14 == 0x1414_1414_1414_1414 && o.r15 == 0x1515_1515_1515_1515, "R14, R15")?;
    ok(o.rbp == 0x55_5555_5555 && o.rsi == 6 && o.rdi == 7 && o.rsp == sys_stack(), "RBP, RSI, RDI, RSP")?;
    eq(o.rcx & 0x401, 0x401, "CF and DF")?;
    eq(o.rbx, u64::from(desc::UDS), "DS")?;
    eq(o.rdx, u64::from(desc::TSS), "TR")?;
    ok(before == after, "CR0, CR3, CR4, EFER")?;
    eq(cpu::rdmsr(0xc000_0100), 0x1234_5000, "FS base")?;
    eq(cpu::rdmsr(0xc000_0102), 0x7fff_0000_1000, "kernel GS base")?;
    eq(cpu::rdmsr(0xc000_0081), 0x1b_0008 << 32, "STAR")?;
    eq(cpu::rdmsr(0xc000_0082), 0xffff_8000_0000_1000, "LSTAR")?;
    eq(cpu::cr8(), 3, "CR8")?;
    ok(t1 > t0, "the TSC goes forward")?;
    eq(desc::sgdt().0, desc::gdt_base(), "GDTR")?;
    eq(desc::sidt().0, desc::idt_base(), "IDTR")?;
    for i in 0..512 {
        eq(rd(p + i * 8), i * 0x9e37_79b9_7f4a_7c15, "memory")?;
    }
    Ok(())
}

fn save_restore_user() -> Verdict {
    usable()?;
    let map = unsafe { (&raw mut (*desc::tss()).bitmap).cast::<u8>() };
    unsafe { map.add(0xf5 / 8).write_volatile(0) };
    let o = Ctx::user(code64!(
        "mov al, 0x5a",
        "out 0xf5, al",
        "mov ebx, cs",
        "mov ecx, ss",
        "mov rdx, rsp",
        "pushfq",
        "pop r8"
    ))
    .flags(0x200)
    .run();
    done(&o, "at CPL 3")?;
    ok(
        o.rbx == u64::from(desc::UCS) && o.rcx == u64::from(desc::UDS) && o.rdx == user_stack(),
        "CS, SS, RSP",
    )?;
    eq(o.r8 & 0x200, 0x200, "IF")
}

fn save_restore_compat() -> Verdict {
    usable()?;
    let p = page();
    wr(p + 0x20, 0x6666);
    desc::set_gdt(desc::FREE, desc::descriptor(p as u32, 0xfff, 0xf3, 4));
    let o = Ctx::kernel32(code32!(
        "mov al, 0x5a",
        "out 0xf5, al",
        "mov ebx, [esi]",
        "mov ecx, ds",
        "mov edx, cs"
    ))
    .ds(desc::FREE)
    .rsi(0x20)
    .run();
    done(&o, "in compatibility mode")?;
    eq(o.rbx & 0xffff_ffff, 0x6666, "the hidden base of DS")?;
    ok(o.rcx & 0xffff == u64::from(desc::FREE) && o.rdx & 0xffff == u64::from(desc::KCS32), "selectors")
}

fn save_restore_real_and_v86() -> Verdict {
    usable()?;
    let o = Legacy::real(
        code16!(
            "mov ax, 0x980",
            "mov ds, ax",
            "mov al, 0x5a",
            "out 0xf5, al",
            "mov bx, ds",
            "mov cx, cs",
            "mov edx, cr0"
        ),
        true,
    )
    .run();
    ldone(&o, "in real mode")?;
    ok(
        o.ebx & 0xffff == 0x980 && o.ecx & 0xffff == crate::legacy::LOW >> 4 && o.edx & 1 == 0,
        "segments and CR0",
    )?;
    let mut l = Legacy::real(code16!("mov al, 0x5a", "out 0xf5, al", "mov ecx, dword ptr fs:[ebx]"), true);
    crate::mem::wr32(crate::mem::BIG, 0x1a2b_3c4d);
    l.ebx = crate::mem::BIG as u32;
    let o = l.run();
    ldone(&o, "the large limit of unreal mode is kept")?;
    eq(u64::from(o.ecx), 0x1a2b_3c4d, "data")?;
    let mut l = Legacy::v86(code16!("mov al, 0x5a", "out 0xf5, al", "mov cx, ds"), 3);
    wr8(tss() + 104 + 0xf5 / 8, 0);
    l.ds = 0x432;
    let o = l.run();
    ldone(&o, "in V86 mode")?;
    eq(u64::from(o.ecx & 0xffff), 0x432, "DS")
}

fn save_restore_interrupts() -> Verdict {
    usable()?;
    // One interrupt in service, one pending, IF clear.
    set_mode(0x62, RESUME);
    set_mode(0x61, RESUME | EOI_APIC);
    let ipi = |v: u32| {
        write(0x310, read(0x20));
        write(0x300, 0x4_4000 | v);
    };
    ipi(0x62);
    unsafe { asm!("sti") };
    let first = wait(|| count(0x62) == 1);
    unsafe { asm!("cli") };
    ipi(0x61);
    io_route(5, 0x1_a955, 0x0300_0000);
    cpu::outb(0x21, 0x5f);
    mark();
    let route = apic::io_read(0x1a) & 0x1_afff;
    let mask = cpu::inb(0x21);
    io_route(5, 0x1_0000, 0);
    let isr = read(0x130) >> 2 & 1;
    let irr = read(0x230) >> 1 & 1;
    write(0xb0, 0);
    unsafe { asm!("sti") };
    let second = wait(|| count(0x61) == 1);
    unsafe { asm!("cli") };
    ok(first, "62H delivered before")?;
    ok(isr == 1 && irr == 1, "in service and pending afterwards")?;
    ok(second, "61H delivered after EOI")?;
    eq(u64::from(route), 0x1_a955, "redirection entry of the IO-APIC")?;
    eq(u64::from(mask), 0x5f, "mask of the PIC")
}

fn save_restore_timers() -> Verdict {
    usable()?;
    set_mode(0x63, RESUME | EOI_APIC);
    set_mode(0x66, RESUME | EOI_APIC);
    let id = read(0x20) & 0xff00_0000;
    io_route(2, 0x66, id);
    io_route(0, 0x66, id);
    pit(1193, false);
    write(0x3e0, 0xb);
    write(0x320, 0x63);
    write(0x380, 3_000_000);
    mark();
    unsafe { asm!("sti") };
    let both = wait(|| count(0x63) == 1 && count(0x66) >= 2);
    unsafe { asm!("cli") };
    ok(both, "LAPIC timer and PIT run on")?;
    if cpu::has_tsc_deadline() {
        write(0x320, 0x4_0063);
        cpu::wrmsr(0x6e0, cpu::rdtsc() + 3_000_000);
        mark();
        unsafe { asm!("sti") };
        let came = wait(|| count(0x63) == 2);
        unsafe { asm!("cli") };
        ok(came, "the TSC deadline is kept")?;
    }
    let a = cpu::inl(0x608);
    mark();
    ok(a == 0xffff_ffff || wait(|| cpu::inl(0x608) != a), "the PM timer runs on")
}

fn save_restore_paging() -> Verdict {
    usable()?;
    let (s, p) = (Space::active(), page());
    wr(p, 0x99);
    s.map(WIN, p, P | W);
    eq(rd(WIN), 0x99, "before")?;
    mark();
    eq(cpu::cr3(), s.root, "CR3")?;
    eq(rd(WIN), 0x99, "after")?;
    crate::mem::put(p, &crate::mem::code_returning(5));
    eq(crate::mem::call(WIN), 5, "code")?;
    mark();
    crate::mem::put(p, &crate::mem::code_returning(6));
    cpu::cpuid(0, 0);
    eq(crate::mem::call(WIN), 6, "code patched after a restore")
}

fn save_restore_fpu() -> Verdict {
    usable()?;
    let p = page();
    let c = code64!(
        "fninit",
        "fldpi",
        "fld1",
        "mov rax, 0x0f0e0d0c0b0a0908",
        "movq xmm0, rax",
        "movq xmm15, rax",
        "push 0x9fc0",
        "ldmxcsr [rsp]",
        "pop rcx",
        "mov al, 0x5a",
        "out 0xf5, al",
        "movq rbx, xmm0",
        "movq rdx, xmm15",
        "sub rsp, 8",
        "stmxcsr [rsp]",
        "mov ecx, [rsp]",
        "mov dword ptr [rsp], 0x1f80",
        "ldmxcsr [rsp]",
        "add rsp, 8",
        "fstp qword ptr [rdi]",
        "fstp tbyte ptr [rdi + 16]",
        "fninit"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "code")?;
    ok(o.rbx == 0x0f0e_0d0c_0b0a_0908 && o.rdx == o.rbx, "XMM0, XMM15")?;
    eq(o.rcx & 0xffff, 0x9fc0, "MXCSR")?;
    eq(rd(p), 1.0f64.to_bits(), "ST0")?;
    eq(rd(p + 16), 0xc90f_daa2_2168_c235, "ST1")?;
    if !cpu::has_avx() || !cpu::has_xsave() {
        return Ok(());
    }
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    let c = code64!(
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 7",
        "xsetbv",
        "vpcmpeqd xmm1, xmm1, xmm1",
        "vinsertf128 ymm1, ymm1, xmm1, 1",
        "mov al, 0x5a",
        "out 0xf5, al",
        "vextractf128 xmm2, ymm1, 1",
        "vmovq rbx, xmm2",
        "xgetbv",
        "vzeroupper"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "AVX")?;
    eq(o.rbx, u64::MAX, "upper half of YMM1")?;
    eq(o.rax & 7, 7, "XCR0")
}

fn save_restore_debug() -> Verdict {
    usable()?;
    let p = page();
    cpu::set_dr0(p);
    cpu::set_dr6(0);
    cpu::set_dr7(0x400 | 2 | 1 << 16 | 3 << 18);
    mark();
    eq(cpu::dr0(), p, "DR0")?;
    let o = catch(|| wr(p, 1));
    cpu::set_dr7(0x400);
    eq(o.vector, DB, "the breakpoint is armed")?;
    eq(cpu::dr6() & 0xf, 1, "DR6")
}
