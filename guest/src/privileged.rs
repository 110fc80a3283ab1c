//! Privileged instructions at CPL 3, and ports by IOPL and the I/O permission bitmap.

use crate::harness::{Verdict, done, eq, fault};
use crate::traps::*;
use crate::{code32, code64, cpu, desc, mem, tests};

tests!("privileged":
    hlt_cli_sti, mov_cr, descriptor_tables, msrs, cache_and_tlb, clts_lmsw, iopl_allows, io_bitmap_denies, io_bitmap_allows, io_bitmap_width,
    io_bitmap_limit, ins_outs, rdpmc_user, cr8_user, in_compat_mode, monitor_user, rdtsc_tsd, xsetbv_user, iret_sysret_user,
);

fn all_gp(cases: &[(Code, &str)]) -> Verdict {
    for (c, what) in cases {
        let o = Ctx::user(*c).rdi(user_stack() - 64).run();
        fault(&o, GP, 0, what)?;
        eq(o.rip, c.start + mem::ALIAS, what)?;
    }
    Ok(())
}

fn hlt_cli_sti() -> Verdict {
    all_gp(&[(code64!("hlt"), "HLT"), (code64!("cli"), "CLI"), (code64!("sti"), "STI")])
}

fn mov_cr() -> Verdict {
    all_gp(&[
        (code64!("mov rax, cr0"), "read CR0"),
        (code64!("mov cr0, rax"), "write CR0"),
        (code64!("mov rax, cr2"), "read CR2"),
        (code64!("mov rax, cr3"), "read CR3"),
        (code64!("mov cr3, rax"), "write CR3"),
        (code64!("mov cr4, rax"), "write CR4"),
    ])?;
    fault(&Ctx::kernel(code64!(".byte 0x0f, 0x20, 0xc8")).run(), UD, 0, "MOV from CR1")?;
    fault(&Ctx::kernel(code64!(".byte 0x0f, 0x20, 0xe8")).run(), UD, 0, "MOV from CR5")
}

fn descriptor_tables() -> Verdict {
    all_gp(&[
        (code64!("lgdt [rdi]"), "LGDT"),
        (code64!("lidt [rdi]"), "LIDT"),
        (code64!("lldt ax"), "LLDT"),
        (code64!("ltr ax"), "LTR"),
    ])
}

fn msrs() -> Verdict {
    all_gp(&[(code64!("rdmsr"), "RDMSR"), (code64!("wrmsr"), "WRMSR")])
}

fn cache_and_tlb() -> Verdict {
    all_gp(&[(code64!("wbinvd"), "WBINVD"), (code64!("invd"), "INVD"), (code64!("invlpg [rdi]"), "INVLPG")])
}

fn clts_lmsw() -> Verdict {
    all_gp(&[(code64!("clts"), "CLTS"), (code64!("lmsw ax"), "LMSW")])?;
    // LMSW sets PE but cannot clear it; MP, EM and TS follow.
    let o =
        Ctx::kernel(code64!("mov rcx, cr0", "mov eax, 0xa", "lmsw ax", "mov rdx, cr0", "mov cr0, rcx")).run();
    done(&o, "LMSW")?;
    eq(o.rdx & 0xf, 0xb, "PE stays, MP and TS set")
}

fn iopl_allows() -> Verdict {
    let o = Ctx::user(code64!("cli", "sti", "cli", "in al, 0x61")).flags(0x3000).run();
    done(&o, "CLI, STI and IN at IOPL 3")?;
    fault(&Ctx::user(code64!("cli")).flags(0x2000).run(), GP, 0, "IOPL 2 is not enough")?;
    fault(&Ctx::user(code64!("hlt")).flags(0x3000).run(), GP, 0, "HLT needs CPL 0")
}

fn allow(port: u16, bits: u16) {
    let map = unsafe { (&raw mut (*desc::tss()).bitmap).cast::<u8>() };
    for p in port..port + bits {
        unsafe {
            let b = map.add(usize::from(p >> 3));
            b.write_volatile(b.read_volatile() & !(1 << (p & 7)));
        }
    }
}

fn io_bitmap_denies() -> Verdict {
    all_gp(&[
        (code64!("in al, 0x61"), "IN imm8"),
        (code64!("out 0x80, al"), "OUT imm8"),
        (code64!("in eax, dx"), "IN dx"),
        (code64!("out dx, ax"), "OUT dx"),
    ])
}

fn io_bitmap_allows() -> Verdict {
    allow(0x61, 1);
    done(&Ctx::user(code64!("in al, 0x61")).run(), "IN from an allowed port")?;
    fault(&Ctx::user(code64!("in al, 0x60")).run(), GP, 0, "its neighbour below")?;
    fault(&Ctx::user(code64!("in al, 0x62")).run(), GP, 0, "its neighbour above")?;
    fault(&Ctx::user(code64!("in ax, 0x61")).run(), GP, 0, "a word reaches the neighbour")
}

