//! The runner: one line a test on COM1, a summary, and the way out.

use crate::traps::{self, Outcome, catch};
use crate::{apic, boot, cpu, desc, mem};
use core::fmt::{self, Write};

/// COM1.
pub struct Serial;

const COM1: u16 = 0x3f8;

impl Serial {
    /// Its first port.
    pub const PORT: u16 = COM1;
}

impl Write for Serial {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            if b == b'\n' {
                put(b'\r');
            }
            put(b);
        }
        Ok(())
    }
}

fn put(b: u8) {
    for _ in 0..1_000_000 {
        if cpu::inb(COM1 + 5) & 0x20 != 0 {
            break;
        }
    }
    cpu::outb(COM1, b);
}

fn init_serial() {
    for (reg, v) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        cpu::outb(COM1 + reg, v);
    }
}

/// Prints a line.
#[macro_export]
macro_rules! say {
    ($($a:tt)*) => {{ use core::fmt::Write; let _ = writeln!($crate::harness::Serial, $($a)*); }};
}

/// Why a test did not pass.
pub enum Stop {
    /// It failed; the message says what.
    Fail(Message),
    /// It cannot run here; the message says why.
    Skip(Message),
}

/// A short text without an allocator.
pub struct Message {
    text: [u8; 160],
    len: usize,
}

impl Message {
    /// Formats a message, cut at 160 bytes.
    pub fn new(args: fmt::Arguments<'_>) -> Self {
        let mut m = Message { text: [0; 160], len: 0 };
        let _ = m.write_fmt(args);
        m
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.text[..self.len]).unwrap_or("?")
    }
}

