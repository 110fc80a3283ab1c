//! 32-bit paging with 4 MiB pages, and PAE paging, in legacy protected mode.

use crate::harness::{Verdict, eq, ok};
use crate::legacy::*;
use crate::mem::*;
use crate::modes::{ldone, lfault};
use crate::traps::*;
use crate::{code32, cpu, tests};

tests!("paging32":
    plain_4k, error_codes, user_pages, large_4m, large_4m_reserved, pse_clear, accessed_dirty, cross_page, pae_basic, pae_large_nx,
    pae_pdpte_reload, pae_pdpte_reserved, pae_user, cr3_switch, wp_clear,
);

/// Test window: directory slot 512 of 32-bit paging, PDPT slot 2 of PAE.
const VA: u32 = 0x8000_0000;

fn set(table: u64, index: u64, entry: u64) {
    wr32(table + index * 4, entry as u32);
}

/// A page directory that maps the first GiB by 4 MiB supervisor pages, and its page table for the window.
fn directory() -> (u64, u64) {
    let (pd, pt) = (page(), page());
    for i in 0..256 {
        set(pd, i, i << 22 | 0x83);
    }
    set(pd, 512, pt | P | W | U);
    (pd, pt)
}

fn with(mut l: Legacy, pd: u64) -> Legacy {
    l.cr0 |= 0x8001_0000;
    l.cr4 |= 0x10;
    l.cr3 = pd as u32;
    l
}

fn load(pd: u64, va: u32) -> LegacyOutcome {
    let mut l = with(Legacy::kernel(code32!("mov eax, [edi]")), pd);
    l.edi = va;
    l.run()
}

fn store(pd: u64, va: u32, value: u32) -> LegacyOutcome {
    let mut l = with(Legacy::kernel(code32!("mov [edi], ebx")), pd);
    (l.edi, l.ebx) = (va, value);
    l.run()
}

fn fault_at(o: &LegacyOutcome, error: u64, cr2: u32, what: &str) -> Verdict {
    lfault(o, PF, error, what)?;
    eq(o.cr2, u64::from(cr2), what)
}

fn plain_4k() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    wr32(p + 0x10, 0x1234_5678);
    set(pt, 3, p | P | W);
    let o = load(pd, VA + 0x3010);
    ldone(&o, "read")?;
    eq(u64::from(o.eax), 0x1234_5678, "data")?;
    ldone(&store(pd, VA + 0x3014, 77), "write")?;
    eq(u64::from(rd32(p + 0x14)), 77, "written")
}

fn error_codes() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    set(pt, 0, p | P);
    fault_at(&load(pd, VA + 0x1234), 0, VA + 0x1234, "absent page, read")?;
    fault_at(&store(pd, VA + 0x1234, 0), 2, VA + 0x1234, "absent page, write")?;
    fault_at(&load(pd, 0xc000_0000), 0, 0xc000_0000, "absent table")?;
    fault_at(&store(pd, VA, 0), 3, VA, "read-only page, WP set")?;
    let mut l = with(Legacy::user(code32!("mov eax, [edi]")), pd);
    // User code lies in supervisor pages here: the first fetch faults.
    l.edi = VA;
    let eip = l.eip;
    let o = l.run();
    lfault(&o, PF, o.error & 0x10 | 5, "user fetch of a supervisor page")?;
    eq(o.cr2, u64::from(eip), "CR2")
}

/// Maps the snippet's page and the user stack for CPL 3 at their own addresses, 4 KiB pages in slot 0.
fn user_directory(pd: u64) {
    let pt = page();
    for i in 0..1024 {
        set(pt, i, i << 12 | P | W | U);
    }
    set(pd, 0, pt | P | W | U);
}

fn user_pages() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    user_directory(pd);
    set(pt, 0, p | P | W);
    set(pt, 1, p | P | U);
    let user = |c, va| {
        let mut l = with(Legacy::user(c), pd);
        l.edi = va;
        l.run()
    };
    fault_at(&user(code32!("mov eax, [edi]"), VA), 5, VA, "user read of a supervisor page")?;
    fault_at(&user(code32!("mov [edi], eax"), VA), 7, VA, "user write of a supervisor page")?;
    ldone(&user(code32!("mov eax, [edi]"), VA + 0x1000), "user read of a user page")?;
    fault_at(
        &user(code32!("mov [edi], eax"), VA + 0x1000),
        7,
        VA + 0x1000,
        "user write of a read-only page",
    )?;
    fault_at(&user(code32!("mov [edi], eax"), VA + 0x2000), 6, VA + 0x2000, "user write of an absent page")
}

