//! More than one processor: INIT and SIPI, IPIs, atomics, ordering, TLB shootdown, cross-modifying code.
//!
//! Application processors run [`ap_main`]: halted until an IPI, then the function in their mailbox. Their
//! exceptions and interrupts go through an IDT of their own that counts by vector.

pub mod partner;

use crate::apic::{read, write};
use crate::harness::{Verdict, eq, ok, wait};
use crate::mem::{P, Page, Space, W, WIN, call, code_returning, page, put, rd, rd8, rd32, wr, wr32};
use crate::traps::{EOI_APIC, RESUME, count, set_mode};
use crate::{boot, cpu, desc, skip, tests};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

tests!("smp":
    start_all, apic_ids, run_on_each, ipi_counts, ipi_broadcast, ipi_logical, ipi_back, nmi_to_ap, atomics_contend, spinlock, message_passing,
    store_buffering, no_tearing, tlb_shootdown, unmapped_faults_there, cross_modifying_code, patch_while_running, init_stops, tsc_passes,
    halted_until_ipi, save_restore_running,
);

const MAX: usize = 16;
/// Wakes a processor to look at its mailbox.
const WAKE: u32 = 0xf0;
/// Only counted.
const PING: u32 = 0xf1;
/// INVLPG of SHOOT_VA.
const SHOOT: u32 = 0xf2;

#[unsafe(no_mangle)]
static AP_NEXT: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
static AP_COUNT: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
#[unsafe(no_mangle)]
static AP_FIXUP: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static AP_CR2: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static AP_ERROR: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static AP_SHOOT_VA: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static mut AP_STACKS: [Page; MAX * 2] = [Page::ZERO; MAX * 2];
static mut AP_IST: [Page; MAX] = [Page::ZERO; MAX];
static mut AP_TSSES: [[u32; 28]; MAX] = [[0; 28]; MAX];
#[unsafe(no_mangle)]
static mut AP_IDT: Page = Page::ZERO;
static READY: AtomicU32 = AtomicU32::new(0);
static IDS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static MAIL: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];

global_asm!(
    r#"
.section .text
.code16
.balign 16
.global ap_start, ap_end, ap_stubs
ap_start:
    cli
    xor eax, eax
    mov ds, eax
    .byte 0x66, 0x0f, 0x01, 0x16
    .short 0x8000 + 2f - ap_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long ap_start32
    .short 0x38
.balign 8
2:  .short 0x2ff
    .long GDT
ap_end:
.code32
ap_start32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset BOOT_PML4
    mov cr3, eax
    mov eax, 0x80000001
    cpuid
    mov ebx, edx
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x101
    bt ebx, 20
    jnc 3f
    or eax, 0x800
3:  wrmsr
    mov eax, 0x80010033
    mov cr0, eax
    .byte 0xea
    .long 4f
    .short 0x08
.code64
4:  mov edi, 1
    lock xadd dword ptr [rip + AP_NEXT], edi
    cmp edi, 16
    jae 5f
    lea eax, [rdi + 1]
    shl rax, 13
    lea rsp, [rip + AP_STACKS]
    add rsp, rax
    xor ebp, ebp
    call ap_main
5:  cli
    hlt
    jmp 5b

.balign 16
ap_stubs:
.set vec, 0
.rept 256
    .balign 16
    .if (vec == 8) || (vec >= 10 && vec <= 14) || (vec == 17) || (vec == 21) || (vec == 29) || (vec == 30)
    .else
    .byte 0x6a, 0
    .endif
    .byte 0x68
    .long vec
    jmp ap_common
    .set vec, vec + 1
.endr

ap_common:
    push rax
    push rbx
    mov ebx, [rsp + 16]
    lea rax, [rip + AP_COUNT]
    lock inc dword ptr [rax + rbx*4]
    cmp ebx, 2
    je 4f
    cmp ebx, 0x20
    jae 2f
    mov rax, cr2
    mov [rip + AP_CR2], rax
    mov rax, [rsp + 24]
    mov [rip + AP_ERROR], rax
    mov rax, [rip + AP_FIXUP]
    test rax, rax
    jz 5f
    mov [rsp + 32], rax
    jmp 4f
2:  cmp ebx, 0xf2
    jne 3f
    mov rax, [rip + AP_SHOOT_VA]
    invlpg [rax]
3:  mov eax, 0xfee000b0
    mov dword ptr [rax], 0
4:  pop rbx
    pop rax
    add rsp, 16
    iretq
5:  cli
    hlt
    jmp 5b
"#
);

