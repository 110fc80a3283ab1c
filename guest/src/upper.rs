//! The upper half of the address space: what outlives loads of CR3 and flushes of everything there, and what must not.

use crate::harness::{Verdict, done, eq, page_fault};
use crate::mem::*;
use crate::traps::*;
use crate::{code64, cpu, skip, tests};

tests!("upper":
    global_code_at_flushes, global_code_at_invlpg, crossing_code_at_flushes, local_code_at_cr3, many_local_pages, local_accessed_dirty, local_rights, local_pages_of_two_spaces,
);

const HIGH: u64 = 0xffff_9000_0000_0000;
const NEXT: u64 = HIGH + 0x1000;
const PCIDE: u64 = 1 << 17;
const NO_FLUSH: u64 = 1 << 63;
const PGE: u64 = 1 << 7;

fn store(va: u64) -> Outcome {
    Ctx::kernel(code64!("mov [rdi], rbx")).rdi(va).run()
}
fn jump(va: u64) -> Outcome {
    Ctx::kernel(code64!("call rdi")).rdi(va).run()
}

fn global_code_at_invlpg() -> Verdict {
    let s = Space::active();
    let (first, a, b) = two_pages();
    cpu::set_cr4(cpu::cr4() | PGE);
    // Code beside it, which stays: HIGH + 0x800 jumps to NEXT + 0x1010.
    put(first + 0x800, &[0xe9, 0x0b, 0x18, 0, 0]);
    s.map(HIGH, first, P | W | G);
    s.map(NEXT, a, P | W | G);
    s.map(NEXT + 0x1000, b, P | W | G);
    for turn in 0..40 {
        let (frame, want) = if turn & 1 == 0 { (b, 0x222) } else { (a, 0x111) };
        wr(s.entry(NEXT, 1), frame | P | W | G);
        cpu::invlpg(NEXT + 0x123);
        for _ in 0..5 {
            eq(call(HIGH), want, "the page that was invalidated is another")?;
            eq(call(HIGH + 0x800), 0x222, "the one behind it is not")?;
        }
    }
    wr(s.entry(NEXT, 1), 0);
    cpu::invlpg(NEXT);
    page_fault(&jump(HIGH), 0x10, NEXT + 0x10, "the page is gone")
}

/// Drops everything: by CR4.PGE, or by INVPCID if there is one.
fn flush(turn: u64) {
    if turn & 1 == 0 && cpu::has_invpcid() {
        let d = [0u64, 0];
        Ctx::kernel(code64!("invpcid rax, [rdi]")).rax(2).rdi((&raw const d) as u64).run();
    } else {
        cpu::set_cr4(cpu::cr4() & !PGE);
        cpu::set_cr4(cpu::cr4() | PGE);
    }
}

/// Code that goes to the next page by a direct jump, which returns a constant.
fn two_pages() -> (u64, u64, u64) {
    let (first, a, b) = (page(), page(), page());
    // jmp NEXT + 0x10
    put(first, &[0xe9, 0x0b, 0x10, 0, 0]);
    put(a + 0x10, &code_returning(0x111));
    put(b + 0x10, &code_returning(0x222));
    (first, a, b)
}

fn global_code_at_flushes() -> Verdict {
    let s = Space::active();
    let (first, a, b) = two_pages();
    cpu::set_cr4(cpu::cr4() | PGE);
    s.map(HIGH, first, P | W | G);
    s.map(NEXT, a, P | W | G);
    for turn in 0..60 {
        eq(call(HIGH), 0x111, "code that stays where it is")?;
        flush(turn);
    }
    for turn in 0..20 {
        let (frame, want) = if turn & 2 == 0 { (b, 0x222) } else { (a, 0x111) };
        wr(s.entry(NEXT, 1), frame | P | W | G);
        flush(turn);
        for _ in 0..5 {
            eq(call(HIGH), want, "the second page is another behind a flush of everything")?;
        }
    }
    wr(s.entry(NEXT, 1), 0);
    flush(0);
    page_fault(&jump(HIGH), 0x10, NEXT + 0x10, "the second page is gone")
}

fn crossing_code_at_flushes() -> Verdict {
    let (s, first, a, b) = (Space::active(), page(), page(), page());
    cpu::set_cr4(cpu::cr4() | PGE);
    // jmp HIGH + 0x20 or HIGH + 0x40: four bytes of it are in the next page, where nothing else is executed.
    put(first + 0xfff, &[0xe9]);
    put(a, &(0x20i32 - 0x1004).to_le_bytes());
    put(b, &(0x40i32 - 0x1004).to_le_bytes());
    put(first + 0x20, &code_returning(0x111));
    put(first + 0x40, &code_returning(0x222));
    s.map(HIGH, first, P | W | G);
    for turn in 0..40 {
        let (frame, want) = if turn & 2 == 0 { (a, 0x111) } else { (b, 0x222) };
        wr(s.entry(NEXT, 1), frame | P | W | G | A);
        flush(turn);
        for _ in 0..5 {
            eq(call(HIGH + 0xfff), want, "an instruction that reaches into the next page")?;
        }
    }
    Ok(())
}

