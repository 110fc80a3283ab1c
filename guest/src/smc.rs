//! Self-modifying and cross-modifying code (SDM 3A 10.1.3, 13.6; APM 2 7.6.1).
//!
//! On one processor a store to code takes effect for the next instruction when the address is the same; through
//! another linear address a serializing instruction (here CPUID, or an IRETQ of the harness) must come between.

use crate::harness::{Verdict, done, eq, ok, page_fault};
use crate::mem::{P, Space, W, WIN, call, code_returning, page, pages, put, rd8, wr, wr8, wr32};
use crate::traps::*;
use crate::{code64, cpu, tests};

tests!("smc":
    next_instruction, same_block_ahead, own_loop, immediate_counter, call_patched, through_alias, cross_page_instruction, rep_stos_over_code,
    rep_movs_over_code, data_beside_code, code_grows, patched_to_int3, jump_target_patched, remapped_code, two_virtual_addresses,
    write_by_user_alias, atomic_patch, code_on_stack, jit_many, sse_store_over_code, patch_previous_block, page_freed_and_reused,
);

fn next_instruction() -> Verdict {
    // The store changes the immediate of the very next instruction.
    for v in [5u64, 99, 0x7fff_ffff] {
        let c = code64!("lea rdi, [rip + 2f]", "mov dword ptr [rdi + 1], ecx", "2: mov eax, 0x11111111");
        let o = Ctx::kernel(c).rcx(v).run();
        done(&o, "store to the next instruction")?;
        eq(o.rax, v, "the new immediate is executed")?;
    }
    Ok(())
}

fn same_block_ahead() -> Verdict {
    let c = code64!(
        "lea rdi, [rip + 2f]",
        "mov dword ptr [rdi + 1], ecx",
        "nop",
        "nop",
        "add ebx, 1",
        "2: mov eax, 0x22222222",
        "add eax, ebx"
    );
    let o = Ctx::kernel(c).rcx(40).rbx(1).run();
    done(&o, "store some instructions ahead")?;
    eq(o.rax, 42, "the new immediate is executed")
}

fn own_loop() -> Verdict {
    // A loop that increments its own immediate.
    let c = code64!(
        "xor ebx, ebx",
        "mov ecx, 10",
        "lea rdi, [rip + 2f]",
        "mov dword ptr [rdi + 1], 0",
        "2: mov eax, 0",
        "add ebx, eax",
        "inc dword ptr [rdi + 1]",
        "loop 2b"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "loop")?;
    eq(o.rbx, 45, "sum of 0 to 9")
}

fn immediate_counter() -> Verdict {
    let p = page();
    put(p, &code_returning(0));
    for i in 0..200u32 {
        wr32(p + 1, i);
        eq(call(p), u64::from(i), "patched immediate")?;
    }
    Ok(())
}

fn call_patched() -> Verdict {
    let (p, q) = (page(), page());
    put(q, &code_returning(1));
    put(q + 64, &code_returning(2));
    let rel = |to: u64| (to.wrapping_sub(p + 5)) as u32;
    put(p, &[0xe9]);
    wr32(p + 1, rel(q));
    eq(call(p), 1, "first target")?;
    wr32(p + 1, rel(q + 64));
    eq(call(p), 2, "patched jump")?;
    wr32(p + 1, rel(q));
    eq(call(p), 1, "and back")
}

fn through_alias() -> Verdict {
    let (s, p) = (Space::active(), page());
    put(p, &code_returning(1));
    s.map(WIN, p, P | W);
    s.map(WIN + 0x1000, p, P | W);
    eq(call(WIN), 1, "before")?;
    wr32(WIN + 0x1001, 2);
    cpu::cpuid(0, 0);
    eq(call(WIN), 2, "patched through another virtual address")?;
    wr32(p + 1, 3);
    cpu::cpuid(0, 0);
    eq(call(WIN), 3, "patched through the identity map")
}