unsafe extern "C" {
    static ap_start: u8;
    static ap_end: u8;
    static ap_stubs: u8;
}

#[unsafe(no_mangle)]
extern "C" fn ap_main(n: usize) -> ! {
    unsafe {
        let selector = desc::AP_TSS + (n as u16) * 16;
        asm!("ltr {:x}", in(reg) selector);
        asm!("lidt [{}]", in(reg) &raw const AP_IDTR);
    }
    write(0xf0, 0x1ff);
    write(0x80, 0);
    IDS[n].store(read(0x20) >> 24, SeqCst);
    READY.fetch_add(1, SeqCst);
    loop {
        unsafe { asm!("cli") };
        let f = MAIL[n].load(SeqCst);
        if f == 0 {
            unsafe { asm!("sti", "hlt") };
            continue;
        }
        let f: fn(usize) = unsafe { core::mem::transmute(f as *const ()) };
        unsafe { asm!("sti") };
        f(n);
        MAIL[n].store(0, SeqCst);
    }
}

#[repr(C, align(8))]
struct Idtr([u16; 5]);
static mut AP_IDTR: Idtr = Idtr([0; 5]);

fn prepare_tables() {
    unsafe {
        let (start, end) = (&raw const ap_start as u64, &raw const ap_end as u64);
        for i in 0..end - start {
            crate::mem::wr8(0x8000 + i, rd8(start + i));
        }
        let idt = &raw const AP_IDT as u64;
        for v in 0..256u64 {
            let h = &raw const ap_stubs as u64 + v * 16;
            let ist = if v == 2 { 0 } else { 1 };
            wr(
                idt + v * 16,
                h & 0xffff | u64::from(desc::KCS) << 16 | ist << 32 | 0x8e << 40 | (h >> 16 & 0xffff) << 48,
            );
            wr(idt + v * 16 + 8, h >> 32);
        }
        let idtr = &raw const AP_IDTR as u64;
        (idtr as *mut u16).write(4095);
        ((idtr + 2) as *mut u64).write_unaligned(idt);
        for n in 0..MAX {
            let tss = (&raw const AP_TSSES as u64) + (n * 112) as u64;
            let top = (&raw const AP_IST as u64) + ((n + 1) * 4096) as u64;
            ((tss + 0x24) as *mut u64).write_unaligned(top);
            wr32(tss + 0x64, 104 << 16);
            desc::set_system(desc::AP_TSS + (n as u16) * 16, tss, 103, 0x89);
        }
    }
}

fn checksum(at: u64, len: u64) -> bool {
    (0..len).fold(0u8, |s, i| s.wrapping_add(rd8(at + i))) == 0
}

fn find(signature: u64, from: u64, to: u64) -> Option<u64> {
    (from..to).step_by(16).find(|a| rd(*a) == signature && checksum(*a, 20))
}

fn unaligned(at: u64) -> u64 {
    (0..8).fold(0, |v, i| v | u64::from(rd8(at + i)) << (i * 8))
}

/// Processors that the ACPI MADT says are enabled.
fn madt_cpus() -> Option<u32> {
    let hint = boot::rsdp_hint();
    let signature = u64::from_le_bytes(*b"RSD PTR ");
    let rsdp = if hint != 0 && rd(hint) == signature {
        hint
    } else {
        find(signature, 0xe_0000, 0x10_0000).or_else(|| find(signature, 0x9_fc00, 0xa_0000))?
    };
    let (xsdt, wide) = if rd8(rsdp + 15) >= 2 && unaligned(rsdp + 24) != 0 {
        (unaligned(rsdp + 24), true)
    } else {
        (u64::from(rd32(rsdp + 16)), false)
    };
    let size = if wide { 8 } else { 4 };
    let entries = (u64::from(rd32(xsdt + 4)).wrapping_sub(36) / size).min(64);
    for i in 0..entries {
        let at = xsdt + 36 + i * size;
        let table = if wide { unaligned(at) } else { unaligned(at) & 0xffff_ffff };
        if rd32(table) == u32::from_le_bytes(*b"APIC") {
            return Some(count_madt(table));
        }
    }
    None
}

