//! Long-mode paging: rights, error codes, accessed and dirty bits, large pages, the TLB's duties.

use crate::harness::{Verdict, clean, done, eq, fault, ok, page_fault};
use crate::mem::*;
use crate::traps::*;
use crate::{code64, cpu, skip, tests};

tests!("paging":
    map_and_read, not_present, write_protect, wp_clear, user_supervisor, user_write, nx_fetch, nxe_clear_reserved,
    reserved_pte, reserved_large, reserved_pml4_ps, large_2m, large_1g, accessed_dirty, accessed_dirty_large, dirty_after_read,
    fault_leaves_dirty_clear, absent_not_cached, invlpg_large, cr3_flushes, global_pge_toggle, cross_page_load, cross_page_store,
    cross_page_rmw, cross_page_push, pcid_two_spaces, pcid_code, pcid_rules, invpcid_types, smep, smap, smap_rules, protection_keys,
    self_map, walk_through_user_table, fetch_sets_accessed, atomic_on_readonly,
);

fn load(va: u64) -> Outcome {
    Ctx::kernel(code64!("mov rbx, [rdi]")).rdi(va).run()
}
fn store(va: u64) -> Outcome {
    Ctx::kernel(code64!("mov [rdi], rbx")).rdi(va).run()
}
fn jump(va: u64) -> Outcome {
    Ctx::kernel(code64!("call rdi")).rdi(va).run()
}
fn user_load(va: u64) -> Outcome {
    Ctx::user(code64!("mov rbx, [rdi]")).rdi(va).run()
}
fn user_store(va: u64) -> Outcome {
    Ctx::user(code64!("mov [rdi], rbx")).rdi(va).run()
}
fn user_jump(va: u64) -> Outcome {
    Ctx::user(code64!("call rdi")).rdi(va).run()
}

fn map_and_read() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    wr(a, 0x1111);
    wr(b, 0x2222);
    s.map(WIN, a, P | W);
    eq(rd(WIN), 0x1111, "first page")?;
    s.map(WIN, b, P | W);
    eq(rd(WIN), 0x2222, "after remapping with INVLPG")?;
    wr(WIN + 8, 7);
    eq(rd(b + 8), 7, "store seen at the physical address")
}

fn not_present() -> Verdict {
    let s = Space::active();
    page_fault(&load(WIN + 0x123), 0, WIN + 0x123, "read, PML4 entry absent")?;
    page_fault(&store(WIN + 0x456), 2, WIN + 0x456, "write, PML4 entry absent")?;
    s.map(WIN, page(), P | W);
    for (level, va) in [(1, WIN + 0x1000), (2, WIN + 0x20_0000), (3, WIN + 0x4000_0000)] {
        let o = load(va);
        page_fault(&o, 0, va, if level == 1 { "PTE absent" } else { "table absent" })?;
    }
    page_fault(&user_load(WIN + 0x1000), 4, WIN + 0x1000, "user read")?;
    page_fault(&user_store(WIN + 0x1000), 6, WIN + 0x1000, "user write")
}

fn write_protect() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P);
    done(&load(WIN), "read of a read-only page")?;
    page_fault(&store(WIN + 8), 3, WIN + 8, "supervisor write, WP set")?;
    s.map(WIN, page(), P | W);
    done(&store(WIN), "write after making it writable")?;
    wr(s.entry(WIN, 2), rd(s.entry(WIN, 2)) & !W);
    cpu::invlpg(WIN);
    page_fault(&store(WIN + 8), 3, WIN + 8, "W clear in the page directory")
}

fn wp_clear() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | U);
    let mut v = NONE;
    let o = catch(|| {
        cpu::set_cr0(cpu::cr0() & !(1 << 16));
        v = store(WIN).vector;
    });
    clean(&o, "WP clear")?;
    eq(v, END, "supervisor write to a read-only page with WP clear")?;
    page_fault(&store(WIN), 3, WIN, "WP set again takes effect at once")?;
    let o = catch(|| {
        cpu::set_cr0(cpu::cr0() & !(1 << 16));
        v = user_store(WIN).error;
    });
    clean(&o, "WP clear, user")?;
    eq(v, 7, "WP does not matter to user writes")
}