fn cross_page_instruction() -> Verdict {
    let p = pages(2);
    let at = p + 4096 - 3;
    put(at, &code_returning(0x0102_0304));
    eq(call(at), 0x0102_0304, "instruction across two pages")?;
    wr8(p + 4096, 0x77);
    eq(call(at), 0x0177_0304, "the part in the second page patched")?;
    wr8(p + 4094, 0x88);
    eq(call(at), 0x0177_0388, "the part in the first page patched")?;
    // The second page replaced in the page table.
    let (s, q) = (Space::active(), page());
    s.map(WIN, p, P | W);
    s.map(WIN + 4096, p + 4096, P | W);
    eq(call(WIN + 4093), 0x0177_0388, "mapped")?;
    put(q, &[0x99, 0x66, 0xc3]);
    s.map(WIN + 4096, q, P | W);
    eq(call(WIN + 4093), 0x6699_0388, "second page remapped")?;
    s.map(WIN + 4096, q, 0);
    let o = Ctx::kernel(code64!("call rdi")).rdi(WIN + 4093).run();
    page_fault(&o, o.error & 0x10, WIN + 4096, "second page unmapped")
}

fn rep_stos_over_code() -> Verdict {
    let p = page();
    put(p, &[0xb8, 7, 0, 0, 0]);
    put(p + 5, &[0xff, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xc3]);
    eq(call(p), 11, "four increments")?;
    let o = Ctx::kernel(code64!("rep stosb")).rdi(p + 5).rcx(4).rax(0x90).run();
    done(&o, "REP STOSB")?;
    eq(call(p), 9, "two increments are NOPs now")?;
    // Within one run: the string store overwrites what comes next.
    let c = code64!(
        "lea rdi, [rip + 2f]",
        "mov ecx, 4",
        "mov eax, 0x90",
        "rep stosb",
        "2: inc ebx",
        "inc ebx",
        "nop"
    );
    let o = Ctx::kernel(c).rbx(5).run();
    done(&o, "REP STOSB over the next instructions")?;
    eq(o.rbx, 5, "the increments are gone")
}

fn rep_movs_over_code() -> Verdict {
    let p = page();
    put(p, &code_returning(1));
    put(p + 0x800, &code_returning(0xabc));
    eq(call(p), 1, "before")?;
    done(&Ctx::kernel(code64!("rep movsb")).rsi(p + 0x800).rdi(p).rcx(6).run(), "REP MOVSB")?;
    eq(call(p), 0xabc, "copied code")
}

fn data_beside_code() -> Verdict {
    // Code that writes data in its own page.
    let c = code64!(
        "mov ecx, 1000",
        "2: inc dword ptr [rip + 3f]",
        "loop 2b",
        "mov eax, [rip + 3f]",
        "jmp 4f",
        "3: .long 0",
        "4: nop"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "data in the code page")?;
    eq(o.rax, 1000, "counter")
}

fn code_grows() -> Verdict {
    let p = page();
    for n in 1..100u64 {
        // n times INC EAX, then RET.
        put(p, &[0x31, 0xc0]);
        for i in 0..n {
            put(p + 2 + i * 2, &[0xff, 0xc0]);
        }
        wr8(p + 2 + n * 2, 0xc3);
        eq(call(p), n, "code that grows")?;
    }
    Ok(())
}

fn patched_to_int3() -> Verdict {
    let p = page();
    put(p, &[0x31, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xc3]);
    eq(call(p), 2, "before")?;
    wr8(p + 4, 0xcc);
    let o = Ctx::kernel(code64!("call rdi")).rdi(p).run();
    eq(o.vector, BP, "INT3 patched in")?;
    eq(o.rip, p + 5, "RIP")?;
    wr8(p + 4, 0xff);
    eq(call(p), 2, "patched out")
}

fn jump_target_patched() -> Verdict {
    // The patched bytes lie in a block that was reached by a jump from another page.
    let (p, q) = (page(), page());
    put(p, &[0xe9]);
    wr32(p + 1, q.wrapping_sub(p + 5) as u32);
    for i in 1..50u32 {
        put(q, &code_returning(i));
        eq(call(p), u64::from(i), "target of a direct jump patched")?;
    }
    Ok(())
}

fn remapped_code() -> Verdict {
    let (s, p, q) = (Space::active(), page(), page());
    put(p, &code_returning(1));
    put(q, &code_returning(2));
    for i in 0..20 {
        let (frame, want) = if i & 1 == 0 { (p, 1) } else { (q, 2) };
        s.map(WIN, frame, P | W);
        eq(call(WIN), want, "code page remapped")?;
    }
    Ok(())
}

