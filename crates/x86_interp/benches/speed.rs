//! Guest instructions a second: an integer loop in registers, and a memory-heavy loop.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::Vcpu;
use guestmem::Gpa;

const BUDGET: u64 = 2_000_000;

fn machine(code: &[u8]) -> common::Mini {
    let mut mini = common::Mini::new(64 << 20);
    mini.mem.write(Gpa(0x10000), code).unwrap();
    let state = common::long_mode(&mini.mem, 0x10000, 0x20000);
    mini.vcpu.restore(&state);
    mini
}

fn speed(c: &mut Criterion) {
    let mut group = c.benchmark_group("instructions");
    group.throughput(Throughput::Elements(BUDGET));
    // add rax, rcx; inc rcx; xor rdx, rax; cmp rcx, rsi; lea rbx, [rax + rcx*2]; test rbx, rbx; jmp
    let integer: &[u8] = &[
        0x48, 0x01, 0xc8, 0x48, 0xff, 0xc1, 0x48, 0x31, 0xc2, 0x48, 0x39, 0xf1, 0x48, 0x8d, 0x1c, 0x48, 0x48,
        0x85, 0xdb, 0xeb, 0xeb,
    ];
    // mov rax, [rdi + rcx]; add [rdi + rcx + 64], rax; add rcx, 72; and rcx, 0xffff8; push rax; pop rdx; jmp
    let memory: &[u8] = &[
        0x48, 0x8b, 0x04, 0x0f, 0x48, 0x01, 0x44, 0x0f, 0x40, 0x48, 0x83, 0xc1, 0x48, 0x48, 0x81, 0xe1, 0xf8,
        0xff, 0x0f, 0x00, 0x50, 0x5a, 0xeb, 0xe8,
    ];
    for (name, code) in [("integer", integer), ("memory", memory)] {
        let mut mini = machine(code);
        mini.vcpu.cpu().gpr[7] = 0x10_0000;
        group.bench_function(name, |b| b.iter(|| mini.vcpu.run(BUDGET)));
        assert!(mini.vcpu.instructions() > BUDGET);
    }
    group.finish();
}

criterion_group!(benches, speed);
criterion_main!(benches);