fn user_supervisor() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | W);
    page_fault(&user_load(WIN), 5, WIN, "user read of a supervisor page")?;
    page_fault(&user_store(WIN), 7, WIN, "user write of a supervisor page")?;
    s.map(WIN, page(), P | W | U);
    done(&user_load(WIN), "user page")?;
    wr(s.entry(WIN, 3), rd(s.entry(WIN, 3)) & !U);
    cpu::invlpg(WIN);
    page_fault(&user_load(WIN), 5, WIN, "U clear in the PDPT")
}

fn user_write() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | U);
    done(&user_load(WIN), "user read")?;
    page_fault(&user_store(WIN), 7, WIN, "user write of a read-only page")
}

fn nx_fetch() -> Verdict {
    if !cpu::has_nx() {
        skip!("no NX");
    }
    let (s, p) = (Space::active(), page());
    put(p, &[0xc3]);
    s.map(WIN, p, P | W | U);
    done(&jump(WIN), "executable page")?;
    s.map(WIN, p, P | W | U | NX);
    page_fault(&jump(WIN), 0x11, WIN, "supervisor fetch")?;
    page_fault(&user_jump(WIN), 0x15, WIN, "user fetch")?;
    done(&load(WIN), "data access")?;
    page_fault(&user_jump(WIN + 0x1000), 0x14, WIN + 0x1000, "user fetch of an absent page")?;
    ok(true, "")?;
    fault(&jump(WIN), PF, 0x11, "again")
}

fn nxe_clear_reserved() -> Verdict {
    if !cpu::has_nx() {
        skip!("no NX");
    }
    let s = Space::active();
    s.map(WIN, page(), P | W | NX);
    done(&load(WIN), "NX page")?;
    crate::harness::set_efer(crate::harness::baseline_efer() & !0x800);
    cpu::invlpg(WIN);
    page_fault(&load(WIN), 9, WIN, "bit 63 is reserved when EFER.NXE is clear")?;
    page_fault(&store(WIN), 0xb, WIN, "write")?;
    crate::harness::set_efer(crate::harness::baseline_efer());
    done(&load(WIN), "NXE set again")
}

fn reserved_pte() -> Verdict {
    let bits = cpu::phys_bits();
    if bits >= 52 {
        skip!("52 physical address bits");
    }
    let s = Space::active();
    s.map(WIN, page(), P | W | U | 1 << 51);
    page_fault(&load(WIN), 9, WIN, "supervisor read")?;
    page_fault(&store(WIN), 0xb, WIN, "supervisor write")?;
    page_fault(&user_load(WIN), 0xd, WIN, "user read")?;
    page_fault(&user_store(WIN), 0xf, WIN, "user write")?;
    if crate::harness::baseline_efer() & 0x800 != 0 {
        page_fault(&user_jump(WIN), 0x1d, WIN, "user fetch")?;
    }
    s.map(WIN, page(), 1 << 51);
    page_fault(&load(WIN), 0, WIN, "P clear: reserved bits are ignored")?;
    s.map(WIN, page(), P | W);
    wr(s.entry(WIN, 2), rd(s.entry(WIN, 2)) | 1 << bits);
    cpu::invlpg(WIN);
    page_fault(&load(WIN), 9, WIN, "reserved bit in the page directory")
}

fn reserved_large() -> Verdict {
    let s = Space::active();
    s.map_large(WIN, BIG | 1 << 13, P | W, 2);
    page_fault(&load(WIN), 9, WIN, "bit 13 of a 2 MiB entry")?;
    s.map_large(WIN, BIG | 1 << 20, P | W, 2);
    page_fault(&store(WIN), 0xb, WIN, "bit 20 of a 2 MiB entry")?;
    if !cpu::has_1g() {
        return Ok(());
    }
    let va = WIN + 0x4000_0000;
    s.map_large(va, 1 << 29, P | W, 3);
    page_fault(&load(va), 9, va, "bit 29 of a 1 GiB entry")
}

fn reserved_pml4_ps() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | W);
    wr(s.entry(WIN, 4), rd(s.entry(WIN, 4)) | PS);
    cpu::invlpg(WIN);
    page_fault(&load(WIN), 9, WIN, "bit 7 of a PML4 entry is reserved")
}

