//! String instructions: SDM 2B REP, and the pages of MOVS and CMPS (SDM 2A, 2B).

use crate::harness::{Verdict, done, eq, ok, page_fault};
use crate::mem::{P, Space, W, WIN, page, pages, put, rd, wr, wr8};
use crate::traps::*;
use crate::{code64, tests};

tests!("string":
    string_df, rep_zero, rep_movs_fault, rep_stos_fault, rep_cmps_scas, rep_32bit_counts, rep_overlap, singles, comparison_over_pages,
    cmps_fault, scas_fault, straddling_elements, pages_share_entries, device_operands,
);

/// Runs a snippet that leaves flags in RDX: appends PUSHF, POP RDX.
macro_rules! with_flags {
    ($($l:literal),* $(,)?) => { code64!($($l,)* "pushfq", "pop rdx") };
}

const CF: u64 = 1;
const ZF: u64 = 0x40;

/// So often a place must be reached to be sure that a translator has translated it.
const WARM: u32 = 24;

fn string_df() -> Verdict {
    let p = page();
    for i in 0..4 {
        wr(p + i * 8, i + 1);
    }
    let o = Ctx::kernel(code64!("std", "rep movsq", "cld")).rsi(p + 24).rdi(p + 32).rcx(4).run();
    done(&o, "REP MOVSQ with DF")?;
    ok(o.rsi == p - 8 && o.rdi == p && o.rcx == 0, "pointers go down")?;
    for i in 0..4 {
        eq(rd(p + 8 + i * 8), i + 1, "overlapping copy upwards")?;
    }
    let o = Ctx::kernel(code64!("std", "lodsb", "stosw", "cld")).rsi(p).rdi(p + 64).run();
    ok(o.rsi == p - 1 && o.rdi == p + 62, "LODSB and STOSW with DF")
}

fn rep_zero() -> Verdict {
    let o = Ctx::kernel(with_flags!("xor eax, eax", "rep movsb", "repe cmpsb", "rep stosb"))
        .rsi(1 << 63)
        .rdi(1 << 63)
        .rcx(0)
        .run();
    done(&o, "REP with RCX zero touches no memory")?;
    eq(o.rdx & ZF, ZF, "and no flags")?;
    eq(o.rsi, 1 << 63, "RSI")
}

fn rep_movs_fault() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    s.map(WIN, a, P | W);
    s.map(WIN + 0x2000, b, P | W);
    for i in 0..512 {
        wr(a + i * 8, i);
    }
    // The source runs into an absent page after 16 words.
    let o = Ctx::kernel(code64!("rep movsq")).rsi(WIN + 0xf80).rdi(WIN + 0x2000).rcx(20).run();
    page_fault(&o, 0, WIN + 0x1000, "source page absent")?;
    ok(o.rcx == 4 && o.rsi == WIN + 0x1000 && o.rdi == WIN + 0x2080, "RCX, RSI and RDI tell what was done")?;
    eq(rd(b + 0x78), 511, "the last word before the fault is written")?;
    // The destination is read-only in the middle.
    s.map(WIN + 0x3000, b, P);
    let o = Ctx::kernel(code64!("rep movsd")).rsi(WIN).rdi(WIN + 0x2ff0).rcx(100).run();
    page_fault(&o, 3, WIN + 0x3000, "destination page read-only")?;
    ok(o.rcx == 96 && o.rsi == WIN + 16 && o.rdi == WIN + 0x3000, "state")
}

fn rep_stos_fault() -> Verdict {
    let (s, a) = (Space::active(), page());
    s.map(WIN, a, P | W);
    let o = Ctx::kernel(code64!("rep stosb")).rdi(WIN + 0xff0).rcx(0x100).rax(0xab).run();
    page_fault(&o, 2, WIN + 0x1000, "STOSB into an absent page")?;
    ok(o.rcx == 0xf0 && o.rdi == WIN + 0x1000, "state")?;
    let o = Ctx::kernel(code64!("std", "rep stosq")).rdi(WIN + 0x10).rcx(0x10).run();
    page_fault(&o, 2, WIN - 8, "downwards")?;
    ok(o.rcx == 0xd && o.rdi == WIN - 8, "state")?;
    // Crossing words: an element that straddles the edge is not written at all.
    wr(a + 0xff8, 0x5555_5555_5555_5555);
    let o = Ctx::kernel(code64!("rep stosq")).rdi(WIN + 0xff4).rcx(2).rax(0).run();
    page_fault(&o, 2, WIN + 0x1000, "straddling element")?;
    ok(o.rcx == 1 && o.rdi == WIN + 0xffc, "state")?;
    eq(rd(a + 0xff8), 0x5555_5555_0000_0000, "no half element")
}