fn count_madt(table: u64) -> u32 {
    let end = table + u64::from(rd32(table + 4)).min(0x1000);
    let (mut at, mut n) = (table + 44, 0);
    while at + 2 <= end && rd8(at + 1) >= 2 {
        let flags = match rd8(at) {
            0 => rd8(at + 4),
            9 => rd8(at + 8),
            _ => 0,
        };
        n += u32::from(flags & 1);
        at += u64::from(rd8(at + 1));
    }
    n
}

/// Processors in the MP table, for machines without ACPI.
fn mp_cpus() -> Option<u32> {
    let fps = (0x9_fc00..0xa_0000u64)
        .chain(0xf_0000..0x10_0000)
        .step_by(16)
        .find(|a| rd32(*a) == u32::from_le_bytes(*b"_MP_") && checksum(*a, 16))?;
    let table = u64::from(rd32(fps + 4));
    let entries = u64::from(rd8(table + 34)) | u64::from(rd8(table + 35)) << 8;
    let (mut at, mut n) = (table + 44, 0);
    for _ in 0..entries {
        if rd8(at) == 0 {
            n += u32::from(rd8(at + 3) & 1);
            at += 20;
        } else {
            at += 8;
        }
    }
    Some(n)
}

fn cpus() -> u32 {
    madt_cpus().or_else(mp_cpus).unwrap_or(1)
}

fn icr(dest: u32, lo: u32) {
    write(0x310, dest << 24);
    write(0x300, lo);
    wait(|| read(0x300) & 0x1000 == 0);
}

static STARTED: AtomicU32 = AtomicU32::new(0);

/// Starts the application processors if they do not run; the number of them.
fn start() -> Result<usize, crate::harness::Stop> {
    let want = cpus().min(MAX as u32 + 1) - 1;
    if want == 0 {
        skip!("one processor");
    }
    if STARTED.load(SeqCst) == 0 {
        boot_aps();
        if !wait(|| READY.load(SeqCst) >= want) {
            crate::fail!("{} of {want} application processors came up", READY.load(SeqCst));
        }
        STARTED.store(1, SeqCst);
    }
    for c in &AP_COUNT {
        c.store(0, SeqCst);
    }
    AP_FIXUP.store(0, SeqCst);
    Ok(want as usize)
}

fn boot_aps() {
    READY.store(0, SeqCst);
    AP_NEXT.store(0, SeqCst);
    for m in &MAIL {
        m.store(0, SeqCst);
    }
    prepare_tables();
    // INIT, then two STARTUPs at 8000H, to all but this one (SDM 3A 9.4.4).
    icr(0, 0xc_4500);
    pause_us(10_000);
    icr(0, 0xc_4608);
    pause_us(200);
    icr(0, 0xc_4608);
}

/// Waits by the PM timer if there is one; bounded in any case.
fn pause_us(us: u32) {
    let a = cpu::inl(0x608);
    let ticks = us * 3 + us / 2;
    for _ in 0..us * 20 {
        let now = cpu::inl(0x608);
        if now != a && now.wrapping_sub(a) & 0xff_ffff >= ticks {
            break;
        }
    }
}

fn id(n: usize) -> u32 {
    IDS[n].load(SeqCst)
}

fn post(n: usize, f: fn(usize)) {
    MAIL[n].store(f as usize as u64, SeqCst);
    icr(id(n), 0x4000 | WAKE);
}

fn join(n: usize) -> Verdict {
    if wait(|| MAIL[n].load(SeqCst) == 0) {
        return Ok(());
    }
    STARTED.store(0, SeqCst);
    crate::fail!("processor {n} does not come back")
}