fn large_2m() -> Verdict {
    let s = Space::active();
    wr(BIG, 0xaaaa);
    wr(BIG + 0x1f_fff8, 0xbbbb);
    s.map_large(WIN, BIG, P | W, 2);
    eq(rd(WIN), 0xaaaa, "first word")?;
    eq(rd(WIN + 0x1f_fff8), 0xbbbb, "last word")?;
    s.map_large(WIN, BIG, P, 2);
    page_fault(&store(WIN + 0x12_3450), 3, WIN + 0x12_3450, "write to a read-only large page")?;
    s.map_large(WIN, BIG | 1 << 12, P | W | U, 2);
    done(&user_load(WIN + 0x1000), "bit 12 is PAT; user access")
}

fn large_1g() -> Verdict {
    if !cpu::has_1g() {
        skip!("no 1 GiB pages");
    }
    let s = Space::active();
    wr(BIG + 0x10, 0xcccc);
    s.map_large(WIN, 0, P | W, 3);
    eq(rd(WIN + BIG + 0x10), 0xcccc, "word in a 1 GiB page")?;
    wr(WIN + BIG + 0x18, 1);
    eq(rd(s.entry(WIN, 3)) & (A | D), A | D, "A and D of the PDPT entry")
}

fn accessed_dirty() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | W | U);
    load(WIN);
    for level in 1..=4 {
        eq(rd(s.entry(WIN, level)) & (A | D), A, "after a read: A at every level, D nowhere")?;
    }
    store(WIN);
    eq(s.pte(WIN) & (A | D), A | D, "after a write: D in the leaf")?;
    for level in 2..=4 {
        eq(rd(s.entry(WIN, level)) & D, 0, "D is for leaves")?;
    }
    wr(s.entry(WIN, 1), s.pte(WIN) & !(A | D));
    cpu::invlpg(WIN);
    user_load(WIN);
    eq(s.pte(WIN) & (A | D), A, "set again after clearing and INVLPG, by user code")
}

fn accessed_dirty_large() -> Verdict {
    let s = Space::active();
    s.map_large(WIN, BIG, P | W, 2);
    load(WIN + 0x5000);
    eq(rd(s.entry(WIN, 2)) & (A | D), A, "read")?;
    store(WIN + 0x6000);
    eq(rd(s.entry(WIN, 2)) & (A | D), A | D, "write")
}

fn dirty_after_read() -> Verdict {
    let s = Space::active();
    for i in 0..4 {
        s.map(WIN + i * 4096, page(), P | W);
    }
    for i in 0..4 {
        rd(WIN + i * 4096);
    }
    let c = code64!(
        "add dword ptr [rdi], 1",
        "mov qword ptr [rdi + 4096], 1",
        "lock xadd [rdi + 8192], rax",
        "movups [rdi + 12288], xmm0"
    );
    done(&Ctx::kernel(c).rdi(WIN).run(), "writes after reads")?;
    for i in 0..4 {
        eq(s.pte(WIN + i * 4096) & D, D, "D is set by a write that finds a clean translation")?;
    }
    Ok(())
}

fn fault_leaves_dirty_clear() -> Verdict {
    let s = Space::active();
    s.map(WIN, page(), P | U);
    page_fault(&user_store(WIN), 7, WIN, "write to a read-only page")?;
    eq(s.pte(WIN) & D, 0, "D after a faulting write")
}

fn absent_not_cached() -> Verdict {
    let (s, p) = (Space::active(), page());
    wr(p, 0x77);
    s.map(WIN + 0x1000, page(), P | W);
    page_fault(&load(WIN), 0, WIN, "absent")?;
    wr(s.entry(WIN, 1), p | P);
    let o = load(WIN);
    done(&o, "present without INVLPG: absent entries are not cached (SDM 3A 4.10.2.3)")?;
    eq(o.rbx, 0x77, "data")
}

fn invlpg_large() -> Verdict {
    let s = Space::active();
    wr(BIG + 0x3000, 1);
    wr(BIG + 0x20_3000, 2);
    s.map_large(WIN, BIG, P | W, 2);
    eq(rd(WIN + 0x3000), 1, "before")?;
    wr(s.entry(WIN, 2), (BIG + 0x20_0000) | P | W | PS);
    cpu::invlpg(WIN + 0x1f_0000);
    eq(rd(WIN + 0x3000), 2, "INVLPG of any address in a large page drops all of it")
}

fn cr3_flushes() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a, 1), wr(b, 2));
    for i in 0..8 {
        s.map(WIN + i * 4096, a, P | W);
        rd(WIN + i * 4096);
    }
    for i in 0..8 {
        wr(s.entry(WIN + i * 4096, 1), b | P | W);
    }
    cpu::set_cr3(s.root);
    for i in 0..8 {
        eq(rd(WIN + i * 4096), 2, "MOV to CR3 drops translations")?;
    }
    Ok(())
}