fn rep_cmps_scas() -> Verdict {
    let (a, b) = (page(), page());
    wr(b + 16, 0x0100);
    let o = Ctx::kernel(with_flags!("repe cmpsb")).rsi(a).rdi(b).rcx(64).run();
    ok(o.rcx == 64 - 18 && o.rsi == a + 18 && o.rdi == b + 18, "REPE CMPSB stops after the difference")?;
    eq(o.rdx & (ZF | CF), CF, "flags of 0 - 1")?;
    let o = Ctx::kernel(with_flags!("repne scasb")).rax(1).rdi(b).rcx(64).run();
    ok(o.rcx == 64 - 18 && o.rdi == b + 18, "REPNE SCASB stops after the match")?;
    eq(o.rdx & ZF, ZF, "ZF")?;
    let o = Ctx::kernel(with_flags!("repe scasq")).rax(0).rdi(a).rcx(10).run();
    ok(o.rcx == 0 && o.rdx & ZF != 0, "REPE SCASQ to the end")
}

fn rep_32bit_counts() -> Verdict {
    let p = page();
    let o = Ctx::kernel(code64!(".byte 0x67", "rep stosb")).rdi(p).rcx(0xffff_ffff_0000_0004).rax(1).run();
    done(&o, "67H REP uses ECX")?;
    eq(o.rcx & 0xffff_ffff, 0, "ECX")?;
    eq(o.rdi & 0xffff_ffff, p + 4, "EDI")?;
    let o = Ctx::kernel(code64!(".byte 0x67", "loop 2f", "2: nop")).rcx(0xffff_ffff_0000_0001).run();
    eq(o.rcx, 0, "67H LOOP writes ECX, zero-extended")
}

fn rep_overlap() -> Verdict {
    let p = page();
    wr(p, 0x8877_6655_4433_2211);
    let o = Ctx::kernel(code64!("rep movsb")).rsi(p).rdi(p + 1).rcx(15).run();
    done(&o, "overlapping REP MOVSB")?;
    eq(rd(p + 8), 0x1111_1111_1111_1111, "goes byte by byte")?;
    wr(p, 0xaaaa_bbbb_cccc_dddd);
    let o = Ctx::kernel(code64!("rep movsd")).rsi(p).rdi(p + 4).rcx(4).run();
    done(&o, "overlapping REP MOVSD")?;
    eq(rd(p + 8), 0xcccc_dddd_cccc_dddd, "word by word")
}

fn singles() -> Verdict {
    let (a, b) = (page(), page());
    for _ in 0..WARM {
        wr(a, 0x8877_6655_4433_2211);
        wr(b, 0x8877_6655_4433_2212);
        let o = Ctx::kernel(with_flags!("cmpsq")).rsi(a).rdi(b).run();
        ok(o.rsi == a + 8 && o.rdi == b + 8, "CMPSQ goes on")?;
        eq(o.rdx & (ZF | CF), CF, "CMPSQ subtracts the destination from the source")?;
        let o = Ctx::kernel(with_flags!("cmpsb")).rsi(a + 1).rdi(b + 1).run();
        ok(o.rsi == a + 2 && o.rdi == b + 2 && o.rdx & (ZF | CF) == ZF, "CMPSB of equal bytes")?;
        let o = Ctx::kernel(with_flags!("scasw")).rax(0xffff_ffff_ffff_2213).rdi(b).run();
        ok(o.rdi == b + 2 && o.rdx & (ZF | CF) == 0, "SCASW compares AX alone")?;
        let o = Ctx::kernel(with_flags!("scasd")).rax(0x4433_2212).rdi(b).run();
        ok(o.rdi == b + 4 && o.rdx & (ZF | CF) == ZF, "SCASD")?;
        let o = Ctx::kernel(code64!("stc", "lodsw", "lodsb")).rax(u64::MAX).rsi(a).run();
        ok(o.rax == 0xffff_ffff_ffff_2233 && o.rsi == a + 3, "LODSW and LODSB keep the upper bits")?;
        let o = Ctx::kernel(code64!("rep lodsd")).rax(u64::MAX).rcx(2).rsi(a).run();
        ok(o.rax == 0x8877_6655 && o.rsi == a + 8 && o.rcx == 0, "REP LODSD has the last element")?;
    }
    Ok(())
}

