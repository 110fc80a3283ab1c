//! What nobody writes who means well: garbage as code, ever new code, faults everywhere, tables and stacks in device memory. The machine
//! must do what the manuals say, and go on.

use crate::apic;
use crate::boot::BOOT_PML4;
use crate::harness::{Verdict, baseline_efer, done, eq, fault, ok, set_efer};
use crate::mem::{
    ADDR, ALIAS, BIG, P, Space, U, W, WIN, call, code_returning, page, pages, put, rd, rd8, wr, wr8,
};
use crate::traps::*;
use crate::{code64, cpu, tests};

tests!("hostile":
    garbage_at_level_3, jumps_into_instructions, ever_new_code, one_page_at_many_addresses, control_bits_toggle, faults_in_every_instruction,
    stack_in_device_memory, page_tables_in_device_memory, code_in_device_memory, tables_in_device_memory,
);

/// So often a place must be reached to be sure that a translator has translated it.
const WARM: u32 = 24;
/// Physical addresses where there is nothing.
const NOTHING: u64 = 0xd000_0000;

/// Numbers that look random: xorshift (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// An address space without the user alias of physical memory.
fn without_alias() -> Space {
    let (s, pdpt) = (Space::new(), page());
    let boot = unsafe { BOOT_PML4.0[0] } & ADDR;
    for i in (0..512).filter(|i| *i != ALIAS >> 30) {
        wr(pdpt + i * 8, rd(boot + i * 8));
    }
    wr(s.root, pdpt | P | W | U);
    cpu::set_cr3(s.root);
    s
}

/// The vector of the timer that ends what does not end by itself.
const TIMER: u64 = 0x63;

/// Runs a context until it faults or a timer ends it, which may be before its first instruction.
fn run_for_a_while(c: Ctx) -> Outcome {
    apic::write(0x3e0, 0xb);
    apic::write(0x320, TIMER as u32);
    apic::write(0x380, 300_000);
    let o = c.flags(0x200).run();
    apic::reset();
    o
}

/// Random bytes run at level 3 until they fault or a timer ends them. They reach nothing but their own pages.
fn garbage_at_level_3() -> Verdict {
    const STACK: u64 = WIN + 0x1_0000;
    const KERNEL: u64 = WIN + 0x2_0000;
    let s = without_alias();
    let (code, stack, kernel) = (pages(2), page(), page());
    for (i, pa) in [code, code + 0x1000].into_iter().enumerate() {
        s.map(WIN + 0x1000 * i as u64, pa, P | W | U);
    }
    s.map(STACK, stack, P | W | U);
    s.map(KERNEL, kernel, P | W);
    wr(kernel, 0x5a5a_5a5a);
    set_efer(baseline_efer() & !1);
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..300 {
        for at in (0..0x2000).step_by(8) {
            wr(code + at, random.next());
        }
        let mut c = Ctx::user(Code { start: WIN - ALIAS + random.next() % 0x1fff, end: 0 });
        c.0.rsp = STACK + 0x800;
        let somewhere = [WIN, STACK, KERNEL, 1 << 63, 0x8000_0000_0000, 0, !0];
        for r in
            [&mut c.0.rax, &mut c.0.rbx, &mut c.0.rcx, &mut c.0.rdx, &mut c.0.rsi, &mut c.0.rdi, &mut c.0.rbp]
        {
            let n = random.next();
            *r = if n & 1 != 0 { somewhere[n as usize / 2 % 7] + (n >> 32 & 0xfff) } else { random.next() };
        }
        let o = run_for_a_while(c);
        ok(o.vector != NONE, "it ends with a trap")?;
        eq(rd(kernel), 0x5a5a_5a5a, "supervisor memory is as it was")?;
        unsafe { core::arch::asm!("fninit", "push 0x1f80", "ldmxcsr [rsp]", "add rsp, 8") };
    }
    Ok(())
}

/// Every byte of a run of MOV r32, imm32 and NOP is an entry.
fn jumps_into_instructions() -> Verdict {
    const LEN: usize = 120;
    let p = page();
    let mut bytes = [0x90u8; LEN + 9];
    let mut random = Random(77);
    for b in &mut bytes[..LEN] {
        *b = [0xb8, 0xb9, 0xba, 0xbb, 0x90][random.next() as usize % 5];
    }
    bytes[LEN + 8] = 0xc3;
    put(p, &bytes);
    let c = code64!("call rdi");
    for _ in 0..WARM {
        for entry in 0..LEN {
            let mut registers = [0u64; 4];
            let mut at = entry;
            while bytes[at] != 0xc3 {
                if bytes[at] == 0x90 {
                    at += 1;
                    continue;
                }
                let value = u32::from_le_bytes([bytes[at + 1], bytes[at + 2], bytes[at + 3], bytes[at + 4]]);
                registers[usize::from(bytes[at] & 3)] = u64::from(value);
                at += 5;
            }
            let o = Ctx::kernel(c).rdi(p + entry as u64).run();
            done(&o, "entry in the middle")?;
            ok([o.rax, o.rcx, o.rdx, o.rbx] == registers, "what is decoded from there is executed")?;
        }
    }
    Ok(())
}