fn global_pge_toggle() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a, 1), wr(b, 2));
    cpu::set_cr4(cpu::cr4() | 1 << 7);
    s.map(WIN, a, P | W | G);
    eq(rd(WIN), 1, "global page")?;
    wr(s.entry(WIN, 1), b | P | W | G);
    cpu::set_cr4(cpu::cr4() & !(1 << 7));
    eq(rd(WIN), 2, "clearing CR4.PGE drops global translations")?;
    cpu::set_cr4(cpu::cr4() | 1 << 7);
    eq(rd(WIN), 2, "after setting it")?;
    wr(s.entry(WIN, 1), a | P | W | G);
    cpu::invlpg(WIN);
    eq(rd(WIN), 1, "INVLPG drops global translations")
}

const EDGE: u64 = WIN + 4096;

fn cross_page_load() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    s.map(WIN, a, P | W);
    page_fault(&load(EDGE - 3), 0, EDGE, "second page absent")?;
    s.map(EDGE, b, P | W);
    (wr(a + 4088, 0x1122_3344_5566_7788), wr(b, 0x99aa_bbcc_ddee_ff00));
    eq(load(EDGE - 3).rbx, 0xccdd_eeff_0011_2233, "data of both pages")?;
    s.map(WIN, a, 0);
    page_fault(&load(EDGE - 3), 0, EDGE - 3, "first page absent")?;
    let c = code64!("movups xmm0, [rdi]");
    s.map(WIN, a, P);
    s.map(EDGE, b, 0);
    page_fault(&Ctx::kernel(c).rdi(EDGE - 8).run(), 0, EDGE, "16 bytes, second page absent")
}

fn cross_page_store() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a + 4088, 0x5a5a_5a5a_5a5a_5a5a), wr(b, 0x5a5a_5a5a_5a5a_5a5a));
    s.map(WIN, a, P | W);
    s.map(EDGE, b, P);
    page_fault(&store(EDGE - 4), 3, EDGE, "second page read-only")?;
    eq(rd(a + 4088), 0x5a5a_5a5a_5a5a_5a5a, "nothing is written to the first page")?;
    s.map(EDGE, b, P | W);
    let o = Ctx::kernel(code64!("mov [rdi], rbx")).rdi(EDGE - 4).rbx(0x1122_3344_5566_7788).run();
    done(&o, "both writable")?;
    eq(rd(a + 4088), 0x5566_7788_5a5a_5a5a, "low half")?;
    eq(rd(b), 0x5a5a_5a5a_1122_3344, "high half")
}

fn cross_page_rmw() -> Verdict {
    let (s, a, b) = (Space::active(), page(), page());
    s.map(WIN, a, P | W);
    s.map(EDGE, b, P);
    for (c, what) in [
        (code64!("add qword ptr [rdi], 1"), "add"),
        (code64!("lock inc qword ptr [rdi]"), "lock inc"),
        (code64!("xchg [rdi], rax"), "xchg"),
        (code64!("lock xadd [rdi], rax"), "xadd"),
        (code64!("mov eax, 5", "lock cmpxchg [rdi], rcx"), "cmpxchg writes even when unequal"),
    ] {
        let o = Ctx::kernel(c).rdi(EDGE - 4).rax(7).run();
        page_fault(&o, 3, EDGE, what)?;
        eq(rd(a + 4088), 0, "first page untouched")?;
    }
    Ok(())
}

fn cross_page_push() -> Verdict {
    let s = Space::active();
    s.map(EDGE, page(), P | W);
    let o = Ctx::kernel(code64!("mov rsp, rdi", "push rax")).rdi(EDGE).run();
    page_fault(&o, 2, EDGE - 8, "push into an absent page")?;
    eq(o.rsp, EDGE, "RSP unchanged")?;
    let o = Ctx::kernel(code64!("mov rsp, rdi", "call rdi")).rdi(EDGE + 4).run();
    page_fault(&o, 2, EDGE - 4, "call across a page")?;
    eq(o.rsp, EDGE + 4, "RSP unchanged")?;
    let o = Ctx::kernel(code64!("mov rsp, rdi", "pop rax")).rdi(EDGE + 4092).rax(9).run();
    page_fault(&o, 0, EDGE + 4096, "pop across a page")?;
    eq(o.rsp, EDGE + 4092, "RSP unchanged")?;
    eq(o.rax, 9, "RAX unchanged")
}

