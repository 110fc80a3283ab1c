//! Interrupts: PIC and PIT, local APIC and its timers, IO-APIC, NMI, HLT, and the clocks.

use crate::apic::{self, io_read, io_route, pit, read, virtual_wire, write};
use crate::harness::{Verdict, clean, done, eq, fault, ok, wait};
use crate::mem::{BIG, rd, rd32, wr32};
use crate::traps::*;
use crate::{code64, cpu, skip, tests};
use core::arch::asm;

tests!("irq":
    pit_by_pic, if_masks, sti_shadow, popf_delivers_at_once, self_ipi, irr_and_isr, priority_order, tpr_masks, cr8_masks, in_service_blocks,
    timer_one_shot, timer_periodic, timer_count_runs, timer_masked, tsc_deadline, apic_registers, apic_software_disable, x2apic_mode,
    x2apic_rules, x2apic_transitions, nmi_self, nmi_blocked_until_iret, ioapic_registers, ioapic_pit, ioapic_masked, ioapic_level, serial_by_pic,
    rtc_by_slave_pic, hlt_wakes, rep_interrupted, scan_interrupted, user_interrupted, hpet_counts, hpet_timer, rtc_time, pm_timer, pit_counts, pit_channel_2,
    pic_mask_registers, pic_in_service, pic_level_and_edge, interrupt_clears_if_only, rtc_update_interrupt,
);

