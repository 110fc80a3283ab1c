//! IRETQ again and again from one place, while what it depends on changes between two of them: an engine that remembers what it checked
//! must see each change. And faults that come in storms.

use crate::apic::{read, write};
use crate::harness::{Verdict, done, eq, fault, ok, page_fault, wait};
use crate::mem::{P, Page, Space, U, W, WIN, page, pages, rd, wr};
use crate::traps::*;
use crate::{code64, cpu, desc, skip, tests};

tests!("returns":
    gdt_changes, code_of_two_sizes, gdt_limit_changes, gdt_moves, gdt_unmapped, data_segments_dropped, fs_base_dropped, ac_under_smap, odd_flags, frame_crosses_pages,
    stack_of_any_value, waiting_interrupt, waiting_interrupt_user, if_cleared, sti_shadow_covers_iret, many_levels, page_fault_storm,
    page_faults_off_one_base, divide_storm, breakpoint_storm, nested_faults,
);

const F: u16 = desc::FREE;
/// How often a place is executed, so that every engine has taken it to heart.
const WARM: usize = 60;

/// Returns to level 0 with CS in RDI and SS in RSI.
fn kernel_return() -> Code {
    code64!(
        "mov rax, rsp",
        "push rsi",
        "push rax",
        "push 2",
        "push rdi",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: mov ecx, cs",
        "mov edx, ss",
    )
}

fn to_kernel(cs: u16, ss: u16) -> Outcome {
    Ctx::kernel(kernel_return()).rdi(u64::from(cs)).rsi(u64::from(ss)).run()
}

fn warm_up(cs: u16, ss: u16) -> Verdict {
    for _ in 0..WARM {
        let o = to_kernel(cs, ss);
        done(&o, "return")?;
        eq(o.rcx, u64::from(cs), "CS")?;
        eq(o.rdx, u64::from(ss), "SS")?;
    }
    Ok(())
}

fn gdt_changes() -> Verdict {
    let code = |access: u8, flags: u8| desc::set_gdt(F, desc::descriptor(0, 0xfffff, access, flags));
    let data = |access: u8| desc::set_gdt(F + 8, desc::descriptor(0, 0xfffff, access, 0xc));
    code(0x9b, 0xa);
    data(0x93);
    warm_up(F, F + 8)?;
    code(0x1b, 0xa);
    fault(&to_kernel(F, F + 8), NP, u64::from(F), "code became absent")?;
    code(0x93, 0xa);
    fault(&to_kernel(F, F + 8), GP, u64::from(F), "code became data")?;
    code(0xfb, 0xa);
    fault(&to_kernel(F, F + 8), GP, u64::from(F), "code became user code")?;
    code(0x9a, 0xa);
    done(&to_kernel(F, F + 8), "code not accessed")?;
    eq(desc::get_gdt(F) >> 40 & 0xff, 0x9b, "a return sets the accessed bit")?;
    code(0x9f, 0xa);
    done(&to_kernel(F, F + 8), "conforming code")?;
    code(0x9b, 0xa);
    data(0x13);
    fault(&to_kernel(F, F + 8), SS, u64::from(F) + 8, "stack became absent")?;
    data(0x91);
    fault(&to_kernel(F, F + 8), GP, u64::from(F) + 8, "stack became read-only")?;
    data(0xf3);
    fault(&to_kernel(F, F + 8), GP, u64::from(F) + 8, "stack became a user's")?;
    data(0x92);
    done(&to_kernel(F, F + 8), "stack not accessed")?;
    eq(desc::get_gdt(F + 8) >> 40 & 0xff, 0x93, "a return sets the accessed bit of SS")?;
    warm_up(F, 0)?;
    warm_up(F, F + 8)
}

fn code_of_two_sizes() -> Verdict {
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9b, 0xa));
    warm_up(F, desc::KDS)?;
    desc::set_gdt(F, desc::descriptor(0, 0xfffff, 0x9b, 0xe));
    fault(&to_kernel(F, desc::KDS), GP, u64::from(F), "code with L and D")
}