const PCIDE: u64 = 1 << 17;
const NO_FLUSH: u64 = 1 << 63;

fn pcid_two_spaces() -> Verdict {
    if !cpu::has_pcid() {
        skip!("no PCID");
    }
    let (a, b, pa, pb, pc) = (Space::new(), Space::new(), page(), page(), page());
    (wr(pa, 0xa), wr(pb, 0xb), wr(pc, 0xc));
    a.map(WIN, pa, P | W);
    b.map(WIN, pb, P | W);
    cpu::set_cr4(cpu::cr4() | PCIDE);
    cpu::set_cr3(a.root | 1);
    eq(rd(WIN), 0xa, "space A")?;
    cpu::set_cr3(b.root | 2);
    eq(rd(WIN), 0xb, "space B")?;
    for _ in 0..10 {
        cpu::set_cr3(a.root | 1 | NO_FLUSH);
        eq(rd(WIN), 0xa, "space A without a flush")?;
        cpu::set_cr3(b.root | 2 | NO_FLUSH);
        eq(rd(WIN), 0xb, "space B without a flush")?;
    }
    wr(a.entry(WIN, 1), pc | P | W);
    cpu::set_cr3(a.root | 1);
    eq(rd(WIN), 0xc, "a CR3 write without bit 63 drops the PCID's translations")?;
    eq(cpu::cr3(), a.root | 1, "bit 63 reads as zero")
}

fn pcid_code() -> Verdict {
    if !cpu::has_pcid() {
        skip!("no PCID");
    }
    let (a, b, pa, pb) = (Space::new(), Space::new(), page(), page());
    put(pa, &code_returning(0x111));
    put(pb, &code_returning(0x222));
    a.map(WIN, pa, P | W);
    b.map(WIN, pb, P | W);
    cpu::set_cr4(cpu::cr4() | PCIDE);
    cpu::set_cr3(a.root | 1);
    eq(call(WIN), 0x111, "code of A")?;
    cpu::set_cr3(b.root | 2);
    eq(call(WIN), 0x222, "code of B")?;
    for i in 0..6 {
        let (s, want) = if i & 1 == 0 { (a.root | 1, 0x111) } else { (b.root | 2, 0x222) };
        cpu::set_cr3(s | NO_FLUSH);
        eq(call(WIN), want, "code after a switch without flush")?;
    }
    cpu::set_cr3(a.root | 1 | NO_FLUSH);
    put(pa, &code_returning(0x333));
    cpu::cpuid(0, 0);
    eq(call(WIN), 0x333, "code patched through another address")
}

fn pcid_rules() -> Verdict {
    if !cpu::has_pcid() {
        skip!("no PCID");
    }
    let s = Space::active();
    cpu::set_cr3(s.root | 0x18);
    let o = catch(|| cpu::set_cr4(cpu::cr4() | PCIDE));
    fault(&o, GP, 0, "setting CR4.PCIDE with CR3[11:0] not zero")?;
    cpu::set_cr3(s.root);
    let o = catch(|| {
        cpu::set_cr4(cpu::cr4() | PCIDE);
        cpu::set_cr0(cpu::cr0() & !(1 << 31));
    });
    fault(&o, GP, 0, "clearing CR0.PG with PCIDE set")?;
    let o = catch(|| cpu::set_cr3(s.root | NO_FLUSH));
    fault(&o, GP, 0, "bit 63 of CR3 with PCIDE clear")
}

fn invpcid(kind: u64, pcid: u64, va: u64) -> Outcome {
    let d = [pcid, va];
    Ctx::kernel(code64!("invpcid rax, [rdi]")).rax(kind).rdi((&raw const d) as u64).run()
}