fn open_window() {
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Waits with interrupts on.
fn wait_on(condition: impl FnMut() -> bool) -> bool {
    unsafe { asm!("sti") };
    let r = wait(condition);
    unsafe { asm!("cli") };
    r
}

fn unmask(irq: u8) {
    if irq < 8 {
        cpu::outb(0x21, !(1 << irq));
    } else {
        cpu::outb(0x21, !4);
        cpu::outb(0xa1, !(1 << (irq - 8)));
    }
}

fn pic_irr() -> u8 {
    cpu::outb(0x20, 0x0a);
    cpu::inb(0x20)
}

fn pit_by_pic() -> Verdict {
    set_mode(0x20, RESUME | EOI_PIC);
    virtual_wire(true);
    pit(1193, false);
    unmask(0);
    ok(wait_on(|| count(0x20) >= 5), "IRQ 0 comes through the PIC again and again")
}

fn if_masks() -> Verdict {
    set_mode(0x20, RESUME | EOI_PIC);
    virtual_wire(true);
    pit(1193, true);
    cpu::outb(0x21, 0xfe);
    ok(wait(|| pic_irr() & 1 != 0), "IRQ 0 pending in the PIC")?;
    eq(u64::from(count(0x20)), 0, "nothing is delivered with IF clear")?;
    ok(wait_on(|| count(0x20) != 0), "delivered with IF set")
}

/// Asks the local APIC for an interrupt of this processor.
fn ipi_self(vector: u8) {
    write(0x310, read(0x20));
    write(0x300, 0x4_4000 | u32::from(vector));
    wait(|| read(0x300) & 0x1000 == 0);
}

fn pending(vector: u8) -> bool {
    read(0x200 + u64::from(vector >> 5) * 0x10) >> (vector & 31) & 1 != 0
}

fn in_service(vector: u8) -> bool {
    read(0x100 + u64::from(vector >> 5) * 0x10) >> (vector & 31) & 1 != 0
}

fn sti_shadow() -> Verdict {
    set_mode(0x60, RESUME | EOI_APIC);
    ipi_self(0x60);
    done(&Ctx::kernel(code64!("sti", "cli", "nop", "nop")).run(), "code")?;
    eq(u64::from(count(0x60)), 0, "no interrupt between STI and the next instruction")?;
    let c = code64!("sti", "inc eax", "inc eax", "cli");
    done(&Ctx::kernel(c).run(), "code")?;
    eq(u64::from(count(0x60)), 1, "delivered")?;
    eq(log(0).rip, c.start + 3, "after the instruction that follows STI")
}

fn popf_delivers_at_once() -> Verdict {
    set_mode(0x60, RESUME | EOI_APIC);
    ipi_self(0x60);
    ok(wait(|| pending(0x60)), "pending")?;
    let c = code64!("push 0x202", "popfq", "nop", "nop", "cli");
    done(&Ctx::kernel(c).run(), "code")?;
    eq(u64::from(count(0x60)), 1, "delivered")?;
    eq(log(0).rip, c.start + 6, "POPF has no shadow")
}

fn self_ipi() -> Verdict {
    set_mode(0x61, RESUME | EOI_APIC);
    for i in 1..=10u32 {
        ipi_self(0x61);
        open_window();
        ok(wait_on(|| count(0x61) == i), "self-IPI")?;
    }
    ok(!in_service(0x61) && !pending(0x61), "nothing left after EOI")
}

fn irr_and_isr() -> Verdict {
    set_mode(0x62, RESUME);
    ipi_self(0x62);
    ok(wait(|| pending(0x62)), "IRR set while IF is clear")?;
    ok(!in_service(0x62), "ISR clear")?;
    open_window();
    ok(in_service(0x62) && !pending(0x62), "ISR set, IRR clear after delivery")?;
    eq(u64::from(read(0xa0)), 0x60, "PPR is the class in service")?;
    write(0xb0, 0);
    ok(!in_service(0x62), "EOI clears ISR")?;
    eq(u64::from(read(0xa0)), 0, "PPR")
}

fn priority_order() -> Verdict {
    for v in [0x51, 0x61, 0x71, 0x72] {
        set_mode(v, RESUME | EOI_APIC);
        ipi_self(v);
    }
    ok(wait(|| pending(0x51) && pending(0x72)), "pending")?;
    ok(wait_on(|| logged() == 4), "all delivered")?;
    for (i, v) in [0x72, 0x71, 0x61, 0x51].into_iter().enumerate() {
        eq(log(i).vector, v, "highest vector first")?;
    }
    Ok(())
}

fn tpr_masks() -> Verdict {
    for v in [0x61, 0x71, 0x81] {
        set_mode(v, RESUME | EOI_APIC);
    }
    write(0x80, 0x70);
    for v in [0x61, 0x71, 0x81] {
        ipi_self(v);
    }
    ok(wait_on(|| count(0x81) == 1), "a class above the TPR is delivered")?;
    open_window();
    ok(count(0x61) == 0 && count(0x71) == 0, "classes at and below the TPR wait")?;
    write(0x80, 0x60);
    ok(wait_on(|| count(0x71) == 1), "TPR lowered by one class")?;
    eq(u64::from(count(0x61)), 0, "61H waits")?;
    write(0x80, 0);
    ok(wait_on(|| count(0x61) == 1), "TPR zero")
}

fn cr8_masks() -> Verdict {
    set_mode(0x61, RESUME | EOI_APIC);
    cpu::set_cr8(6);
    ipi_self(0x61);
    ok(wait(|| pending(0x61)), "pending")?;
    open_window();
    eq(u64::from(count(0x61)), 0, "CR8 = 6 holds back 61H")?;
    let c = code64!("sti", "nop", "xor eax, eax", "mov cr8, rax", "nop", "nop", "cli");
    done(&Ctx::kernel(c).run(), "code")?;
    ok(wait_on(|| count(0x61) == 1), "MOV to CR8 lets it through")
}

fn in_service_blocks() -> Verdict {
    set_mode(0x62, RESUME);
    set_mode(0x61, RESUME | EOI_APIC);
    set_mode(0x72, RESUME | EOI_APIC);
    ipi_self(0x62);
    ok(wait_on(|| count(0x62) == 1), "62H in service")?;
    ipi_self(0x61);
    ipi_self(0x72);
    ok(wait_on(|| count(0x72) == 1), "a higher class interrupts")?;
    open_window();
    eq(u64::from(count(0x61)), 0, "the same class waits for EOI")?;
    ok(in_service(0x62), "the EOI of 72H did not touch 62H")?;
    write(0xb0, 0);
    ok(wait_on(|| count(0x61) == 1), "after EOI")
}

fn timer(lvt: u32, initial: u32) {
    write(0x3e0, 0xb);
    write(0x320, lvt);
    write(0x380, initial);
}

fn timer_one_shot() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    timer(0x63, 100_000);
    ok(wait_on(|| count(0x63) == 1), "the timer fires")?;
    eq(u64::from(read(0x390)), 0, "the count stays at zero")?;
    for _ in 0..1000 {
        open_window();
    }
    eq(u64::from(count(0x63)), 1, "once")
}