fn gdt_limit_changes() -> Verdict {
    desc::set_gdt(F, desc::get_gdt(desc::KCS));
    warm_up(F, desc::KDS)?;
    desc::lgdt(desc::gdt_base(), F + 6);
    fault(&to_kernel(F, desc::KDS), GP, u64::from(F), "the limit cuts the descriptor")?;
    desc::lgdt(desc::gdt_base(), F + 7);
    done(&to_kernel(F, desc::KDS), "the limit is the descriptor's last byte")
}

fn gdt_moves() -> Verdict {
    desc::set_gdt(F, desc::get_gdt(desc::KCS));
    warm_up(F, desc::KDS)?;
    let other = page();
    for n in 0..32 {
        wr(other + 8 * n, desc::get_gdt(8 * n as u16));
    }
    wr(other + u64::from(F), 0);
    desc::lgdt(other, 255);
    fault(&to_kernel(F, desc::KDS), GP, u64::from(F), "the other table has no such descriptor")?;
    // A table that begins at an odd address, so that a descriptor crosses into the next page.
    let at = pages(2) + 4096 - u64::from(F) - 4;
    for n in 0..32 {
        wr(at + 8 * n, desc::get_gdt(8 * n as u16));
    }
    desc::lgdt(at, 255);
    done(&to_kernel(F, desc::KDS), "a descriptor on two pages")
}

fn gdt_unmapped() -> Verdict {
    let s = Space::active();
    let verdict = gdt_in_window(&s);
    desc::lgdt(desc::gdt_base(), (desc::GDT_LEN * 8 - 1) as u16);
    verdict
}

fn gdt_in_window(s: &Space) -> Verdict {
    let (first, second) = (page(), page());
    for n in 0..32 {
        wr(first + 8 * n, desc::get_gdt(8 * n as u16));
    }
    wr(first + u64::from(F), desc::get_gdt(desc::KCS));
    for n in 0..32 {
        wr(second + 8 * n, rd(first + 8 * n));
    }
    wr(second + u64::from(F), 0);
    s.map(WIN, first, P | W);
    desc::lgdt(WIN, 255);
    warm_up(F, desc::KDS)?;
    s.map(WIN, second, P | W);
    fault(&to_kernel(F, desc::KDS), GP, u64::from(F), "another page is mapped there")?;
    s.map(WIN, first, P | W);
    warm_up(F, desc::KDS)
}

/// Level 3, where level 0 leaves this selector in DS.
fn user_with_ds(ds: u16) -> Outcome {
    Ctx::user(code64!("mov ecx, ds", "mov edx, es")).ds(ds).run()
}

fn data_segments_dropped() -> Verdict {
    for _ in 0..WARM {
        let o = user_with_ds(desc::UDS);
        done(&o, "user")?;
        eq(o.rcx, u64::from(desc::UDS), "DS of level 3 stays")?;
        let o = user_with_ds(desc::KDS);
        done(&o, "user")?;
        eq(o.rcx, 0, "DS of level 0 becomes null")?;
        eq(o.rdx, u64::from(desc::UDS), "ES of level 3 stays")?;
        let o = user_with_ds(3);
        done(&o, "user")?;
        ok(o.rcx <= 3, "null stays null")?;
    }
    Ok(())
}

fn fs_base_dropped() -> Verdict {
    const FS_BASE: u32 = 0xc000_0100;
    let place = page();
    for _ in 0..WARM {
        unsafe { core::arch::asm!("mov fs, {:e}", in(reg) 0u32) };
        cpu::wrmsr(FS_BASE, place);
        done(&Ctx::user(code64!("mov ecx, fs")).run(), "user")?;
        eq(cpu::rdmsr(FS_BASE), place, "the base of a null FS stays")?;
        unsafe { core::arch::asm!("mov fs, {:e}", in(reg) u32::from(desc::KDS)) };
        cpu::wrmsr(FS_BASE, place);
        let o = Ctx::user(code64!("mov ecx, fs")).run();
        done(&o, "user")?;
        eq(o.rcx, 0, "FS of level 0 becomes null")?;
        unsafe { core::arch::asm!("mov fs, {:e}", in(reg) 0u32) };
        cpu::wrmsr(FS_BASE, 0);
    }
    Ok(())
}