fn ever_new_code() -> Verdict {
    for round in 0..WARM {
        for at in (0..0x1_0000u64).step_by(16) {
            put(BIG + at, &code_returning(round << 16 | at as u32));
        }
        for at in (0..0x1_0000u64).step_by(16) {
            eq(call(BIG + at), u64::from(round) << 16 | at, "new code is executed")?;
        }
    }
    Ok(())
}

fn one_page_at_many_addresses() -> Verdict {
    const COUNT: u64 = 2048;
    let (s, p) = (Space::active(), page());
    // lea rax, [rip - 7]; ret; and at 16 the same with INT 80H.
    put(p, &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xc3]);
    put(p + 16, &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xcd, 0x80]);
    for i in 0..COUNT {
        s.map(WIN + i * 0x1000, p, P);
        s.map(WIN + (COUNT + i) * 0x1000, p, P | U);
    }
    for round in 0..WARM {
        // All of them some times, a few often.
        let count = if round < 4 { COUNT } else { 32 };
        for i in 0..count {
            let at = WIN + i * 0x1000;
            eq(call(at), at, "the code sees its own address")?;
        }
        for i in 0..count / 8 {
            let at = WIN + (COUNT + i) * 0x1000 + 16;
            let o = Ctx::user(Code { start: at - ALIAS, end: 0 }).run();
            done(&o, "at level 3")?;
            eq(o.rax, at, "the code sees its own address at level 3")?;
        }
    }
    Ok(())
}

fn control_bits_toggle() -> Verdict {
    const EM: u64 = 1 << 2;
    const TS: u64 = 1 << 3;
    const OSFXSR: u64 = 1 << 9;
    /// MP, EM, TS, NE, WP, AM.
    const CR0_BITS: u64 = 1 << 1 | EM | TS | 1 << 5 | 1 << 16 | 1 << 18;
    /// TSD, DE, PGE, PCE, OSFXSR, OSXMMEXCPT.
    const CR4_BITS: u64 = 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8 | OSFXSR | 1 << 10;
    let c = code64!(
        "mov cr0, rax",
        "mov cr4, rbx",
        "mov rax, rdx",
        "mov ecx, 0xc0000080",
        "xor edx, edx",
        "wrmsr",
        "add esi, edi",
        "paddd xmm0, xmm0",
        "add esi, edi",
        "fnop",
        "add esi, edi",
    );
    let (cr0, cr4, efer) = (cpu::cr0(), cpu::cr4(), baseline_efer());
    let mut random = Random(4711);
    for _ in 0..1500 {
        let n = random.next();
        let (cr0, cr4) = (cr0 ^ n & CR0_BITS, cr4 ^ n >> 20 & CR4_BITS);
        if cr0 & TS != 0 && (cr0 & EM != 0 || cr4 & OSFXSR == 0) {
            // #UD or #NM: the manual does not say which comes first (SDM 3A table 6-2).
            continue;
        }
        let o = Ctx::kernel(c).rax(cr0).rbx(cr4).rdx(efer ^ n >> 63).rdi(3).run();
        let (vector, sum) = if cr0 & EM != 0 || cr4 & OSFXSR == 0 {
            (UD, 3)
        } else if cr0 & TS != 0 {
            (NM, 3)
        } else {
            (END, 9)
        };
        fault(&o, vector, 0, "SSE under these control bits")?;
        eq(o.rsi, sum, "instructions before the fault, and none behind")?;
    }
    Ok(())
}

fn faults_in_every_instruction() -> Verdict {
    let p = page();
    // div ecx; ud2; mov eax, [rdi]; inc esi: two bytes each, and the first three fault.
    for i in 0..40 {
        put(p + i * 8, &[0xf7, 0xf1, 0x0f, 0x0b, 0x8b, 0x07, 0xff, 0xc6]);
    }
    put(p + 320, &[0xcd, 0x80]);
    set_skip(2);
    for vector in [DE, UD, GP] {
        set_mode(vector as u8, RESUME | SKIP);
    }
    let start = Code { start: p, end: 0 };
    for round in 1..=WARM {
        let o = Ctx::kernel(start).rax(5).rdi(1 << 63).run();
        done(&o, "40 times three faults")?;
        ok(o.rsi == 40 && o.rax == 5 && o.rcx == 0, "what stands between them is executed")?;
        for vector in [DE, UD, GP] {
            eq(u64::from(count(vector as u8)), u64::from(40 * round), "each faults")?;
        }
    }
    // Page faults, and then none any more.
    let (s, a) = (Space::active(), page());
    s.map(WIN + 0x1000, a, P);
    for i in 0..40 {
        put(p + i * 2, &[0x8b, 0x07]);
    }
    put(p + 80, &[0xcd, 0x80]);
    set_mode(PF as u8, RESUME | SKIP);
    for round in 1..=WARM {
        done(&Ctx::kernel(start).rdi(WIN).run(), "40 page faults")?;
        eq(u64::from(count(PF as u8)), u64::from(40 * round), "each faults")?;
        done(&Ctx::kernel(start).rdi(WIN + 0x1000).run(), "no page fault")?;
    }
    Ok(())
}