fn timer_periodic() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    timer(0x2_0063, 100_000);
    ok(wait_on(|| count(0x63) >= 5), "the timer fires again and again")?;
    write(0x380, 0);
    open_window();
    let n = count(0x63);
    for _ in 0..100_000 {
        open_window();
    }
    eq(u64::from(count(0x63)), u64::from(n), "an initial count of zero stops it")
}

fn timer_count_runs() -> Verdict {
    timer(0x1_0063, 0xffff_ffff);
    let a = read(0x390);
    ok(wait(|| read(0x390) < a), "the current count goes down")?;
    eq(u64::from(read(0x380)), 0xffff_ffff, "the initial count stays")
}

fn timer_masked() -> Verdict {
    timer(0x1_0063, 1000);
    ok(wait(|| read(0x390) == 0), "a masked timer counts to zero")?;
    ok(!pending(0x63), "but raises nothing")
}

fn tsc_deadline() -> Verdict {
    if !cpu::has_tsc_deadline() {
        skip!("no TSC deadline");
    }
    set_mode(0x64, RESUME | EOI_APIC);
    write(0x320, 0x4_0064);
    unsafe { asm!("mfence") };
    cpu::wrmsr(0x6e0, cpu::rdtsc() + 1_000_000);
    ok(cpu::rdmsr(0x6e0) != 0 || count(0x64) != 0 || pending(0x64), "armed")?;
    ok(wait_on(|| count(0x64) == 1), "the deadline interrupts")?;
    eq(cpu::rdmsr(0x6e0), 0, "the MSR reads zero after it fired")?;
    cpu::wrmsr(0x6e0, 1);
    ok(wait_on(|| count(0x64) == 2), "a deadline in the past fires at once")?;
    cpu::wrmsr(0x6e0, u64::MAX);
    cpu::wrmsr(0x6e0, 0);
    open_window();
    eq(u64::from(count(0x64)), 2, "zero disarms")?;
    timer(0x4_0064, 1000);
    eq(u64::from(read(0x390)), 0, "the count register is not used in this mode")
}

fn apic_registers() -> Verdict {
    let v = read(0x30);
    ok((0x10..=0x1f).contains(&(v & 0xff)), "version of an integrated APIC")?;
    ok(v >> 16 & 0xff >= 3, "LVT entries")?;
    write(0xe0, 0xffff_ffff);
    write(0xd0, 0x0100_0000);
    eq(u64::from(read(0xd0)), 0x0100_0000, "LDR")?;
    eq(u64::from(read(0xe0)), 0xffff_ffff, "DFR")?;
    write(0x310, 0x0700_0000);
    eq(u64::from(read(0x310)), 0x0700_0000, "ICR high")?;
    for d in [0u32, 1, 2, 3, 8, 9, 0xa, 0xb] {
        write(0x3e0, d);
        eq(u64::from(read(0x3e0)), u64::from(d), "divide configuration")?;
    }
    Ok(())
}

fn apic_software_disable() -> Verdict {
    write(0x320, 0x2_0063);
    write(0xf0, 0xff);
    eq(u64::from(read(0x320) & 0x1_0000), 0x1_0000, "software disable masks the LVT")?;
    write(0xf0, 0x1ff);
    eq(u64::from(read(0x320) & 0x1_0000), 0x1_0000, "still masked after enabling")?;
    write(0x320, 0x63);
    eq(u64::from(read(0x320) & 0x1_00ff), 0x63, "can be unmasked again")
}

fn enter_x2apic() -> bool {
    if !cpu::has_x2apic() {
        return false;
    }
    cpu::wrmsr(apic::APIC_BASE, cpu::rdmsr(apic::APIC_BASE) | 0xc00);
    true
}

