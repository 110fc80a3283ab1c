//! The contract suite: a bare-metal guest that checks what a virtual machine promises.
//!
//! It is no cargo package: `guest/embed` compiles it with rustc for the host target and embeds the image.
//! Tests describe the architecture (SDM, APM); see `guest/README.md` for how to run it and to add a test.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "a bare-metal program is nothing else; there is no safe layer below it")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "one thread, statics and physical memory are its own")]
#![allow(dead_code, reason = "drivers and helpers are complete sets")]
#![deny(missing_docs)]

mod apic;
mod boot;
mod calls;
mod cpu;
mod crmsr;
mod debug;
mod desc;
mod faults;
mod fpu;
mod harness;
mod hostile;
mod integer;
mod irq;
mod legacy;
mod mem;
mod modes;
mod nano;
mod paging;
mod paging32;
mod privileged;
mod returns;
mod runtime;
mod segments;
mod segments32;
mod sensitive;
mod smc;
mod smp;
mod snapshot;
mod string;
mod syscalls;
mod traps;
mod upper;

const GROUPS: &[&[harness::Test]] = &[
    faults::TESTS,
    paging::TESTS,
    modes::TESTS,
    paging32::TESTS,
    upper::TESTS,
    debug::TESTS,
    segments::TESTS,
    segments32::TESTS,
    sensitive::TESTS,
    privileged::TESTS,
    crmsr::TESTS,
    syscalls::TESTS,
    returns::TESTS,
    calls::TESTS,
    integer::TESTS,
    string::TESTS,
    smc::TESTS,
    hostile::TESTS,
    irq::TESTS,
    fpu::TESTS,
    snapshot::TESTS,
    smp::TESTS,
];

/// Called by the boot code in long mode.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    harness::main(GROUPS)
}