fn run(n: usize, f: fn(usize)) -> Verdict {
    post(n, f);
    join(n)
}

fn ap_count(vector: u32) -> u32 {
    AP_COUNT[vector as usize].load(SeqCst)
}

static A: AtomicU64 = AtomicU64::new(0);
static B: AtomicU64 = AtomicU64::new(0);
static C: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);

fn clear() {
    A.store(0, SeqCst);
    B.store(0, SeqCst);
    C.store(0, SeqCst);
    STOP.store(0, SeqCst);
}

fn start_all() -> Verdict {
    STARTED.store(0, SeqCst);
    let n = start()?;
    pause_us(1000);
    eq(u64::from(AP_NEXT.load(SeqCst)), n as u64, "as many processors as the tables say")
}

fn apic_ids() -> Verdict {
    let n = start()?;
    for i in 0..n {
        ok(id(i) != read(0x20) >> 24, "not the boot processor's ID")?;
        ok((0..i).all(|j| id(j) != id(i)), "IDs differ")?;
    }
    fn bsp_flag(_: usize) {
        A.fetch_or(cpu::rdmsr(0x1b), SeqCst);
    }
    clear();
    run(0, bsp_flag)?;
    eq(A.load(SeqCst) & 0x900, 0x800, "the BSP flag is clear there")
}

fn run_on_each() -> Verdict {
    let n = start()?;
    clear();
    for i in 0..n {
        run(i, |n| {
            A.fetch_or(1 << n, SeqCst);
        })?;
    }
    eq(A.load(SeqCst), (1 << n) - 1, "every processor ran")
}

fn ipi_counts() -> Verdict {
    start()?;
    for i in 1..=100u32 {
        icr(id(0), 0x4000 | PING);
        ok(wait(|| ap_count(PING) == i), "fixed IPI")?;
    }
    Ok(())
}

fn ipi_broadcast() -> Verdict {
    let n = start()?;
    set_mode(PING as u8, RESUME | EOI_APIC);
    icr(0, 0xc_4000 | PING);
    ok(wait(|| ap_count(PING) == n as u32), "all excluding self")?;
    icr(0, 0x8_4000 | PING);
    unsafe { asm!("sti") };
    let came = wait(|| ap_count(PING) == 2 * n as u32 && count(PING as u8) == 1);
    unsafe { asm!("cli") };
    ok(came, "all including self")
}

fn ipi_logical() -> Verdict {
    start()?;
    fn set_ldr(_: usize) {
        write(0xe0, 0xffff_ffff);
        write(0xd0, 0x4000_0000);
    }
    run(0, set_ldr)?;
    write(0xe0, 0xffff_ffff);
    write(0xd0, 0x0100_0000);
    write(0x310, 0x4000_0000);
    write(0x300, 0x4800 | PING);
    ok(wait(|| ap_count(PING) == 1), "flat logical destination")?;
    set_mode(PING as u8, RESUME | EOI_APIC);
    write(0x310, 0x4100_0000);
    write(0x300, 0x4800 | PING);
    unsafe { asm!("sti") };
    let came = wait(|| ap_count(PING) == 2 && count(PING as u8) == 1);
    unsafe { asm!("cli") };
    ok(came, "a set of two")
}

fn ipi_back() -> Verdict {
    start()?;
    clear();
    set_mode(0x6a, RESUME | EOI_APIC);
    A.store(u64::from(read(0x20) >> 24), SeqCst);
    fn send(_: usize) {
        for _ in 0..10 {
            icr(A.load(SeqCst) as u32, 0x406a);
            wait(|| B.swap(0, SeqCst) == 1);
        }
    }
    post(0, send);
    unsafe { asm!("sti") };
    let mut came = true;
    for i in 1..=10 {
        came &= wait(|| count(0x6a) == i);
        B.store(1, SeqCst);
    }
    unsafe { asm!("cli") };
    join(0)?;
    ok(came, "IPIs from the other processor")
}

