//! Code that changes, and code memory that is full: what the counters say, and that what is executed is what is there.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::io::GeneralProtection;
use engine::{CpuIo, Report, Signals, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86_interp::Parts;

const START: u64 = 0x10000;
const FUNCTION: u64 = 0x12000;
const BUFFER: u64 = 0x10_0000;

/// mov eax, value; ret
fn returning(value: u32) -> [u8; 8] {
    let [a, b, c, d] = value.to_le_bytes();
    [0xb8, a, b, c, d, 0xc3, 0x90, 0x90]
}

/// Runs `code`, which calls a function at RBP that returns 3, with `times` in ECX. RBX, and what the vCPU says of itself.
fn run(
    code: &[u8],
    times: u64,
    io: impl Fn(&Arc<GuestMemory>) -> Arc<dyn CpuIo>,
    knobs: Knobs,
) -> (u64, Report) {
    let mem = GuestMemory::new(16 << 20).unwrap();
    mem.write(Gpa(START), code).unwrap();
    mem.write(Gpa(FUNCTION), &returning(3)).unwrap();
    let io = io(&mem);
    let mut state = common::long_mode(&mem, START, 0x20000);
    (state.gpr[1], state.gpr[3], state.gpr[5], state.gpr[7]) = (times, 0, FUNCTION, BUFFER);
    state.gpr[8] = u64::from_le_bytes(returning(9));
    let parts = Parts {
        index: 0,
        vcpus: 1,
        io,
        mem,
        signals: Arc::new(Signals::default()),
        model: Arc::new(CpuModel::parse("max").unwrap()),
    };
    let mut vcpu = BtVcpu::with_knobs(parts, knobs).unwrap();
    vcpu.restore(&state);
    assert_eq!(vcpu.run(u64::MAX), VcpuExit::Halted);
    (vcpu.save().gpr[3], vcpu.report())
}

fn no_devices(_: &Arc<GuestMemory>) -> Arc<dyn CpuIo> {
    Arc::new(common::NoDevices::default())
}

/// Writes a function to ever new places, calls it, and calls another that stays.
/// l: mov [rdi], r8; call rdi; call rbp; add rbx, rax; add rdi, 16; dec ecx; jne l; hlt
const EVER_NEW: &[u8] = &[
    0x4c, 0x89, 0x07, 0xff, 0xd7, 0xff, 0xd5, 0x48, 0x01, 0xc3, 0x48, 0x83, 0xc7, 0x10, 0xff, 0xc9, 0x75,
    0xee, 0xf4,
];

#[test]
fn ever_new_code_in_a_small_cache_evicts_itself_and_not_what_is_used() {
    let knobs = Knobs { warm: 0, code_bytes: 64 << 10, ..Knobs::default() };
    let report = |times| {
        let (sum, report) = run(EVER_NEW, times, no_devices, knobs);
        assert_eq!(sum, 3 * times);
        report
    };
    let (few, many) = (report(10_000), report(40_000));
    let new = 40_000;
    assert!(many.get("fragments evicted") > new * 9 / 10, "{}", many.get("fragments evicted"));
    assert!(many.get("fragments kept") > 100, "the loop and its function are kept");
    assert!(many.get("fragments made") < new + new / 50, "what is used is not made again");
    assert!(many.get("code memory used") <= 64 << 10);
    assert_eq!(many.get("flushes"), 1, "at the start");
    assert!(many.get("TC tables") < few.get("TC tables") * 5 / 4, "tables are bounded");
}

#[test]
fn forced_eviction_changes_nothing_but_the_time() {
    let knobs = Knobs { warm: 0, evict: 3, ..Knobs::default() };
    let (sum, report) = run(EVER_NEW, 2000, no_devices, knobs);
    assert_eq!(sum, 6000);
    assert!(report.get("segments emptied") > 100);
}

/// Changes the constant of a function, and calls it.
/// l: mov [rbp + 1], ecx; call rbp; add rbx, rax; dec ecx; jne l; hlt
const PATCH: &[u8] = &[0x89, 0x4d, 0x01, 0xff, 0xd5, 0x48, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf4, 0xf4];

#[test]
fn code_that_changes_at_every_call_is_translated_a_few_times_and_not_traced() {
    let times = 50_000;
    let (sum, report) = run(PATCH, times, no_devices, Knobs { warm: 0, ..Knobs::default() });
    assert_eq!(sum, times * (times + 1) / 2);
    assert!(report.get("fragments made") < 50, "{}", report.get("fragments made"));
    assert!(report.get("fragments that check themselves") > 0);
    assert_eq!(report.get("checks failed"), 0, "the constant is not compared");
    assert!(report.get("TC entries") < 300, "{}", report.get("TC entries"));
}

/// Writes data in the function's page, and calls it.
/// l: mov [rbp + 0x800], ecx; call rbp; add rbx, rax; dec ecx; jne l; hlt
const BESIDE: &[u8] = &[0x89, 0x8d, 0, 8, 0, 0, 0xff, 0xd5, 0x48, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf1, 0xf4];

#[test]
fn data_beside_code_is_written_without_rust() {
    let times = 50_000;
    let (sum, report) = run(BESIDE, times, no_devices, Knobs { warm: 0, ..Knobs::default() });
    assert_eq!(sum, 3 * times);
    assert!(report.get("writes beside code") > times - 100, "{}", report.get("writes beside code"));
    assert!(report.get("callouts") < 100, "{}", report.get("callouts"));
    assert_eq!(report.get("fragments suspended"), 0);
}

/// Has a device write another constant into the function, and calls it.
/// l: out 0x80, eax; call rbp; add rbx, rax; dec ecx; jne l; hlt
const BY_DEVICE: &[u8] = &[0xe7, 0x80, 0xff, 0xd5, 0x48, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf5, 0xf4];

/// What a device does to memory at its nth command.
type Command = Box<dyn Fn(&Arc<GuestMemory>, u32) + Send + Sync>;

struct Dma {
    none: common::NoDevices,
    mem: Arc<GuestMemory>,
    commands: AtomicU32,
    command: Command,
}

impl Dma {
    fn device(mem: &Arc<GuestMemory>, command: Command) -> Arc<dyn CpuIo> {
        let none = common::NoDevices::default();
        Arc::new(Self { none, mem: Arc::clone(mem), commands: AtomicU32::new(0), command })
    }
}

impl CpuIo for Dma {
    fn port_in(&self, vcpu: usize, port: u16, size: u8) -> u32 {
        self.none.port_in(vcpu, port, size)
    }
    fn port_out(&self, _: usize, _: u16, _: u8, _: u32) {
        let number = self.commands.fetch_add(1, Ordering::Relaxed) + 1;
        (self.command)(&self.mem, number);
    }
    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]) {
        self.none.mmio_read(vcpu, gpa, data);
    }
    fn mmio_write(&self, _: usize, _: Gpa, _: &[u8]) {}
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, vcpu: usize, index: u32) -> Result<u64, GeneralProtection> {
        self.none.apic_msr_read(vcpu, index)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        0
    }
    fn tsc_hz(&self) -> u64 {
        self.none.tsc_hz()
    }
    fn system_time_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
    fn tsc_offset_changed(&self, _: usize, _: u64) {}
    fn apic_init(&self, _: usize) {}
}

