//! What Rust does for translated code on the frame, without the interpreter's registers: against the interpreter.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]
#![expect(unsafe_code, reason = "guest code is assembled with the test")]

#[macro_use]
mod both;

use std::arch::global_asm;
use std::sync::{Arc, Mutex};

use both::{STACK, START, assert_same_registers, common, done_in_cache, run_both, run_both_with};
use engine::io::GeneralProtection;
use engine::{CpuIo, VcpuExit};
use guestmem::{Gpa, GuestMemory};
use x86::state::sreg;
use x86::{CpuState, Segment};

// ---- page faults --------------------------------------------------------------------------------------------------------

// RSI turns of two faults with different flags, then UD2. The handlers stand at 100h and 200h.
guest_code!(
    faulting,
    "trellis_test_faulting",
    "trellis_test_faulting_end",
    "2:",
    // Flags that are read afterwards: others need not be those of the instruction before (docs/deviations.md).
    "cmp esi, 20",
    "mov rdx, [r11]",
    "pushfq",
    "pop r9",
    "add esi, 0x7fffffe0",
    "mov [r11 + 8], rdx",
    "pushfq",
    "pop r9",
    "sub esi, 0x7fffffe0",
    "add r11, 4096",
    "dec esi",
    "jne 2b",
    "ud2",
);

// Logs what was pushed, CR2, RSP, RFLAGS, CS and SS at [R8], and goes on behind the instruction.
guest_code!(
    handler,
    "trellis_test_handler",
    "trellis_test_handler_end",
    "push rax",
    "pushfq",
    "pop rax",
    "mov [r8], rax",
    "mov rax, cr2",
    "mov [r8 + 8], rax",
    "mov rax, [rsp + 8]",
    "mov [r8 + 16], rax",
    "mov rax, [rsp + 16]",
    "mov [r8 + 24], rax",
    "mov rax, [rsp + 24]",
    "mov [r8 + 32], rax",
    "mov rax, [rsp + 32]",
    "mov [r8 + 40], rax",
    "mov rax, [rsp + 40]",
    "mov [r8 + 48], rax",
    "mov rax, [rsp + 48]",
    "mov [r8 + 56], rax",
    "mov [r8 + 64], rsp",
    "mov eax, cs",
    "mov [r8 + 72], rax",
    "mov eax, ss",
    "mov [r8 + 80], rax",
    "add r8, 88",
    // Both instructions that fault have three or four bytes: the one that writes has a displacement.
    "mov rax, [rsp + 8]",
    "shr rax, 1",
    "and eax, 1",
    "add rax, 3",
    "add [rsp + 16], rax",
    "pop rax",
    "add rsp, 8",
    "iretq",
);

const IDT: u64 = 0x11_0000;
const GDT: u64 = 0x11_1000;
const TSS: u64 = 0x11_2000;
const LOG: u64 = 0x18_0000;
const INNER: u64 = 0x14_0000;
const LISTED: u64 = 0x14_8000;
const UNMAPPED: u64 = 0x80_0000;

/// How a guest differs from others.
#[derive(Clone, Copy, Debug)]
struct Way {
    level: u8,
    ist: u64,
    gate: u64,
    stack: u64,
    flags: u64,
    present: u64,
    code: u64,
}

const USUAL: Way =
    Way { level: 3, ist: 0, gate: 0xe, stack: INNER, flags: 2, present: 1, code: 0x00af_9b00_0000_ffff };