fn ac_under_smap() -> Verdict {
    if cpu::cpuid(7, 0).b >> 20 & 1 == 0 {
        skip!("no SMAP");
    }
    let s = Space::active();
    s.map(WIN, page(), P | W | U);
    let c = code64!(
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "push rdi",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: pushfq",
        "pop rcx",
        "mov rdx, [rsi]",
    );
    cpu::set_cr4(cpu::cr4() | 1 << 21);
    for _ in 0..WARM {
        let o = Ctx::kernel(c).rdi(0x4_0002).rsi(WIN).run();
        done(&o, "with AC the user page is readable")?;
        eq(o.rcx & 0x4_0000, 0x4_0000, "AC")?;
        let o = Ctx::kernel(c).rdi(2).rsi(WIN).run();
        fault(&o, PF, 1, "without AC it is not")?;
    }
    cpu::set_cr4(cpu::cr4() & !(1 << 21));
    let o = Ctx::kernel(c).rdi(2).rsi(WIN).run();
    done(&o, "without SMAP it is")
}

fn odd_flags() -> Verdict {
    let c = code64!(
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "push rdi",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: pushfq",
        "pop rcx",
        "push 2",
        "popfq",
    );
    for _ in 0..WARM / 4 {
        for bits in [0u64, 0xad5 & !0x200, 0x400, 0x3000, 0x4000, 0x20_0000, 0x1_0000, 0x4_0000, 0x8d5, 0x45]
        {
            let o = Ctx::kernel(c).rdi(bits).run();
            done(&o, "return")?;
            eq(o.rcx, bits & !0x1_0000 | 2, "RFLAGS")?;
        }
        // VM, reserved bits and those above 31 do not become set in IA-32e mode.
        let o = Ctx::kernel(c).rdi(0x2_8028 | 0xff << 40).run();
        done(&o, "return")?;
        eq(o.rcx, 2, "RFLAGS without VM")?;
    }
    Ok(())
}

fn frame_crosses_pages() -> Verdict {
    let stack = pages(2) + 4096;
    let c = code64!(
        "mov rsp, rsi",
        "push 0x10",
        "push rdi",
        "push 0x41",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: mov rcx, rsp",
        "setz dl",
        "mov rsp, rdi",
    );
    for _ in 0..WARM {
        for k in 0..=6 {
            let o = Ctx::kernel(c).rsi(stack + 8 * k).rdi(sys_stack()).run();
            done(&o, "return")?;
            eq(o.rcx, sys_stack(), "RSP")?;
            eq(o.rdx & 1, 1, "ZF")?;
        }
        let o = Ctx::kernel(c).rsi(stack + 19).rdi(sys_stack()).run();
        done(&o, "a frame at an odd address")?;
    }
    Ok(())
}

fn stack_of_any_value() -> Verdict {
    let c = code64!(
        "mov rbx, rsp",
        "push 0x10",
        "push rdi",
        "push 2",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: mov rcx, rsp",
        "mov rsp, rbx",
    );
    for _ in 0..WARM {
        for rsp in [0, 1, 0x8000_0000_0000, u64::MAX, 0x1234_5678_9abc_def0] {
            let o = Ctx::kernel(c).rdi(rsp).run();
            done(&o, "return")?;
            eq(o.rcx, rsp, "RSP is popped whatever it is")?;
        }
    }
    Ok(())
}

/// Asks the local APIC for an interrupt of this processor.
fn ipi_self(vector: u8) {
    write(0x310, read(0x20));
    write(0x300, 0x4_4000 | u32::from(vector));
    wait(|| read(0x200 + u64::from(vector >> 5) * 0x10) >> (vector & 31) & 1 != 0);
}

fn waiting_interrupt() -> Verdict {
    let c = code64!(
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "push 0x202",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "nop",
        "2: inc ecx",
        "cli",
    );
    set_mode(0x60, RESUME | EOI_APIC);
    for n in 1..=WARM as u32 {
        ipi_self(0x60);
        done(&Ctx::kernel(c).run(), "return")?;
        eq(u64::from(count(0x60)), u64::from(n), "the interrupt came")?;
        eq(log(n as usize - 1).rip, c.end - 5, "before the first instruction behind IRET")?;
    }
    Ok(())
}