impl Write for Message {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            if self.len < self.text.len() {
                self.text[self.len] = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// What a test returns.
pub type Verdict = Result<(), Stop>;

/// A test and its name.
pub type Test = (&'static str, fn() -> Verdict);

/// Makes a table of tests out of functions; the name is `group.function`.
#[macro_export]
macro_rules! tests {
    ($group:literal: $($name:ident),* $(,)?) => {
        /// The tests of this group.
        pub const TESTS: &[$crate::harness::Test] = &[$((concat!($group, ".", stringify!($name)), $name)),*];
    };
}

/// Ends the test as failed.
#[macro_export]
macro_rules! fail { ($($a:tt)*) => { return Err($crate::harness::Stop::Fail($crate::harness::Message::new(format_args!($($a)*)))) }; }
/// Ends the test as skipped.
#[macro_export]
macro_rules! skip { ($($a:tt)*) => { return Err($crate::harness::Stop::Skip($crate::harness::Message::new(format_args!($($a)*)))) }; }

/// Fails unless `got` is `want`.
pub fn eq(got: u64, want: u64, what: &str) -> Verdict {
    if got != want {
        fail!("{what}: {got:#x}, expected {want:#x}");
    }
    Ok(())
}

/// Fails unless the condition holds.
pub fn ok(condition: bool, what: &str) -> Verdict {
    if !condition {
        fail!("{what}");
    }
    Ok(())
}

/// Fails unless the outcome is this vector with this error code.
pub fn fault(o: &Outcome, vector: u64, error: u64, what: &str) -> Verdict {
    if o.vector != vector || o.error != error {
        fail!(
            "{what}: vector {:#x} error {:#x} rip {:#x} cr2 {:#x}, expected vector {vector:#x} error {error:#x}",
            o.vector,
            o.error,
            o.rip,
            o.cr2
        );
    }
    Ok(())
}

/// Fails unless nothing trapped.
pub fn clean(o: &Outcome, what: &str) -> Verdict {
    fault(o, traps::NONE, o.error, what)
}

/// Fails unless the snippet came to its end.
pub fn done(o: &Outcome, what: &str) -> Verdict {
    fault(o, traps::END, 0, what)
}

/// Fails unless it is a page fault with this error code and address.
pub fn page_fault(o: &Outcome, error: u64, cr2: u64, what: &str) -> Verdict {
    fault(o, traps::PF, error, what)?;
    eq(o.cr2, cr2, what)
}

/// Waits until the condition holds; the bound is in loops, several seconds on any machine.
pub fn wait(mut condition: impl FnMut() -> bool) -> bool {
    for _ in 0..40_000_000u32 {
        if condition() {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

struct Baseline {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}
static mut BASELINE: Baseline = Baseline { cr0: 0, cr3: 0, cr4: 0, efer: 0 };

/// Writes EFER.
pub fn set_efer(v: u64) {
    cpu::wrmsr(0xc000_0080, v);
}

/// The EFER that the suite boots with.
pub fn baseline_efer() -> u64 {
    unsafe { BASELINE.efer }
}

/// Puts back what a test may have changed, so that tests do not depend on one another.
pub fn reset_world() {
    unsafe {
        core::arch::asm!("cli", "cld");
        cpu::set_cr0(BASELINE.cr0);
        if cpu::cr4() & 1 << 17 != 0 {
            cpu::set_cr3(BASELINE.cr3);
        }
        cpu::set_cr4(BASELINE.cr4);
        cpu::set_cr3(BASELINE.cr3);
        set_efer(BASELINE.efer);
        cpu::set_dr7(0x400);
        cpu::set_dr6(0xffff_0ff0);
        for msr in
            [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x174]
        {
            cpu::wrmsr(msr, 0);
        }
        core::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(desc::UDS));
        core::arch::asm!("fninit", "push 0x1f80", "ldmxcsr [rsp]", "add rsp, 8");
    }
    desc::reset();
    traps::reset();
    mem::reset_pool();
    apic::reset();
    cpu::outb(0x3f9, 0);
    cpu::outb(0x3fc, 3);
}

fn run_one(test: &Test) -> Verdict {
    let mut verdict = Ok(());
    let o = catch(|| verdict = test.1());
    if o.vector != traps::NONE {
        let verdict = fault(&o, traps::NONE, 0, "unexpected trap");
        return verdict;
    }
    verdict
}

static mut CURRENT: &str = "boot";

/// Runs all tests and ends the machine.
pub fn main(groups: &[&[Test]]) -> ! {
    init_serial();
    boot::read_info();
    desc::reset();
    desc::load_tr();
    unsafe {
        BASELINE = Baseline {
            cr0: cpu::cr0(),
            cr3: cpu::cr3(),
            cr4: cpu::cr4(),
            efer: cpu::rdmsr(0xc000_0080) & !0x400,
        };
    }
    apic::init();
    if let Some(what) = boot::option("nano") {
        crate::nano::main(what);
    }
    say!("Trellis contract suite, boot by {}", boot::protocol());
    let only = boot::option("only").unwrap_or("");
    let skip = boot::option("skip").unwrap_or("");
    // Goes on behind this test, where another run ended in it.
    let mut before = boot::option("after");
    let left_out = |name: &str| skip.split(',').any(|s| !s.is_empty() && name.contains(s));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for test in groups.iter().copied().flatten() {
        if let Some(last) = before {
            before = (test.0 != last).then_some(last);
            continue;
        }
        if !test.0.contains(only) || left_out(test.0) {
            continue;
        }
        unsafe { CURRENT = test.0 };
        reset_world();
        let verdict = run_one(test);
        reset_world();
        match verdict {
            Ok(()) => {
                passed += 1;
                say!("PASS {}", test.0);
            }
            Err(Stop::Fail(m)) => {
                failed += 1;
                say!("FAIL {}: {}", test.0, m.as_str());
            }
            Err(Stop::Skip(m)) => {
                skipped += 1;
                say!("SKIP {}: {}", test.0, m.as_str());
            }
        }
    }
    if skipped != 0 {
        say!("{skipped} skipped");
    }
    say!("{passed} passed, {failed} failed");
    exit(failed == 0)
}

/// Ends the machine: isa-debug-exit, else ACPI power-off when all passed, else halt.
pub fn exit(good: bool) -> ! {
    cpu::outl(0xf4, if good { 0x10 } else { 0x11 });
    if good {
        cpu::outw(0x604, 0x2000);
    }
    loop {
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}

/// A trap outside of any test: nothing can go on.
#[unsafe(no_mangle)]
extern "C" fn guest_fatal() -> ! {
    let o = traps::last();
    say!(
        "FAIL {}: trap in the harness: vector {:#x} error {:#x} rip {:#x} cr2 {:#x}",
        unsafe { CURRENT },
        o.vector,
        o.error,
        o.rip,
        o.cr2
    );
    say!("0 passed, 1 failed");
    exit(false)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("FAIL {}: {}", unsafe { CURRENT }, info);
    say!("0 passed, 1 failed");
    exit(false)
}