fn lay_faulting(mem: &GuestMemory, way: Way) -> CpuState {
    let mut state = common::long_mode(mem, START, STACK);
    let put = |at: u64, value: u64| mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    put(0x3000 + 8 * (UNMAPPED >> 21), 0);
    let gate = |vector: u64, target: u64, kind: u64, ist: u64, present: u64| {
        let low = target & 0xffff | 8 << 16 | ist << 32 | kind << 40 | present << 47 | target >> 16 << 48;
        put(IDT + 16 * vector, low);
        put(IDT + 16 * vector + 8, 0);
    };
    gate(14, START + 0x100, way.gate, way.ist, way.present);
    gate(6, START + 0x200, 0xe, 0, 1);
    gate(11, START + 0x200, 0xe, 0, 1);
    let descriptors = [0, way.code, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    descriptors.iter().enumerate().for_each(|(n, d)| put(GDT + 8 * n as u64, *d));
    put(TSS + 4, way.stack);
    put(TSS + 0x24, LISTED + 8);
    mem.write(Gpa(START), faulting()).unwrap();
    mem.write(Gpa(START + 0x100), handler()).unwrap();
    mem.write(Gpa(START + 0x200), &[0xf4]).unwrap();
    (state.gdtr.base, state.gdtr.limit) = (GDT, 5 * 8 - 1);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    let (code, data) = if way.level == 3 { (0x23u16, 0x1b) } else { (8, 0x10) };
    let load = |selector: u16| Segment::from_descriptor(selector, descriptors[usize::from(selector >> 3)]);
    state.seg = [load(data); 6];
    state.seg[sreg::CS] = load(code);
    state.tr = Segment { selector: 0x28, base: TSS, limit: 0x67, attr: x86::Attr(0x8b) };
    state.cpl = way.level;
    state.rflags = way.flags;
    state.gpr[4] = 0x12_0000 + (way.stack & 15);
    state.gpr[6] = 60;
    (state.gpr[8], state.gpr[11]) = (LOG, UNMAPPED);
    state
}

#[test]
fn page_faults_are_delivered_as_the_interpreter_does() {
    for way in [
        USUAL,
        Way { ist: 1, ..USUAL },
        Way { gate: 0xf, flags: 0x202, ..USUAL },
        Way { gate: 0xe, flags: 0x202, ..USUAL },
        Way { stack: INNER + 8, ..USUAL },
        Way { flags: 0xad7, ..USUAL },
        Way { level: 0, ..USUAL },
        Way { level: 0, ist: 1, flags: 0x202, ..USUAL },
        Way { level: 0, stack: INNER + 4, flags: 0x4_0ad7, ..USUAL },
    ] {
        for knobs in ["", "unit=1", "tlb=one"] {
            let [a, b] = run_both(&|mem| lay_faulting(mem, way), knobs);
            let what = format!("{way:?}, {knobs}");
            assert_eq!(a.exit, VcpuExit::Halted, "{what}");
            assert_same_registers(&a, &b, &what);
            assert_eq!(a.state.cr2, b.state.cr2, "{what}");
            assert_eq!(a.state.gpr[8], LOG + 88 * 120, "{what}: 120 faults");
            assert!(a.memory == b.memory, "{what}");
            let on_frame = done_in_cache(&b, "page faults delivered on the frame");
            assert!(on_frame > 60, "{what}: {on_frame}");
        }
    }
}

#[test]
fn unusual_page_faults_are_the_interpreters() {
    for way in [
        // Not present: #NP instead, whose handler halts.
        Way { present: 0, ..USUAL },
        // Not accessed: the interpreter sets the bit, so that only the first is unusual.
        Way { code: 0x00af_9a00_0000_ffff, ..USUAL },
        // The stack reaches into the page below.
        Way { stack: INNER + 0x20, ..USUAL },
        // No stack: a double fault, and as that has no gate, shutdown.
        Way { stack: UNMAPPED, ..USUAL },
        Way { stack: 1 << 62, ..USUAL },
    ] {
        let [a, b] = run_both(&|mem| lay_faulting(mem, way), "");
        let what = format!("{way:?}");
        assert_same_registers(&a, &b, &what);
        assert_eq!(a.state.cr2, b.state.cr2, "{what}");
        assert!(a.memory == b.memory, "{what}");
        let on_frame = done_in_cache(&b, "page faults delivered on the frame");
        if way.code == USUAL.code {
            assert_eq!(on_frame, 0, "{what}");
        }
    }
}

// ---- devices ------------------------------------------------------------------------------------------------------------

/// Devices that write down what they are asked, and answer with what was asked so far.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, what: String) -> u64 {
        let mut all = self.0.lock().unwrap();
        let answer =
            what.bytes().fold(all.len() as u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        all.push(what);
        answer
    }
}