fn waiting_interrupt_user() -> Verdict {
    let c = code64!("inc ecx", "inc ecx");
    set_mode(0x60, RESUME | EOI_APIC);
    for n in 1..=WARM as u32 {
        ipi_self(0x60);
        let o = Ctx::user(c).rcx(0).flags(0x200).run();
        done(&o, "user")?;
        eq(u64::from(count(0x60)), u64::from(n), "the interrupt came")?;
        eq(log(n as usize - 1).rcx, 0, "before the first instruction at level 3")?;
        eq(o.rcx, 2, "both instructions")?;
    }
    Ok(())
}

fn if_cleared() -> Verdict {
    let c = code64!(
        "mov rax, rsp",
        "sti",
        "push 0x10",
        "push rax",
        "push 2",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2: pushfq",
        "pop rcx",
    );
    set_mode(0x60, RESUME | EOI_APIC);
    for n in 1..=WARM as u32 {
        ipi_self(0x60);
        let o = Ctx::kernel(c).run();
        done(&o, "return")?;
        eq(u64::from(count(0x60)), u64::from(n), "the interrupt came while IF was set")?;
        eq(o.rcx & 0x200, 0, "IF is clear again")?;
    }
    Ok(())
}

fn sti_shadow_covers_iret() -> Verdict {
    let c = code64!(
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "push 2",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "sti",
        "iretq",
        "2: nop",
    );
    set_mode(0x60, RESUME | EOI_APIC);
    ipi_self(0x60);
    for _ in 0..WARM {
        done(&Ctx::kernel(c).run(), "return")?;
        eq(u64::from(count(0x60)), 0, "no interrupt between STI and an IRET that clears IF")?;
    }
    unsafe { core::arch::asm!("sti", "nop", "nop", "cli") };
    eq(u64::from(count(0x60)), 1, "it waited")
}

fn many_levels() -> Verdict {
    // Level 0, level 3 by IRETQ, level 0 by INT, back by IRETQ (the resumed trap), and so on.
    set_mode(0x81, RESUME);
    let (lo, hi) = desc::gate_raw(0x81);
    desc::set_gate_raw(0x81, lo | 3 << 45, hi);
    let c = code64!("mov ecx, 1000", "2: int 0x81", "dec ecx", "jnz 2b", "mov edx, cs", "mov ebx, ss");
    let o = Ctx::user(c).run();
    done(&o, "user")?;
    eq(u64::from(count(0x81)), 1000, "traps")?;
    eq(o.rdx, u64::from(desc::UCS), "CS")?;
    eq(o.rbx, u64::from(desc::UDS), "SS")?;
    let o = Ctx::kernel(c).run();
    done(&o, "kernel")?;
    eq(u64::from(count(0x81)), 2000, "traps")?;
    eq(o.rdx, u64::from(desc::KCS), "CS")
}

fn page_fault_storm() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | W);
    set_mode(14, RESUME | SKIP);
    set_skip(3);
    // The handler skips each access; flags and registers go through it unharmed.
    let c = code64!(
        "mov ecx, 2000",
        "xor edx, edx",
        "2: stc",
        "mov rax, [rsi]",
        "adc edx, 0",
        "stc",
        "mov [rsi], rbx",
        "adc edx, 0",
        "dec ecx",
        "jnz 2b",
    );
    let o = Ctx::user(c).rsi(WIN).rax(77).rbx(5).run();
    done(&o, "user")?;
    eq(u64::from(count(14)), 4000, "faults")?;
    eq(o.rdx, 4000, "CF behind every fault")?;
    eq(o.rax, 77, "RAX")?;
    // The handler maps the page instead: the access is done again.
    set_skip(0);
    let h = code64!(
        "push rax",
        "mov rax, [r8]",
        "xor rax, 1",
        "mov [r8], rax",
        "mov rax, cr2",
        "invlpg [rax]",
        "pop rax",
        "add rsp, 8",
        "iretq",
    );
    desc::set_gate(14, h.start, desc::KCS, 1, 0x8e);
    let c = code64!(
        "mov ecx, 2000",
        "2: mov rax, [rsi]",
        "add rbx, rax",
        "xor byte ptr [r8], 1",
        "invlpg [rsi]",
        "dec ecx",
        "jnz 2b",
    );
    wr(WIN, 3);
    let mut k = Ctx::kernel(c).rsi(WIN).rbx(0);
    k.0.r8 = s.entry(WIN, 1);
    let o = k.run();
    done(&o, "kernel")?;
    eq(o.rbx, 6000, "every access was done once in the end")
}