fn nmi_to_ap() -> Verdict {
    start()?;
    icr(id(0), 0x4400);
    ok(wait(|| ap_count(2) == 1), "NMI to a halted processor")?;
    fn spin(_: usize) {
        unsafe { asm!("cli") };
        wait(|| STOP.load(SeqCst) != 0);
        unsafe { asm!("sti") };
    }
    clear();
    post(0, spin);
    icr(id(0), 0x4400);
    let came = wait(|| ap_count(2) == 2);
    STOP.store(1, SeqCst);
    join(0)?;
    ok(came, "NMI to a processor with IF clear")
}

const ROUNDS: u64 = 20_000;

fn contend(_: usize) {
    for _ in 0..ROUNDS {
        A.fetch_add(3, SeqCst);
        unsafe { asm!("lock inc qword ptr [{}]", in(reg) B.as_ptr()) };
        let mut v = C.load(SeqCst);
        while let Err(now) = C.compare_exchange(v, v + 1, SeqCst, SeqCst) {
            v = now;
        }
    }
}

fn atomics_contend() -> Verdict {
    let n = start()?;
    clear();
    for i in 0..n {
        post(i, contend);
    }
    contend(0);
    for i in 0..n {
        join(i)?;
    }
    let total = ROUNDS * (n as u64 + 1);
    eq(A.load(SeqCst), 3 * total, "LOCK XADD")?;
    eq(B.load(SeqCst), total, "LOCK INC")?;
    eq(C.load(SeqCst), total, "CMPXCHG")
}

fn locked(_: usize) {
    for _ in 0..5000 {
        while A.swap(1, SeqCst) != 0 {
            core::hint::spin_loop();
        }
        // Not atomic on purpose: the lock protects it.
        wr(B.as_ptr() as u64, rd(B.as_ptr() as u64) + 1);
        unsafe { asm!("mov qword ptr [{}], 0", in(reg) A.as_ptr()) };
    }
}

fn spinlock() -> Verdict {
    let n = start()?;
    clear();
    for i in 0..n {
        post(i, locked);
    }
    locked(0);
    for i in 0..n {
        join(i)?;
    }
    eq(B.load(SeqCst), 5000 * (n as u64 + 1), "XCHG lock with a plain store as unlock")
}

fn message_passing() -> Verdict {
    start()?;
    clear();
    fn producer(_: usize) {
        for i in 1..=20_000u64 {
            wr(A.as_ptr() as u64, i);
            wr(B.as_ptr() as u64, i);
        }
    }
    post(0, producer);
    let mut bad = 0;
    let finished = wait(|| {
        let flag = rd(B.as_ptr() as u64);
        let data = rd(A.as_ptr() as u64);
        bad += u64::from(data < flag);
        flag == 20_000
    });
    join(0)?;
    ok(finished, "the producer's stores become visible")?;
    eq(bad, 0, "stores are seen in order (SDM 3A 9.2.2)")
}

fn store_buffering() -> Verdict {
    start()?;
    clear();
    static X: AtomicU64 = AtomicU64::new(0);
    static Y: AtomicU64 = AtomicU64::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(0);
    static TURN: AtomicU64 = AtomicU64::new(0);
    fn side(mine: &AtomicU64, other: &AtomicU64) -> u64 {
        let v: u64;
        unsafe {
            asm!("mov qword ptr [{m}], 1", "mfence", "mov {v}, [{o}]", m = in(reg) mine.as_ptr(), o = in(reg) other.as_ptr(), v = out(reg) v)
        };
        v
    }
    fn other(_: usize) {
        for i in 1..=2000u64 {
            if !wait(|| TURN.load(SeqCst) == 2 * i - 1) {
                return;
            }
            SEEN.store(side(&Y, &X), SeqCst);
            TURN.store(2 * i, SeqCst);
        }
    }
    TURN.store(0, SeqCst);
    post(0, other);
    let mut both_zero = 0;
    for i in 1..=2000u64 {
        X.store(0, SeqCst);
        Y.store(0, SeqCst);
        TURN.store(2 * i - 1, SeqCst);
        let mine = side(&X, &Y);
        if !wait(|| TURN.load(SeqCst) == 2 * i) {
            break;
        }
        both_zero += u64::from(mine == 0 && SEEN.load(SeqCst) == 0);
    }
    join(0)?;
    eq(both_zero, 0, "MFENCE between store and load: not both see zero")
}