impl CpuIo for Recorder {
    fn port_in(&self, _: usize, port: u16, size: u8) -> u32 {
        self.note(format!("in {port:x} {size}")) as u32
    }
    fn port_out(&self, _: usize, port: u16, size: u8, value: u32) {
        let value = u64::from(value) & ((1 << (8 * size)) - 1);
        self.note(format!("out {port:x} {size} {value:x}"));
    }
    fn mmio_read(&self, _: usize, gpa: Gpa, data: &mut [u8]) {
        let answer = self.note(format!("read {:x} {}", gpa.0, data.len()));
        data.iter_mut().zip(answer.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
    fn mmio_write(&self, _: usize, gpa: Gpa, data: &[u8]) {
        self.note(format!("write {:x} {data:x?}", gpa.0));
    }
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        self.note("read CR8".to_owned()) & 15
    }
    fn set_cr8(&self, _: usize, value: u64) {
        self.note(format!("write CR8 {value:x}"));
    }
    fn apic_msr_read(&self, _: usize, index: u32) -> Result<u64, GeneralProtection> {
        let answer = self.note(format!("rdmsr {index:x}"));
        if index == 0x8ff { Err(GeneralProtection) } else { Ok(answer) }
    }
    fn apic_msr_write(&self, _: usize, index: u32, value: u64) -> Result<(), GeneralProtection> {
        self.note(format!("wrmsr {index:x} {value:x}"));
        Ok(())
    }
    fn tsc(&self) -> u64 {
        0
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
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

// ESI turns through everything that reaches a device; what is read goes into RBX. R10 and RDI are device memory.
guest_code!(
    touching,
    "trellis_test_touching",
    "trellis_test_touching_end",
    "2:",
    "mov rax, rbx",
    "mov edx, 0x1230",
    "in al, dx",
    "add rbx, rax",
    "in ax, dx",
    "add rbx, rax",
    "in eax, dx",
    "add rbx, rax",
    "in al, 0x71",
    "in ax, 0x72",
    "in eax, 0x74",
    "xor rbx, rax",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "out 0x80, al",
    "out 0x82, eax",
    "mov ecx, 0x830",
    "mov rdx, rbx",
    "wrmsr",
    "mov rax, -1",
    "mov rdx, -1",
    "rdmsr",
    "add rbx, rax",
    "sub rbx, rdx",
    "mov ecx, 0x6e0",
    "wrmsr",
    "rdmsr",
    "xor rbx, rax",
    "mov r14, cr8",
    "add rbx, r14",
    "mov r15d, esi",
    "and r15d, 15",
    "mov cr8, r15",
    // Bases and system-call registers.
    "mov ecx, 0xc0000100",
    "mov eax, ebx",
    "mov edx, 0x7fff",
    "wrmsr",
    "inc ecx",
    "wrmsr",
    "inc ecx",
    "wrmsr",
    "swapgs",
    "mov rax, -1",
    "rdmsr",
    "add rbx, rax",
    "mov ecx, 0xc0000082",
    "mov edx, 0x1234",
    "wrmsr",
    "xor edx, edx",
    "rdmsr",
    "lea rbx, [rbx + rdx*8]",
    // Device memory.
    "mov eax, [r10]",
    "add rbx, rax",
    "mov rax, [r10 + 8]",
    "add rbx, rax",
    "mov ax, [r10 + 16]",
    "mov al, [r10 + 17]",
    "mov ah, [rdi + 18]",
    "add rbx, rax",
    "movzx r13d, byte ptr [r10 + 19]",
    "movzx r13d, word ptr [r10 + 20]",
    "add rbx, r13",
    "movsx rax, word ptr [r10 + 24]",
    "add rbx, rax",
    "mov [r10 + 32], ebx",
    "mov [r10 + 40], rbx",
    "mov [r10 + 48], bx",
    "mov [r10 + 50], bl",
    "mov [rdi + 51], bh",
    "mov [r10 + 56], r13",
    "mov dword ptr [r10 + 64], 5",
    "add dword ptr [r10 + 72], 5",
    "dec esi",
    "jne 2b",
    "hlt",
);

fn lay_touching(mem: &GuestMemory) -> CpuState {
    let mut state = common::long_mode(mem, START, STACK);
    mem.write(Gpa(START), touching()).unwrap();
    state.gpr[6] = 300;
    (state.gpr[7], state.gpr[10]) = (0x1000_0000, 0x1000_0000);
    state
}

#[test]
fn devices_are_asked_as_the_interpreter_asks() {
    for knobs in ["", "adapt=1", "unit=1", "helpers=off"] {
        let devices = [Arc::new(Recorder::default()), Arc::new(Recorder::default())];
        let io = devices.each_ref().map(|d| Arc::clone(d) as Arc<dyn CpuIo>);
        let [a, b] = run_both_with(&lay_touching, knobs, io);
        assert_eq!(a.exit, VcpuExit::Halted, "{knobs}");
        assert_same_registers(&a, &b, knobs);
        assert_eq!(a.state.msr, b.state.msr, "{knobs}");
        let [first, second] = devices.each_ref().map(|d| d.0.lock().unwrap().clone());
        let different = first.iter().zip(&second).position(|(a, b)| a != b);
        assert_eq!(different.map(|n| (&first[n], &second[n])), None, "{knobs}");
        assert_eq!(first.len(), second.len(), "{knobs}");
        let quick = done_in_cache(&b, "callouts that only reach a device");
        let bases = done_in_cache(&b, "RDMSR and WRMSR in the TC");
        match knobs {
            "helpers=off" => assert_eq!((quick, bases), (0, 0)),
            _ => assert!(quick > 300 * 18 && bases >= 300 * 4, "{knobs}: {quick}, {bases}"),
        }
    }
}