fn x2apic_mode() -> Verdict {
    let id = read(0x20) >> 24;
    if !enter_x2apic() {
        skip!("no x2APIC");
    }
    eq(cpu::rdmsr(0x802), u64::from(id), "ID")?;
    let ldr = cpu::rdmsr(0x80d);
    eq(ldr, u64::from(id >> 4 << 16 | 1 << (id & 15)), "LDR is derived from the ID")?;
    set_mode(0x65, RESUME | EOI_X2APIC);
    cpu::wrmsr(0x83f, 0x65);
    ok(wait_on(|| count(0x65) == 1), "SELF IPI register")?;
    cpu::wrmsr(0x830, u64::from(id) << 32 | 0x4065);
    ok(wait_on(|| count(0x65) == 2), "64-bit ICR")?;
    cpu::wrmsr(0x808, 0x70);
    eq(cpu::cr8(), 7, "TPR and CR8")?;
    cpu::wrmsr(0x808, 0);
    cpu::wrmsr(0x83e, 0xb);
    cpu::wrmsr(0x832, 0x65);
    cpu::wrmsr(0x838, 10_000);
    ok(wait_on(|| count(0x65) == 3), "timer in x2APIC mode")
}

fn x2apic_rules() -> Verdict {
    if !enter_x2apic() {
        skip!("no x2APIC");
    }
    fault(&catch(|| cpu::wrmsr(0x80b, 1)), GP, 0, "EOI with a value")?;
    fault(&catch(|| cpu::wrmsr(0x802, 0)), GP, 0, "ID is read-only")?;
    fault(&catch(|| cpu::wrmsr(0x80d, 0)), GP, 0, "LDR is read-only")?;
    let mut v = 0;
    fault(&catch(|| v = cpu::rdmsr(0x80e)), GP, 0, "there is no DFR")?;
    fault(&catch(|| v += cpu::rdmsr(0x80b)), GP, 0, "EOI is write-only")?;
    fault(&catch(|| v += cpu::rdmsr(0x83f)), GP, 0, "SELF IPI is write-only")?;
    fault(&catch(|| v += cpu::rdmsr(0x831)), GP, 0, "there is no ICR high")?;
    fault(&catch(|| cpu::wrmsr(0x808, 0x100)), GP, 0, "reserved bits of TPR")?;
    fault(&catch(|| cpu::wrmsr(0x832, 1 << 32)), GP, 0, "upper half of a 32-bit register")?;
    eq(v, 0, "")
}

fn x2apic_transitions() -> Verdict {
    if !cpu::has_x2apic() {
        skip!("no x2APIC");
    }
    let base = cpu::rdmsr(apic::APIC_BASE);
    let mut v = 0;
    fault(&catch(|| v = cpu::rdmsr(0x802)), GP, 0, "x2APIC MSRs in xAPIC mode")?;
    fault(&catch(|| cpu::wrmsr(apic::APIC_BASE, base & !0x800 | 0x400)), GP, 0, "EXTD without EN")?;
    enter_x2apic();
    fault(&catch(|| cpu::wrmsr(apic::APIC_BASE, base)), GP, 0, "x2APIC to xAPIC directly")?;
    clean(&catch(|| cpu::wrmsr(apic::APIC_BASE, base & !0xc00)), "to disabled")?;
    eq(u64::from(cpu::cpuid(1, 0).d >> 9 & 1), 0, "CPUID shows no APIC when it is disabled")?;
    fault(&catch(|| cpu::wrmsr(apic::APIC_BASE, base | 0xc00)), GP, 0, "disabled to x2APIC directly")?;
    clean(&catch(|| cpu::wrmsr(apic::APIC_BASE, base)), "to xAPIC")?;
    eq(u64::from(cpu::cpuid(1, 0).d >> 9 & 1), 1, "CPUID shows it again")?;
    eq(v, 0, "")
}

fn send_nmi() {
    write(0x310, read(0x20));
    write(0x300, 0x4400);
    wait(|| read(0x300) & 0x1000 == 0);
}