fn page_faults_off_one_base() -> Verdict {
    // Each fault is that of its own access, though an engine may check them together.
    let s = Space::active();
    let c = code64!("xor eax, eax", "mov rcx, [rsi + 24]", "inc eax", "mov [rsi + 40], rbx", "inc eax");
    let stack = code64!(
        "xor eax, eax",
        "mov rbx, rsp",
        "mov rsp, rsi",
        "pop rcx",
        "push rcx",
        "push rcx",
        "mov rsp, rbx"
    );
    for _ in 0..WARM {
        s.map(WIN, 0, 0);
        let o = Ctx::user(c).rsi(WIN).run();
        page_fault(&o, 4, WIN + 24, "the read")?;
        eq(o.rax, 0, "nothing was done")?;
        let o = Ctx::user(stack).rsi(WIN + 64).run();
        page_fault(&o, 4, WIN + 64, "the pop")?;
        s.map(WIN, page_once(), P | U);
        let o = Ctx::user(c).rsi(WIN).run();
        page_fault(&o, 7, WIN + 40, "the write")?;
        eq(o.rax, 1, "the read was done")?;
        let o = Ctx::user(stack).rsi(WIN + 64).run();
        page_fault(&o, 7, WIN + 64, "the push")?;
        s.map(WIN, page_once(), P | W);
        page_fault(&Ctx::user(c).rsi(WIN).run(), 5, WIN + 24, "the read of a supervisor page")?;
        done(&Ctx::kernel(c).rsi(WIN).run(), "kernel")?;
    }
    Ok(())
}

/// The same page each time.
fn page_once() -> u64 {
    (&raw const PLACE) as u64
}

static mut PLACE: Page = Page::ZERO;

fn divide_storm() -> Verdict {
    set_mode(0, RESUME | SKIP);
    set_skip(2);
    let c = code64!(
        "mov ecx, 2000",
        "xor ebx, ebx",
        "2: xor edx, edx",
        "div ebx",
        "inc esi",
        "dec ecx",
        "jnz 2b"
    );
    for o in [Ctx::user(c).rsi(0).run(), Ctx::kernel(c).rsi(0).run()] {
        done(&o, "code")?;
        eq(o.rsi, 2000, "every division was skipped")?;
    }
    eq(u64::from(count(0)), 4000, "faults")
}

fn breakpoint_storm() -> Verdict {
    set_mode(3, RESUME);
    let c = code64!("mov ecx, 2000", "2: int3", "inc esi", "dec ecx", "jnz 2b");
    let o = Ctx::user(c).rsi(0).run();
    done(&o, "user")?;
    eq(o.rsi, 2000, "after each")?;
    eq(u64::from(count(3)), 2000, "traps")
}

fn nested_faults() -> Verdict {
    // A page-fault handler that itself divides by zero: two frames, two returns.
    set_mode(0, RESUME | SKIP);
    set_skip(2);
    let h = code64!(
        "push rax",
        "push rdx",
        "push rbx",
        "xor ebx, ebx",
        "xor edx, edx",
        "div ebx",
        "pop rbx",
        "pop rdx",
        "pop rax",
        "add qword ptr [rsp + 8], 3",
        "add rsp, 8",
        "iretq",
    );
    desc::set_gate(14, h.start, desc::KCS, 7, 0x8e);
    let _space = Space::active();
    let c = code64!("mov ecx, 500", "2: mov rax, [rsi]", "inc edi", "dec ecx", "jnz 2b");
    for o in [Ctx::user(c).rsi(WIN).rdi(0).run(), Ctx::kernel(c).rsi(WIN).rdi(0).run()] {
        done(&o, "code")?;
        eq(o.rdi, 500, "every access was skipped")?;
    }
    eq(u64::from(count(0)), 1000, "divide errors in the handler")
}