/// Somewhere in device memory and where there is nothing.
fn places() -> [u64; 3] {
    // Reserved registers of the local APIC; the I/O APIC's window.
    [NOTHING, apic::LAPIC + 0x900, apic::IOAPIC + 0x800]
}

fn stack_in_device_memory() -> Verdict {
    let c = code64!(
        "mov rsp, rdi",
        "push rax",
        "pop rbx",
        "push 5",
        "pushfq",
        "popfq",
        "lea rsp, [rsp + 8]",
        "enter 16, 0",
        "inc ecx"
    );
    for place in places() {
        for _ in 0..WARM {
            let o = Ctx::kernel(c).rdi(place + 0x100).run();
            ok(o.vector != NONE && (o.vector != END || o.rcx == 1), "a stack in device memory")?;
        }
    }
    let c = code64!("mov rsp, rdi", "push rax", "pop rbx", "call 2f", "2: inc ecx");
    for _ in 0..WARM {
        let o = Ctx::kernel(c).rax(0x5a5a_0001).rdi(NOTHING + 0x800).run();
        done(&o, "a stack where nothing is")?;
        ok(o.rbx != 0x5a5a_0001, "what was pushed is gone")?;
        let o = run_for_a_while(Ctx::kernel(code64!("mov rsp, rdi", "ret")).rdi(NOTHING));
        ok(o.vector != NONE && o.vector != END, "nor is there a way back")?;
    }
    Ok(())
}

fn page_tables_in_device_memory() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | W);
    let c = code64!("mov al, [rdi]", "mov [rdi], al", "inc ecx");
    for level in [2, 3, 4] {
        let entry = s.entry(WIN, level);
        let kept = rd(entry);
        for place in places() {
            for bits in [P, P | W, P | W | U] {
                wr(entry, place & ADDR | bits);
                cpu::set_cr3(s.root);
                for _ in 0..4 {
                    let o = Ctx::kernel(c).rdi(WIN).run();
                    ok(o.vector == PF || o.vector == END, "an access through tables in device memory")?;
                }
            }
        }
        wr(entry, kept);
        cpu::set_cr3(s.root);
        done(&Ctx::kernel(c).rdi(WIN).run(), "and back")?;
    }
    Ok(())
}

fn code_in_device_memory() -> Verdict {
    for place in places() {
        for _ in 0..WARM {
            let o = run_for_a_while(Ctx::kernel(Code { start: place, end: 0 }));
            ok(o.vector != NONE && o.vector != END, "code in device memory ends by a trap")?;
        }
    }
    // From a page of memory into nothing: the instruction's second half is missing.
    let (s, a) = (Space::active(), page());
    s.map(WIN, a, P);
    s.map(WIN + 0x1000, NOTHING, P);
    put(a + 0xffd, &[0xb8, 1, 2]);
    for _ in 0..WARM {
        let o = run_for_a_while(Ctx::kernel(Code { start: WIN + 0xffd, end: 0 }));
        ok(o.vector != NONE && o.vector != END, "it ends by a trap")?;
        if o.vector == TIMER {
            continue;
        }
        // What is read where nothing is depends on the machine.
        let high = o.rax >> 16 & 0xffff;
        ok(
            o.rax & 0xff00 == 0x200 && (high == 0 || high == 0xffff),
            "its immediate ends with what is read there",
        )?;
    }
    Ok(())
}

/// GDT and IDT where they cannot be, between two instructions that need neither.
fn tables_in_device_memory() -> Verdict {
    let (kept, moved) = (page(), page());
    let c = code64!(
        "sgdt [rsi]",
        "sidt [rsi + 16]",
        "lgdt [rdi]",
        "lidt [rdi]",
        "xor eax, eax",
        "mov es, eax",
        "lar ebx, edx",
        "lsl ebx, edx",
        "verr dx",
        "lgdt [rsi]",
        "lidt [rsi + 16]",
        "inc ecx",
    );
    for place in places() {
        for _ in 0..WARM {
            wr(moved, 0xfff);
            for i in 0..8 {
                wr8(moved + 2 + i, (place >> (8 * i)) as u8);
            }
            let o = Ctx::kernel(c).rsi(kept).rdi(moved).rdx(0x28).run();
            done(&o, "GDT and IDT in device memory")?;
            eq(o.rcx, 1, "and back")?;
            ok(rd8(kept) != 0, "the tables were there")?;
        }
    }
    Ok(())
}