fn comparison_over_pages() -> Verdict {
    let (a, b) = (pages(4), pages(4));
    for offset in [0x100, 0xfff, 0x1000, 0x2ffc, 0x3ffd] {
        for _ in 0..WARM {
            wr8(b + offset, 0x5a);
            let o = Ctx::kernel(with_flags!("repne scasb")).rax(0x5a).rdi(b + 3).rcx(0x3ffd).run();
            eq(o.rdi, b + offset + 1, "REPNE SCASB stops behind the match")?;
            ok(o.rcx == 0x3fff - offset && o.rdx & ZF == ZF, "with RCX and ZF")?;
            let o = Ctx::kernel(with_flags!("repe cmpsb")).rsi(a).rdi(b).rcx(0x4000).run();
            ok(o.rsi == a + offset + 1 && o.rdi == b + offset + 1, "REPE CMPSB stops behind the difference")?;
            ok(o.rcx == 0x3fff - offset && o.rdx & (ZF | CF) == CF, "with RCX and flags of 0 - 5AH")?;
            wr8(b + offset, 0);
            let o = Ctx::kernel(with_flags!("repe cmpsw")).rsi(a + 2).rdi(b + 1).rcx(0x1ff0).run();
            ok(o.rcx == 0 && o.rsi == a + 2 + 0x3fe0 && o.rdx & (ZF | CF) == ZF, "REPE CMPSW to the end")?;
            let o = Ctx::kernel(with_flags!("repne scasq")).rax(1).rdi(b).rcx(0x800).run();
            ok(o.rcx == 0 && o.rdi == b + 0x4000 && o.rdx & (ZF | CF) == 0, "REPNE SCASQ to the end")?;
        }
    }
    Ok(())
}

fn cmps_fault() -> Verdict {
    let (s, a) = (Space::active(), page());
    s.map(WIN, a, P | W);
    s.map(WIN + 0x2000, a, P | W);
    s.map(WIN + 0x3000, a, P | W);
    for _ in 0..WARM {
        let o = Ctx::kernel(code64!("repe cmpsb")).rsi(WIN + 0xf00).rdi(WIN + 0x2000).rcx(0x180).run();
        page_fault(&o, 0, WIN + 0x1000, "source page absent")?;
        ok(o.rcx == 0x80 && o.rsi == WIN + 0x1000 && o.rdi == WIN + 0x2100, "registers say how far it got")?;
        let o = Ctx::kernel(code64!("repe cmpsd")).rsi(WIN + 0x2000).rdi(WIN + 0xff0).rcx(0x10).run();
        page_fault(&o, 0, WIN + 0x1000, "destination page absent")?;
        ok(o.rcx == 0xc && o.rsi == WIN + 0x2010 && o.rdi == WIN + 0x1000, "registers say how far it got")?;
        // The page comes, and the instruction goes on where it was.
        s.map(WIN + 0x1000, a, P);
        let o = Ctx::kernel(with_flags!("repe cmpsd")).rsi(o.rsi).rdi(o.rdi).rcx(o.rcx).run();
        ok(o.rcx == 0 && o.rdi == WIN + 0x1030 && o.rdx & ZF == ZF, "and goes on")?;
        s.map(WIN + 0x1000, 0, 0);
        let o = Ctx::kernel(code64!("cmpsb")).rsi(WIN).rdi(WIN + 0x1000).run();
        page_fault(&o, 0, WIN + 0x1000, "CMPSB")?;
        ok(o.rsi == WIN && o.rdi == WIN + 0x1000, "nothing moved")?;
    }
    Ok(())
}