fn nmi_self() -> Verdict {
    set_mode(2, RESUME);
    send_nmi();
    ok(wait(|| count(2) == 1), "an NMI comes with IF clear")?;
    write(0x80, 0xff);
    send_nmi();
    ok(wait(|| count(2) == 2), "and whatever the TPR says")
}

fn nmi_blocked_until_iret() -> Verdict {
    // The handler sends a second NMI and goes on for a while; R8 counts entries, R9 the depth, R10 its maximum.
    let h = code64!(
        "inc r8",
        "inc r9",
        "cmp r9, r10",
        "jbe 2f",
        "mov r10, r9",
        "2: cmp r8, 1",
        "jne 4f",
        "mov eax, 0xfee00000",
        "mov ecx, [rax + 0x20]",
        "mov [rax + 0x310], ecx",
        "mov dword ptr [rax + 0x300], 0x4400",
        "mov ecx, 20000",
        "3: pause",
        "loop 3b",
        "mov r11, r8",
        "4: dec r9",
        "iretq"
    );
    crate::desc::set_gate(2, h.start, crate::desc::KCS, 2, 0x8e);
    let c = code64!(
        "xor r8d, r8d",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "xor r11d, r11d",
        "mov eax, 0xfee00000",
        "mov ecx, [rax + 0x20]",
        "mov [rax + 0x310], ecx",
        "mov dword ptr [rax + 0x300], 0x4400",
        "mov ecx, 10000000",
        "5: pause",
        "cmp r8, 2",
        "je 6f",
        "loop 5b",
        "6: nop"
    );
    let o = Ctx::kernel(c).run();
    done(&o, "code")?;
    eq(o.r11, 1, "no second NMI before IRET")?;
    eq(o.r8, 2, "delivered after IRET")?;
    eq(o.r10, 1, "never nested")
}

fn ioapic_registers() -> Verdict {
    let v = io_read(1);
    ok(v & 0xff >= 0x11, "version")?;
    ok(v >> 16 & 0xff >= 23, "at least 24 pins")?;
    io_route(5, 0x1_a955, 0x0300_0000);
    eq(u64::from(io_read(0x1a) & 0x1_afff), 0x1_a955, "low half reads back")?;
    eq(u64::from(io_read(0x1b) >> 24), 3, "destination reads back")?;
    io_route(5, 0x1_0000, 0);
    Ok(())
}

fn route_pit(vector: u32) {
    let id = read(0x20) & 0xff00_0000;
    // IRQ 0 is pin 2 on PCs (the MADT's override), pin 0 on some.
    io_route(2, vector, id);
    io_route(0, vector, id);
}

fn ioapic_pit() -> Verdict {
    set_mode(0x66, RESUME | EOI_APIC);
    route_pit(0x66);
    pit(1193, false);
    ok(wait_on(|| count(0x66) >= 3), "the PIT through the IO-APIC")
}

fn ioapic_masked() -> Verdict {
    set_mode(0x66, RESUME | EOI_APIC);
    route_pit(0x1_0066);
    pit(1193, false);
    cpu::outb(0x21, 0xfe);
    ok(wait(|| pic_irr() & 1 != 0), "the PIT ticks")?;
    open_window();
    eq(u64::from(count(0x66)), 0, "a masked pin delivers nothing")
}

/// Makes COM1 raise (or drop) its interrupt line: transmitter empty.
fn serial_interrupt(on: bool) {
    cpu::outb(0x3fc, if on { 0x0b } else { 0x03 });
    cpu::outb(0x3f9, if on { 2 } else { 0 });
    if !on {
        cpu::inb(0x3fa);
    }
}

fn serial_idle() {
    wait(|| cpu::inb(0x3fd) & 0x40 != 0);
}

fn ioapic_level() -> Verdict {
    serial_idle();
    set_mode(0x67, RESUME);
    io_route(4, 0x8067, read(0x20) & 0xff00_0000);
    serial_interrupt(true);
    let came = wait_on(|| count(0x67) == 1);
    let remote = io_read(0x18) & 0x4000;
    // EOI while the line is still high: the interrupt comes again.
    write(0xb0, 0);
    let again = wait(|| pending(0x67));
    serial_interrupt(false);
    open_window();
    let n = count(0x67);
    write(0xb0, 0);
    let after = io_read(0x18) & 0x4000;
    io_route(4, 0x1_0000, 0);
    ok(came, "a level interrupt comes")?;
    eq(u64::from(remote), 0x4000, "remote IRR is set until EOI")?;
    ok(again, "EOI with the line high delivers again")?;
    eq(u64::from(n), 2, "twice")?;
    eq(u64::from(after), 0, "remote IRR clear in the end")
}