fn two_virtual_addresses() -> Verdict {
    // The same physical code at two addresses is position dependent: it returns its own address.
    let (s, p) = (Space::active(), page());
    put(p, &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xc3]);
    s.map(WIN, p, P | W);
    s.map(WIN + 0x7000, p, P | W);
    eq(call(WIN), WIN, "first address")?;
    eq(call(WIN + 0x7000), WIN + 0x7000, "second address")?;
    eq(call(p), p, "third address")
}

fn write_by_user_alias() -> Verdict {
    let p = page();
    put(p, &code_returning(1));
    eq(call(p), 1, "before")?;
    let o = Ctx::user(code64!("mov dword ptr [rdi + 1], 77")).rdi(p + crate::mem::ALIAS).run();
    done(&o, "user store")?;
    eq(call(p), 77, "kernel code patched by user code")
}

fn atomic_patch() -> Verdict {
    let p = page();
    put(p, &code_returning(1));
    wr8(p + 6, 0xc3);
    eq(call(p), 1, "before")?;
    let new = u64::from_le_bytes([0xb8, 0x22, 0, 0, 0, 0xc3, 0xc3, 0]);
    done(&Ctx::kernel(code64!("lock xchg [rdi], rax")).rdi(p).rax(new).run(), "XCHG")?;
    eq(call(p), 0x22, "patched by XCHG")?;
    done(
        &Ctx::kernel(code64!("lock cmpxchg [rdi], rcx")).rdi(p).rax(new).rcx(new ^ 0x1100).run(),
        "CMPXCHG",
    )?;
    eq(call(p), 0x33, "patched by CMPXCHG")?;
    done(&Ctx::kernel(code64!("lock or dword ptr [rdi + 1], 4")).rdi(p).run(), "LOCK OR")?;
    eq(call(p), 0x37, "patched by LOCK OR")
}

fn code_on_stack() -> Verdict {
    let c = code64!(
        "mov rax, 0xc300000055b890",
        "push rax",
        "call rsp",
        "mov ebx, eax",
        "mov byte ptr [rsp + 2], 0x66",
        "call rsp",
        "pop rcx"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "code on the stack")?;
    eq(o.rbx, 0x55, "first")?;
    eq(o.rax, 0x66, "patched")
}

fn jit_many() -> Verdict {
    // Many small functions, written, called, and written again.
    let p = pages(2);
    for round in 0..4u32 {
        for i in 0..256u32 {
            put(p + u64::from(i) * 16, &code_returning(i * 3 + round));
        }
        for i in 0..256u32 {
            eq(call(p + u64::from(i) * 16), u64::from(i * 3 + round), "generated function")?;
        }
    }
    Ok(())
}

fn sse_store_over_code() -> Verdict {
    let p = page();
    put(p, &code_returning(1));
    put(p + 0x40, &code_returning(0x99));
    eq(call(p), 1, "before")?;
    done(&Ctx::kernel(code64!("movups xmm0, [rdi + 0x40]", "movups [rdi], xmm0")).rdi(p).run(), "MOVUPS")?;
    eq(call(p), 0x99, "patched by MOVUPS")
}

fn patch_previous_block() -> Verdict {
    // The loop body patches code that it has already run and will run again.
    let c = code64!(
        "xor ebx, ebx",
        "mov ecx, 6",
        "lea rdi, [rip + 2f]",
        "mov byte ptr [rdi + 2], 1",
        "2: .byte 0x83, 0xc3, 1",
        "jmp 3f",
        "3: test cl, 1",
        "jz 4f",
        "mov byte ptr [rdi + 2], 10",
        "jmp 5f",
        "4: mov byte ptr [rdi + 2], 1",
        "5: dec ecx",
        "jnz 2b"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "loop")?;
    eq(o.rbx, 1 + 1 + 10 + 1 + 10 + 1, "alternating immediates")
}

fn page_freed_and_reused() -> Verdict {
    let (s, p) = (Space::active(), page());
    put(p, &code_returning(1));
    s.map(WIN, p, P | W);
    eq(call(WIN), 1, "code")?;
    // The page becomes data, then code again, with other content.
    for i in 0..512 {
        wr(p + i * 8, i);
    }
    ok(rd8(p + 8) == 1, "data")?;
    put(p, &code_returning(5));
    cpu::cpuid(0, 0);
    eq(call(WIN), 5, "code again")
}
