//! An exception handler that faults at its first instruction, for ever, does not keep the vCPU from coming back.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod common;

use engine::{Vcpu, VcpuExit};
use guestmem::Gpa;
use x86::CpuState;

#[test]
fn handler_that_always_faults_uses_up_the_budget() {
    let mut mini = common::Mini::new(2 << 20);
    // Real mode: vector 6 leads to UD2 at 0:8000H, which raises #UD again; the stack pointer wraps.
    mini.mem.write(Gpa(6 * 4), &0x8000u32.to_le_bytes()).unwrap();
    mini.mem.write(Gpa(0x8000), &[0x0f, 0x0b]).unwrap();
    let mut state = CpuState::reset();
    state.seg = [x86::Segment::real_mode(0); 6];
    state.seg[2] = x86::Segment::real_mode(0x2000);
    state.seg[1].attr = x86::Attr(0x9b);
    state.rip = 0x8000;
    state.gpr[4] = 0x1000;
    mini.vcpu.restore(&state);
    assert_eq!(mini.vcpu.run(100), VcpuExit::Budget);
    assert_eq!(mini.vcpu.instructions(), 0);
}