fn large_4m() -> Verdict {
    let (pd, _) = directory();
    set(pd, 513, BIG | 0x83);
    wr32(BIG + 0x3f_fffc, 0xabcd);
    let o = load(pd, VA + 0x7f_fffc);
    ldone(&o, "last word of a 4 MiB page")?;
    eq(u64::from(o.eax), 0xabcd, "data")?;
    set(pd, 513, BIG | 0x81);
    fault_at(&store(pd, VA + 0x40_0000, 0), 3, VA + 0x40_0000, "read-only 4 MiB page")
}

fn large_4m_reserved() -> Verdict {
    let (pd, _) = directory();
    set(pd, 513, BIG | 0x83 | 1 << 21);
    fault_at(&load(pd, VA + 0x40_0000), 9, VA + 0x40_0000, "bit 21 of a 4 MiB entry is reserved")
}

fn pse_clear() -> Verdict {
    // Without CR4.PSE bit 7 of a directory entry is ignored: it names a page table.
    let (pd, pt, low, p) = (page(), page(), page(), page());
    for i in 0..1024 {
        set(low, i, i << 12 | P | W);
    }
    set(pd, 0, low | P | W);
    set(pd, 512, pt | P | W | PS);
    set(pt, 5, p | P | W);
    wr32(p, 0x77);
    let mut l = with(Legacy::kernel(code32!("mov eax, [edi]")), pd);
    l.cr4 &= !0x10;
    l.edi = VA + 0x5000;
    let o = l.run();
    ldone(&o, "PS ignored")?;
    eq(u64::from(o.eax), 0x77, "data")
}

fn accessed_dirty() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    set(pt, 0, p | P | W);
    set(pd, 514, BIG | 0x83);
    ldone(&load(pd, VA), "read")?;
    eq(u64::from(rd32(pt)) & (A | D), A, "A")?;
    eq(u64::from(rd32(pd + 512 * 4)) & A, A, "A of the directory entry")?;
    ldone(&store(pd, VA, 1), "write")?;
    eq(u64::from(rd32(pt)) & (A | D), A | D, "D")?;
    ldone(&store(pd, VA + 0x80_0000, 1), "write to a 4 MiB page")?;
    eq(u64::from(rd32(pd + 514 * 4)) & (A | D), A | D, "A and D of a 4 MiB page")
}

fn cross_page() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    set(pt, 0, p | P | W);
    fault_at(&load(pd, VA + 0xffe), 0, VA + 0x1000, "read across")?;
    fault_at(&store(pd, VA + 0xffd, 0), 2, VA + 0x1000, "write across")
}

fn pae() -> (u64, u64, u64) {
    let (pdpt, pd0, pd2, pt) = (page(), page(), page(), page());
    for i in 0..512 {
        wr(pd0 + i * 8, i << 21 | 0x83);
    }
    wr(pdpt, pd0 | P);
    wr(pdpt + 16, pd2 | P);
    wr(pd2, pt | P | W | U);
    (pdpt, pd2, pt)
}

fn with_pae(mut l: Legacy, pdpt: u64) -> Legacy {
    l.cr0 |= 0x8001_0000;
    l.cr4 |= 0x20;
    l.cr3 = pdpt as u32;
    l
}

fn pae_load(pdpt: u64, va: u32) -> LegacyOutcome {
    let mut l = with_pae(Legacy::kernel(code32!("mov eax, [edi]")), pdpt);
    l.edi = va;
    l.run()
}

fn pae_basic() -> Verdict {
    let ((pdpt, _, pt), p) = (pae(), page());
    wr32(p, 0x4242);
    wr(pt + 8, p | P | W);
    let o = pae_load(pdpt, VA + 0x1000);
    ldone(&o, "read")?;
    eq(u64::from(o.eax), 0x4242, "data")?;
    eq(rd(pt + 8) & (A | D), A, "A")?;
    fault_at(&pae_load(pdpt, VA + 0x2000), 0, VA + 0x2000, "absent page")?;
    fault_at(&pae_load(pdpt, 0x4000_0000), 0, 0x4000_0000, "absent PDPT entry")
}