fn local_code_at_cr3() -> Verdict {
    let s = Space::active();
    let (first, a, b) = two_pages();
    cpu::set_cr4(cpu::cr4() | PGE);
    s.map(HIGH, first, P | W);
    s.map(NEXT, a, P | W);
    for _ in 0..600 {
        eq(call(HIGH), 0x111, "local code that stays where it is")?;
        cpu::set_cr3(s.root);
    }
    for turn in 0..20 {
        let (frame, want) = if turn & 1 == 0 { (b, 0x222) } else { (a, 0x111) };
        wr(s.entry(NEXT, 1), frame | P | W);
        cpu::set_cr3(s.root);
        for _ in 0..5 {
            eq(call(HIGH), want, "a local page is another behind a load of CR3")?;
        }
    }
    wr(s.entry(NEXT, 1), 0);
    cpu::set_cr3(s.root);
    page_fault(&jump(HIGH), 0x10, NEXT + 0x10, "the second page is gone")
}

fn many_local_pages() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a, 1), wr(b, 2));
    for count in [3, 60, 64, 65, 200] {
        for turn in 0..4 {
            let (frame, want) = if turn & 1 == 0 { (a, 1) } else { (b, 2) };
            (0..count).for_each(|i| wr(s.entry(HIGH + i * 4096, 1), frame | P | W));
            cpu::set_cr3(s.root);
            for i in 0..count {
                eq(rd(HIGH + i * 4096), want, "local pages are others behind a load of CR3")?;
            }
        }
    }
    Ok(())
}

fn local_accessed_dirty() -> Verdict {
    let s = Space::active();
    s.map(HIGH, page(), P | W);
    s.map(NEXT, page(), P);
    for _ in 0..10 {
        rd(NEXT);
        wr(s.entry(NEXT, 1), s.pte(NEXT) & !A);
        cpu::set_cr3(s.root);
        rd(NEXT);
        eq(s.pte(NEXT) & (A | D), A, "A clear, CR3 loaded, read of a page that only is read")?;
        done(&store(HIGH), "store")?;
        eq(s.pte(HIGH) & (A | D), A | D, "behind a store")?;
        wr(s.entry(HIGH, 1), s.pte(HIGH) & !D);
        cpu::set_cr3(s.root);
        rd(HIGH);
        eq(s.pte(HIGH) & (A | D), A, "D clear, CR3 loaded, read")?;
        done(&store(HIGH), "store")?;
        eq(s.pte(HIGH) & (A | D), A | D, "D clear, CR3 loaded, written")?;
        wr(s.entry(HIGH, 1), s.pte(HIGH) & !(A | D));
        cpu::set_cr3(s.root);
        eq(s.pte(HIGH) & (A | D), 0, "nobody came there")?;
        rd(HIGH);
        eq(s.pte(HIGH) & (A | D), A, "A clear, CR3 loaded, read")?;
    }
    Ok(())
}

fn local_rights() -> Verdict {
    let (s, p) = (Space::active(), page());
    put(p, &[0xc3]);
    for _ in 0..10 {
        s.map(HIGH, p, P | W);
        done(&store(HIGH + 8), "writable")?;
        done(&jump(HIGH), "executable")?;
        wr(s.entry(HIGH, 1), s.pte(HIGH) & !W);
        cpu::set_cr3(s.root);
        page_fault(&store(HIGH + 8), 3, HIGH + 8, "W clear, CR3 loaded")?;
        done(&jump(HIGH), "still executable")?;
        if cpu::has_nx() {
            wr(s.entry(HIGH, 1), s.pte(HIGH) | NX);
            cpu::set_cr3(s.root);
            page_fault(&jump(HIGH), 0x11, HIGH, "NX, CR3 loaded")?;
        }
        wr(s.entry(HIGH, 1), 0);
        cpu::set_cr3(s.root);
        page_fault(&store(HIGH + 8), 2, HIGH + 8, "absent, CR3 loaded")?;
    }
    Ok(())
}

fn local_pages_of_two_spaces() -> Verdict {
    if !cpu::has_pcid() {
        skip!("no PCID");
    }
    let (a, b, pa, pb, ca, cb) = (Space::new(), Space::new(), page(), page(), page(), page());
    (wr(pa, 0xa), wr(pb, 0xb));
    put(ca, &code_returning(0x111));
    put(cb, &code_returning(0x222));
    a.map(HIGH, pa, P | W);
    b.map(HIGH, pb, P | W);
    a.map(NEXT, ca, P | W);
    b.map(NEXT, cb, P | W);
    cpu::set_cr4(cpu::cr4() | PCIDE | PGE);
    for turn in 0..600u64 {
        let flush = if turn < 2 { 0 } else { NO_FLUSH };
        cpu::set_cr3(a.root | 1 | flush);
        eq(rd(HIGH), 0xa, "data of A")?;
        eq(call(NEXT), 0x111, "code of A")?;
        cpu::set_cr3(b.root | 2 | flush);
        eq(rd(HIGH), 0xb, "data of B")?;
        eq(call(NEXT), 0x222, "code of B")?;
    }
    Ok(())
}