fn io_bitmap_width() -> Verdict {
    allow(0x86, 4);
    done(
        &Ctx::user(code64!("mov dx, 0x86", "in eax, dx")).run(),
        "four ports across two bytes of the bitmap",
    )?;
    fault(&Ctx::user(code64!("mov dx, 0x87", "in eax, dx")).run(), GP, 0, "one of the four is denied")
}

fn io_bitmap_limit() -> Verdict {
    let t = desc::tss();
    unsafe { (&raw mut (*t).iomap).write_unaligned(0xffff) };
    allow(0x61, 1);
    fault(&Ctx::user(code64!("in al, 0x61")).run(), GP, 0, "bitmap offset beyond the TSS limit")
}

fn ins_outs() -> Verdict {
    fault(&Ctx::user(code64!("insb")).rdi(user_stack() - 64).rdx(0x61).run(), GP, 0, "INSB")?;
    fault(&Ctx::user(code64!("outsb")).rsi(user_stack() - 64).rdx(0x80).run(), GP, 0, "OUTSB")?;
    allow(0x61, 1);
    let o = Ctx::user(code64!("insb")).rdi(user_stack() - 64).rdx(0x61).run();
    done(&o, "INSB from an allowed port")?;
    eq(o.rdi, user_stack() - 63, "RDI")?;
    let o = Ctx::kernel(code64!("rep insb")).rdi(mem::page()).rcx(3).rdx(0x61).run();
    done(&o, "REP INSB")?;
    eq(o.rcx, 0, "RCX")
}

fn rdpmc_user() -> Verdict {
    cpu::set_cr4(cpu::cr4() & !0x100);
    fault(&Ctx::user(code64!("xor ecx, ecx", "rdpmc")).run(), GP, 0, "RDPMC with CR4.PCE clear")
}

fn cr8_user() -> Verdict {
    all_gp(&[(code64!("mov rax, cr8"), "read CR8"), (code64!("mov cr8, rax"), "write CR8")])
}

fn in_compat_mode() -> Verdict {
    for (c, what) in [
        (code32!("cli"), "CLI"),
        (code32!("hlt"), "HLT"),
        (code32!("mov eax, cr0"), "MOV CR"),
        (code32!("rdmsr"), "RDMSR"),
        (code32!("in al, 0x61"), "IN"),
        (code32!("lidt [esp]"), "LIDT"),
        (code32!("clts"), "CLTS"),
    ] {
        fault(&Ctx::user32(c).run(), GP, 0, what)?;
    }
    done(&Ctx::kernel32(code32!("cli", "mov eax, cr0", "clts", "in al, 0x61")).run(), "all allowed at CPL 0")
}

fn monitor_user() -> Verdict {
    if !cpu::has_monitor() {
        fault(
            &Ctx::kernel(code64!("mov rax, rsp", "xor ecx, ecx", "xor edx, edx", "monitor")).run(),
            UD,
            0,
            "MONITOR not announced",
        )?;
        return fault(
            &Ctx::kernel(code64!("xor eax, eax", "xor ecx, ecx", "mwait")).run(),
            UD,
            0,
            "MWAIT not announced",
        );
    }
    fault(
        &Ctx::user(code64!("mov rax, rsp", "xor ecx, ecx", "xor edx, edx", "monitor")).run(),
        UD,
        0,
        "MONITOR at CPL 3",
    )?;
    done(
        &Ctx::kernel(code64!("mov rax, rsp", "xor ecx, ecx", "xor edx, edx", "monitor")).run(),
        "MONITOR at CPL 0",
    )
}

fn rdtsc_tsd() -> Verdict {
    done(&Ctx::user(code64!("rdtsc")).run(), "RDTSC at CPL 3, TSD clear")?;
    cpu::set_cr4(cpu::cr4() | 4);
    fault(&Ctx::user(code64!("rdtsc")).run(), GP, 0, "RDTSC at CPL 3, TSD set")?;
    done(&Ctx::kernel(code64!("rdtsc")).run(), "RDTSC at CPL 0")?;
    if cpu::has_rdtscp() {
        fault(&Ctx::user(code64!("rdtscp")).run(), GP, 0, "RDTSCP at CPL 3, TSD set")?;
    }
    Ok(())
}

fn xsetbv_user() -> Verdict {
    if !cpu::has_xsave() {
        return Ok(());
    }
    let c = code64!("xor ecx, ecx", "xgetbv", "xsetbv");
    fault(&Ctx::kernel(c).run(), UD, 0, "XGETBV with CR4.OSXSAVE clear")?;
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    fault(&Ctx::user(c).run(), GP, 0, "XSETBV at CPL 3")?;
    done(&Ctx::user(code64!("xor ecx, ecx", "xgetbv")).run(), "XGETBV at CPL 3")?;
    done(&Ctx::kernel(c).run(), "XSETBV at CPL 0")
}

fn iret_sysret_user() -> Verdict {
    all_gp(&[(code64!("sysretq"), "SYSRET")])
}