fn invpcid_types() -> Verdict {
    if !cpu::has_invpcid() || !cpu::has_pcid() {
        skip!("no INVPCID");
    }
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a, 1), wr(b, 2));
    cpu::set_cr4(cpu::cr4() | PCIDE | 1 << 7);
    cpu::set_cr3(s.root | 5);
    for kind in 0..4 {
        // Type 3 keeps global translations, type 2 does not.
        s.map(WIN, a, P | W | if kind == 2 { G } else { 0 });
        eq(rd(WIN), 1, "before")?;
        wr(s.entry(WIN, 1), b | P | W | if kind == 2 { G } else { 0 });
        done(&invpcid(kind, 5, WIN), "INVPCID")?;
        if rd(WIN) != 2 {
            crate::fail!("INVPCID type {kind} left a stale translation");
        }
    }
    fault(&invpcid(4, 5, WIN), GP, 0, "type 4")?;
    fault(&invpcid(1, 0x1005, WIN), GP, 0, "reserved bits of the descriptor")?;
    fault(&invpcid(0, 5, 1 << 63), GP, 0, "type 0 with a non-canonical address")?;
    let d = [5u64, WIN];
    let o = Ctx::user(code64!("invpcid rax, [rdi]")).rdi((&raw const d) as u64 + ALIAS).run();
    fault(&o, GP, 0, "INVPCID at CPL 3")
}

fn smep() -> Verdict {
    if !cpu::has_smep() {
        skip!("no SMEP");
    }
    let (s, p) = (Space::active(), page());
    put(p, &[0xc3]);
    s.map(WIN, p, P | W | U);
    cpu::set_cr4(cpu::cr4() | 1 << 20);
    page_fault(&jump(WIN), 0x11, WIN, "supervisor fetch from a user page")?;
    done(&load(WIN), "data access is not affected")?;
    s.map(WIN, p, P | W);
    done(&jump(WIN), "supervisor page")?;
    s.map(WIN, p, P | W | U);
    wr(s.entry(WIN, 2), rd(s.entry(WIN, 2)) & !U);
    cpu::invlpg(WIN);
    done(&jump(WIN), "U clear in the page directory makes it a supervisor page")?;
    wr(s.entry(WIN, 2), rd(s.entry(WIN, 2)) | U);
    cpu::invlpg(WIN);
    let o = Ctx::user(code64!("call rdi")).rdi(WIN).run();
    done(&o, "user code runs")?;
    cpu::set_cr4(cpu::cr4() & !(1 << 20));
    done(&jump(WIN), "SMEP clear again")
}

fn smap() -> Verdict {
    if !cpu::has_smap() {
        skip!("no SMAP");
    }
    let s = Space::active();
    s.map(WIN, page(), P | W | U);
    cpu::set_cr4(cpu::cr4() | 1 << 21);
    page_fault(&load(WIN), 1, WIN, "supervisor read of a user page, AC clear")?;
    page_fault(&store(WIN), 3, WIN, "supervisor write")?;
    done(
        &Ctx::kernel(code64!("stac", "mov rbx, [rdi]", "mov [rdi], rbx", "clac")).rdi(WIN).run(),
        "with AC set by STAC",
    )?;
    page_fault(&Ctx::kernel(code64!("stac", "clac", "mov rbx, [rdi]")).rdi(WIN).run(), 1, WIN, "after CLAC")?;
    done(&Ctx::kernel(code64!("mov rbx, [rdi]")).rdi(WIN).flags(1 << 18).run(), "AC set by IRETQ")?;
    done(&user_load(WIN), "user access")?;
    done(&user_store(WIN), "user write")?;
    s.map(WIN, page(), P | W);
    done(&load(WIN), "supervisor page")
}

fn smap_rules() -> Verdict {
    if !cpu::has_smap() {
        skip!("no SMAP");
    }
    fault(&Ctx::user(code64!("stac")).run(), UD, 0, "STAC at CPL 3")?;
    fault(&Ctx::user(code64!("clac")).run(), UD, 0, "CLAC at CPL 3")?;
    let o = Ctx::kernel(code64!("stac", "pushfq", "pop rax", "clac", "pushfq", "pop rbx")).run();
    done(&o, "STAC and CLAC work without CR4.SMAP")?;
    ok(o.rax & 1 << 18 != 0 && o.rbx & 1 << 18 == 0, "AC follows")?;
    // An implicit supervisor access ignores AC: a segment load at CPL 3 from an LDT in a user page.
    let (s, p) = (Space::active(), page());
    wr(p + 8, crate::desc::descriptor(0, 0xfffff, 0xf3, 0xc));
    s.map(WIN, p, P | W | U);
    crate::desc::set_system(crate::desc::FREE, WIN, 0xfff, 0x82);
    let c = code64!("pushfq", "or qword ptr [rsp], 0x40000", "popfq", "mov eax, 0xf", "mov fs, eax");
    unsafe { core::arch::asm!("lldt {:x}", in(reg) crate::desc::FREE) };
    let open = Ctx::user(c).run();
    cpu::set_cr4(cpu::cr4() | 1 << 21);
    let closed = Ctx::user(c).run();
    unsafe { core::arch::asm!("lldt {:x}", in(reg) 0) };
    done(&open, "LDT in a user page, SMAP clear")?;
    page_fault(&closed, 1, WIN + 8, "implicit access to a user page, SMAP set")
}

