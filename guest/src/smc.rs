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
    immediate_changes_and_rests, opcode_changes_often, code_changes_itself_often, own_loop_long, data_in_the_line_of_code, data_beside_code_often,
    call_target_changes_often, other_code_each_time, constants_of_every_form,
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

fn immediate_changes_and_rests() -> Verdict {
    // An engine may adapt to code that changes often, and to code that has ceased to.
    let p = page();
    put(p, &code_returning(0));
    for round in 0..3u32 {
        for i in 0..3000u32 {
            let v = (i * 77) ^ (round << 20);
            wr32(p + 1, v);
            eq(call(p), u64::from(v), "it changes")?;
        }
        wr32(p + 1, round);
        for _ in 0..12_000 {
            eq(call(p), u64::from(round), "it rests")?;
        }
    }
    Ok(())
}

fn opcode_changes_often() -> Verdict {
    // xor eax, eax; inc or dec or nop eax; ret
    let p = page();
    put(p, &[0x31, 0xc0, 0xff, 0xc0, 0xc3]);
    for i in 0..3000u32 {
        let (byte, want) = [(0xc0, 1), (0xc8, 0xffff_ffff), (0xd0, 0)][(i % 3) as usize];
        if byte == 0xd0 {
            put(p + 2, &[0x66, 0x90]);
        } else {
            put(p + 2, &[0xff, byte]);
        }
        eq(call(p), want, "another instruction")?;
        eq(call(p), want, "again")?;
    }
    Ok(())
}

fn code_changes_itself_often() -> Verdict {
    // mov [rip + 1], ecx; mov eax, 0x11111111; ret: the constant is changed just before it is used.
    let p = page();
    put(p, &[0x89, 0x0d, 1, 0, 0, 0, 0xb8, 0x11, 0x11, 0x11, 0x11, 0xc3]);
    let caller = code64!("2: mov rcx, rbx", "call rdi", "cmp rax, rbx", "jne 3f", "dec ebx", "jnz 2b", "3: nop");
    let o = Ctx::kernel(caller).rdi(p).rbx(5000).run();
    done(&o, "calls")?;
    eq(o.rbx, 0, "each constant was the new one")
}

fn own_loop_long() -> Verdict {
    let c = code64!(
        "xor ebx, ebx",
        "mov ecx, 20000",
        "lea rdi, [rip + 2f]",
        "mov dword ptr [rdi + 1], 0",
        "2: mov eax, 0",
        "add rbx, rax",
        "inc dword ptr [rdi + 1]",
        "dec ecx",
        "jnz 2b"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "loop")?;
    eq(o.rbx, 19_999 * 10_000, "sum of 0 to 19999")
}

fn data_in_the_line_of_code() -> Verdict {
    // A counter next to the code that counts, and a function that reads it.
    let p = page();
    put(p, &[0xff, 0x05, 0x0a, 0, 0, 0, 0x8b, 0x05, 0x04, 0, 0, 0, 0xc3]);
    for i in 1..6000u64 {
        eq(call(p), i, "inc [p + 16]; mov eax, [p + 16]")?;
    }
    wr32(p + 16, 0);
    eq(call(p), 1, "written from outside")
}

fn data_beside_code_often() -> Verdict {
    let p = page();
    put(p + 0x400, &code_returning(7));
    let c = code64!(
        "mov ecx, 300",
        "2: mov [rdi + 0x80], cl",
        "mov [rdi + 0x82], cx",
        "mov [rdi + 0x84], ecx",
        "mov [rdi + 0x88], rcx",
        "lock add [rdi + 0x90], rcx",
        "add dword ptr [rdi + 0x98], 3",
        "mov [rdi + 0x3c - 3], rcx",
        "movups [rdi + 0x100], xmm0",
        "push rdi",
        "push rcx",
        "add rdi, 0x200",
        "mov eax, 0x5a",
        "mov ecx, 0x100",
        "rep stosb",
        "stosb",
        "pop rcx",
        "pop rdi",
        "lea rdx, [rdi + 0x400]",
        "call rdx",
        "cmp eax, 7",
        "jne 3f",
        "dec ecx",
        "jnz 2b",
        "3: nop"
    );
    let o = Ctx::kernel(c).rdi(p).run();
    done(&o, "data of all sizes beside code")?;
    eq(o.rcx, 0, "the function is the same all the time")?;
    ok(rd8(p + 0x80) == 1, "byte")?;
    eq(crate::mem::rd(p + 0x88), 1, "eight bytes")?;
    eq(crate::mem::rd(p + 0x90), 45_150, "locked")?;
    eq(crate::mem::rd(p + 0x98), 900, "read and written")?;
    eq(crate::mem::rd(p + 0x39), 1, "across lines")?;
    ok(rd8(p + 0x300) == 0x5a, "string")?;
    // A store that begins in a line of data and reaches into the function's first bytes.
    wr(p + 0x3fc, u64::from_le_bytes([0, 0, 0, 0, 0xb8, 0x44, 0, 0]));
    eq(call(p + 0x400), 0x44, "patched from the line before")
}

