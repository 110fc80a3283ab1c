//! Long-mode paging: rights, error codes, accessed and dirty bits, large pages, the TLB's duties.

use crate::harness::{Verdict, clean, done, eq, fault, ok, page_fault};
use crate::mem::*;
use crate::traps::*;
use crate::{code64, cpu, skip, tests};

tests!("paging":
    map_and_read, not_present, write_protect, wp_clear, user_supervisor, user_write, nx_fetch,
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
