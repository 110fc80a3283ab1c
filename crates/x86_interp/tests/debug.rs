//! What a debugger outside of the guest may ask of the interpreter, and that the guest does not notice.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod common;

use engine::debug::{Debug, DebugStop, WatchKind, Watchpoint};
use engine::signals::Signal;
use engine::{Vcpu, VcpuExit};
use guestmem::Gpa;
use x86::CpuState;

const CODE: u64 = 0x10000;
const DATA: u64 = 0x30000;
const ADD: u64 = CODE + 7;
const LOOP: u64 = CODE + 10;
const STORE: u64 = CODE + 12;
const HLT: u64 = CODE + 22;
/// xor eax, eax; mov ecx, 100; l: add rax, rcx; loop l; mov [0x30000], rax; hlt
const SUM: [u8; 23] =
    [0x31, 0xc0, 0xb9, 100, 0, 0, 0, 0x48, 0x01, 0xc8, 0xe2, 0xfb, 0x48, 0xa3, 0, 0, 3, 0, 0, 0, 0, 0, 0xf4];
const BUDGET: u64 = 1_000_000;

fn at(code: &[u8]) -> common::Mini {
    let mut mini = common::Mini::new(16 << 20);
    mini.mem.write(Gpa(CODE), code).unwrap();
    let state = common::long_mode(&mini.mem, CODE, 0x20000);
    mini.vcpu.restore(&state);
    mini
}

fn step() -> Debug {
    let mut debug = Debug::default();
    debug.step = Some(0..0);
    debug
}

fn watch(start: u64, len_bytes: u64, kind: WatchKind) -> Debug {
    let mut debug = Debug::default();
    debug.watchpoints.push(Watchpoint { start, len_bytes, kind });
    debug
}

/// State and count after running to the end without a debugger.
fn undisturbed(code: &[u8]) -> (CpuState, u64) {
    let mut mini = at(code);
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Halted);
    (mini.vcpu.save(), mini.vcpu.instructions())
}

#[test]
fn breakpoint_stops_before_the_instruction_until_it_is_removed() {
    let mut mini = at(&SUM);
    mini.vcpu.set_debug(&Debug::with_breakpoints([LOOP, 0xffff_8000_0000_0000]));
    for _ in 0..2 {
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Breakpoint));
        let state = mini.vcpu.save();
        assert_eq!((state.rip, state.gpr[0], mini.vcpu.instructions()), (LOOP, 100, 3));
    }
    mini.vcpu.set_debug(&Debug::default());
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Halted);
    assert_eq!((mini.vcpu.save(), mini.vcpu.instructions()), undisturbed(&SUM));
}

#[test]
fn breakpoint_is_hit_in_every_round_and_in_code_that_ran_before() {
    let mut mini = at(&SUM);
    assert_eq!(mini.vcpu.run(50), VcpuExit::Budget);
    mini.vcpu.set_debug(&Debug::with_breakpoints([ADD]));
    let mut rounds = 0;
    while mini.vcpu.run(BUDGET) == VcpuExit::Debug(DebugStop::Breakpoint) {
        rounds += 1;
        mini.vcpu.set_debug(&step());
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
        mini.vcpu.set_debug(&Debug::with_breakpoints([ADD]));
    }
    // 24 of the 100 rounds were done after 50 instructions.
    assert_eq!(rounds, 76);
    assert_eq!(mini.mem.load_gpa::<u64>(Gpa(DATA)), Some(5050));
}

#[test]
fn stepping_to_the_end_leaves_the_state_of_a_plain_run() {
    let mut mini = at(&SUM);
    mini.vcpu.set_debug(&step());
    let mut steps = 0;
    while mini.vcpu.save().rip != HLT {
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
        steps += 1;
    }
    assert_eq!(steps, 2 + 200 + 1);
    // HLT is an instruction as others; behind it the vCPU sleeps.
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Halted);
    assert_eq!((mini.vcpu.save(), mini.vcpu.instructions()), undisturbed(&SUM));
}

#[test]
fn step_from_a_breakpoint_leaves_it_and_stops_at_the_next() {
    let mut mini = at(&SUM);
    mini.vcpu.set_debug(&Debug::with_breakpoints([ADD, LOOP]));
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Breakpoint));
    let mut debug = Debug::with_breakpoints([ADD, LOOP]);
    debug.step = Some(CODE..STORE);
    mini.vcpu.set_debug(&debug);
    // Somebody else interrupts before it begins.
    mini.io.signals.lock().unwrap().as_ref().unwrap().raise(Signal::KICK);
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Kicked);
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Breakpoint));
    assert_eq!((mini.vcpu.save().rip, mini.vcpu.save().gpr[0]), (LOOP, 100));
}

#[test]
fn range_step_goes_on_within_the_range() {
    let mut mini = at(&SUM);
    let mut debug = Debug::default();
    debug.step = Some(CODE..STORE);
    mini.vcpu.set_debug(&debug);
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
    assert_eq!((mini.vcpu.save().rip, mini.vcpu.save().gpr[0]), (STORE, 5050));
}