fn no_tearing() -> Verdict {
    start()?;
    clear();
    fn writer(_: usize) {
        let mut v = 0u64;
        while STOP.load(SeqCst) == 0 {
            v = !v;
            wr(A.as_ptr() as u64, v);
        }
    }
    post(0, writer);
    let mut torn = 0;
    let mut changes = 0;
    let mut last = 0;
    for _ in 0..200_000 {
        let v = rd(A.as_ptr() as u64);
        torn += u64::from(v != 0 && v != u64::MAX);
        changes += u64::from(v != last);
        last = v;
    }
    STOP.store(1, SeqCst);
    join(0)?;
    let _ = changes;
    eq(torn, 0, "aligned 64-bit stores are atomic")
}

fn use_space(_: usize) {
    cpu::set_cr3(A.load(SeqCst));
    B.store(rd(WIN), SeqCst);
    C.store(1, SeqCst);
    // Read on, so that the translation stays in use, until told to stop.
    while STOP.load(SeqCst) == 0 {
        B.store(rd(WIN), SeqCst);
    }
    B.store(rd(WIN), SeqCst);
    cpu::set_cr3((&raw const boot::BOOT_PML4) as u64);
}

fn tlb_shootdown() -> Verdict {
    start()?;
    clear();
    let (s, p, q) = (Space::active(), page(), page());
    (wr(p, 1), wr(q, 2));
    s.map(WIN, p, P | W);
    A.store(s.root, SeqCst);
    AP_SHOOT_VA.store(WIN, SeqCst);
    post(0, use_space);
    let up = wait(|| C.load(SeqCst) == 1 && B.load(SeqCst) == 1);
    s.map(WIN, q, P | W);
    icr(id(0), 0x4000 | SHOOT);
    let acked = wait(|| ap_count(SHOOT) == 1);
    let seen = wait(|| B.load(SeqCst) == 2);
    STOP.store(1, SeqCst);
    join(0)?;
    ok(up, "the other processor reads the first page")?;
    ok(acked, "IPI")?;
    ok(seen, "it reads the second page after INVLPG there")
}

fn read_with_fixup(_: usize) {
    cpu::set_cr3(A.load(SeqCst));
    unsafe {
        asm!(
            "lea {t}, [rip + 2f]", "mov [{f}], {t}", "mov {t}, 1", "mov {t}, [{va}]", "mov {t}, 0", "2:", "mov qword ptr [{f}], 0",
            t = out(reg) _, f = in(reg) AP_FIXUP.as_ptr(), va = in(reg) WIN + 0x123
        );
    }
    cpu::set_cr3((&raw const boot::BOOT_PML4) as u64);
}

fn unmapped_faults_there() -> Verdict {
    start()?;
    clear();
    let s = Space::new();
    s.map(WIN + 0x1000, page(), P);
    A.store(s.root, SeqCst);
    cpu::set_cr2(0x55);
    run(0, read_with_fixup)?;
    eq(u64::from(ap_count(14)), 1, "#PF on the other processor")?;
    eq(AP_CR2.load(SeqCst), WIN + 0x123, "its CR2")?;
    eq(AP_ERROR.load(SeqCst), 0, "its error code")?;
    eq(cpu::cr2(), 0x55, "ours is untouched")
}

fn cross_modifying_code() -> Verdict {
    // The handshake of SDM 3A 10.1.3: write, flag; the other waits, serializes, executes.
    start()?;
    clear();
    let p = page();
    put(p, &code_returning(0));
    A.store(p, SeqCst);
    fn executor(_: usize) {
        for i in 1..=300u64 {
            if !wait(|| B.load(SeqCst) == i) {
                return;
            }
            cpu::cpuid(0, 0);
            C.store(call(A.load(SeqCst)), SeqCst);
            B.store(i | 1 << 32, SeqCst);
        }
    }
    post(0, executor);
    let mut bad = 0;
    for i in 1..=300u64 {
        wr32(p + 1, i as u32 * 7);
        B.store(i, SeqCst);
        if !wait(|| B.load(SeqCst) == i | 1 << 32) {
            bad += 1000;
            break;
        }
        bad += u64::from(C.load(SeqCst) != i * 7);
    }
    join(0)?;
    eq(bad, 0, "code patched by another processor")
}