#[test]
fn code_written_by_a_device_is_executed() {
    for (knobs, times) in [(Knobs { warm: 0, ..Knobs::default() }, 3000), (Knobs::default(), 3000)] {
        let io = |mem: &Arc<GuestMemory>| -> Arc<dyn CpuIo> {
            let patch = |mem: &Arc<GuestMemory>, n| mem.write(Gpa(FUNCTION), &returning(n)).unwrap();
            Dma::device(mem, Box::new(patch))
        };
        let (sum, report) = run(BY_DEVICE, times, io, knobs);
        assert_eq!(sum, times * (times + 1) / 2);
        assert!(report.get("fragments suspended") > 0);
    }
}

/// Adds up what a function returns.
/// mov r9d, ecx; xor esi, esi; l: call rbp; add rsi, rax; dec r9d; jne l; mov rbx, rsi; hlt
const SERIALISED: &[u8] = &[
    0x41, 0x89, 0xc9, 0x31, 0xf6, 0xff, 0xd5, 0x48, 0x01, 0xc6, 0x41, 0xff, 0xc9, 0x75, 0xf6, 0x48, 0x89,
    0xf3, 0xf4,
];
/// A command to a device, CPUID, which serialises, and a jump to the next line but one: out 0x80, eax; xor eax, eax; cpuid; jmp
const SERIALISING: &[u8] = &[0xe7, 0x80, 0x31, 0xc0, 0x0f, 0xa2, 0xeb, 0x78];
/// Behind a line of NOPs, so that the function before it does not depend on it.
const BEHIND: u64 = FUNCTION + 0xc0;

/// Writes code when it is told to give up the right to write to a page with code: while somebody waits for that.
struct Meanwhile {
    mem: Arc<GuestMemory>,
    armed: AtomicU32,
}

impl guestmem::Holder for Meanwhile {
    fn invalidate(&self, _: std::ops::Range<guestmem::Gfn>, _: guestmem::Invalidation) {
        if self.armed.swap(0, Ordering::Relaxed) != 0 {
            self.mem.write(Gpa(BEHIND), &returning(4)).unwrap();
        }
    }
    fn id(&self) -> u64 {
        1000
    }
}

#[test]
fn code_written_while_other_code_is_traced_is_not_executed_as_it_was() {
    let (times, at) = (20, 10);
    let io = |mem: &Arc<GuestMemory>| -> Arc<dyn CpuIo> {
        mem.write(Gpa(FUNCTION), SERIALISING).unwrap();
        mem.write(Gpa(FUNCTION + 0x80), &[0x90; 0x40]).unwrap();
        mem.write(Gpa(BEHIND), &returning(3)).unwrap();
        let meanwhile = Arc::new(Meanwhile { mem: Arc::clone(mem), armed: AtomicU32::new(0) });
        let holder: Arc<dyn guestmem::Holder> = meanwhile.clone();
        mem.register(Arc::downgrade(&holder));
        let command = move |mem: &Arc<GuestMemory>, n| {
            if n == 5 || n == at {
                // What follows is entered from the dispatcher, which compares and traces it first.
                mem.write(Gpa(FUNCTION), SERIALISING).unwrap();
            }
            if n == at {
                // That waits for everybody.
                mem.share_page(Gpa(FUNCTION).gfn());
                meanwhile.armed.store(1, Ordering::Relaxed);
            }
        };
        Dma::device(mem, Box::new(command))
    };
    let (sum, report) = run(SERIALISED, times, io, Knobs { warm: 0, ..Knobs::default() });
    assert!(report.get("fragments resumed") > 0);
    assert_eq!(sum, 3 * u64::from(at - 1) + 4 * (times - u64::from(at) + 1));
}