#[test]
fn watchpoint_stops_behind_the_access_of_its_kind() {
    for (kind, hit) in [(WatchKind::Write, true), (WatchKind::Access, true), (WatchKind::Read, false)] {
        let mut mini = at(&SUM);
        mini.vcpu.set_debug(&watch(DATA + 2, 1, kind));
        let exit = mini.vcpu.run(BUDGET);
        if hit {
            assert_eq!(exit, VcpuExit::Debug(DebugStop::Watch { address: DATA + 2, kind }));
            assert_eq!(mini.vcpu.save().rip, HLT);
            assert_eq!(mini.mem.load_gpa::<u64>(Gpa(DATA)), Some(5050));
        }
        mini.vcpu.set_debug(&Debug::default());
        assert_eq!((exit == VcpuExit::Halted, mini.vcpu.run(BUDGET)), (!hit, VcpuExit::Halted));
        assert_eq!(mini.vcpu.save(), undisturbed(&SUM).0, "{kind:?}");
    }
}

#[test]
fn read_modify_write_is_a_read_and_a_write() {
    // mov ebx, 0x30000; inc qword [rbx]; hlt
    let code = [0xbb, 0, 0, 3, 0, 0x48, 0xff, 0x03, 0xf4];
    for kind in [WatchKind::Read, WatchKind::Write, WatchKind::Access] {
        let mut mini = at(&code);
        // Once without, so that the TLB knows the page.
        mini.vcpu.run(2);
        mini.vcpu.restore(&common::long_mode(&mini.mem, CODE, 0x20000));
        mini.vcpu.set_debug(&watch(DATA, 8, kind));
        let stop = DebugStop::Watch { address: DATA, kind };
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(stop));
        assert_eq!(mini.mem.load_gpa::<u64>(Gpa(DATA)), Some(2), "{kind:?}");
    }
}

#[test]
fn vector_store_is_watched() {
    // mov ebx, 0x30000; movups [rbx], xmm0; hlt
    let code = [0xbb, 0, 0, 3, 0, 0x0f, 0x11, 0x03, 0xf4];
    let mut mini = at(&code);
    let mut state = mini.vcpu.save();
    state.cr4 |= x86::bits::cr4::OSFXSR;
    mini.vcpu.restore(&state);
    mini.vcpu.set_debug(&watch(DATA + 15, 4, WatchKind::Write));
    let stop = DebugStop::Watch { address: DATA + 15, kind: WatchKind::Write };
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(stop));
    assert_eq!(mini.vcpu.save().rip, CODE + 8);
}

#[test]
fn repeated_string_instruction_is_watched_and_stepped_round_by_round() {
    // mov edi, 0x30000; mov ecx, 16; rep stosb; hlt
    let code = [0xbf, 0, 0, 3, 0, 0xb9, 16, 0, 0, 0, 0xf3, 0xaa, 0xf4];
    let mut mini = at(&code);
    mini.vcpu.set_debug(&watch(DATA + 5, 2, WatchKind::Write));
    for hit in [5, 6] {
        let stop = DebugStop::Watch { address: DATA + hit, kind: WatchKind::Write };
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(stop));
        assert_eq!((mini.vcpu.save().rip, mini.vcpu.save().gpr[1]), (CODE + 10, 15 - hit));
    }
    mini.vcpu.set_debug(&step());
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
    assert_eq!(mini.vcpu.save().gpr[1], 8);
    mini.vcpu.set_debug(&Debug::with_breakpoints([CODE + 12]));
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Breakpoint));
    assert_eq!(mini.vcpu.save().gpr[1], 0);
}

#[test]
fn access_that_faults_is_no_hit() {
    // mov rax, [0x8000000000]: not mapped; there is no IDT.
    let mut mini = at(&[0x48, 0xa1, 0, 0, 0, 0, 0x80, 0, 0, 0, 0xf4]);
    let mut state = mini.vcpu.save();
    state.idtr.limit = 0;
    mini.vcpu.restore(&state);
    mini.vcpu.set_debug(&watch(0x80_0000_0000, 8, WatchKind::Access));
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::TripleFault);
}

#[test]
fn interrupts_wait_for_the_end_of_a_step() {
    let mut mini = at(&SUM);
    let mut state = mini.vcpu.save();
    state.idtr.limit = 0; // an NMI that is delivered shows as a triple fault
    mini.vcpu.restore(&state);
    mini.vcpu.set_debug(&step());
    mini.io.signals.lock().unwrap().as_ref().unwrap().raise(Signal::NMI);
    for _ in 0..10 {
        assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Step));
    }
    mini.vcpu.set_debug(&Debug::default());
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::TripleFault);
}

#[test]
fn code_written_by_the_debugger_is_executed() {
    let mut mini = at(&SUM);
    assert_eq!(mini.vcpu.run(50), VcpuExit::Budget);
    mini.vcpu.set_debug(&Debug::with_breakpoints([ADD]));
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Debug(DebugStop::Breakpoint));
    // hlt instead of add
    mini.mem.write(Gpa(ADD), &[0xf4]).unwrap();
    mini.mem.note_write(Gpa(ADD), 1);
    mini.vcpu.set_debug(&Debug::default());
    assert_eq!(mini.vcpu.run(BUDGET), VcpuExit::Halted);
    assert_eq!(mini.vcpu.save().rip, ADD + 1);
}