fn serial_by_pic() -> Verdict {
    serial_idle();
    set_mode(0x24, RESUME | EOI_PIC);
    virtual_wire(true);
    unmask(4);
    serial_interrupt(true);
    let came = wait_on(|| count(0x24) >= 1);
    let iir = cpu::inb(0x3fa);
    serial_interrupt(false);
    ok(came, "IRQ 4")?;
    ok(iir & 0xf == 2 || iir & 0xf == 1, "IIR says transmitter empty")
}

fn cmos(reg: u8) -> u8 {
    cpu::outb(0x70, reg);
    cpu::inb(0x71)
}

fn cmos_write(reg: u8, v: u8) {
    cpu::outb(0x70, reg);
    cpu::outb(0x71, v);
}

fn rtc_by_slave_pic() -> Verdict {
    set_mode(0x28, RESUME | EOI_PIC2);
    virtual_wire(true);
    let (a, b) = (cmos(10), cmos(11));
    cmos_write(10, a & 0xf0 | 6);
    cmos_write(11, b | 0x40);
    cmos(12);
    unmask(8);
    let mut came = true;
    for i in 1..=3 {
        came &= wait_on(|| count(0x28) >= i);
        cmos(12);
    }
    cmos_write(11, b & 0x7f);
    cmos_write(10, a & 0x7f);
    cmos(12);
    ok(came, "the RTC's periodic interrupt through the slave PIC, armed again by reading register C")
}

fn rtc_update_interrupt() -> Verdict {
    let b = cmos(11);
    cmos(12);
    let came = wait(|| cmos(12) & 0x10 != 0);
    let _ = b;
    ok(came, "the update-ended flag comes once a second")
}

fn hlt_wakes() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    for i in 1..=5u64 {
        timer(0x63, 50_000);
        let c = code64!("sti", "hlt", "cli", "inc rax");
        let o = Ctx::kernel(c).run();
        done(&o, "HLT")?;
        eq(u64::from(count(0x63)), i, "the timer ended HLT")?;
        eq(log(i as usize - 1).rip, c.start + 2, "RIP is after HLT")?;
    }
    Ok(())
}

fn rep_interrupted() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    let (src, dst) = (BIG, BIG + 0x20_0000);
    for i in 0..0x4_0000u64 {
        crate::mem::wr(src + i * 8, i * 0x0101_0101);
    }
    let mut inside = 0;
    // How long the copy takes is the engine's and the host's business: the timer comes sooner and sooner,
    // and on a busy host it may be a while until it comes at all.
    for period in [20_000u32, 50_000, 5_000, 100_000, 2_000, 10_000, 1_000, 500].into_iter().cycle().take(1024) {
        timer(0x2_0063, period);
        let c = code64!("sti", "nop", "rep movsb", "cli");
        let o = Ctx::kernel(c).rsi(src).rdi(dst).rcx(0x20_0000).run();
        write(0x380, 0);
        open_window();
        done(&o, "REP MOVSB")?;
        ok(o.rcx == 0 && o.rsi == src + 0x20_0000 && o.rdi == dst + 0x20_0000, "state at the end")?;
        inside += (0..logged().min(64)).filter(|i| log(*i).rip == c.start + 2 && log(*i).rcx != 0).count();
        if inside != 0 {
            break;
        }
    }
    for i in (0..0x4_0000u64).step_by(97) {
        eq(rd(dst + i * 8), i * 0x0101_0101, "copied right")?;
    }
    if inside == 0 {
        crate::fail!(
            "{} interrupts, none inside REP MOVSB; last at {:#x} RCX {:#x}",
            logged(),
            log(logged().saturating_sub(1)).rip,
            log(logged().saturating_sub(1)).rcx
        );
    }
    ok(inside != 0, "an interrupt comes inside REP MOVSB, with RCX telling how far it got")
}