fn pae_large_nx() -> Verdict {
    let (pdpt, pd2, _) = pae();
    wr(pd2 + 8, BIG | 0x83);
    put(BIG, &[0xc3]);
    let call = || {
        let mut l = with_pae(Legacy::kernel(code32!("call edi")), pdpt);
        l.edi = VA + 0x20_0000;
        l.run()
    };
    ldone(&call(), "call into a 2 MiB page")?;
    if !cpu::has_nx() {
        return Ok(());
    }
    wr(pd2 + 8, BIG | 0x83 | NX);
    fault_at(&call(), 0x11, VA + 0x20_0000, "fetch from a no-execute page")
}

fn pae_pdpte_reload() -> Verdict {
    let ((pdpt, pd2, pt), a, b) = (pae(), page(), page());
    let (other, pt2) = (page(), page());
    (wr32(a, 1), wr32(b, 2));
    wr(pt, a | P | W);
    wr(other, pt2 | P | W);
    wr(pt2, b | P | W);
    let mut l = with_pae(
        Legacy::kernel(code32!(
            "mov eax, [edi]",
            "mov [esi], ebx",
            "mov ecx, cr3",
            "mov cr3, ecx",
            "mov edx, [edi]"
        )),
        pdpt,
    );
    (l.edi, l.esi, l.ebx) = (VA, pdpt as u32 + 16, (other | P) as u32);
    let o = l.run();
    ldone(&o, "PDPTE change")?;
    eq(u64::from(o.eax), 1, "before")?;
    eq(u64::from(o.edx), 2, "MOV to CR3 loads the PDPTEs")?;
    ok(pd2 != 0, "")
}

fn pae_pdpte_reserved() -> Verdict {
    let (pdpt, _, _) = pae();
    let bad = page();
    for i in 0..4 {
        wr(bad + i * 8, rd(pdpt + i * 8));
    }
    wr(bad + 24, 0x1000 | P | W);
    let mut l = with_pae(Legacy::kernel(code32!("mov cr3, ebx")), pdpt);
    l.ebx = bad as u32;
    lfault(&l.run(), GP, 0, "MOV to CR3 with a reserved bit in a present PDPTE")
}

fn pae_user() -> Verdict {
    let ((pdpt, _, pt), p) = (pae(), page());
    let pd0 = rd(pdpt) & ADDR;
    for i in 0..2 {
        wr(pd0 + i * 8, rd(pd0 + i * 8) | U);
    }
    wr(pt, p | P | W);
    wr(pt + 8, p | P | W | U);
    let user = |va| {
        let mut l = with_pae(Legacy::user(code32!("mov [edi], eax")), pdpt);
        l.edi = va;
        l.run()
    };
    fault_at(&user(VA), 7, VA, "user write of a supervisor page")?;
    ldone(&user(VA + 0x1000), "user write of a user page")
}

fn cr3_switch() -> Verdict {
    let ((pd, pt), a, b) = (directory(), page(), page());
    let (pd2, pt2) = directory();
    (wr32(a, 1), wr32(b, 2));
    set(pt, 0, a | P | W);
    set(pt2, 0, b | P | W);
    let mut l = with(
        Legacy::kernel(code32!(
            "mov eax, [edi]",
            "mov cr3, ebx",
            "mov ecx, [edi]",
            "mov cr3, esi",
            "mov edx, [edi]"
        )),
        pd,
    );
    (l.edi, l.ebx, l.esi) = (VA, pd2 as u32, pd as u32);
    let o = l.run();
    ldone(&o, "switch")?;
    ok(o.eax == 1 && o.ecx == 2 && o.edx == 1, "the same address in two spaces")
}

fn wp_clear() -> Verdict {
    let ((pd, pt), p) = (directory(), page());
    set(pt, 0, p | P);
    let mut l = with(Legacy::kernel(code32!("mov [edi], ebx")), pd);
    l.cr0 &= !0x1_0000;
    (l.edi, l.ebx) = (VA, 9);
    ldone(&l.run(), "supervisor write to a read-only page, WP clear")?;
    eq(u64::from(rd32(p)), 9, "written")
}