fn call_target_changes_often() -> Verdict {
    let p = page();
    put(p, &[0x53, 0xe8]);
    put(p + 6, &[0x5b, 0xc3]);
    put(p + 0x100, &code_returning(1));
    put(p + 0x180, &code_returning(2));
    put(p + 0x20, &[0xe9]);
    for i in 0..4000u64 {
        let to = if i & 1 == 0 { 0x100 } else { 0x180 };
        wr32(p + 2, (to - 6) as u32);
        eq(call(p), 1 + (i & 1), "call")?;
        wr32(p + 0x21, (to - 0x25) as u32);
        eq(call(p + 0x20), 1 + (i & 1), "jump")?;
    }
    Ok(())
}

fn other_code_each_time() -> Verdict {
    // A compiler that uses its buffer again: functions of other lengths at other places each time.
    let p = page();
    for round in 0..400u64 {
        let mut at = p + round % 7;
        let first = at;
        put(at, &[0x31, 0xc0]);
        at += 2;
        for i in 0..round % 23 {
            put(at, if (round + i) % 3 == 0 { &[0xff, 0xc0] } else { &[0x83, 0xc0, 2] });
            at += if (round + i) % 3 == 0 { 2 } else { 3 };
        }
        wr8(at, 0xc3);
        let want: u64 = (0..round % 23).map(|i| if (round + i) % 3 == 0 { 1 } else { 2 }).sum();
        for _ in 0..10 {
            eq(call(first), want, "generated function")?;
        }
    }
    Ok(())
}

fn constants_of_every_form() -> Verdict {
    // Moves of constants to registers in every form, with constants that change: the last bytes of each are the constant's.
    let forms: [(&[u8], u64, usize, bool); 6] = [
        (&[0xb8], 1, 4, false),                 // mov eax, imm32
        (&[0x48, 0xb8], 2, 8, false),           // mov rax, imm64
        (&[0x48, 0xc7, 0xc0], 3, 4, true),      // mov rax, imm32
        (&[0xc7, 0xc0], 2, 4, false),           // mov eax, imm32, the long form
        (&[0x49, 0xbd], 2, 8, false),           // mov r13, imm64
        (&[0x49, 0xc7, 0xc7], 3, 4, true),      // mov r15, imm32
    ];
    for (n, (opcode, at, len, signed)) in forms.into_iter().enumerate() {
        let p = page() + 3 * n as u64;
        // push r13; push r15; the move; mov rax, r13 or r15; pop r15; pop r13; ret
        put(p, &[0x41, 0x55, 0x41, 0x57]);
        put(p + 4, opcode);
        let behind = p + 4 + at + len as u64;
        match n {
            4 => put(behind, &[0x4c, 0x89, 0xe8]),
            5 => put(behind, &[0x4c, 0x89, 0xf8]),
            _ => put(behind, &[0x48, 0x89, 0xc0]),
        }
        put(behind + 3, &[0x41, 0x5f, 0x41, 0x5d, 0xc3]);
        for i in 0..1500u64 {
            let v = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            put(p + 4 + at, &v.to_le_bytes()[..len]);
            let want = match (len, signed) {
                (8, _) => v,
                (_, false) => v & 0xffff_ffff,
                (_, true) => v as u32 as i32 as u64,
            };
            eq(call(p), want, "the constant")?;
        }
    }
    Ok(())
}