fn scan_interrupted() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    unsafe { core::ptr::with_exposed_provenance_mut::<u8>(BIG as usize).write_bytes(0, 0x20_0000) };
    let mut inside = 0;
    for period in [20_000u32, 50_000, 5_000, 100_000, 2_000, 10_000, 1_000, 500].into_iter().cycle().take(128) {
        timer(0x2_0063, period);
        let c = code64!("sti", "nop", "repne scasb", "pushfq", "cli", "pop rdx");
        let o = Ctx::kernel(c).rax(1).rdi(BIG).rcx(0x20_0000).run();
        write(0x380, 0);
        open_window();
        done(&o, "REPNE SCASB")?;
        ok(o.rcx == 0 && o.rdi == BIG + 0x20_0000, "state at the end")?;
        eq(o.rdx & 0x40, 0, "ZF")?;
        inside += (0..logged().min(64)).filter(|i| log(*i).rip == c.start + 2 && log(*i).rcx != 0).count();
        if inside != 0 {
            break;
        }
    }
    ok(inside != 0, "an interrupt comes inside REPNE SCASB, with RCX telling how far it got")
}

fn user_interrupted() -> Verdict {
    set_mode(0x63, RESUME | EOI_APIC);
    timer(0x2_0063, 50_000);
    let c = code64!(
        "mov ecx, 3000000",
        "xor eax, eax",
        "2: inc eax",
        "mov rdx, rax",
        "push rdx",
        "pop rbx",
        "cmp rbx, rax",
        "jne 3f",
        "loop 2b",
        "3: nop"
    );
    let o = Ctx::user(c).flags(0x200).run();
    write(0x380, 0);
    done(&o, "user loop")?;
    eq(o.rax, 3_000_000, "not disturbed")?;
    ok(count(0x63) > 0, "by timer interrupts")
}

const HPET: u64 = 0xfed0_0000;

fn hpet_present() -> bool {
    let id = rd32(HPET);
    id != 0xffff_ffff && id != 0
}

fn hpet_counts() -> Verdict {
    if !hpet_present() {
        skip!("no HPET");
    }
    let period = rd32(HPET + 4);
    ok(period > 0 && period <= 100_000_000, "period in femtoseconds")?;
    wr32(HPET + 0x10, 0);
    let a = rd(HPET + 0xf0);
    eq(rd(HPET + 0xf0), a, "a stopped counter stands still")?;
    wr32(HPET + 0x10, 1);
    ok(wait(|| rd(HPET + 0xf0) > a + 1000), "a running counter counts")?;
    wr32(HPET + 0x10, 0);
    crate::mem::wr(HPET + 0xf0, 0x1234);
    eq(rd(HPET + 0xf0), 0x1234, "it can be written while stopped")
}

fn hpet_timer() -> Verdict {
    if !hpet_present() {
        skip!("no HPET");
    }
    let routes = rd32(HPET + 0x104);
    if routes == 0 {
        skip!("no route to the IO-APIC");
    }
    let pin = 31 - routes.leading_zeros();
    set_mode(0x69, RESUME | EOI_APIC);
    io_route(pin, 0x69, read(0x20) & 0xff00_0000);
    wr32(HPET + 0x10, 0);
    crate::mem::wr(HPET + 0xf0, 0);
    wr32(HPET + 0x100, 0x4 | pin << 9);
    crate::mem::wr(HPET + 0x108, 20_000);
    wr32(HPET + 0x10, 1);
    let came = wait_on(|| count(0x69) == 1);
    wr32(HPET + 0x100, 0);
    wr32(HPET + 0x10, 0);
    io_route(pin, 0x1_0000, 0);
    ok(came, "timer 0 in one-shot mode")
}