fn scas_fault() -> Verdict {
    let (s, a) = (Space::active(), pages(2));
    s.map(WIN, a, P);
    s.map(WIN + 0x1000, a + 0x1000, P);
    for _ in 0..WARM {
        let o = Ctx::kernel(code64!("repne scasb")).rax(1).rdi(WIN + 5).rcx(u64::MAX).run();
        page_fault(&o, 0, WIN + 0x2000, "the page behind is absent")?;
        ok(o.rcx == u64::MAX - 0x1ffb && o.rdi == WIN + 0x2000, "registers say how far it got")?;
        let o = Ctx::kernel(code64!("scasq")).rdi(WIN + 0x2000).run();
        page_fault(&o, 0, WIN + 0x2000, "SCASQ")?;
        eq(o.rdi, WIN + 0x2000, "nothing moved")?;
    }
    Ok(())
}

fn straddling_elements() -> Verdict {
    let (s, a) = (Space::active(), pages(2));
    s.map(WIN, a, P | W);
    s.map(WIN + 0x1000, a + 0x1000, P | W);
    put(a + 0xffe, &[1, 2, 3, 4]);
    for _ in 0..WARM {
        let o = Ctx::kernel(with_flags!("repne scasd")).rax(0x0403_0201).rdi(WIN + 2).rcx(0x700).run();
        ok(
            o.rdi == WIN + 0x1002 && o.rcx == 0x300 && o.rdx & ZF == ZF,
            "SCASD finds an element in two pages",
        )?;
        let o = Ctx::kernel(code64!("repne scasq")).rax(7).rdi(WIN + 0x1004).rcx(0x300).run();
        page_fault(&o, 0, WIN + 0x2000, "the last element's second half is absent")?;
        ok(o.rdi == WIN + 0x1ffc && o.rcx == 0x300 - 0x1ff, "registers stand before it")?;
    }
    Ok(())
}

fn pages_share_entries() -> Verdict {
    // Whatever a TLB's number of sets, some of these pages want the same entry.
    let (s, a, b) = (Space::active(), page(), page());
    s.map(WIN, a, P | W);
    wr(a, 0x0102_0304_0506_0708);
    for shift in 16..27 {
        let other = WIN + (1 << shift);
        s.map(other, b, P | W);
        for _ in 0..WARM {
            wr(b, 0);
            let o = Ctx::kernel(code64!("movsq")).rsi(WIN).rdi(other).run();
            done(&o, "MOVSQ")?;
            eq(rd(b), 0x0102_0304_0506_0708, "is copied")?;
            let o = Ctx::kernel(with_flags!("cmpsq")).rsi(WIN).rdi(other).run();
            eq(o.rdx & ZF, ZF, "CMPSQ")?;
            let o = Ctx::kernel(code64!("rep movsb")).rsi(WIN).rdi(other + 8).rcx(16).run();
            ok(o.rcx == 0 && rd(b + 8) == 0x0102_0304_0506_0708, "REP MOVSB")?;
            let o = Ctx::kernel(with_flags!("repe cmpsb")).rsi(other).rdi(WIN).rcx(16).run();
            ok(o.rcx == 7 && o.rdx & ZF == 0, "REPE CMPSB: the ninth byte differs")?;
            let o = Ctx::kernel(code64!("push qword ptr [rsi]", "pop qword ptr [rdi]"))
                .rsi(WIN)
                .rdi(other + 64)
                .run();
            done(&o, "PUSH and POP of memory")?;
            eq(rd(b + 64), 0x0102_0304_0506_0708, "by the stack")?;
        }
        s.map(other, 0, 0);
    }
    Ok(())
}

fn device_operands() -> Verdict {
    // The version register of the local APIC.
    const VERSION: u64 = 0xfee0_0030;
    let a = page();
    for _ in 0..WARM {
        let o = Ctx::kernel(code64!("movsd")).rsi(VERSION).rdi(a).run();
        ok(o.rsi == VERSION + 4 && rd(a) & 0xff != 0, "MOVSD from a device")?;
        let o = Ctx::kernel(with_flags!("repe cmpsd")).rsi(VERSION).rdi(a).rcx(1).run();
        ok(o.rcx == 0 && o.rdx & ZF == ZF, "REPE CMPSD with a device")?;
        let o = Ctx::kernel(with_flags!("scasd")).rax(rd(a)).rdi(VERSION).run();
        ok(o.rdi == VERSION + 4 && o.rdx & ZF == ZF, "SCASD of a device")?;
    }
    Ok(())
}
