//! Single operations for `trellis bench`, and for counting what one costs: no operating system, no timer, one operation
//! over and over.
//!
//! `nano=serve` on the command line reads commands (`run NAME N`) from COM1 and answers on the debug console (port E9H) as
//! `guest/bench/src/lib.rs` says. `nano=NAME:N` does N iterations of one and ends the machine. While it waits for a command it halts until the serial line interrupts.

use crate::apic::virtual_wire;
use crate::harness::{self, Serial, Stop};
use crate::mem::{ALIAS, P, Space, W, WIN, page, wr};
use crate::traps::{self, Code, Ctx, EOI_APIC, EOI_PIC, RESUME, count, set_mode};
use crate::smp::partner;
use crate::{code64, cpu, desc};
use core::arch::{asm, global_asm};
use core::fmt::Write as _;

/// Operations of an iteration, mostly.
const OPS: u64 = 64;
/// Pages of `count-sweep`.
const SWEPT: u64 = 512;
/// Of one that takes long where the host has fewer CPUs to give than the guest has.
const FEW: u64 = 8;
const DEBUG_PORT: u16 = 0xe9;
const LSTAR: u32 = 0xc000_0082;
/// The vector by which an application processor answers.
const ANSWER: u8 = 0x60;

/// One operation: `run` does so many iterations.
struct Nano {
    name: &'static str,
    /// Operations of an iteration.
    ops: u64,
    run: fn(u64) -> Result<(), Stop>,
}

const NANOS: &[Nano] = &[
    Nano { name: "nano-syscall", ops: OPS, run: system_call },
    Nano { name: "nano-in", ops: OPS, run: port },
    Nano { name: "nano-cr8wr", ops: OPS, run: cr8 },
    Nano { name: "nano-callret", ops: OPS, run: call_ret },
    Nano { name: "nano-pgfault", ops: OPS, run: page_fault },
    Nano { name: "nano-divzero", ops: OPS, run: divide },
    Nano { name: "nano-ptemod", ops: OPS, run: page_table },
    Nano { name: "nano-cpuid", ops: OPS, run: cpuid },
    Nano { name: "nano-rdtsc", ops: OPS, run: time_stamp },
    Nano { name: "nano-vmcall", ops: OPS, run: vmcall },
    Nano { name: "nano-ipi", ops: FEW, run: ipi },
    Nano { name: "nano-hlt-wake", ops: OPS, run: hlt_wake },
    Nano { name: "nano-mmio", ops: OPS, run: mmio },
    Nano { name: "nano-invlpg", ops: OPS, run: invlpg },
    Nano { name: "nano-cr3wr", ops: OPS, run: cr3 },
    Nano { name: "nano-wrmsr", ops: OPS, run: wrmsr },
    Nano { name: "count-sweep", ops: SWEPT, run: sweep },
    Nano { name: "count-spaces", ops: OPS, run: spaces },
    Nano { name: "count-patch", ops: OPS, run: patch },
    Nano { name: "count-indirect", ops: OPS, run: indirect },
];

/// Does what the command line says; see the module.
pub fn main(what: &str) -> ! {
    if what != "serve" {
        let (name, count) = what.split_once(':').unwrap_or((what, "1"));
        harness::exit(once(name, count.parse().unwrap_or(0)));
    }
    answer(format_args!("READY"));
    let mut bytes = [0; 128];
    loop {
        let line = read_line(&mut bytes);
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next().map(str::parse)) {
            (Some("run"), Some(name), Some(Ok(count))) => serve(name, count),
            (Some("quit"), ..) => harness::exit(true),
            (None, ..) => {}
            _ => answer(format_args!("ERR unknown command")),
        }
    }
}

fn once(name: &str, count: u64) -> bool {
    let Some(nano) = NANOS.iter().find(|nano| nano.name == name) else {
        crate::say!("FAIL {name}: there is no such operation");
        return false;
    };
    harness::reset_world();
    match (nano.run)(count) {
        Ok(()) => crate::say!("PASS {name}: {} operations", count * nano.ops),
        Err(Stop::Skip(why)) => crate::say!("SKIP {name}: {}", why.as_str()),
        Err(Stop::Fail(why)) => {
            crate::say!("FAIL {name}: {}", why.as_str());
            return false;
        }
    }
    true
}

fn serve(name: &str, count: u64) {
    let Some(nano) = NANOS.iter().find(|nano| nano.name == name) else {
        return answer(format_args!("ERR there is no such operation"));
    };
    harness::reset_world();
    cpu::outb(DEBUG_PORT, 1);
    let result = (nano.run)(count);
    cpu::outb(DEBUG_PORT, 2);
    match result {
        // It has no clock but the one that is under test.
        Ok(()) => answer(format_args!("DONE {name} {} - 0", count * nano.ops)),
        Err(Stop::Skip(why)) => answer(format_args!("SKIP {name} {}", why.as_str())),
        Err(Stop::Fail(why)) => answer(format_args!("ERR {name}: {}", why.as_str())),
    }
}