fn rtc_time() -> Verdict {
    ok(cmos(13) & 0x80 != 0, "register D: the time is valid")?;
    let b = cmos(11);
    ok(b & 2 != 0, "24-hour mode")?;
    ok(wait(|| cmos(10) & 0x80 == 0), "no update in progress")?;
    let value = |r: u8| {
        let v = cmos(r);
        if b & 4 == 0 { v / 16 * 10 + (v & 15) } else { v }
    };
    ok(value(0) < 60 && value(2) < 60 && value(4) < 24, "time of day")?;
    ok((1..=31).contains(&value(7)) && (1..=12).contains(&value(8)), "date")?;
    let s = value(0);
    ok(wait(|| value(0) != s), "seconds advance")
}

fn pm_timer() -> Verdict {
    let a = cpu::inl(0x608);
    if a == 0xffff_ffff {
        skip!("no PM timer at 608H");
    }
    ok(wait(|| cpu::inl(0x608).wrapping_sub(a) & 0xff_ffff > 100), "the ACPI timer counts")
}

fn pit_count(channel: u8) -> u16 {
    cpu::outb(0x43, channel << 6);
    let lo = cpu::inb(0x40 + u16::from(channel));
    u16::from(cpu::inb(0x40 + u16::from(channel))) << 8 | u16::from(lo)
}

fn pit_counts() -> Verdict {
    pit(0, false);
    let a = pit_count(0);
    ok(wait(|| pit_count(0) != a), "the count changes")?;
    cpu::outb(0x43, 0xe2);
    let status = cpu::inb(0x40);
    eq(u64::from(status & 0x3f), 0x34, "read-back of the status shows the mode")
}

fn pit_channel_2() -> Verdict {
    cpu::outb(0x61, cpu::inb(0x61) & !3);
    cpu::outb(0x43, 0xb0);
    cpu::outb(0x42, 0x00);
    cpu::outb(0x42, 0x08);
    ok(cpu::inb(0x61) & 0x20 == 0, "OUT is low after the count is written")?;
    cpu::outb(0x61, cpu::inb(0x61) & !2 | 1);
    let high = wait(|| cpu::inb(0x61) & 0x20 != 0);
    cpu::outb(0x61, cpu::inb(0x61) & !3);
    ok(high, "OUT goes high when the gate lets the count run out")
}

fn pic_mask_registers() -> Verdict {
    for v in [0x55, 0xaa, 0xff] {
        cpu::outb(0x21, v);
        cpu::outb(0xa1, !v);
        ok(cpu::inb(0x21) == v && cpu::inb(0xa1) == !v, "masks read back")?;
    }
    Ok(())
}

fn pic_in_service() -> Verdict {
    set_mode(0x20, RESUME);
    virtual_wire(true);
    pit(1193, false);
    unmask(0);
    let came = wait_on(|| count(0x20) == 1);
    let isr = || {
        cpu::outb(0x20, 0x0b);
        cpu::inb(0x20)
    };
    let before = isr();
    for _ in 0..100 {
        open_window();
    }
    let n = count(0x20);
    cpu::outb(0x21, 0xff);
    cpu::outb(0x20, 0x60);
    let after = isr();
    ok(came, "IRQ 0")?;
    eq(u64::from(before), 1, "in service")?;
    eq(u64::from(n), 1, "no second one before EOI")?;
    eq(u64::from(after), 0, "specific EOI")
}

fn pic_level_and_edge() -> Verdict {
    cpu::outb(0x4d0, 0x20);
    cpu::outb(0x4d1, 0x0c);
    let (a, b) = (cpu::inb(0x4d0), cpu::inb(0x4d1));
    cpu::outb(0x4d0, 0);
    cpu::outb(0x4d1, 0);
    ok(a == 0x20 && b == 0x0c, "ELCR reads back")
}

fn interrupt_clears_if_only() -> Verdict {
    set_mode(0x60, RESUME | EOI_APIC);
    ipi_self(0x60);
    let o = Ctx::kernel(code64!("std", "stc", "sti", "nop", "nop", "cli", "pushfq", "pop rax")).run();
    done(&o, "code")?;
    eq(u64::from(count(0x60)), 1, "delivered")?;
    eq(o.rax & 0x401, 0x401, "flags come back from the frame")?;
    eq(log(0).rflags & 0x200, 0x200, "IF set in the frame")
}
