//! Costs of a small guest's exits: counted exactly, measured, sampled where they are many, and no more than the time that passed.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use engine::cost::{Basis, Row, Table};
use engine::host_tsc::rdtsc;
use engine::{CpuIo, Signals, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86_interp::Parts;

const START: u64 = 0x10000;
const TURNS: u32 = 2_000_000;

/// Runs `mov r8d, TURNS; l: BODY; dec r8d; jne l; hlt`; its costs and the ticks it took.
fn run(body: &[u8], knobs: Knobs) -> (Vec<Row>, u64, u64) {
    let turns = TURNS.to_le_bytes();
    let mut code = vec![0x41, 0xb8, turns[0], turns[1], turns[2], turns[3]];
    code.extend_from_slice(body);
    code.extend_from_slice(&[0x41, 0xff, 0xc8, 0x75, 0]);
    let back = -i8::try_from(body.len() + 5).unwrap();
    *code.last_mut().unwrap() = back as u8;
    code.push(0xf4);
    let mem = GuestMemory::new(16 << 20).unwrap();
    mem.write(Gpa(START), &code).unwrap();
    let state = common::long_mode(&mem, START, 0x20000);
    let parts = Parts {
        index: 0,
        vcpus: 1,
        mem,
        io: Arc::new(common::NoDevices::default()) as Arc<dyn CpuIo>,
        signals: Arc::new(Signals::default()),
        model: Arc::new(CpuModel::parse("max").unwrap()),
    };
    let mut vcpu = BtVcpu::with_knobs(parts, knobs).unwrap();
    vcpu.restore(&state);
    let from = rdtsc();
    assert_eq!(vcpu.run(u64::MAX), VcpuExit::Halted);
    let ticks = rdtsc() - from;
    let mut rows = vcpu.stats().rows();
    engine::cost::add_rows(&mut rows, &vcpu.report().costs);
    (rows, ticks, vcpu.stats().meter.measurements)
}

fn row<'a>(rows: &'a [Row], kind: &str, cause: &str) -> &'a Row {
    rows.iter().find(|r| r.kind == kind && r.cause == cause).unwrap()
}

#[test]
fn callouts_are_counted_exactly_sampled_and_sum_to_less_than_the_time() {
    // xor eax, eax; cpuid
    let knobs = Knobs { warm: 0, helpers: false, ..Knobs::default() };
    let (rows, ticks, measurements) = run(&[0x31, 0xc0, 0x0f, 0xa2], knobs);
    let cpuid = row(&rows, "callout", "CPUID");
    assert_eq!((cpuid.count, cpuid.basis()), (u64::from(TURNS), Basis::Sampled));
    assert!(cpuid.measured >= 16 && cpuid.measured < u64::from(TURNS) / 4, "{cpuid:?}");
    // The instruction's meaning is in the callout.
    assert_eq!(row(&rows, "exit", "cpuid").basis(), Basis::Counted);
    let switches =
        row(&rows, "switch", "to Rust and back").count + row(&rows, "switch", "with vector registers").count;
    assert!((u64::from(TURNS)..u64::from(TURNS) + 1000).contains(&switches), "{switches}");
    let table = Table::new(ticks as f64, rows, measurements);
    let callouts = row(&table.rows, "callout", "CPUID").total().unwrap();
    assert!(callouts > 0.1 * ticks as f64, "a loop of callouts is callouts: {table:?}");
    println!("{:.3} of the time is accounted for", table.accounted() / ticks as f64);
    assert!(table.accounted() <= 1.1 * ticks as f64, "{table:?}");
    assert!(table.overhead() > 0.0 && table.percent(table.overhead()).unwrap() < 5.0, "{}", table.overhead());
}

#[test]
fn instructions_done_in_the_cache_are_only_counted() {
    let (rows, _, _) = run(&[0x31, 0xc0, 0x0f, 0xa2], Knobs { warm: 0, ..Knobs::default() });
    let helped = row(&rows, "assembly", "CPUID in the TC");
    assert!(helped.count > u64::from(TURNS) - 100 && helped.total().is_none(), "{helped:?}");
    assert!(row(&rows, "callout", "CPUID").count < 100);
}