struct Console;

impl core::fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        text.bytes().for_each(|byte| cpu::outb(DEBUG_PORT, byte));
        Ok(())
    }
}

fn answer(text: core::fmt::Arguments<'_>) {
    let _ = Console.write_fmt(text);
    let _ = Console.write_str("\n");
}

/// A line from COM1, cut at the buffer's length.
fn read_line(bytes: &mut [u8; 128]) -> &str {
    harness::reset_world();
    set_mode(0x24, RESUME | EOI_PIC);
    virtual_wire(true);
    cpu::outb(0x21, !0x10);
    cpu::outb(Serial::PORT + 4, 0xb);
    cpu::outb(Serial::PORT + 1, 1);
    let mut len = 0;
    loop {
        unsafe { asm!("cli") };
        if cpu::inb(Serial::PORT + 5) & 1 == 0 {
            unsafe { asm!("sti", "hlt") };
            continue;
        }
        match cpu::inb(Serial::PORT) {
            b'\n' => break,
            byte if len < bytes.len() => {
                bytes[len] = byte;
                len += 1;
            }
            _ => {}
        }
    }
    core::str::from_utf8(&bytes[..len]).unwrap_or("")
}

/// User code that counts RBX down to zero.
fn user(code: Code, turns: u64) -> Result<(), Stop> {
    user_with(code, turns, 0)
}

fn user_with(code: Code, turns: u64, r12: u64) -> Result<(), Stop> {
    if turns == 0 {
        return Ok(());
    }
    let mut context = Ctx::user(code).rbx(turns).rcx(0);
    context.0.r12 = r12;
    harness::done(&context.run(), "the operation")
}

fn system_call(n: u64) -> Result<(), Stop> {
    cpu::wrmsr(0xc000_0081, 0x001b_0008 << 32);
    cpu::wrmsr(LSTAR, code64!("sysretq").start);
    cpu::wrmsr(0xc000_0084, 0x200);
    user(code64!("2: syscall", "dec rbx", "jnz 2b"), n * OPS)
}

fn call_ret(n: u64) -> Result<(), Stop> {
    let code = code64!("jmp 4f", ".balign 64", "3: ret", ".balign 64", "4:", ".rept 64", "call 3b", ".endr", "dec rbx", "jnz 4b");
    user(code, n)
}

fn cpuid(n: u64) -> Result<(), Stop> {
    user(code64!("mov r12, rbx", "2: xor eax, eax", "cpuid", "dec r12", "jnz 2b"), n * OPS)
}

fn time_stamp(n: u64) -> Result<(), Stop> {
    user(code64!("2: .rept 64", "rdtsc", ".endr", "dec rbx", "jnz 2b"), n)
}

// Handlers that step over the instruction that faulted: 4, 2 and 3 bytes.
global_asm!(
    r#"
.section .text
.code64
.global nano_skip_load, nano_skip_div, nano_skip_vmcall
nano_skip_load:
    add rsp, 8
    add qword ptr [rsp], 4
    iretq
nano_skip_div:
    add qword ptr [rsp], 2
    iretq
nano_skip_vmcall:
    add qword ptr [rsp], 3
    iretq
"#
);

unsafe extern "C" {
    static nano_skip_load: u8;
    static nano_skip_div: u8;
    static nano_skip_vmcall: u8;
}

fn gate(vector: u64, handler: *const u8) {
    desc::set_gate(vector as u8, handler as u64, desc::KCS, 0, 0x8e);
}

fn page_fault(n: u64) -> Result<(), Stop> {
    gate(traps::PF, &raw const nano_skip_load);
    user_with(code64!("2: mov rax, [r12]", "dec rbx", "jnz 2b"), n * OPS, WIN)
}

fn divide(n: u64) -> Result<(), Stop> {
    gate(traps::DE, &raw const nano_skip_div);
    user(code64!("2: div ecx", "dec rbx", "jnz 2b"), n * OPS)
}

/// #UD where the machine knows no hypercall.
fn vmcall(n: u64) -> Result<(), Stop> {
    gate(traps::UD, &raw const nano_skip_vmcall);
    let amd = cpu::is_amd();
    for _ in 0..n * OPS {
        unsafe {
            if amd {
                asm!("vmmcall", inout("rax") 0xffff_u64 => _, in("ecx") 0);
            } else {
                asm!("vmcall", inout("rax") 0xffff_u64 => _, in("ecx") 0);
            }
        }
    }
    Ok(())
}

