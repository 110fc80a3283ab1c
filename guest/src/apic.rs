//! Drivers for the interrupt controllers and timers, as far as the tests need them.

use crate::cpu;
use crate::mem::{rd32, wr32};

/// Local APIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// IO-APIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// First vector of the remapped PIC.
pub const PIC_BASE: u8 = 0x20;

/// Reads a local APIC register.
pub fn read(reg: u64) -> u32 {
    rd32(LAPIC + reg)
}
/// Writes a local APIC register.
pub fn write(reg: u64, v: u32) {
    wr32(LAPIC + reg, v);
}
/// Reads an IO-APIC register.
pub fn io_read(reg: u32) -> u32 {
    wr32(IOAPIC, reg);
    rd32(IOAPIC + 0x10)
}
/// Writes an IO-APIC register.
pub fn io_write(reg: u32, v: u32) {
    wr32(IOAPIC, reg);
    wr32(IOAPIC + 0x10, v);
}
/// Programs one redirection entry.
pub fn io_route(pin: u32, lo: u32, hi: u32) {
    io_write(0x11 + pin * 2, hi);
    io_write(0x10 + pin * 2, lo);
}

/// Initialises both PICs: vectors 20H and 28H, all masked, edge triggered.
fn init_pics() {
    for (port, v) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, PIC_BASE),
        (0xa1, PIC_BASE + 8),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
    ] {
        cpu::outb(port, v);
    }
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    cpu::outb(0x4d0, 0);
    cpu::outb(0x4d1, 0);
}

/// Initialises the controllers.
pub fn init() {
    init_pics();
    let base = cpu::rdmsr(APIC_BASE);
    cpu::wrmsr(APIC_BASE, base | 0x800);
    reset();
    for pin in 0..=(io_read(1) >> 16 & 0xff) {
        io_route(pin, 0x1_0000, 0);
    }
}

/// Masks every source; takes what is pending out of the local APIC.
pub fn reset() {
    init_pics();
    if cpu::rdmsr(APIC_BASE) & 0x400 != 0 {
        // Out of x2APIC mode only through the disabled state (SDM 3A 11.12.5).
        let base = cpu::rdmsr(APIC_BASE);
        cpu::wrmsr(APIC_BASE, base & !0xc00);
        cpu::wrmsr(APIC_BASE, (base & !0xc00) | 0x800);
    }
    write(0xf0, 0x1ff);
    write(0x320, 0x1_0000);
    write(0x350, 0x1_0700);
    write(0x360, 0x1_0400);
    write(0x370, 0x1_00fe);
    write(0x380, 0);
    write(0x80, 0);
    for pin in [0, 2, 4] {
        io_route(pin, 0x1_0000, 0);
    }
    // Take what is still pending, by handlers that only acknowledge.
    for v in 0x20..=0xff {
        crate::traps::set_mode(v, crate::traps::RESUME | crate::traps::EOI_APIC);
    }
    unsafe { core::arch::asm!("sti", "nop", "nop", "cli") };
    crate::traps::reset();
    // An interrupt in service blocks its class for ever: acknowledge what a failed test left.
    for _ in 0..16 {
        if (0..8).all(|i| read(0x100 + i * 0x10) == 0) {
            break;
        }
        write(0xb0, 0);
    }
}

/// Lets the PIC's output through LINT0 (virtual wire mode).
pub fn virtual_wire(on: bool) {
    write(0x350, if on { 0x700 } else { 0x1_0700 });
}

/// Programs PIT channel 0: mode 2 with this divisor, or mode 0 when `once`.
pub fn pit(divisor: u16, once: bool) {
    cpu::outb(0x43, if once { 0x30 } else { 0x34 });
    cpu::outb(0x40, divisor as u8);
    cpu::outb(0x40, (divisor >> 8) as u8);
}
