//! The interpreter alone: a few instructions in 64-bit and 32-bit code.

#![allow(missing_docs, reason = "a test")]

mod common;

use engine::{Vcpu, VcpuExit};
use guestmem::Gpa;

#[test]
fn long_mode_loop_sums_and_halts() {
    let mut mini = common::Mini::new(16 << 20);
    // xor eax, eax; mov ecx, 100; l: add rax, rcx; loop l; mov [0x30000], rax; hlt
    let code = [
        0x31, 0xc0, 0xb9, 100, 0, 0, 0, 0x48, 0x01, 0xc8, 0xe2, 0xfb, 0x48, 0xa3, 0, 0, 3, 0, 0, 0, 0, 0,
        0xf4,
    ];
    mini.mem.write(Gpa(0x10000), &code).unwrap();
    let state = common::long_mode(&mini.mem, 0x10000, 0x20000);
    mini.vcpu.restore(&state);
    assert_eq!(mini.vcpu.run(1_000_000), VcpuExit::Halted);
    assert_eq!(mini.mem.load_gpa::<u64>(Gpa(0x30000)), Some(5050));
    assert_eq!(mini.vcpu.instructions(), 2 + 200 + 2);
}

#[test]
fn triple_fault_without_idt_is_reported() {
    let mut mini = common::Mini::new(16 << 20);
    mini.mem.write(Gpa(0x10000), &[0x0f, 0x0b]).unwrap();
    let mut state = common::long_mode(&mini.mem, 0x10000, 0x20000);
    state.idtr.limit = 0;
    mini.vcpu.restore(&state);
    assert_eq!(mini.vcpu.run(1_000_000), VcpuExit::TripleFault);
}

#[test]
fn self_modifying_store_to_next_instruction_takes_effect() {
    let mut mini = common::Mini::new(16 << 20);
    // mov byte [rip+1], 5 (patches the immediate below); mov al, 1; hlt
    let code = [0xc6, 0x05, 1, 0, 0, 0, 5, 0xb0, 1, 0xf4];
    mini.mem.write(Gpa(0x10000), &code).unwrap();
    let state = common::long_mode(&mini.mem, 0x10000, 0x20000);
    mini.vcpu.restore(&state);
    assert_eq!(mini.vcpu.run(1_000_000), VcpuExit::Halted);
    assert_eq!(mini.vcpu.save().gpr[0] & 0xff, 5);
}

#[test]
fn push_of_segment_register_in_64_bit_code_writes_eight_bytes() {
    let mut mini = common::Mini::new(16 << 20);
    // push fs; pop rax; hlt
    mini.mem.write(Gpa(0x10000), &[0x0f, 0xa0, 0x58, 0xf4]).unwrap();
    mini.mem.write(Gpa(0x20000 - 8), &[0xff; 8]).unwrap();
    let state = common::long_mode(&mini.mem, 0x10000, 0x20000);
    mini.vcpu.restore(&state);
    assert_eq!(mini.vcpu.run(1_000_000), VcpuExit::Halted);
    assert_eq!(mini.vcpu.save().gpr[0], 0x10);
}