fn port(n: u64) -> Result<(), Stop> {
    for _ in 0..n * OPS {
        cpu::inb(Serial::PORT + 5);
    }
    Ok(())
}

fn cr8(n: u64) -> Result<(), Stop> {
    for _ in 0..n * OPS {
        cpu::set_cr8(0);
    }
    Ok(())
}

fn cr3(n: u64) -> Result<(), Stop> {
    let root = cpu::cr3();
    for _ in 0..n * OPS {
        cpu::set_cr3(root);
    }
    Ok(())
}

fn wrmsr(n: u64) -> Result<(), Stop> {
    for i in 0..n * OPS {
        cpu::wrmsr(LSTAR, ALIAS + i % 2);
    }
    Ok(())
}

fn mmio(n: u64) -> Result<(), Stop> {
    for _ in 0..n * OPS {
        crate::apic::read(0x20);
    }
    Ok(())
}

fn invlpg(n: u64) -> Result<(), Stop> {
    let space = Space::active();
    space.map(WIN, page(), P | W);
    for _ in 0..n * OPS {
        cpu::invlpg(WIN);
    }
    Ok(())
}

/// The entry names one page and the other, in turn.
fn page_table(n: u64) -> Result<(), Stop> {
    let space = Space::active();
    let (first, second) = (page(), page());
    wr(first, 1);
    wr(second, 2);
    let entry = space.entry(WIN, 1);
    let mut sum = 0;
    for _ in 0..n * OPS / 2 {
        for at in [first, second] {
            wr(entry, at | P | W);
            cpu::invlpg(WIN);
            sum += crate::mem::rd(WIN);
        }
    }
    harness::eq(sum, n * OPS / 2 * 3, "the pages that the entry named")
}

fn ipi(n: u64) -> Result<(), Stop> {
    partner::with_partner(partner::spin_until_stopped, || {
        for i in 1..=n * FEW {
            partner::ping();
            if !harness::wait(|| u64::from(partner::pings()) == i) {
                crate::fail!("interrupt {i} does not arrive");
            }
        }
        Ok(())
    })
}

/// One operation wakes one CPU: there, and back.
fn hlt_wake(n: u64) -> Result<(), Stop> {
    set_mode(ANSWER, RESUME | EOI_APIC);
    partner::with_partner(partner::answer_until_stopped, || {
        for i in 1..=n * OPS / 2 {
            partner::ping();
            loop {
                unsafe { asm!("cli") };
                if u64::from(count(ANSWER)) == i {
                    break;
                }
                unsafe { asm!("sti", "hlt") };
            }
        }
        Ok(())
    })
}

// What follows is not in the bench's table: small workloads of which only the counts are of interest.

/// A word of each of 512 pages.
fn sweep(n: u64) -> Result<(), Stop> {
    let space = Space::active();
    let at = page();
    (0..SWEPT).for_each(|i| space.map(WIN + i * 4096, at, P | W));
    for _ in 0..n {
        (0..SWEPT).for_each(|i| wr(WIN + i * 4096, i));
    }
    harness::eq(crate::mem::rd(at), if n == 0 { 0 } else { SWEPT - 1 }, "the last word written")
}

/// Two address spaces in turn, with a page of their own at one address.
fn spaces(n: u64) -> Result<(), Stop> {
    let pair = [Space::new(), Space::new()];
    for (i, space) in pair.iter().enumerate() {
        let at = page();
        wr(at, i as u64 + 1);
        space.map(WIN, at, P | W);
    }
    let mut sum = 0;
    for _ in 0..n * OPS / 2 {
        for space in &pair {
            cpu::set_cr3(space.root);
            sum += crate::mem::rd(WIN);
        }
    }
    harness::eq(sum, n * OPS / 2 * 3, "the pages of both")
}

/// An immediate patched, the code called.
fn patch(n: u64) -> Result<(), Stop> {
    let at = page();
    let mut sum = 0;
    for i in 0..n * OPS {
        crate::mem::put(at, &crate::mem::code_returning(i as u32 & 7));
        sum += crate::mem::call(at);
    }
    harness::eq(sum, n * OPS / 8 * 28, "what the patched code returned")
}

/// Calls through four pointers in turn.
fn indirect(n: u64) -> Result<(), Stop> {
    let at = page();
    (0..4).for_each(|i| crate::mem::put(at + i * 64, &crate::mem::code_returning(i as u32)));
    let mut sum = 0;
    for i in 0..n * OPS {
        sum += crate::mem::call(at + (i & 3) * 64);
    }
    harness::eq(sum, n * OPS / 4 * 6, "what the four returned")
}