fn protection_keys() -> Verdict {
    if !cpu::has_pku() {
        skip!("no PKU");
    }
    let s = Space::active();
    s.map(WIN, page(), P | W | U | 3 << 59);
    fault(&Ctx::kernel(code64!("xor ecx, ecx", "rdpkru")).run(), UD, 0, "RDPKRU with CR4.PKE clear")?;
    cpu::set_cr4(cpu::cr4() | 1 << 22);
    let set =
        |v: u64| done(&Ctx::kernel(code64!("xor ecx, ecx", "xor edx, edx", "wrpkru")).rax(v).run(), "WRPKRU");
    set(0)?;
    done(&user_store(WIN), "key 3 open")?;
    set(2 << 6)?;
    done(&user_load(WIN), "write disable: read")?;
    page_fault(&user_store(WIN), 0x27, WIN, "write disable: write")?;
    set(1 << 6)?;
    page_fault(&user_load(WIN), 0x25, WIN, "access disable: read")?;
    page_fault(&load(WIN), 0x21, WIN, "supervisor access to a user page too")?;
    set(0)?;
    done(&user_store(WIN), "open again")
}

fn self_map() -> Verdict {
    // The page table maps itself; a store through the mapping changes the mapping.
    let (s, a, b) = (Space::active(), page(), page());
    (wr(a, 1), wr(b, 2));
    s.map(WIN, a, P | W);
    let table = s.entry(WIN, 1) & !0xfff;
    s.map(WIN + 0x5000, table, P | W);
    eq(rd(WIN), 1, "before")?;
    wr(WIN + 0x5000, b | P | W);
    cpu::invlpg(WIN);
    eq(rd(WIN), 2, "after a store through the self map")?;
    wr(WIN + 0x5000, 0);
    cpu::invlpg(WIN);
    page_fault(&load(WIN), 0, WIN, "unmapped through the self map")
}

fn walk_through_user_table() -> Verdict {
    // Changing a directory entry to another page table, then INVLPG.
    let (s, a, b, t2) = (Space::active(), page(), page(), page());
    (wr(a, 1), wr(b, 2));
    s.map(WIN, a, P | W);
    s.map(WIN + 0x1000, a, P | W);
    (wr(t2, b | P | W), wr(t2 + 8, b | P | W));
    eq(rd(WIN) + rd(WIN + 0x1000), 2, "before")?;
    wr(s.entry(WIN, 2), t2 | P | W | U);
    cpu::invlpg(WIN);
    cpu::invlpg(WIN + 0x1000);
    eq(rd(WIN) + rd(WIN + 0x1000), 4, "after a change of the directory entry")?;
    wr(s.entry(WIN, 3), 0);
    cpu::set_cr3(s.root);
    page_fault(&load(WIN), 0, WIN, "directory gone")
}

fn fetch_sets_accessed() -> Verdict {
    let (s, p) = (Space::active(), page());
    put(p, &[0xc3]);
    s.map(WIN, p, P | W);
    eq(s.pte(WIN) & A, 0, "before")?;
    done(&jump(WIN), "call")?;
    eq(s.pte(WIN) & (A | D), A, "a fetch sets A, not D")
}

fn atomic_on_readonly() -> Verdict {
    let s = Space::active();
    let p = page();
    wr(p, 5);
    s.map(WIN, p, P | U);
    for (c, what) in [
        (code64!("lock cmpxchg [rdi], rcx"), "cmpxchg that fails to compare still writes"),
        (code64!("xchg [rdi], rcx"), "xchg"),
        (code64!("lock bts qword ptr [rdi], 0"), "bts"),
        (code64!("lock cmpxchg8b [rdi]"), "cmpxchg8b"),
    ] {
        let o = Ctx::user(c).rdi(WIN).rax(1).run();
        page_fault(&o, 7, WIN, what)?;
        eq(o.rax, 1, "RAX unchanged")?;
        eq(rd(p), 5, "memory unchanged")?;
    }
    Ok(())
}