fn patch_while_running() -> Verdict {
    // The other processor runs the code all the time; an aligned immediate changes under it.
    start()?;
    clear();
    let p = page();
    put(p + 3, &code_returning(1));
    A.store(p + 3, SeqCst);
    fn runner(_: usize) {
        while STOP.load(SeqCst) == 0 {
            let v = call(A.load(SeqCst));
            if v != 1 && v != 0x2222_2222 {
                B.store(v, SeqCst);
            }
            C.store(v, SeqCst);
        }
    }
    post(0, runner);
    let first = wait(|| C.load(SeqCst) == 1);
    wr32(p + 4, 0x2222_2222);
    icr(id(0), 0x4000 | PING);
    let acked = wait(|| ap_count(PING) == 1);
    let second = wait(|| C.load(SeqCst) == 0x2222_2222);
    let seen = C.load(SeqCst);
    STOP.store(1, SeqCst);
    join(0)?;
    ok(first && acked, "running")?;
    eq(seen, 0x2222_2222, "code after the patch")?;
    ok(second, "the new code after an interrupt, which serializes")?;
    eq(B.load(SeqCst), 0, "nothing between old and new")
}

fn init_stops() -> Verdict {
    let n = start()?;
    clear();
    fn counter(_: usize) {
        loop {
            A.fetch_add(1, SeqCst);
        }
    }
    post(0, counter);
    let runs = wait(|| A.load(SeqCst) > 1000);
    icr(id(0), 0x4500);
    // INIT takes effect soon, not at once.
    let mut stopped = false;
    for _ in 0..100 {
        let before = A.load(SeqCst);
        pause_us(2000);
        stopped = A.load(SeqCst) == before;
        if stopped {
            break;
        }
    }
    // Start everything again.
    STARTED.store(0, SeqCst);
    let again = start()?;
    ok(runs, "running")?;
    ok(stopped, "INIT stops a processor")?;
    eq(again as u64, n as u64, "SIPI starts it again")
}

fn tsc_passes() -> Verdict {
    start()?;
    clear();
    run(0, |_| {
        let a = cpu::rdtsc();
        let b = cpu::rdtsc();
        A.store(u64::from(b >= a), SeqCst);
    })?;
    eq(A.load(SeqCst), 1, "RDTSC does not go backwards there")
}

fn halted_until_ipi() -> Verdict {
    start()?;
    clear();
    // Between two wake-ups nothing runs there.
    for i in 1..=50u64 {
        run(0, |_| {
            A.fetch_add(1, SeqCst);
        })?;
        eq(A.load(SeqCst), i, "one run a wake-up")?;
    }
    Ok(())
}

fn save_restore_running() -> Verdict {
    crate::snapshot::usable()?;
    start()?;
    clear();
    // One processor counts in a register while the other asks for the save; both go on.
    fn counter(_: usize) {
        let mut n = 0u64;
        while STOP.load(SeqCst) == 0 {
            n += 1;
            B.store(u64::from(A.swap(n, SeqCst) != n - 1) | B.load(SeqCst), SeqCst);
        }
    }
    post(0, counter);
    let before = wait(|| A.load(SeqCst) > 100);
    crate::snapshot::mark();
    let a = A.load(SeqCst);
    let after = wait(|| A.load(SeqCst) > a + 100);
    STOP.store(1, SeqCst);
    join(0)?;
    ok(before && after, "the other processor runs before and after")?;
    eq(B.load(SeqCst), 0, "its register and memory agree all the time")?;
    crate::snapshot::mark();
    clear();
    run(0, |_| A.store(7, SeqCst))?;
    eq(A.load(SeqCst), 7, "a processor halted at the save wakes by an IPI")
}
